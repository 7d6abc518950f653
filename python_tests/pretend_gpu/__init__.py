"""Two CUDA devices on a machine that has none, for tests of what stands between torch and the kernels.

torch's CUDA build and the package's own host code, compiled by nvcc, run as they are: they allocate, choose devices and
streams, launch and capture on a pretend CUDA runtime (cudart.cpp). A kernel of the package is its source, compiled for
the host (twins.cpp); torch's own operators are served by the CPU (torch_kernels.py).

What it can't see: device code as nvcc compiles it, architectures, registers and occupancy, kernels that run at once and
the order of memory between them, cuBLAS and cuDNN, anything about speed.

``make test-cuda`` builds it and runs the tests on it (``__main__.py``).
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "pretend_gpu"


class Launch(NamedTuple):
    kernel: str  # as nvcc mangles it
    device: int
    stream: int  # 0: the default one
    grid: int  # blocks along x
    block: int  # threads along x
    cluster: int
    dynamic: int  # bytes of shared memory


class CLaunch(ctypes.Structure):
    _fields_ = list(zip(Launch._fields, [ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p] + [ctypes.c_uint] * 3))
    _fields_ += [("dynamic", ctypes.c_size_t)]


WANTED = "PRETEND_ORDER" in os.environ
runtime = None


def load() -> None:
    """Takes CUDA's place in this process. To be called before anything imports torch; a second call does nothing."""
    global runtime
    if runtime is not None:
        return
    assert "torch" not in sys.modules
    runtime, _ = (ctypes.CDLL(BUILD / name, ctypes.RTLD_GLOBAL) for name in ("libcudart.so.13", "libcuda.so.1"))
    runtime.pretend_run.argtypes = [ctypes.c_void_p] * 3
    runtime.pretend_wait.argtypes = [ctypes.c_void_p]
    runtime.pretend_launches.argtypes = [ctypes.POINTER(CLaunch), ctypes.c_size_t]
    runtime.pretend_launches.restype = ctypes.c_size_t
    sys.setdlopenflags(os.RTLD_LAZY)  # functions of the runtime that nothing calls need not be there
    ctypes.CDLL(BUILD / os.environ.get("PRETEND_TWINS", "twins.so"))

    from . import torch_kernels

    torch_kernels.install()


def launches() -> list[Launch]:
    """What was launched since the last call, oldest first."""
    records = (CLaunch * 100_000)()
    count = runtime.pretend_launches(records, len(records))
    return [
        Launch(x.kernel.decode(), x.device, x.stream or 0, *(getattr(x, name) for name in Launch._fields[3:]))
        for x in records[:count]
    ]


def sanitized() -> dict[str, str]:
    """The environment of a process whose kernels run under AddressSanitizer, each allocation of torch by itself."""
    # Python is not instrumented, so what instrumented code relies on is loaded before it.
    ask = [[os.environ.get("CXX", "c++"), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(subprocess.check_output(command, text=True).strip() for command in ask),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # leaks are Python's own
        "PRETEND_TWINS": "twins_asan.so",
        "PRETEND_ALLOCATOR": "malloc",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
