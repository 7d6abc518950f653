"""How the Python half of an op is registered: fallback kernel, fake and autograd, each in one call."""

import os
from collections.abc import Callable

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
FORCED_BACKEND = os.environ.get("VTW_KERNELS_BACKEND") or None

_library = torch.library.Library("vtw_kernels", "IMPL")


def register(name: str, *, reference: Callable, fake: Callable) -> None:
    """Gives an op its fake, and its reference as the kernel of every device that has none of its own.

    A forced backend is the only one registered, so a tensor on a device it does not serve raises.
    """
    torch.library.register_fake(f"vtw_kernels::{name}", fake)
    if FORCED_BACKEND in (None, "reference"):
        _library.impl(name, reference, "CompositeExplicitAutograd")
