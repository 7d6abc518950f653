"""What differs between releases of transformers from 4.57 on. The rest of the package is written for the newest.

Up to one of the first of 5, models number the tokens of a forward once for all layers, as ``cache_position`` ``[q]``:
that is where static caches write, and what cache layers are asked with.
"""

import warnings
from functools import cache
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

NEWEST_TESTED = "5.24"
HAS_CACHE_POSITION = "cache_position" in signature(CacheLayerMixin.get_mask_sizes).parameters
# Models that take keyword arguments and do not pass them on.
NOT_PASSING = ("fuyu",) if HAS_CACHE_POSITION else ()
CROPS_TO_LENGTH = "max_length" in signature(DynamicLayer.crop).parameters
# Whether the hooks of a layer run again when gradient checkpointing recomputes it.
RECOMPUTES_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


@cache
def warn_if_newer() -> None:
    """Warns, once, of a transformers that nobody has tested this package with."""
    if Version(transformers.__version__).release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"withdraw is tested with transformers up to {NEWEST_TESTED}, and this is {transformers.__version__}; "
            "`vtw-kernels check` tries it here",
            stacklevel=4,
        )


def as_query(rows: int) -> int | Tensor:
    """What ``get_mask_sizes`` of a cache layer takes for so many rows."""
    return torch.arange(rows) if HAS_CACHE_POSITION else rows


def query_length(query: int | Tensor) -> int:
    """The inverse of ``as_query``."""
    return query.shape[0] if HAS_CACHE_POSITION else query


def written_at(slots: Tensor, args: tuple) -> tuple:
    """The last arguments of a static cache layer's ``update``, such that it writes to ``slots``, int64 ``[q]``."""
    return ((args[0] or {}) | {"cache_position": slots},) if args else ({"cache_position": slots},)


def written_to(named: dict[str, Any]) -> tuple:
    """What an attention with these arguments passes on to ``update`` of a cache layer, beside keys and values."""
    return ({"cache_position": named.get("cache_position")},) if HAS_CACHE_POSITION else ()


def rows_left(kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The keyword arguments of a decoder layer, of which so many rows are left: as many ``cache_position``."""
    position = kwargs.get("cache_position")
    return kwargs if position is None else kwargs | {"cache_position": position[-rows:]}


def tokens_removed(argument: int | Tensor, tokens: int) -> int:
    """By ``crop(argument)`` of a cache with so many tokens. A positive number is a length, up to 5.19."""
    argument = int(argument)  # 5.17 counts the candidates that it rejects in a tensor
    if argument > 0 or CROPS_TO_LENGTH and argument == 0:
        return max(0, tokens - argument)
    return min(-argument, tokens)


def slots_filled(window: CacheLayerMixin) -> int:
    """How many slots a sliding window of a cache has filled since it was empty."""
    return getattr(window, "cumulative_length_int", window.cumulative_length)


def kv_sharing_modes(text_config: Any) -> list[str | None]:
    """Per decoder layer "store" or "reuse", where later layers reuse the keys of earlier ones; else empty."""
    if getattr(text_config, "kv_sharing_modes", None) is not None:
        return text_config.kv_sharing_modes
    shared = getattr(text_config, "num_kv_shared_layers", None) or 0
    types = list(text_config.layer_types) if shared else []
    own = types[: len(types) - shared]
    stores = {len(own) - 1 - own[::-1].index(kind) for kind in types[len(own) :]}
    return ["store" if i in stores else None for i in range(len(own))] + ["reuse"] * shared
