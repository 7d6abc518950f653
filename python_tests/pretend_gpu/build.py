"""Builds the pretend GPU: the runtime and the driver in CUDA's place, and the twins of kernels, with and without
AddressSanitizer."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import BUILD, HERE

ROOT = HERE.parents[1]
SHARED = ["-std=c++17", "-g", "-fPIC", "-shared", "-Wall"]
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
TWIN = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-I{HERE.parent / 'simt'}", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
TWIN += ["-U_FORTIFY_SOURCE"]  # which forbids jumps from stack to stack
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
RUNTIME = [f"-L{BUILD}", "-l:libcudart.so.13"]


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def build() -> None:
    compiler = os.environ.get("CXX", "c++")
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "versions").write_text("libcudart.so.13 { global: cuda*; __cuda*; pretend_*; local: *; };\n")
    named = ["-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={BUILD / 'versions'}"]
    run(
        compiler,
        *SHARED,
        "-O2",
        f"-I{CUDA / 'include'}",
        HERE / "cudart.cpp",
        *named,
        "-ldl",
        "-pthread",
        "-o",
        BUILD / "libcudart.so.13",
    )
    (BUILD / "libcudart.so").unlink(missing_ok=True)
    (BUILD / "libcudart.so").symlink_to("libcudart.so.13")  # what a linker asks for
    nvcc = [CUDA / "bin" / "nvcc", "-std=c++17", "-arch=sm_90", "-Xcompiler=-fPIC", "-shared", "-cudart=shared"]
    driver = [HERE / "driver.cpp", "-Wl,-soname,libcuda.so.1", *RUNTIME]
    twins = [*TWIN, HERE / "twins.cpp", *RUNTIME]
    commands = [
        [compiler, *SHARED, "-O2", *driver, "-o", BUILD / "libcuda.so.1"],
        [*nvcc, f"-I{ROOT / 'csrc'}", HERE / "broken.cu", "-o", BUILD / "broken.so"],
        [compiler, *SHARED, "-O2", *twins, "-o", BUILD / "twins.so"],
        [compiler, *SHARED, *SANITIZE, *twins, "-o", BUILD / "twins_asan.so"],
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: run(*command), commands))


if __name__ == "__main__":
    build()
