"""Where a model keeps its decoder layers, and how its visual tokens are recognised: a table of what is not usual.

The usual shape: ``model.base_model`` takes ``input_ids`` and merges the images into their embeddings, its
``get_decoder()`` has ``.layers``, and the config names the placeholder tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One model type. ``decoder``: path from the base model, or "" for ``get_decoder()``. ``token_ids``: names in the
    config, those that exist count. ``min_layer``: path in the config of a list as long as the smallest layer, for models
    that go on adding visual features to the first layers. ``refused``: why withdrawal does not apply."""

    decoder: str = ""
    token_ids: tuple[str, ...] = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    min_layer: str = ""
    refused: str = ""


FAMILIES = {
    "llava": Family(decoder="language_model"),
    "qwen2_vl": Family(decoder="language_model"),
    "qwen3_vl": Family(decoder="language_model", min_layer="vision_config.deepstack_visual_indexes"),
    "qwen3_vl_moe": Family(decoder="language_model", min_layer="vision_config.deepstack_visual_indexes"),
    "mllama": Family(refused="images reach its text through cross-attention layers, not as tokens"),
}
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class Parts(NamedTuple):
    """What withdrawal touches. ``body`` is the module that sees ``input_ids``, ``decoder`` the one with ``layers``;
    ``token_ids`` are those of visual placeholders, ``min_layer`` the first layer before which they may be withdrawn."""

    body: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    token_ids: list[int]
    min_layer: int


def find_parts(model: nn.Module) -> Parts:
    """Looks a model up in the table, and otherwise takes it to be of the usual shape.

    Raises:
        TypeError: not a model of transformers.
        ValueError: a model that withdrawal does not apply to, or whose decoder layers are not found.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config") or not hasattr(model, "base_model"):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    name, family = type(model).__name__, FAMILIES.get(config.model_type, Family())
    text = config.get_text_config(decoder=True)
    odd_layers = set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS
    refused = family.refused
    if not refused and config.is_encoder_decoder:
        refused = "it is an encoder-decoder: its images end in the encoder"
    if not refused and odd_layers:
        refused = f"layers of type {', '.join(sorted(odd_layers))} keep a state that withdrawal does not handle"
    if not refused and getattr(text, "num_kv_shared_layers", 0):
        refused = "some layers read the keys and values of earlier layers (num_kv_shared_layers)"
    if refused:
        raise ValueError(f"model: {name} is not supported: {refused}")

    body = model.base_model
    decoder = (
        attrgetter(family.decoder)(body) if family.decoder and hasattr(body, family.decoder) else body.get_decoder()
    )
    while not hasattr(decoder, "layers") and getattr(decoder, "base_model", decoder) is not decoder:
        decoder = decoder.base_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"model: {name} is not supported: expected decoder layers at {type(decoder).__name__}.layers")
    token_ids = {getattr(config, key, None) for key in family.token_ids} - {None}
    min_layer = max(1, len(attrgetter(family.min_layer)(config))) if family.min_layer else 1
    return Parts(body, decoder, layers, sorted(token_ids), min_layer)


def find_visual_tokens(parts: Parts, inputs: Mapping[str, Any]) -> Tensor:
    """The visual tokens among a batch of inputs: bool ``[B, S]``.

    Args:
        parts: of the model.
        inputs: its keyword arguments; ``input_ids`` ``[B, S]`` or, with placeholders in it, ``inputs_embeds``.

    Raises:
        ValueError: they cannot be told from the inputs, so ``visual_mask=`` is needed.
    """
    if not parts.token_ids:
        raise ValueError(
            f"visual_mask: expected bool [B, S], as the config of {type(parts.body).__name__} names no visual token, "
            "got None"
        )
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if input_ids is not None:
        return torch.isin(input_ids, torch.tensor(parts.token_ids, device=input_ids.device))
    if embeds is None:
        raise ValueError("inputs: expected input_ids [B, S] or inputs_embeds [B, S, H], got neither")
    placeholders = parts.body.get_input_embeddings()(torch.tensor(parts.token_ids, device=embeds.device))
    visual = (embeds[:, :, None] == placeholders).all(-1).any(-1)
    if not visual.any():
        raise ValueError(
            "visual_mask: expected bool [B, S], as inputs_embeds without placeholder tokens do not tell which tokens are "
            "visual (none at all: pass a mask of False); got None"
        )
    return visual
