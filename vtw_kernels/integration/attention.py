"""Observing the attention of decoder layers without ever holding [heads, S, S] weights: the model computes attention as
usual, and the softmax of single rows is computed beside it."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import AttentionInterface

from vtw_kernels.integration.masks import check_mask

_INTERFACE = threading.RLock()  # only one thread at a time may patch transformers' interface


class _PerThread(threading.local):
    observe: Callable | None = None  # the observer that is active now


_per_thread = _PerThread()


@contextmanager
def observed_attention(layers: Mapping[int, nn.Module], observe: Callable) -> Iterator[None]:
    """In this context, attention of these decoder layers calls ``observe(layer, attend, query, key, mask, options)`` in
    this thread, which has to return what ``attend()``, the model's own function, returns. ``query`` is
    ``[B, heads, q, D]``, ``options`` are the function's keyword arguments. Of nested contexts, only the innermost
    observes."""
    layer_of = {module: i for i, layer in layers.items() for module in layer.modules()}

    def observed(function: Callable) -> Callable:
        @torch.compiler.disable(reason="Attention is looked at outside of the graph")
        @wraps(function)
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest, **options) -> Any:
            def attend() -> Any:
                return function(module, query, key, value, *rest, **options)

            whole = getattr(module, "whole", module)  # pruning calls attention for some of a module's heads
            if _per_thread.observe is not observe or whole not in layer_of:
                return attend()
            mask = rest[0] if rest else options.get("attention_mask")
            further = dict(zip(list(inspect.signature(function).parameters)[5:], rest[1:]))
            given = {"is_causal": getattr(module, "is_causal", True), "value": value} | further | options
            return observe(layer_of[whole], attend, query, key, mask, given)

        return attention

    # The function behind each name is wrapped, and no new name registered, because models decide by the name what masks
    # to make. Eager attention has no name in the interface: it is a function in the file of a model's attention.
    files = {sys.modules.get(kind.__module__) for module in layer_of for kind in type(module).__mro__} - {None}
    with _INTERFACE, ExitStack() as replaced:
        original = AttentionInterface.__getitem__
        registered = patch.object(AttentionInterface, "__getitem__", lambda self, name: observed(original(self, name)))
        replaced.enter_context(registered)
        for file in files:
            for name in [name for name in vars(file) if name.endswith("eager_attention_forward")]:
                replaced.enter_context(patch.object(file, name, observed(getattr(file, name))))
        with _observed_by(observe):
            yield


def observing() -> bool:
    """Whether an observer is active in this thread that needs all rows in one call of attention; observers that do not
    mind several calls are marked ``in_parts``."""
    return _per_thread.observe is not None and not getattr(_per_thread.observe, "in_parts", False)


def unobserved() -> AbstractContextManager:
    """In this context, the observer of a policy is inactive in this thread: for a model that is called within one of
    its own layers, whose attention is not what the policy asked for."""
    looking = _per_thread.observe
    return _observed_by(None if getattr(looking, "for_policy", False) else looking)


@contextmanager
def _observed_by(observe: Callable | None) -> Iterator[None]:
    before, _per_thread.observe = _per_thread.observe, observe
    try:
        yield
    finally:
        _per_thread.observe = before


def last_row(
    query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], last: Tensor, first_key: int | Tensor = 0
) -> Tensor:
    """fp32 ``[B, heads, keys]``: the attention weights of the rows ``last`` ``[B]``, where ``first_key`` is the key of
    row 0. The other arguments are what ``observe`` is given."""
    check_mask(mask)
    batch, heads, device = torch.arange(len(last), device=key.device), query.shape[1], key.device
    rows = query[batch, :, last].float().unflatten(1, (key.shape[1], -1))  # heads that share keys are neighbours
    scores = torch.einsum("bhgd,bhkd->bhgk", rows, key.float()).flatten(1, 2)
    scaling = options.get("scaling")
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    keys = torch.arange(key.shape[2], device=device)
    for bias in (options.get("position_bias"), mask):
        if isinstance(bias, BlockMask):
            at = (batch, torch.arange(1 if bias.shape[1] == 1 else heads, device=device), keys)
            sample, head, column = torch.meshgrid(*at, indexing="ij")
            scores = scores.where(
                bias.mask_mod(sample, head, last[:, None, None].expand_as(sample), column), -torch.inf
            )
        elif bias is not None and bias.ndim == 4:
            bias = bias[..., : key.shape[2]].to(device)  # of older static caches it is longer
            row = bias.expand(len(last), -1, -1, -1)[batch, :, last]
            scores = scores.where(row, -torch.inf) if row.dtype == torch.bool else scores + row.float()
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        distance = last[:, None] + first_key - keys
        window = options.get("sliding_window")
        visible = distance >= 0 if options["is_causal"] else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible &= distance < window
        if mask is not None:
            visible &= mask.to(device) != 0
        scores = scores.where(visible[:, None], -torch.inf)
    if (sinks := options.get("s_aux")) is not None:
        sinks = sinks.float().view(1, -1, 1).expand(len(last), -1, -1)
        return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1)
