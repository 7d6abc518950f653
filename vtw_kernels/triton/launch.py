"""How kernels are launched."""

import functools

import torch
from torch import Tensor
from triton.runtime import driver


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on some GPUs of AMD. The current device's; Triton's interpreter has 32."""
    return 32 if device.type == "cpu" else driver.active.get_current_target().warp_size


def launch(kernel, programs: int, on: Tensor, *args, threads: int = 128, **options) -> None:
    """Runs a kernel on the device of a tensor, which need not be the current one; nothing if there are no programs.
    ``threads``: of a program; on a GPU of wide warps it has fewer of them, and at least one."""
    if programs > 0:
        with torch.cuda.device_of(on):
            # Said, because the default depends on the version. A product and a sum may become one: p and q go through
            # the same instructions all the same, so the divergence of equal rows stays 0.
            num_warps = max(1, threads // warp_size(on.device))
            kernel[(programs,)](*args, num_warps=num_warps, enable_fp_fusion=True, **options)
