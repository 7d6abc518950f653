"""Where the extension gets torch's current stream from (csrc/cuda/stream.h), with pretended CUDA libraries of torch in
place of the true one. Needs nvcc, and no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sass import cuda_tool
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
NVCC = cuda_tool("nvcc")
ASKED = "aoti_torch_get_current_cuda_stream"
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

CALLER = """
#include "cuda/stream.h"

extern "C" const char* stream_of(int device, cudaStream_t* stream) {
  static std::string error;
  try {
    *stream = vtw::cuda::current_stream(device);
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
"""
TORCHS = {
    "none": None,
    "without it": "",
    "fails": f'extern "C" int {ASKED}(int, void** stream) {{ *stream = (void*)16; return 1; }}',
    "works": f'extern "C" int {ASKED}(int device, void** stream) {{ *stream = (void*)(16l + device); return 0; }}',
}
CALL = """
import ctypes, sys
import torch
caller, *torchs = sys.argv[1:]
kept = [ctypes.CDLL(path) for path in torchs]
caller = ctypes.CDLL(caller)
caller.stream_of.restype = ctypes.c_char_p
for device in (3, 4):
    stream = ctypes.c_void_p()
    error = caller.stream_of(device, ctypes.byref(stream)).decode()
    print(error, stream.value)
"""


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    source = tmp_path_factory.mktemp("stream") / "caller.cu"
    source.write_text(CALLER)
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *include_paths())]
    options = [
        "-std=c++17",
        "-shared",
        "-Xcompiler=-fPIC",
        "--cudart=static",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    subprocess.run([NVCC, *options, *includes, source, "-o", source.with_suffix(".so")], check=True)
    return source.with_suffix(".so")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch's own CUDA library is there")
@pytest.mark.parametrize(
    "there, wanted",
    [
        ("none", f"expected libtorch_cuda.so with {ASKED}, got none that is loaded"),
        ("without it", f"expected libtorch_cuda.so with {ASKED}, got one without it"),
        ("fails", "get(device, &stream) API call failed"),
    ],
)
def test_no_stream_is_an_error(caller, tmp_path, there, wanted):
    """Not the null stream, on which the kernel would not wait for what torch has launched before."""
    lines = streams(caller, tmp_path, TORCHS[there])
    assert len(lines) == 2
    assert all(wanted in line and line.endswith(" None") for line in lines), lines


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch's own CUDA library is there")
def test_the_stream_is_that_of_the_device(caller, tmp_path):
    assert streams(caller, tmp_path, TORCHS["works"]) == [" 19", " 20"]


def streams(caller: Path, folder: Path, source: str | None) -> list[str]:
    libraries = [] if source is None else [folder / "libtorch_cuda.so"]
    if source is not None:
        options = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", "-"]
        subprocess.run(["c++", *options, "-o", *libraries], input=source, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", CALL, caller, *libraries], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
