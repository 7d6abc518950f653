"""What is done with a model and a batch before they are measured."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtw_kernels.integration.families import NO_PLACEHOLDER, Parts, find_visual_tokens


def prepare(
    model: nn.Module, parts: Parts, inputs: Mapping[str, Any], visual_mask: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """Inputs as ``find_layer`` takes them, on the model's device and without what is not for its forward; and which of
    their tokens are visual, bool ``[B, S]``."""
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name in ("labels", "use_cache", "logits_to_keep"):
        inputs.pop(name, None)
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        inputs.pop("token_type_ids", None)  # tokenizers return them to models without, whose generate refuses them
    given = inputs.pop("visual_mask", None)
    if visual_mask is None and given is None:
        visual = find_visual_tokens(parts, inputs)
        if inputs.get("input_ids") is None and not visual.any():
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


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
