"""Where the attention of a prompt's last position goes, layer by layer, without any [heads, S, S] weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtw_kernels.integration.attention import last_row, observed_attention
from vtw_kernels.integration.families import ATTENTION_LAYERS, find_parts
from vtw_kernels.integration.inputs import in_eval_mode, prepare
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.integration.withdraw import unwrapped


@torch.inference_mode()
def attention_mass(
    model: nn.Module, inputs: Mapping[str, Any], *, visual_mask: Tensor | None = None, decoder: nn.Module | None = None
) -> Tensor:
    """How much of the attention of the last prompt position goes where, in every decoder layer: what withdrawal rests
    on.

    Works with every attention that models reach through transformers' ``AttentionInterface``: the softmax of the last
    row alone is computed beside it, in fp32.

    Args:
        model, decoder: as for ``withdraw``.
        inputs: keyword arguments of the model's forward, as ``find_layer`` takes them, for one sample or more.
        visual_mask: bool ``[B, S]``, as for ``withdraw``; by default that in ``inputs``, or the placeholder tokens.

    Returns:
        fp32 ``[L, 3]`` on the CPU, means over heads and samples: the shares of text before the first visual token, of
        visual tokens, and of all other text. What is missing to 1 went to attention sinks. NaN in layers that are not
        attention. With tensor parallelism, over the heads of this rank.

    Raises:
        TypeError, ValueError: an unsupported model, a sample without visual tokens, a decoder whose attention does not
            go through the interface.
    """
    model = unwrapped(model)
    parts = find_parts(model, decoder)
    if parts.cross_attention:
        raise ValueError(
            f"model: expected images as tokens, among which attention is shared out, got {type(model).__name__}, whose "
            "images come in by cross-attention"
        )
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
        weights = last_row(query, key, mask, options, last.to(key.device)).mean(1)  # [B, S]
        mass[layer] = (where.to(key.device) * weights).sum(-1).mean(-1).cpu()
        seen.add(layer)
        return attend()

    with in_eval_mode(model), observed_attention(dict(enumerate(parts.layers)), observe):
        model(**inputs, use_cache=False, logits_to_keep=1)
    for layer, kind in enumerate(parts.layer_types):
        if kind in ATTENTION_LAYERS and layer not in seen:
            raise ValueError(
                f"model: expected attention that transformers' AttentionInterface hands out, got none in layer {layer} "
                f"of {type(parts.decoder).__name__}"
            )
    return mass
