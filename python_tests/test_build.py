"""The build: what the extension may depend on, what setup.py says when something is missing, and the command line."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from torch.utils import cpp_extension
from vlm import make_model
from vtw_kernels._build_info import build_info

import vtw_kernels as vtw
from vtw_kernels import _C
from vtw_kernels.cli import main
from vtw_kernels.extras import PACKAGES

ROOT = Path(__file__).parents[1]


def run_setup(tmp_path, **environment):
    """setup.py up to the point where it has made its decisions."""
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "clean"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def run_python(code, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_only_the_stable_abi():
    """No symbol of libtorch's C++ API is needed, so that the binary survives a torch upgrade."""
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols
    assert not re.findall(r"^.*\b(?:at|c10|torch)::.*$", symbols, flags=re.MULTILINE)


def test_build_info():
    info = build_info()
    assert set(info) == {"torch", "compiler", "cpu_capability", "cuda", "cuda_archs", "why_no_cuda"}
    assert bool(info["cuda"]) != bool(info["why_no_cuda"])
    assert info["cpu_capability"] in ("default", "avx2", "avx512")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VTW_KERNELS_BUILD_CUDA": "perhaps"}, "VTW_KERNELS_BUILD_CUDA: expected 0, 1 or auto, got 'perhaps'"),
        ({"VTW_KERNELS_CUDART": "dynamic"}, "VTW_KERNELS_CUDART: expected static or shared, got 'dynamic'"),
        ({"CXX": "no-such-compiler"}, "a C++17 compiler is needed"),
    ],
)
def test_setup_says_what_is_wrong_in_one_line(tmp_path, environment, message):
    result = run_setup(tmp_path, **environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_without_nvcc(tmp_path):
    """VTW_KERNELS_BUILD_CUDA=1 without nvcc is an error; the search for nvcc is made to find none."""
    code = (
        "import pathlib, runpy, shutil, sys; which = shutil.which; exists = pathlib.Path.exists;"
        "shutil.which = lambda name, *a, **k: None if name == 'nvcc' else which(name, *a, **k);"
        "pathlib.Path.exists = lambda path, *a, **k: path.name != 'nvcc' and exists(path, *a, **k);"
        "sys.argv = ['setup.py', '--quiet', 'clean']; runpy.run_path('setup.py')"
    )
    environment = {**os.environ, "VTW_KERNELS_BUILD_CUDA": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "VTW_KERNELS_BUILD_CUDA=1, but there is no nvcc" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_extension(tmp_path):
    """A package without its compiled half says in one line what to run."""
    package = tmp_path / "vtw_kernels"
    package.mkdir()
    (package / "ops").symlink_to(ROOT / "vtw_kernels" / "ops")
    (package / "__init__.py").symlink_to(ROOT / "vtw_kernels" / "__init__.py")
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()];"
        "import vtw_kernels"
    )
    result = run_python(code, cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert "ImportError: vtw_kernels is not compiled" in last and "circular" not in last
    assert "pip install --no-build-isolation ." in last


@pytest.mark.parametrize("statement", ["import vtw_kernels", "from vtw_kernels.ops import compact; import vtw_kernels"])
def test_import_inside_a_checkout(tmp_path, statement):
    """Python looks in the current directory first: there, a checkout without its compiled half, and of another version,
    stands before the package that is installed."""
    without_half = shutil.ignore_patterns("*.so", "__pycache__", "assets*")
    for place, ignored in (("checkout", without_half), ("site", shutil.ignore_patterns("__pycache__", "assets*"))):
        shutil.copytree(ROOT / "vtw_kernels", tmp_path / place / "vtw_kernels", ignore=ignored)
    for file in ("ops/__init__.py", "ops/compaction.py"):
        (tmp_path / "checkout/vtw_kernels" / file).write_text("raise AssertionError('of the checkout')")
    code = f"{statement}; print(vtw_kernels.__file__, vtw_kernels.ops.__file__, vtw_kernels.plan_compaction.__module__)"
    result = run_python(code, cwd=tmp_path / "checkout", PYTHONPATH=str(tmp_path / "site"))
    site = tmp_path / "site/vtw_kernels"
    wanted = f"{site / '__init__.py'} {site / 'ops/__init__.py'} vtw_kernels.ops.compaction"
    assert result.stdout.strip() == wanted, result.stderr
    assert f"{tmp_path / 'checkout/vtw_kernels'} is not compiled; imported instead: {site}" in result.stderr


def brought_by(extra: str) -> set[str]:
    """The packages of an extra of the installed package, those of the extras that it takes in among them."""
    brought = set()
    for requirement in map(Requirement, requires("vtw_kernels")):
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            inner = [brought_by(other) for other in requirement.extras]
            brought |= set().union(*inner) if inner else {requirement.name}
    return brought


def test_extras_bring_what_is_named_as_missing():
    assert {extra: set(names) for extra, names in PACKAGES.items()} == {extra: brought_by(extra) for extra in PACKAGES}
    assert [x for x in requires("vtw_kernels") if "extra ==" not in x] == ["torch>=2.10"]


WITHOUT_EXTRAS = """
import sys
for module in ("transformers numpy scipy tqdm rich matplotlib jinja2 PIL pytest pytest_benchmark".split()):
    assert module not in sys.modules
    sys.modules[module] = None
import torch
import vtw_kernels as vtw
from vtw_kernels.cli import main
plan = vtw.plan_compaction(torch.tensor([[True, False, True]]))
assert vtw.compact([torch.arange(3)[None]], plan, token_dims=1)[0].tolist() == [[0, 2, 0]]
assert vtw.kl_divergence(torch.ones(2, 5), torch.ones(2, 5)).tolist() == [0, 0]
assert main(["info"]) == 0
for name in ("withdraw", "find_layer"):
    try:
        getattr(vtw, name)
    except ImportError as error:
        print(error, file=sys.stderr)
commands = ["info --model m", "search --model m --data d", "report r.json", "check", "demo", "bench"]
assert [main(command.split()) for command in commands] == [1] * len(commands)
"""


def test_what_is_missing_is_named():
    """The ops need torch alone; all else says what it needs."""
    result = run_python(WITHOUT_EXTRAS)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^kl_divergence +cpu", result.stdout, flags=re.MULTILINE)
    of_search = "transformers, numpy, scipy, tqdm, rich, matplotlib, jinja2, pillow"
    wanted = [
        ("vtw_kernels.integration", "transformers", "transformers"),
        ("vtw_kernels.layer_search", of_search, "search"),
        ("info --model", "transformers", "transformers"),
        ("vtw_kernels.layer_search", of_search, "search"),
        ("vtw_kernels.layer_search", of_search, "search"),
        ("check", of_search, "search"),
        ("vtw_kernels.demo", of_search, "search"),
        ("bench", f"{of_search}, pytest, pytest-benchmark", "bench"),
    ]
    said = [line.removeprefix("vtw-kernels: ") for line in result.stderr.splitlines() if "vtw_kernels[" in line]
    assert said == [
        f"{what} needs {packages}, which {'are' if ',' in packages else 'is'} not installed; "
        f"run: pip install 'vtw_kernels[{extra}]'"
        for what, packages, extra in wanted
    ]


def test_without_the_weights_of_the_demo(tmp_path):
    """A wheel has none."""
    ignored = shutil.ignore_patterns("__pycache__", "assets*")
    shutil.copytree(ROOT / "vtw_kernels", tmp_path / "vtw_kernels", ignore=ignored)
    code = "import vtw_kernels; print(vtw_kernels.__file__); from vtw_kernels.cli import main; sys.exit(main(['demo']))"
    result = run_python(f"import sys; {code}", cwd=tmp_path)
    assert result.stdout.strip() == str(tmp_path / "vtw_kernels/__init__.py") and result.returncode == 1
    assert "vtw-kernels: vtw_kernels.demo needs the weights of its models" in result.stderr
    assert "pip install ./demo" in result.stderr


def test_version_and_names():
    assert vtw.__version__ == version("vtw_kernels")
    assert {"withdraw", "find_layer", "compact", "__version__"} <= set(dir(vtw))
    assert all(callable(getattr(vtw, name)) for name in vtw.__all__)
    used = set(re.findall(r"vtw\.(\w+)", (ROOT / "python_tests/typed_use.py").read_text()))
    assert set(vtw.__all__) <= used, "a public name whose types are not looked at"
    result = subprocess.run([sys.executable, "-m", "vtw_kernels", "--version"], capture_output=True, text=True)
    assert result.stdout.strip() == f"vtw-kernels {vtw.__version__}"


def test_info_says_what_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"a made-up GPU {i}")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", printed, flags=re.MULTILINE)
    assert re.search(rf"^transformers +{re.escape(transformers.__version__)}$", printed, flags=re.MULTILINE)
    assert "a made-up GPU 0, a made-up GPU 1" in printed
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    assert "none that torch finds" in capsys.readouterr().out


