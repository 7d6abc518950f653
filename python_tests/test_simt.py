"""The CUDA kernels and their bindings on the host: the conformance tables under AddressSanitizer and UBSan, every block
order and thread schedule drawn at random; and kernels that are wrong on purpose, which this has to find."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SANITIZE = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# The kernels read memory as vectors of other types, which nvcc allows and g++ must be told to.
SANITIZE += ["-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", f"-I{TESTS / 'simt'}"]


def compile_cpp(*arguments: object) -> None:
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *SANITIZE, *map(str, arguments), f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def simt_ops(tmp_path_factory):
    library = tmp_path_factory.mktemp("simt") / "simt_ops.so"
    torch = [f"-I{path}" for path in cpp_extension.include_paths()]
    torch += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    compile_cpp("-fPIC", "-shared", target, TESTS / "simt" / "ops.cpp", "-o", library, *torch)
    return library


# With clusters, few long rows go another way, and all else goes the same.
LONG_ROWS = "and (sizes or broadcast or special or temperature or zero or backward)"


@pytest.mark.parametrize(
    ("table", "clusters"),
    [
        ("test_kl_divergence.py", False),
        ("test_kl_divergence.py", True),
        ("test_compaction.py", False),
        ("test_compaction_paged.py", False),
        ("test_packed.py", False),
        ("test_bad_input.py", False),
    ],
)
def test_conformance(simt_ops, table, clusters):
    # Python itself is not instrumented, so what instrumented code relies on is loaded before it.
    names = ("libasan.so", "libstdc++.so")
    ask = [[os.environ.get("CXX", "c++"), f"-print-file-name={name}"] for name in names]
    runtime = [subprocess.check_output(command, text=True).strip() for command in ask]
    seed = str(random.randrange(2**32))
    environment = {
        "VTW_SIMT_OPS": str(simt_ops),
        "SIMT_SEED": seed,
        "VTW_KERNELS_CLUSTERS": str(int(clusters)),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    chosen = f"simt {LONG_ROWS if clusters else ''}"
    command = [sys.executable, "-m", "pytest", "-qx", "--capture=sys", str(TESTS / table), "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"SIMT_SEED={seed}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    program = tmp_path_factory.mktemp("simt") / "broken"
    compile_cpp(TESTS / "simt" / "broken.cpp", "-o", program)
    return program


@pytest.mark.parametrize(
    ("kernel", "sign"),
    [
        ("missing_barrier", ""),
        ("row_per_block", ""),
        ("off_by_one", "heap-buffer-overflow"),
        ("divergent_barrier", "threads wait at a barrier that others of their block never reach"),
    ],
)
def test_broken_kernels_are_caught(broken, kernel, sign):
    done = subprocess.run([broken, kernel], capture_output=True, text=True)
    assert done.returncode != 0 and sign in done.stderr
    assert sign or done.returncode == 1


def test_the_right_kernel_passes(broken):
    done = subprocess.run([broken, "right"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WAIT = "    turns.wait(turn);\n"
PUBLISH_NOTHING = "    if (threadIdx.x == 0) turns.publish(turn);\n    bool more"


@pytest.mark.parametrize(
    ("line", "instead", "sign"),
    [
        pytest.param("", "", "", id="as_it_is"),
        pytest.param(WAIT, "", "", id="without_wait"),
        pytest.param(PUBLISH_NOTHING, "    bool more", "a thread waits for what never happens", id="without_publish"),
    ],
)
def test_tiles_in_place_wait_for_one_another(tmp_path, line, instead, sign):
    """Blocks that run at once; and without a line of the kernel, to see that this is what it is there for."""
    header = (ROOT / "csrc" / "cuda" / "compaction.cuh").read_text()
    assert not line or header.count(line) == 1
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "compaction.cuh").write_text(header.replace(line, instead) if line else header)
    (tmp_path / "cuda" / "launch.cuh").write_text((ROOT / "csrc" / "cuda" / "launch.cuh").read_text())
    compile_cpp(f"-I{tmp_path}", TESTS / "simt" / "in_turn.cpp", "-o", tmp_path / "in_turn")
    # Whoever looks for leaks would look into stacks of threads that are gone.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([tmp_path / "in_turn"], capture_output=True, text=True, env=environment)
    if not line:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and sign in done.stderr
        assert sign or done.returncode == 1
