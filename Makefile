# make test and make demo set up everything they need in .venv; see README.md.
PYTHON ?= python3
# What is installed where Python has no torch yet. Any torch from 2.10 on will do: make test TORCH=torch==2.10.0
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test bench clean

test: $(VENV)/installed
	$(BIN)/python -m pytest

demo: $(VENV)/installed
	$(BIN)/vtw-kernels demo

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-storage=file://benchmarks/results --benchmark-save=$(or $(NAME),run)

# A torch that this Python already has is used as it is.
$(VENV)/bin/python:
	if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" pybind11 ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info vtw_kernels/_C*.so
