"""Where the attention of a prompt's last position goes, layer by layer, without any [heads, S, S] weights."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import AttentionInterface

from vtw_kernels.integration.families import ATTENTION_LAYERS, Parts, find_parts
from vtw_kernels.integration.inputs import in_eval_mode, prepare
from vtw_kernels.integration.masks import attended_tokens, check_mask
from vtw_kernels.integration.withdraw import unwrapped

_INTERFACE = Lock()  # one observer at a time may have the library's interface


@torch.inference_mode()
def attention_mass(
    model: nn.Module, inputs: Mapping[str, Any], *, visual_mask: Tensor | None = None, decoder: nn.Module | None = None
) -> Tensor:
    """How much of the attention of the last prompt position goes where, in every decoder layer: what withdrawal rests on.

    Works with every attention that models reach through transformers' ``AttentionInterface``: the softmax of the last row
    alone is computed beside it, in fp32.

    Args:
        model, decoder: as for ``withdraw``.
        inputs: keyword arguments of the model's forward, as ``find_layer`` takes them, for one sample or more.
        visual_mask: bool ``[B, S]``, as for ``withdraw``; by default that in ``inputs``, or the placeholder tokens.

    Returns:
        fp32 ``[L, 3]`` on the CPU, means over heads and samples: the shares of text before the first visual token, of
        visual tokens, and of all other text. What is missing to 1 went to attention sinks. NaN in layers that are not
        attention. With tensor parallelism, over the heads of this rank.

    Raises:
        TypeError, ValueError: an unsupported model, a sample without visual tokens, a decoder whose attention does not go
            through the interface.
    """
    model = unwrapped(model)
    parts = find_parts(model, decoder)
    inputs, visual = prepare(model, parts, inputs, visual_mask)
    attended = attended_tokens(inputs.get("attention_mask"), visual)
    visual = attended & visual
    if not visual.any(1).all():
        row = (~visual.any(1)).nonzero()[0].item()
        raise ValueError(f"inputs: expected at least one visual token in each sample, got none in row {row}")
    last = attended.long().cumsum(1).argmax(1)
    before = visual.cumsum(1) == 0
    where = torch.stack([before, visual, ~before & ~visual]).float()  # [3, B, S]
    mass, seen = torch.full((len(parts.layers), 3), torch.nan), set()

    def observe(layer: int, attend: Callable, query: Tensor, key: Tensor, mask: Any, options: dict) -> Any:
        if key.shape[2] != visual.shape[1]:
            raise ValueError(f"inputs: expected one key for each of {visual.shape[1]} tokens, got {key.shape[2]} keys")
        weights = _last_row(query, key, mask, options, last.to(key.device)).mean(1)  # [B, S]
        mass[layer] = (where.to(key.device) * weights).sum(-1).mean(-1).cpu()
        seen.add(layer)
        return attend()

    with in_eval_mode(model), observed_attention(parts, observe):
        model(**inputs, use_cache=False, logits_to_keep=1)
    for layer, kind in enumerate(parts.layer_types):
        if kind in ATTENTION_LAYERS and layer not in seen:
            raise ValueError(
                f"model: expected attention that transformers' AttentionInterface hands out, got none in layer {layer} of "
                f"{type(parts.decoder).__name__}"
            )
    return mass


@contextmanager
def observed_attention(parts: Parts, observe: Callable) -> Iterator[None]:
    """Meanwhile, attention in the decoder's layers becomes ``observe(layer, attend, query, key, mask, options)``, which
    returns what ``attend()``, the model's own function, does. ``query`` is ``[B, heads, q, D]``, ``options`` are the
    function's keyword arguments."""
    layer_of = {module: i for i, layer in enumerate(parts.layers) for module in layer.modules()}

    def observed(function: Callable) -> Callable:
        @wraps(function)
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest, **options) -> Any:
            def attend() -> Any:
                return function(module, query, key, value, *rest, **options)

            if module not in layer_of:
                return attend()
            mask = rest[0] if rest else options.get("attention_mask")
            further = dict(zip(list(inspect.signature(function).parameters)[5:], rest[1:]))
            given = {"is_causal": getattr(module, "is_causal", True), "value": value} | further | options
            return observe(layer_of[module], attend, query, key, mask, given)

        return attention

    # Not a name of its own in the interface: models look at the name to see what masks they make. And eager attention
    # has no name there, but is a function of the file that a model's attention is in.
    files = {sys.modules.get(kind.__module__) for module in layer_of for kind in type(module).__mro__} - {None}
    with _INTERFACE, ExitStack() as replaced:
        original = AttentionInterface.__getitem__
        registered = patch.object(AttentionInterface, "__getitem__", lambda self, name: observed(original(self, name)))
        replaced.enter_context(registered)
        for file in files:
            for name in [name for name in vars(file) if name.endswith("eager_attention_forward")]:
                replaced.enter_context(patch.object(file, name, observed(getattr(file, name))))
        yield


def _last_row(query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], last: Tensor) -> Tensor:
    """fp32 ``[B, heads, keys]``: the attention weights of the rows ``last`` ``[B]``."""
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
            row = bias.to(device).expand(len(last), -1, -1, -1)[batch, :, last]
            scores = scores.where(row, -torch.inf) if row.dtype == torch.bool else scores + row.float()
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        distance = last[:, None] - keys
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
