"""Withdrawal where images come in by cross-attention: Mllama (Llama 3.2 Vision) and Idefics, the first.

There, images are no rows of the decoder, but states that all rows of text look at in some of its layers. Withdrawal
before layer ``K`` is that from ``K`` on, every row is treated as the model itself treats text without an image:

* Mllama's cross-attention layers are decoder layers among the others, and are counted with them. For a prompt without
  images, the model runs none of them, neither their attention nor their MLP; so none from ``K`` on is run.
* Idefics has a block of cross-attention and an MLP in front of every ``cross_layer_interval``-th decoder layer; the
  layers alone are counted. For a row that sees no image, the result of attention is zeroed, and the MLP runs; so it is
  in the blocks in front of layer ``K`` and later ones.

What is left out projects no image states, and caches none. All rows, positions, masks and lengths are the model's own.
The placeholder of an image, where there is one, is a token of text.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.families import Parts
from vtw_kernels.integration.policies import Chosen, Policy
from vtw_kernels.integration.stand_ins import StandIns

FIRST_WITHOUT = "vtw_first_without_images"  # the keyword argument by which a forward's layer reaches its modules
MASKS = ("cross_attention_mask", "image_attention_mask")  # inputs [B, S, ...]: which images a token of text sees
FEATURES = ("pixel_values", "cross_attention_states", "image_encoder_embeddings", "perceiver_embeddings")


def check_layers(chosen: Chosen) -> None:
    """Raises ValueError for a policy, as these are about single tokens."""
    if not all(isinstance(x, int) for x in (chosen if isinstance(chosen, Sequence) else [chosen])):
        raise ValueError(
            "layer: expected an int, or some to draw from in training, as images come in by cross-attention, not as "
            f"tokens of which a policy could choose, got {chosen!r}"
        )


def sees_images(inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Of each sequence of a model's inputs, whether any of its tokens ``[B, S]`` sees an image: bool ``[B]``."""
    if all(inputs.get(name) is None for name in FEATURES):
        return torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    mask = next((inputs[name] for name in MASKS if inputs.get(name) is not None), torch.ones_like(tokens))
    return (mask != 0).flatten(1).any(1)


class CrossAttentionHooks(StandIns):
    """What stands in for ``forward`` of the decoder, which draws or has the layer and hands it on, of its layers, which
    take it out again, and of the modules that look at images, which act on it.

    Args:
        parts: of the model.
        policies: gives the one of a forward by its layer, when told whether the model is in training mode.
        first: the lowest of all layers that it may give.
    """

    def __init__(self, parts: Parts, policies: Callable[[bool], dict[int, Policy]], first: int):
        super().__init__()
        self.parts, self.policies, self.first = parts, policies, first
        self.arguments = Arguments(parts.decoder)

    def place(self) -> None:
        self.active = True
        self._stand_in(self.parts.decoder, partial(self.enter_decoder, self.parts.decoder))
        looking = {x.looking: i for i, x in self.parts.cross_attention.items()}
        for module in dict.fromkeys([*self.parts.layers, *looking]):
            self._stand_in(module, partial(self.enter, looking.get(module), module))

    def enter_decoder(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self._call(module, args, kwargs)
        (layer,) = self.policies(module.training)
        cache = self.arguments.cache_in(args, kwargs)
        if cache is not None:
            if getattr(cache, "withdrawn_before", None) != layer:
                check_empty(cache, layer)
                claim(cache, layer)
            cache.open = True
        try:
            output = self._call(module, args, kwargs | {FIRST_WITHOUT: layer})
        finally:
            if cache is not None:
                cache.open = False
        if cache is None:  # the model may have made one
            for made in output if isinstance(output, tuple) else output.values():
                if isinstance(made, Cache):
                    claim(made, layer)
        return output

    def enter(self, index: int | None, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``index``: in, or in front of, which decoder layer the module looks at images; None for one that does not."""
        layer = kwargs.pop(FIRST_WITHOUT, None)
        if index is not None and self.active and layer is None and index >= self.first:
            raise RuntimeError(
                f"withdraw: expected {type(module).__name__} of decoder layer {index} to run within a forward of its "
                "model, got a call of its own"
            )
        if index is None or layer is None or index < layer:
            return self._call(module, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if module is self.parts.layers[index]:
            return hidden
        return torch.zeros_like(hidden), None  # attention, and its weights


class ClaimedCache:
    """Mixed into a cache that is filled under withdrawal, of whose layers some hold no image states for that."""

    withdrawn_before: int | None  # which layer; None for an empty cache
    open: bool  # while a forward under that withdrawal runs

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.withdrawn_before is not None and not self.open:
            raise ValueError(
                f"past_key_values: this cache was filled under withdraw(layer={self.withdrawn_before}) and can only be "
                "used there, but got a forward without withdrawal"
            )
        return super().update(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.withdrawn_before = None


@functools.cache
def _claimed(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (ClaimedCache, kind), {})


@torch.compiler.disable
def check_empty(cache: Cache, layer: int) -> None:
    """Raises ValueError for a cache that has been filled, without withdrawal or before another layer than this."""
    if cache.get_seq_length() == 0:
        return
    before = getattr(cache, "withdrawn_before", None)
    given = "without withdrawal" if before is None else f"under withdraw(layer={before})"
    raise ValueError(
        f"past_key_values: expected a cache filled under withdraw(layer={layer}) or an empty one, got one filled "
        f"{given}"
    )


@torch.compiler.disable
def claim(cache: Cache, layer: int) -> None:
    if not isinstance(cache, ClaimedCache):
        cache.__class__ = _claimed(type(cache))
    cache.withdrawn_before, cache.open = layer, False
