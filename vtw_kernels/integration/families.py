"""Where a model keeps its decoder layers, and how its visual tokens are recognised: a table of the exceptions.

The usual shape: ``model.base_model`` takes ``input_ids`` and merges the images into their embeddings, one placeholder
token per visual token; its ``get_decoder()`` has ``.layers``; and the config names the placeholder tokens. What a
config says itself, as types of layers, needs no row here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from vtw_kernels.integration import compat


class CrossAttention(NamedTuple):
    """``block``: a decoder layer, or what stands in front of one, that looks at images. ``looking``: the part of it
    that does, and is left out under withdrawal: the layer itself, or attention."""

    block: nn.Module
    looking: nn.Module


@dataclass(frozen=True)
class Family:
    """One model type, by paths in its config, of which those count that exist.

    ``token_ids``: of visual placeholders. ``max_tokens``: from how many tokens on attention layers count positions
    themselves, by rows. ``refused``: why withdrawal does not apply. ``cross_attention``: of a decoder, by layer, where
    images come in, if these are not tokens."""

    token_ids: tuple[str, ...] = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    max_tokens: str = ""
    refused: str = ""
    cross_attention: Callable[[nn.Module], dict[int, CrossAttention]] | None = None


def _cross_attention_layers(decoder: nn.Module) -> dict[int, CrossAttention]:
    layers = {i: decoder.layers[i] for i in sorted(decoder.cross_attention_layers)}
    return {i: CrossAttention(block=layer, looking=layer) for i, layer in layers.items()}


def _cross_attention_blocks(decoder: nn.Module) -> dict[int, CrossAttention]:
    every = decoder.cross_layer_interval
    blocks = enumerate(decoder.gated_cross_attn_layers)
    return {i * every: CrossAttention(block=block, looking=block.cross_attn) for i, block in blocks}


RETRIEVAL = "it compares the last states of all tokens, the visual ones too"
FAMILIES = {
    "colmodernvbert": Family(refused=RETRIEVAL),
    "colpali": Family(refused=RETRIEVAL),
    "colqwen2": Family(refused=RETRIEVAL),
    "idefics": Family(cross_attention=_cross_attention_blocks),
    "mllama": Family(cross_attention=_cross_attention_layers),
    "mllama_text_model": Family(cross_attention=_cross_attention_layers),
    "minimax_m3_vl": Family(refused="its layers choose blocks of keys by their place, which withdrawal moves"),
    "llama4": Family(max_tokens="text_config.floor_scale"),
    "phi4_multimodal": Family(token_ids=("vision_config.image_token_id",)),
}
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class Parts(NamedTuple):
    """The parts of a model that withdrawal works with.

    ``body`` is the module that sees ``input_ids``, ``decoder`` the one with ``layers``, ``config`` the decoder's own;
    ``token_ids`` are those of visual placeholders. ``min_layer..max_layer``: before which layers they may be withdrawn,
    and ``limits``, why no others. ``layer_types``: per layer. ``num_cached``: the first layers, those with keys of
    their own. ``max_tokens``: that a sequence with visual tokens may have. ``cross_attention``: by layer, where images
    come in, if these are not tokens (``cross_attention.py``); else empty."""

    body: nn.Module
    decoder: nn.Module
    config: Any
    layers: nn.ModuleList
    token_ids: list[int]
    min_layer: int
    max_layer: int
    limits: tuple[str, ...]
    layer_types: list[str]
    num_cached: int
    max_tokens: float
    cross_attention: dict[int, CrossAttention]

    @property
    def allowed(self) -> str:
        last = len(self.layers)
        span = f"{self.min_layer}..{self.max_layer}" + (f" or {last}" if self.max_layer < last else "")
        return f"{span if self.min_layer < last else last} ({last} withdraws nothing)"

    def check_layer(self, layer: int) -> None:
        """Raises ValueError for a layer before which the visual tokens can't be withdrawn."""
        if not (self.min_layer <= layer <= self.max_layer or layer == len(self.layers)):
            raise ValueError("; ".join([f"layer: expected {self.allowed}, got {layer}", *self.limits]))

    def check_attention_before(self, layers: tuple[int, ...]) -> None:
        """Raises ValueError for layers behind one that is not attention."""
        for layer in layers:
            if (kind := self.layer_types[layer - 1]) not in ATTENTION_LAYERS:
                raise ValueError(
                    f"layer: expected an attention layer before {layer}, whose weights are looked at, got {kind}"
                )

    def check_visual_mask(self, visual_mask: Any) -> None:
        """Raises ValueError for a mask of visual tokens where there are none."""
        if self.cross_attention and visual_mask is not None:
            raise ValueError(
                f"visual_mask: expected None, as images come in by cross-attention in {type(self.decoder).__name__}, "
                f"not as tokens, got a {type(visual_mask).__name__}"
            )

    def check_tokens(self, tokens: int) -> None:
        """Raises ValueError for a sequence that is too long to withdraw visual tokens from."""
        if tokens >= self.max_tokens:
            raise ValueError(
                f"input_ids: expected less than {self.max_tokens} tokens, as layers of this model scale attention by "
                f"positions that they count themselves, from there on; got {tokens}"
            )


