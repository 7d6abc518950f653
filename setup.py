"""Builds ``vtw_kernels._C``: CPU kernels always, CUDA when torch has CUDA and nvcc is there.

VTW_KERNELS_BUILD_CUDA=0|1|auto decides otherwise, TORCH_CUDA_ARCH_LIST the architectures. Whether this machine has a
GPU is never asked: wheels are built on machines without one. VTW_KERNELS_CUDART=static|shared says which CUDA runtime
is linked: shared is what the pretend GPU of the tests takes the place of.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
# The oldest torch that the binary runs under; see the LibTorch stable ABI.
TARGET_TORCH = "2.10"


def stop(message: str) -> None:
    sys.exit(f"vtw_kernels: {message}")


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools 77 or newer is needed, found {setuptools.__version__}; run: pip install -U setuptools")
try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as missing:
    stop(
        f"{missing.name} is needed to build; run: pip install torch pybind11 ninja, "
        "then: pip install --no-build-isolation ."
    )

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < tuple(int(part) for part in TARGET_TORCH.split(".")):
    stop(f"torch {TARGET_TORCH} or newer is needed, found {torch.__version__}; run: pip install -U torch")
if shutil.which(os.environ.get("CXX", "c++")) is None:
    stop("a C++17 compiler is needed and none was found; install g++ (Debian: apt-get install g++) or set CXX")


def ask_nvcc(nvcc: str | Path, *arguments: str) -> str:
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def find_cuda_home() -> Path | None:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        # The nvcc on PATH may be a wrapper script or a link; the real one knows where it lives.
        candidates += [Path(top) for top in re.findall(r"TOP=(.+)", ask_nvcc(nvcc, "--dryrun", "-x", "cu", os.devnull))]
    candidates.append("/usr/local/cuda")
    return next((Path(home).resolve() for home in candidates if home and (Path(home) / "bin" / "nvcc").exists()), None)


def nvcc_release(cuda_home: Path) -> tuple[int, int]:
    major, minor = re.search(r"release (\d+)\.(\d+)", ask_nvcc(cuda_home / "bin" / "nvcc", "--version")).groups()
    return int(major), int(minor)


def decide_cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and why there will be no CUDA."""
    mode = os.environ.get("VTW_KERNELS_BUILD_CUDA", "auto").lower()
    if mode not in ("0", "1", "auto"):
        stop(f"VTW_KERNELS_BUILD_CUDA: expected 0, 1 or auto, got {mode!r}")
    if mode == "0":
        return None, "VTW_KERNELS_BUILD_CUDA=0"
    if mode == "auto" and torch.version.cuda is None:
        return None, "torch has no CUDA"
    home = find_cuda_home()
    if home is None:
        problem = "there is no nvcc; install the CUDA toolkit or set CUDA_HOME"
    elif torch.version.cuda and nvcc_release(home)[0] != int(torch.version.cuda.split(".")[0]):
        problem = f"torch has CUDA {torch.version.cuda} and {home} is another major version; set CUDA_HOME"
    else:
        return home, ""
    if mode == "1":
        stop(f"VTW_KERNELS_BUILD_CUDA=1, but {problem}")
    print(f"vtw_kernels: building without CUDA kernels: {problem}", file=sys.stderr)
    return None, problem


def default_arch_list(cuda_home: Path) -> str:
    archs = ["8.0", "8.6", "8.9", "9.0"]
    if nvcc_release(cuda_home) >= (12, 8):
        archs += ["10.0", "12.0"]
    return ";".join(archs) + "+PTX"


cuda_home, why_no_cuda = decide_cuda()
cudart = os.environ.get("VTW_KERNELS_CUDART", "static")
if cudart not in ("static", "shared"):
    stop(f"VTW_KERNELS_CUDART: expected static or shared, got {cudart!r}")
suffixes = (".cpp", ".cu") if cuda_home else (".cpp",)
sources = sorted(x.relative_to(ROOT).as_posix() for x in (ROOT / "csrc").rglob("*") if x.suffix in suffixes)
# The second binary, which needs Python: so that the first can be loaded without it.
of_build_info = [x for x in sources if x in ("csrc/python/build_info.cpp", "csrc/python/nvcc.cu")]
cxx_flags = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]
stable_abi = (
    f"-DTORCH_TARGET_VERSION=0x{int(TARGET_TORCH.split('.')[0]):02x}{int(TARGET_TORCH.split('.')[1]):02x}000000000000"
)
defines = [stable_abi, f'-DVTW_BUILT_WITH_TORCH="{torch.__version__}"', f'-DVTW_WHY_NO_CUDA="{why_no_cuda}"']
link = {"libraries": ["torch_cpu", "c10"], "library_dirs": cpp_extension.library_paths()}
if cuda_home:
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_arch_list(cuda_home)
    cpp_extension.CUDA_HOME = str(cuda_home)  # torch leaves it None when it has no CUDA itself
    defines += ["-DVTW_WITH_CUDA", "-DUSE_CUDA"]
    # The static runtime, so that the extension also loads where no libcudart is installed.
    link["libraries"] += ["cudart_static" if cudart == "static" else "cudart", "rt", "dl", "pthread"]
    link["library_dirs"] += [str(path.parent) for path in cuda_home.glob("**/libcudart_static.a")]
# pip shows it with -v.
print(
    f"vtw_kernels: building {len(sources)} files with torch {torch.__version__}, "
    + (
        f"CUDA {cuda_home} for {os.environ['TORCH_CUDA_ARCH_LIST']}: some three minutes of one core"
        if cuda_home
        else "without CUDA: some half a minute of one core"
    ),
    file=sys.stderr,
)

setup(
    # The benchmarks come along, for `vtw-kernels bench`.
    packages=[*find_packages(include=["vtw_kernels*"]), "vtw_kernels.benchmarks"],
    package_dir={"vtw_kernels.benchmarks": "benchmarks"},
    ext_modules=[
        Extension(
            f"vtw_kernels.{name}",
            files,
            include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *cpp_extension.include_paths()],
            extra_compile_args={"cxx": cxx_flags + defines, "nvcc": ["-std=c++17", "-O3", *defines]},
            language="c++",
            **link,
        )
        for name, files in (("_C", [x for x in sources if x not in of_build_info]), ("_build_info", of_build_info))
    ],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
