"""Preparing a model and a batch for a search or a measurement."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtw_kernels.integration.families import NO_PLACEHOLDER, Parts, find_visual_tokens
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.ops import compact, plan_compaction


def prepare(
    model: nn.Module, parts: Parts, inputs: Mapping[str, Any], visual_mask: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """Inputs as ``find_layer`` takes them, moved to the model's device, without labels and options that a measurement
    sets itself; and which of their tokens are visual, bool ``[B, S]``: none where images come in by cross-attention."""
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name in ("labels", "use_cache", "logits_to_keep"):
        inputs.pop(name, None)
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        inputs.pop("token_type_ids", None)  # some tokenizers return them although the model's generate refuses them
    given = inputs.pop("visual_mask", None)
    parts.check_visual_mask(given if visual_mask is None else visual_mask)
    if visual_mask is None and given is None:
        visual = find_visual_tokens(parts, inputs)
        if not parts.cross_attention and inputs.get("input_ids") is None and not visual.any():
            raise ValueError(NO_PLACEHOLDER)
        return inputs, visual
    visual = (given if visual_mask is None else visual_mask).to(model.device)
    sequence = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    if visual.dtype != torch.bool or visual.shape != sequence.shape[:2]:
        raise ValueError(
            f"visual_mask: expected bool of shape {list(sequence.shape[:2])}, got {visual.dtype} of shape "
            f"{list(visual.shape)}"
        )
    return inputs, visual


def padded_left(inputs: dict[str, Any], visual: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The same inputs and visual tokens, bool ``[B, S]``, with padding on the left, as ``generate`` wants it. If there
    is no padding on the right, nothing is changed.

    Raises:
        ValueError: inputs in which tokens can't be moved.
    """
    attended = attended_tokens(inputs.get("attention_mask"), visual)
    if attended[:, -1].all():
        return inputs, visual
    moved = take_tokens(inputs | {"visual_mask": visual}, attended, attended.shape[1], pad="left")
    visual = moved.pop("visual_mask")
    return inputs | moved, visual


def take_tokens(inputs: dict[str, Any], keep: Tensor, length: int, pad: str) -> dict[str, Tensor]:
    """The inputs that have a row for each token, ``[B, S, ...]``, compacted to the tokens that ``keep``, bool
    ``[B, S]``, names, in ``length`` columns; with their ``attention_mask``.

    Raises:
        ValueError: positions of another shape.
    """
    inputs = inputs | {"attention_mask": keep.long()}
    sequences = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.shape[:2] == keep.shape}
    if inputs.get("position_ids") is not None and "position_ids" not in sequences:
        raise ValueError(
            f"position_ids: expected {list(keep.shape)} or none, where padding or answers have to be moved, got shape "
            f"{list(inputs['position_ids'].shape)}"
        )
    return dict(zip(sequences, compact(list(sequences.values()), plan_compaction(keep, length, pad=pad), token_dims=1)))


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
