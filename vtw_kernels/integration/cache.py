"""Cache layers that hold fewer rows than tokens.

transformers sizes masks and positions by the lengths that some cache layer reports, which may be one without visual
tokens. So these report the number of *tokens* seen, and keep to themselves which of them have a *slot* in the cache. A sliding
window holds its last slots, which reach back at least as far as the window does; the mask hides what lies beyond it.
"""

from typing import NamedTuple

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class Slots(NamedTuple):
    """Which tokens a layer holds. ``tokens``: how many it has seen. ``columns``: int64 ``[B, slots]``, the token in each
    slot or -1 for padding; None while every token has a slot. ``padded``: whether a -1 may be among them."""

    tokens: int
    columns: Tensor | None
    padded: bool


EMPTY = Slots(0, None, False)


class WithdrawnLayer:
    """Mixed into a cache layer of transformers."""

    slots: Slots
    incoming: Slots | None  # what the running forward's hook announced, until `update` takes it
    withdraw_layer: int | None  # None: empty, or filled without withdrawal

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.incoming is not None:
            self.slots, self.incoming = self.incoming, None
        elif self.withdraw_layer is None:
            self.slots = Slots(self.slots.tokens + key_states.shape[-2], None, False)
        else:
            raise ValueError(
                f"past_key_values: this cache was filled under withdraw(layer={self.withdraw_layer}) and can only be "
                "used there, but got a forward without withdrawal"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.slots.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys_returned(self.slots.tokens, query_length)

    def keys_returned(self, seen: int, new: int) -> tuple[int, int]:
        """How many keys ``update`` returns for ``new`` rows after ``seen`` ones, and which row is the first of them."""
        is_static = isinstance(self, StaticLayer)
        first = 0
        if self.is_sliding:
            first = max(0, seen + 1 - (self.max_cache_len if is_static else self.sliding_window))
        length = seen + new - first
        return (max(length, self.max_cache_len) if is_static else length), first

    def reset(self) -> None:
        super().reset()
        self.slots, self.incoming, self.withdraw_layer = EMPTY, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(lambda columns: columns.index_select(0, beam_idx.to(columns.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda columns: columns.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(lambda columns: columns[indices])

    def _select(self, rows) -> None:
        if self.slots.columns is not None:
            self.slots = self.slots._replace(columns=rows(self.slots.columns))


class WithdrawnDynamicLayer(WithdrawnLayer, DynamicLayer):
    def crop(self, tokens_to_remove: int) -> None:
        tokens, columns, padded = self.slots
        # Up to 4.57, a positive number is the length to keep.
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, tokens - tokens_to_remove)
        if not self.is_initialized or (removed == 0 and not self.is_sliding):
            return
        count = removed
        if columns is not None:
            last = columns >= tokens - removed
            count = int(last.sum(1).max())
            if not last[:, columns.shape[1] - count :].all():
                raise ValueError(
                    f"crop: expected to remove as many text tokens in each sequence, got {removed} tokens of which the "
                    "sequences hold different numbers"
                )
            columns = columns[:, : columns.shape[1] - count]
        self._crop_rows(count)
        self.slots = Slots(tokens - removed, columns, padded)

    def _crop_rows(self, count: int) -> None:
        length = self.keys.shape[-2] - count
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]


class WithdrawnDynamicSlidingWindowLayer(WithdrawnDynamicLayer, DynamicSlidingWindowLayer):
    def _crop_rows(self, count: int) -> None:
        DynamicSlidingWindowLayer.crop(self, -count)


class WithdrawnStaticLayer(WithdrawnLayer, StaticLayer):
    pass


class WithdrawnStaticSlidingWindowLayer(WithdrawnLayer, StaticSlidingWindowLayer):
    pass


KINDS = {
    DynamicLayer: WithdrawnDynamicLayer,
    DynamicSlidingWindowLayer: WithdrawnDynamicSlidingWindowLayer,
    StaticLayer: WithdrawnStaticLayer,
    StaticSlidingWindowLayer: WithdrawnStaticSlidingWindowLayer,
}


def tokens_seen(cache: Cache | None, layer: int) -> int:
    """How many tokens a cache holds for ``withdraw(layer)``, without reading from the device.

    Raises:
        TypeError: not a ``Cache``.
        ValueError: it was filled without withdrawal, or with another layer.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values: expected a Cache of transformers, got {type(cache).__name__}")
    withdrawn = [isinstance(x, WithdrawnLayer) and x.withdraw_layer is not None for x in cache.layers]
    if any(withdrawn):
        if withdrawn.index(True) == layer:
            return cache.layers[layer].slots.tokens
        given = f"one filled under withdraw(layer={withdrawn.index(True)})"
    elif cache.get_seq_length() == 0:
        return 0
    else:
        given = "one filled without withdrawal"
    raise ValueError(
        f"past_key_values: expected a cache filled under withdraw(layer={layer}) or an empty one, got {given}"
    )


def wrap_layers(cache: Cache, layer: int, num_layers: int) -> None:
    """Replaces the cache layers ``layer..num_layers-1``; the new ones share their tensors with the ones they replace.

    Raises:
        ValueError: a kind of cache layer that is not supported.
    """
    while len(cache.layers) < num_layers and getattr(cache, "layer_class_to_replicate", None) is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    for i in range(layer, num_layers):
        inner = cache.layers[i] if i < len(cache.layers) else None
        if not isinstance(inner, WithdrawnLayer):
            if type(inner) not in KINDS:
                kinds = " or ".join(kind.__name__ for kind in KINDS)
                raise ValueError(f"past_key_values: expected layers of type {kinds}, got {type(inner).__name__} at {i}")
            cache.layers[i] = KINDS[type(inner)].__new__(KINDS[type(inner)])
            cache.layers[i].__dict__.update(inner.__dict__, slots=EMPTY, incoming=None)
        cache.layers[i].withdraw_layer = layer