def find_parts(model: nn.Module, decoder: nn.Module | None = None) -> Parts:
    """Looks a model up in the table, and otherwise takes it to be of the usual shape.

    Raises:
        TypeError: not a model of transformers.
        ValueError: a model that withdrawal does not apply to, or whose decoder layers are not found.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config") or not hasattr(model, "base_model"):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    name, family = type(model).__name__, FAMILIES.get(config.model_type, Family())
    refused = family.refused
    if not refused and getattr(config, "is_encoder_decoder", False):
        refused = "it is an encoder-decoder: its images end in the encoder"
    if refused:
        raise ValueError(f"model: {name} is not supported: {refused}")

    body = model.base_model
    decoder = _find_decoder(body) if decoder is None else decoder
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"decoder: expected a module with its decoder layers in .layers, got {type(decoder).__name__}; {name} is "
            "not of the usual shape, so pass that module as decoder="
        )
    ids = {_lookup(config, path) for path in family.token_ids} - {None}
    max_tokens = _lookup(config, family.max_tokens)
    text = getattr(decoder, "config", None) or config.get_text_config(decoder=True)
    limits = _layer_limits(config, text, len(layers))
    max_tokens = float("inf") if max_tokens is None else max_tokens
    parts = Parts(body, decoder, text, layers, sorted(ids), *limits, max_tokens=max_tokens, cross_attention={})
    if family.cross_attention is None:
        return parts
    found = family.cross_attention(decoder)
    last = max(found)
    limits = (f"images come in by cross-attention, in none of the layers after {last}",)
    return parts._replace(token_ids=[], max_layer=last, limits=limits, cross_attention=found)


def describe(name: str) -> dict[str, str]:
    """What ``withdraw`` would work with in a model of which only the config is loaded, in words.

    Args:
        name: of a model on the Hub, or its folder.

    Raises:
        OSError: no config there.
        ValueError: a model that withdrawal does not apply to, or that transformers does not know.
        ImportError: the model needs a package that is not installed.
    """
    config = transformers.AutoConfig.from_pretrained(name)
    architectures = config.architectures or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise ValueError(
            f"model: expected a config with an architecture of transformers, got {architectures} in {name}"
        )
    with torch.device("meta"):
        model = getattr(transformers, architectures[0])(config)
    parts = find_parts(model)
    path = next((path for path, module in model.named_modules() if module is parts.decoder), "")
    kinds = [f"{parts.layer_types.count(kind)} {kind}" for kind in dict.fromkeys(parts.layer_types)]
    tokens = ", ".join(map(str, parts.token_ids)) or "none in the config: pass visual_mask="
    if parts.cross_attention:
        tokens = f"none: images come in by cross-attention, in layers {', '.join(map(str, parts.cross_attention))}"
    return {
        "family": f"{config.model_type} ({type(model).__name__})",
        "decoder": f"{path or 'the model itself'} ({type(parts.decoder).__name__})",
        "decoder layers": f"{len(parts.layers)}: {', '.join(kinds)}",
        "visual token ids": tokens,
        "layer": "; ".join([parts.allowed, *parts.limits]),
    }


def _find_decoder(module: nn.Module) -> nn.Module:
    """The first module with ``.layers``, from the whole model inwards; or the innermost one that can be found."""
    while True:
        inner = module.get_decoder() if hasattr(module, "get_decoder") else module
        names = ("base_model", "model", "language_model", "text_model")
        for candidate in (inner, *(getattr(inner, name, None) for name in names)):
            if isinstance(candidate, nn.Module) and candidate is not module:
                break
        else:
            return module
        module = candidate
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module


def _layer_limits(config: Any, text: Any, num_layers: int) -> tuple[int, int, tuple[str, ...], list[str], int]:
    """``min_layer`` to ``num_cached`` of ``Parts``, by the configs of the model and of its decoder."""
    first, last, num_cached, limits = 1, num_layers, num_layers, []
    injected = [0]
    for path in ("deepstack_visual_indexes", "vision_config.deepstack_visual_indexes"):
        injected.append(len(_lookup(config, path) or ()))  # added behind layers 0, 1, ...
    injected += [layer for _, layer in _lookup(config, "deepstack_layer_map") or ()]
    injected += _lookup(config, "spatial_target_layers") or ()
    if max(injected) > first:
        first = max(injected)
        limits.append(f"visual features go on being added up to layer {first}")

    types = list(getattr(text, "layer_types", None) or ["full_attention"] * num_layers)
    odd = {i: kind for i, kind in enumerate(types) if kind not in ATTENTION_LAYERS}
    if odd and max(odd) >= first:
        first = max(odd) + 1
        kinds = ", ".join(sorted(set(odd.values())))
        limits.append(f"layers of type {kinds}, here up to {first - 1}, are not attention alone and need all tokens")

    modes = compat.kv_sharing_modes(text)
    if "reuse" in modes:
        num_cached, last = modes.index("reuse"), modes.index("store")
        limits.append(f"layers {num_cached}.. read keys and values of layers {last}.., and need the same tokens")
    return first, last, tuple(limits), types, num_cached


def _lookup(config: Any, path: str) -> Any:
    """An attribute of an attribute, or None."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


