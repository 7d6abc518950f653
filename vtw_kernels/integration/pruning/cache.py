"""Caches under visual pruning: heads that see visual tokens have theirs in the cache's own layers, the others in
further ones beside them."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from vtw_kernels.integration import compat
from vtw_kernels.integration.cache import Slots, WithdrawnDynamicLayer, WithdrawnLayer, WithdrawnStaticLayer
from vtw_kernels.integration.pruning.visual_pruning import VisualPruning

KINDS = (DynamicLayer, StaticLayer)


class PrunedCache:
    """Mixed into a cache of transformers.

    Attributes:
        pruning: that it is filled under.
        books: which tokens the heads without visual keys have: the text.
        blind: by layer, keys and values of those heads, from the first visual token on. Without renormalisation they
            are of all tokens, with zeros for values of visual ones.
    """

    pruning: VisualPruning
    books: Slots
    blind: dict[int, CacheLayerMixin]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.books.open:
            raise ValueError(
                "past_key_values: this cache was filled under prune_visual and can only be used there, but got a "
                "forward without it"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def split(self, layer: int, seeing: Tensor, blind: Tensor) -> None:
        """Gives the heads without visual keys a layer of their own, with the text that is cached so far.

        Args:
            layer: of the decoder.
            seeing, blind: int64 [heads], of keys; one may be in both.
        """
        if layer in self.blind:
            return
        while len(self.layers) <= layer:
            self.layers.append(self.layer_class_to_replicate())
        whole = self.layers[layer]
        static = isinstance(whole, StaticLayer)
        kind: type = StaticLayer if static else DynamicLayer
        if self.pruning.renormalize:
            kind = WithdrawnStaticLayer if static else WithdrawnDynamicLayer
        self.blind[layer] = part = kind.__new__(kind)
        part.__dict__.update(whole.__dict__)
        if isinstance(part, WithdrawnLayer):
            part.slots, part.leads = self.books, False
        if hasattr(whole, "cumulative_length"):
            part.cumulative_length = whole.cumulative_length.clone()
        if whole.is_initialized:
            for name in ("keys", "values"):
                setattr(part, name, getattr(whole, name)[:, blind])
                setattr(whole, name, getattr(whole, name)[:, seeing])

    def reset(self) -> None:
        for layer in self.blind:
            self.layers[layer].is_initialized = False  # the next prompt may have no image, and all heads in one
            self.layers[layer].keys = self.layers[layer].values = None
        super().reset()
        self.blind, self.books = {}, Slots(0, (0,))

    def crop(self, tokens_to_remove: int) -> None:
        if any(isinstance(x, StaticLayer) for x in self.blind.values()):
            raise ValueError("crop: expected a dynamic cache under prune_visual, got a static one")
        removed = compat.tokens_removed(tokens_to_remove, self.books.tokens)
        self.books.crop(removed)
        for layer in (*self.layers, *self.blind.values()):
            if layer.is_initialized:  # one whose heads all see no visual tokens is not
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select("reorder_cache", beam_idx, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select("batch_repeat_interleave", repeats, lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select("batch_select_indices", indices, lambda x: x[indices])

    def _select(self, name: str, argument: Any, rows: Any) -> None:
        for layer in self.blind.values():
            getattr(layer, name)(argument)
        self.books.select(rows)


@functools.cache
def _pruned(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (PrunedCache, kind), {})


def check_cache(cache: Cache, pruning: VisualPruning) -> None:
    """Raises ValueError for a cache that was filled in another way than under this pruning, or is of a kind that is not
    supported."""
    if isinstance(cache, PrunedCache):
        if cache.pruning is not pruning and cache.books.at_least:
            raise ValueError(
                f"past_key_values: expected a cache filled under {pruning!r} or an empty one, got one filled under "
                f"{cache.pruning!r}"
            )
        if not cache.books.whole:
            raise ValueError("past_key_values: expected a cache whose last forward came to its end, got another one")
        return
    if int(cache.get_seq_length()) > 0:
        raise ValueError(
            "past_key_values: expected a cache filled under prune_visual or an empty one, got one filled without it"
        )
    kinds = [*map(type, cache.layers), *([cache.layer_class_to_replicate] if cache.layer_class_to_replicate else [])]
    for kind in kinds:
        if kind not in KINDS and not issubclass(kind, WithdrawnLayer):
            known = " or ".join(x.__name__ for x in KINDS)
            raise ValueError(f"past_key_values: expected layers of type {known}, got {kind.__name__}")
    if getattr(cache, "offloading", False):
        raise ValueError("past_key_values: expected a cache that stays on its device, got one that is offloaded")


def claim(cache: Cache, pruning: VisualPruning) -> None:
    """Makes a cache that ``check_cache`` has let pass one that is filled under this pruning."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _pruned(type(cache))
        cache.books, cache.blind = Slots(0, (0,)), {}
    cache.pruning = pruning


def stores_of(cache: Cache) -> list[tuple[int, Any]]:
    """The layers of a cache, each with the number of the decoder layer, of which some may have two."""
    return [*enumerate(cache.layers), *(cache.blind.items() if isinstance(cache, PrunedCache) else ())]


def past_visual(books: Slots, batch: int, device: torch.device) -> Tensor:
    """bool ``[B, past]``: which tokens before a forward have no place in the books: visual ones, and padding."""
    past = books.at_least
    if books.columns is None:
        return torch.zeros(batch, past, dtype=torch.bool, device=device)
    columns = books.columns.clamp(max=past)
    seen = torch.ones(batch, past + 1, dtype=torch.bool, device=device)
    return seen.scatter_(1, columns.where(columns >= 0, past), False)[:, :past]
