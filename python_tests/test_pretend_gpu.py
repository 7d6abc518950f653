"""The pretend GPU itself: that it sees what is wrong on purpose (pretend_gpu/broken.cu), and that on it the package's
launches go where and how they should. The tests of the ops run on it as they are (``make test-cuda``)."""

import ctypes
import os
import signal
import subprocess
import sys

import pretend_gpu
import pytest
import test_gpu
import torch
from cases import logits

DEVICE = os.environ["PRETEND_DEVICE"]
INDEX = torch.device(DEVICE).index
OTHER = 1 - INDEX
CLUSTERS = os.environ.get("VTW_KERNELS_CLUSTERS") != "0"
OPS = torch.ops.vtw_kernels


@pytest.fixture(scope="session")
def add_one():
    """``add_one(x, stream=, device=, blocks=)``: adds 1 on this stream, by default the current one of x's device, after
    making a device current, by default that of x. -1: makes none."""
    function = ctypes.CDLL(pretend_gpu.BUILD / "broken.so").add_one
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_char_p

    def call(x, stream=None, device=None, blocks=None):
        stream = torch.cuda.current_stream(x.device).cuda_stream if stream is None else stream
        device = x.get_device() if device is None else device
        before = torch.cuda.current_device()
        error = function(x.data_ptr(), x.numel(), -(-x.numel() // 64) if blocks is None else blocks, stream, device)
        torch.cuda.set_device(before)
        return error.decode()

    return call


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own, which may die of it."""
    command = [sys.executable, "-c", "import pretend_gpu; pretend_gpu.load(); import torch\n" + code]
    tests = pretend_gpu.HERE.parent
    return subprocess.run(command, cwd=tests, env=os.environ | environment, capture_output=True, text=True)


def after_a_copy(add_one, stream: int | None) -> list[int]:
    """10s are copied over 0s on a stream that sleeps, 1 is added on one that should be the same, and the result is
    copied on the first."""
    x = torch.zeros(100, dtype=torch.int32).to(DEVICE)
    later = torch.full((100,), 10, dtype=torch.int32).to(DEVICE)
    torch.cuda.synchronize(DEVICE)
    own = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(own):
        torch.cuda._sleep(1000)
        x.copy_(later)
        assert add_one(x, stream) == ""
        result = x.clone()
    own.synchronize()
    return result.tolist()


def test_the_right_launch_passes(add_one):
    assert after_a_copy(add_one, None) == [11] * 100


def test_the_null_stream_is_caught(add_one):
    assert after_a_copy(add_one, 0) == [10] * 100


def test_a_stream_that_is_not_the_current_one_is_caught(add_one):
    assert after_a_copy(add_one, torch.cuda.Stream(DEVICE).cuda_stream) == [10] * 100


def test_no_switch_of_devices_is_caught(add_one):
    x = torch.zeros(100, dtype=torch.int32).to(DEVICE)
    with torch.cuda.device(OTHER):
        error = add_one(x, torch.cuda.Stream(DEVICE).cuda_stream, device=-1)
    assert "stream of another device" in error


def test_an_empty_grid_is_caught(add_one):
    x = torch.zeros(100, dtype=torch.int32).to(DEVICE)
    assert "launch: invalid configuration" in add_one(x, blocks=0)
    assert pretend_gpu.runtime.cudaPeekAtLastError() == 0  # or torch's next launch would seem to fail


def test_a_read_back_in_a_capture_is_caught(add_one):
    x = torch.zeros(100, dtype=torch.int32).to(DEVICE)
    with torch.cuda.device(DEVICE), pytest.raises(RuntimeError, match="capturing|capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
            add_one(x)
            x.cpu()


LAUNCH = """
import ctypes
x = torch.zeros(100, dtype=torch.int32).to("cuda:1")
torch.cuda.set_device(0)
ctypes.CDLL(pretend_gpu.BUILD / "broken.so").add_one(ctypes.c_void_p(x.data_ptr()), 100, 2, None, {device})
torch.cuda.synchronize({device})
print(x.tolist()[:2])
"""


def test_memory_of_another_device_is_caught():
    assert run_alone(LAUNCH.format(device=1)).stdout == "[1, 1]\n"
    done = run_alone(LAUNCH.format(device=0))
    assert done.returncode == -signal.SIGSEGV
    assert "memory of device 1 touched by a kernel of another device" in done.stderr


def test_the_host_in_device_memory_is_caught():
    done = run_alone("import ctypes; ctypes.string_at(torch.zeros(9).to('cuda').data_ptr(), 4)")
    assert done.returncode == -signal.SIGSEGV and "memory of device 0 touched by the host" in done.stderr


PLAN = """
import vtw_kernels
keep = torch.ones(1, 100, dtype=torch.bool).cuda()
keep.untyped_storage().resize_(100 - {missing})
print(torch.ops.vtw_kernels.plan_compaction(keep, -1, False)[1].tolist())
"""


def test_a_storage_that_is_one_element_short_is_caught():
    environment = pretend_gpu.sanitized()
    assert run_alone(PLAN.format(missing=0), **environment).stdout == "[100]\n"
    done = run_alone(PLAN.format(missing=1), **environment)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "plan_kernel" in done.stderr


# --- how the package launches ----------------------------------------------------------------------------------------


def pair(rows: int, vocabulary: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [logits((rows, vocabulary), dtype, seed=seed).to(DEVICE) for seed in (0, 1)]


def launches_of(op, *args) -> list[pretend_gpu.Launch]:
    pretend_gpu.launches()
    op(*args)
    return pretend_gpu.launches()


def test_the_device_is_given_back_by_an_op_that_throws():
    p, q = pair(3, 50)
    with torch.cuda.device(OTHER):
        with pytest.raises(RuntimeError, match="state: expected"):  # which is found once the device has been changed
            OPS.kl_divergence_backward(p.new_zeros(3), p, q, p.new_zeros(2, 5), 1.0, True, True)
        assert torch.cuda.current_device() == OTHER


def test_few_rows_are_split():
    """Over the blocks of a cluster, or over blocks that count one another where there are no clusters."""
    (launch,) = launches_of(OPS.kl_divergence_with_state, *pair(2, 40_000), 1.0)
    assert "forward_kernel" in launch.kernel and launch.device == INDEX
    assert (launch.grid, launch.cluster) == ((16, 8) if CLUSTERS else (80, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", test_gpu.ROWS)
def test_many_aligned_rows_are_read_once(vocabulary, dtype):
    """Where their cluster has room for a pair of them: fp32 pairs of the longer rows have none in half of the memory of
    8 blocks, and have it in all of it. Without clusters, only what fits into one block is read once."""
    p, q = pair(test_gpu.ROWS[vocabulary], vocabulary, dtype)
    first, *others = launches_of(OPS.kl_divergence_with_gradients, p, q, None, 1.0, False, True)
    if CLUSTERS:
        assert "forward_backward_kernel" in first.kernel and first.cluster > 1 and not others
        assert first.dynamic > 48 * 1024  # more than a kernel may have that did not ask for it
    else:
        assert "forward_kernel" in first.kernel and first.cluster == 1 and len(others) == 1


def test_shared_memory_stays_allowed_while_kernels_wait():
    """Rows that need less of it than others that have been launched, and not run yet."""
    with torch.cuda.device(DEVICE):
        for vocabulary in (14_336, 7168):
            p, q = pair(132, vocabulary)
            torch.cuda.synchronize()
            torch.cuda._sleep(1000)
            kl = [OPS.kl_divergence_with_gradients(p[:, :n], q[:, :n], None, 1.0, False, True) for n in (vocabulary, 8)]
            torch.cuda.synchronize()
            assert all(bool(x[0].isfinite().all()) for x in kl)


def test_the_switch_for_clusters_is_0_or_1():
    code = "import vtw_kernels; vtw_kernels.kl_divergence(*torch.randn(2, 3, 50).cuda())"
    done = run_alone(code, VTW_KERNELS_CLUSTERS="no")
    assert done.returncode != 0 and "VTW_KERNELS_CLUSTERS: expected 0 or 1, got 'no'" in done.stderr