def test_info_of_a_model(tmp_path, monkeypatch, capsys):
    """With the layer that its config names."""
    monkeypatch.setenv("COLUMNS", "200")
    model = make_model("llava")
    model.save_pretrained(tmp_path / "plain")
    with vtw.withdraw(model, 2):
        model.save_pretrained(tmp_path / "withdrawn")
    for name, said in (("plain", "none: pass one"), ("withdrawn", "2, taken where none is passed")):
        assert main(["info", "--model", str(tmp_path / name)]) == 0
        assert re.search(rf"layer in its config +{said}", capsys.readouterr().out)


def test_info_command():
    result = subprocess.run([sys.executable, "-m", "vtw_kernels", "info"], capture_output=True, text=True, check=True)
    for word in ("avx" if build_info()["cpu_capability"] != "default" else "default", "compact_", "reference"):
        assert word in result.stdout


USES_THE_OPS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert "vtw_kernels" not in sys.modules
ops = torch.ops.vtw_kernels
p, q = torch.linspace(-1, 1, 100).view(1, 100), torch.linspace(1, -1, 100).view(1, 100)
weight, eye = torch.tensor([2.0]), torch.eye(100)
source, lengths = ops.plan_compaction(torch.tensor([[True, False, True]]), 2)
rows = ops.compact([torch.arange(3)[None]], [1], [0], source)[0]
state = ops.merge_kl_states([ops.kl_state(p[:, :40], q[:, :40]), ops.kl_state(p[:, 40:], q[:, 40:])])
linear = [ops.linear_kl_divergence(p, eye, q, eye, chunk=chunk) for chunk in (None, 30)]
print(rows.tolist(), *[round(x.item(), 4) for x in (
    ops.kl_divergence(p, q), ops.kl_from_state(state), ops.kl_divergence_loss(p, q), *linear,
    ops.kl_divergence_loss(p, q, 1.0, weight), ops.kl_divergence_loss(p, q, 1.0, weight * 0))])