# Embeddings without one may have been made from text alone, or merged with an image.
NO_PLACEHOLDER = (
    "visual_mask: expected bool [B, S], as inputs_embeds without placeholder tokens do not tell which tokens are "
    "visual (none at all: pass a mask of False); got None"
)


def find_visual_tokens(parts: Parts, inputs: Mapping[str, Any]) -> Tensor:
    """The placeholders of visual tokens among a batch of inputs: bool ``[B, S]``, none where images come in by
    cross-attention.

    Args:
        parts: of the model.
        inputs: its keyword arguments; ``input_ids`` ``[B, S]`` or, with placeholders in it, ``inputs_embeds``.

    Raises:
        ValueError: they cannot be told from the inputs, so ``visual_mask=`` is needed.
    """
    if not parts.token_ids and not parts.cross_attention:
        raise ValueError(
            f"visual_mask: expected bool [B, S], as the config of {type(parts.body).__name__} names no visual token, "
            "got None"
        )
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if input_ids is None and embeds is None:
        raise ValueError("inputs: expected input_ids [B, S] or inputs_embeds [B, S, H], got neither")
    if parts.cross_attention:
        sequence = embeds if input_ids is None else input_ids
        return torch.zeros(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
    device = embeds.device if input_ids is None else input_ids.device
    ids = torch.stack([torch.full((), x, device=device) for x in parts.token_ids])  # a copy would make the host wait
    if input_ids is not None:
        return torch.isin(input_ids, ids)
    return (embeds[:, :, None] == parts.body.get_input_embeddings()(ids)).all(-1).any(-1)
