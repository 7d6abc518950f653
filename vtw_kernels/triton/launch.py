"""How kernels are launched."""

import torch
from torch import Tensor


def launch(kernel, programs: int, on: Tensor, *args, **options) -> None:
    """Runs a kernel on the device of a tensor, which need not be the current one; nothing if there are no programs."""
    if programs > 0:
        with torch.cuda.device_of(on):
            # Said, because the default depends on the version. A product and a sum may become one: p and q go through
            # the same instructions all the same, so the divergence of equal rows stays 0.
            kernel[(programs,)](*args, enable_fp_fusion=True, **options)