for wrong in (
    lambda: ops.kl_divergence_loss(p, q, 1.0, weight[0]),
    lambda: ops.linear_kl_divergence(p, eye[1:], q, eye),
):
    try:
        wrong()
    except RuntimeError as error:
        print(error)
"""


def test_load_library_alone():
    """Without the Python half: every op but gradients."""
    done = subprocess.run([sys.executable, "-c", USES_THE_OPS, _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers, *errors = done.stdout.splitlines()
    assert numbers == "[[0, 2]] 0.6379 0.6379 0.6379 0.6379 0.6379 1.2759 0.0"
    assert errors == [
        "kl_divergence_loss: weight: expected shape [1], got shape []",
        "linear_kl_divergence: q_weight: expected vocabulary size 99 of p_weight, got 100",
    ]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_the_cpp_example(tmp_path):
    """Built as examples/README.md says, and run in a process without Python."""
    libraries = cpp_extension.library_paths()[0]
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O0",
        ROOT / "examples/cpp/withdraw.cpp",
        "-o",
        tmp_path / "withdraw",
    ]
    command += [f"-I{path}" for path in cpp_extension.include_paths()] + [f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    command += ["-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "withdraw", _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "kept 4 of 12: 0 1 10 11",
        "first rows of the cache: 0 1 10 11",
        "KL 0.0000 and 0.6379",
    ]


def test_gpu_check_runs_every_file_with_tests_for_a_gpu():
    of_gpu = re.compile(r"def test_\w+\([^)]*\b(?:gpu_)?backend\b|mark\.gpu\b")
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    wanted = {name for name in tests if of_gpu.search((Path(__file__).parent / f"test_{name}.py").read_text())}
    files = re.search(r"^files=.*test_\{(.*)\}", (ROOT / "benchmarks/gpu_check.sh").read_text(), re.MULTILINE)
    assert set(files[1].split(",")) == wanted
