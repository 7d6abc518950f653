"""Withdrawal by definition: the plain model at full length, whose layers from ``layer`` on cannot see visual keys.

This shares no code with the plans, caches and masks of withdrawal: verify.py hides keys by an attention function of its
own, which test_verify.py compares with attention that is written out.
"""

from torch import Tensor

from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.verify import hide_keys
from vtw_kernels.integration.withdraw import unwrapped


def visual_keys_hidden(model, layer: int, visual: Tensor):
    """``visual``: bool [B, S], counted from the start of the sequence; a batch repeated for beams is understood."""
    layers = find_parts(unwrapped(model)).layers
    return hide_keys(model, [visual if i >= layer else None for i in range(len(layers))])
