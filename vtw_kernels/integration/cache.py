"""Cache layers that hold fewer rows than tokens.

transformers sizes masks and positions by the length that one of the cache layers reports, and that may be a layer
without visual tokens. So the layers here report the number of *tokens* seen, and keep to themselves which of these have
a *slot* in the cache. The book-keeping, which layers of a stage share, is called their *books*. A sliding window holds
its last slots, which reach back at least as far as the window; masks hide what lies beyond it.

Layers whose attention is skipped hold nothing at all, and report the lengths of another layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vtw_kernels.integration import compat


@dataclass
class Slots:
    """The books of cache layers that hold the same tokens: those of a stage, and of the stages after it for as long as
    nothing has left in between.

    With a static cache all tensors are updated in place, so that a compiled step of decoding can run again.
    """

    layer: int  # the first of the layers
    boundaries: tuple[int, ...]  # of all stages
    tokens: int | Tensor = 0  # how many were seen; for a static cache int64 []
    at_least: int = 0  # the same, as far as the host knows
    past: int | Tensor = 0  # how many were seen before the forward that runs
    without: int = 0  # how many have no slot
    columns: Tensor | None = None  # int64 [B, slots], the token in each slot or -1; None while every token has one
    filled: Tensor | None = None  # of a static cache: how many of its slots are filled, int64 []
    padded: bool = False  # whether a -1 may be among the filled slots
    open: bool = False  # whether a forward under withdrawal runs; at other times, layers refuse to be updated
    whole: bool = True  # whether the last forward came to its end; if not, some layers may lack its tokens

    def append(self, count: int, rows: Tensor | None, batch: int, device: torch.device, capacity: int | None) -> None:
        """Adds the tokens of a forward.

        Args:
            count: the number of tokens, whether they get a slot or not.
            rows: int ``[B, T]``, those that get one, counted from the first of this forward, or -1; None for all.
            capacity: slots of a static cache, else None.
        """
        new = torch.arange(count, device=device).expand(batch, count) if rows is None else rows
        new = shifted(new, self.tokens)
        self.without += count - new.shape[1]
        if capacity is not None and self.filled is None:
            self.tokens, self.filled = (_fixed(torch.full((), self.at_least, device=device)) for _ in range(2))
        if self.columns is None and rows is not None:
            # Until now, every token had its slot.
            past = torch.arange(self.at_least if capacity is None else capacity, device=device).expand(batch, -1)
            self.columns = past if capacity is None else _fixed(torch.where(past < self.filled, past, -1))
        if capacity is None:
            self.columns = None if self.columns is None else torch.cat([self.columns, new], dim=1)
            self.tokens += count
        else:
            if self.columns is not None:
                self.columns.index_copy_(1, torch.arange(new.shape[1], device=device) + self.filled, new)
            self.filled.add_(new.shape[1])
            self.tokens.add_(count)
        if not torch.compiler.is_compiling():  # a number that changes would be compiled anew
            self.at_least += count

    @property
    def held(self) -> int | Tensor:
        """How many slots are filled."""
        return self.tokens - self.without if self.filled is None else self.filled

    def copied(self) -> "Slots":
        """A copy that can be updated independently."""
        copy = replace(self)
        if self.filled is not None:
            copy.tokens, copy.filled = (_fixed(x.clone()) for x in (self.tokens, self.filled))
            copy.columns = None if self.columns is None else _fixed(self.columns.clone())
        return copy

    def crop(self, removed: int) -> None:
        """Forgets the last tokens; for dynamic caches."""
        count = removed
        if self.columns is not None:
            last = self.columns >= self.tokens - removed
            count = int(last.sum(1).max())
            length = self.columns.shape[1] - count
            if not last[:, length:].all():
                raise ValueError(
                    f"crop: expected to remove as many text tokens in each sequence, got {removed} tokens of which the "
                    "sequences hold different numbers"
                )
            self.columns = self.columns[:, :length]
        self.tokens -= removed
        self.at_least = self.tokens
        self.without -= removed - count

    def select(self, rows) -> None:
        if self.columns is not None:
            self.columns = rows(self.columns)


@dataclass
class Skipped:
    """The books of a cache's layers whose attention is skipped.

    layers: which. all_layers: of the cache; those that are not skipped know the lengths. prompt: over how many tokens
    adapters took their means, padding included. states: what adapters computed from these means, by layer, each tensor
    ``[B, ...]``. folded: weights that adapters of one sequence are folded into, by layer; they can be computed again.
    """

    layers: tuple[int, ...]
    all_layers: list
    prompt: int = 0
    states: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    folded: dict[int, Any] = field(default_factory=dict)

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        self.states = {layer: tuple(map(rows, state)) for layer, state in self.states.items()}
        self.folded = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"folded": {}}  # no copies of weights in copies of a cache


def shifted(rows: Tensor, past: int | Tensor) -> Tensor:
    """Rows of a forward as tokens of the sequence: int64, -1 stays."""
    return torch.where(rows < 0, -1, rows.long() + past)


def _fixed(x: Tensor) -> Tensor:
    """Tells torch.compile that a tensor is written to in place from one step to the next."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


class WithdrawnLayer:
    """Mixed into a cache layer of transformers."""

    slots: Slots | None = None  # its books; None for a layer that is empty, or was filled without withdrawal
    leads: bool = False  # whether it is the first of the layers that share these books: only that one updates them
    skipped: Skipped | None = None  # set in a layer whose attention is skipped
    like: int = 0  # the layer whose lengths a skipped one reports

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.skipped is not None:
            raise ValueError(
                f"past_key_values: this cache was filled {_skipping(self.skipped.layers)} and can only be used there, "
                "but got a forward without it"
            )
        if self.slots is not None and not self.slots.open:
            raise ValueError(
                f"past_key_values: this cache was filled {_under(self.slots.boundaries)} and can only be used "
                "there, but got a forward without withdrawal"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def _like(self) -> Any:
        return self.skipped.all_layers[self.like]

    def get_seq_length(self) -> int | Tensor:
        if self.skipped is not None:
            return self._like.get_seq_length()
        if self.slots is None:
            return super().get_seq_length()
        return self.slots.past if self.slots.open else self.slots.tokens

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        if self.skipped is not None:
            return self._like.get_mask_sizes(query)
        return super().get_mask_sizes(query)

    def crop(self, tokens_to_remove: int) -> None:
        if self.skipped is None:
            super().crop(tokens_to_remove)
        elif self.slots is not None and self.leads:
            self.slots.crop(compat.tokens_removed(tokens_to_remove, self.slots.tokens))

    def keys_returned(self, rows: int, tokens: int) -> tuple[int, int, int] | None:
        """Which keys ``update`` will return in the forward that runs, of so many tokens of which so many rows are left:
        how many, the slot of the first, and the token of the first column in the model's mask. None for all keys."""
        return None

    def reset(self) -> None:
        super().reset()
        self.slots = self.skipped = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.skipped is None:
            super().reorder_cache(beam_idx)
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.skipped is None:
            super().batch_repeat_interleave(repeats)
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.skipped is None:
            super().batch_select_indices(indices)
        self._select(lambda x: x[indices.to(x.device)] if isinstance(indices, Tensor) else x[indices])

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.slots is not None and self.leads:
            self.slots.select(rows)
        if self.skipped is not None and self.skipped.all_layers[self.skipped.layers[0]] is self:
            self.skipped.select(rows)


class WithdrawnDynamicLayer(WithdrawnLayer, DynamicLayer):
    def crop(self, tokens_to_remove: int) -> None:
        if self.slots is None or self.skipped is not None:
            return super().crop(tokens_to_remove)
        if self.leads:
            self.slots.crop(compat.tokens_removed(tokens_to_remove, self.slots.tokens))
        self._keep_slots(0, self.slots.held)

    def _keep_slots(self, first: int, end: int) -> None:
        self.keys, self.values = self.keys[..., first:end, :], self.values[..., first:end, :]


class WithdrawnStaticLayer(WithdrawnLayer, StaticLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if compat.HAS_CACHE_POSITION and self.slots is not None and self.slots.open:
            args = compat.written_at(self._next_slots(key_states.shape[-2], key_states.device), args)
        return super().update(key_states, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "max_batch_size" and self.skipped is not None:  # which caches ask all layers for, up to 4.57
            return self._like.max_batch_size
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _next_slots(self, rows: int, device: torch.device) -> Tensor:
        return torch.arange(rows, device=device) + (self.slots.filled.to(device) - rows)


class WithdrawnWindow(WithdrawnLayer):
    """Mixed into a sliding window, which counts for itself the slots that it has filled."""

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        if self.slots is None or self.skipped is not None:
            return super().get_mask_sizes(query)
        capacity = self.max_cache_len if isinstance(self, StaticLayer) else 0
        seen = compat.slots_filled(self) + self.slots.without
        first = self._first(seen)
        return max(seen + compat.query_length(query) - first, capacity), first

    def keys_returned(self, rows: int, tokens: int) -> tuple[int, int, int]:
        length, first = super().get_mask_sizes(compat.as_query(rows))
        seen = compat.slots_filled(self) + self.slots.without - (tokens - rows)
        return length, first, self._first(seen)

    def _first(self, seen: int) -> int:
        """The first of the tokens, or slots, that the next one still sees."""
        return max(0, seen + 1 - (self.max_cache_len if isinstance(self, StaticLayer) else self.sliding_window))


class WithdrawnDynamicSlidingWindowLayer(WithdrawnWindow, WithdrawnDynamicLayer, DynamicSlidingWindowLayer):
    def _keep_slots(self, first: int, end: int) -> None:
        evicted = self.cumulative_length - self.keys.shape[-2]
        first = self._first(end)
        if first < evicted:
            raise ValueError(
                f"crop: expected at least slot {first} in the window, got {evicted} and later ones; call "
                "activate_past_recording before the tokens to be cropped"
            )
        super()._keep_slots(first - evicted, end - evicted)
        self.cumulative_length = end


class WithdrawnStaticSlidingWindowLayer(WithdrawnWindow, WithdrawnStaticLayer, StaticSlidingWindowLayer):
    def _next_slots(self, rows: int, device: torch.device) -> Tensor:
        return torch.arange(rows, device=device) + self.cumulative_length


KINDS = {
    DynamicLayer: WithdrawnDynamicLayer,
    DynamicSlidingWindowLayer: WithdrawnDynamicSlidingWindowLayer,
    StaticLayer: WithdrawnStaticLayer,
    StaticSlidingWindowLayer: WithdrawnStaticSlidingWindowLayer,
}


def slots_of(cache: Cache | None, boundaries: tuple[int, ...], num_layers: int) -> list[Slots]:
    """The books of a cache, in the layers before ``num_layers``, for each of the stages that begin at ``boundaries``;
    new ones if it is empty. Stages whose layers hold the same tokens share theirs.

    Raises:
        ValueError: it has layers of a kind that is not supported, was filled without withdrawal or with other
            boundaries, or by a forward that did not end.
    """
    empty = [Slots(boundaries[0], boundaries)] * len(boundaries)
    if cache is None:
        return empty
    _check_layers(cache, boundaries[0], num_layers)
    kept = [x.slots for x in cache.layers if isinstance(x, WithdrawnLayer) and x.slots is not None]
    if not kept and cache.get_seq_length() == 0:
        return empty
    if not kept or kept[0].boundaries != boundaries:
        given = f"one filled {_under(kept[0].boundaries)}" if kept else "one filled without withdrawal"
        raise ValueError(f"past_key_values: expected a cache filled {_under(boundaries)} or an empty one, got {given}")
    if not all(slots.whole for slots in kept):
        raise ValueError(
            f"past_key_values: expected a cache filled {_under(boundaries)} or an empty one, got one whose last "
            "forward did not end"
        )
    return [cache.layers[layer].slots for layer in boundaries]


def wrap_layers(cache: Cache, books: list[Slots], num_layers: int) -> None:
    """Replaces the cache layers from the first stage's first on, before ``num_layers``; the new ones share the tensors
    of the ones they replace.

    Args:
        books: of each stage.

    Raises:
        ValueError: for a cache that the model has made itself, as ``slots_of``.
    """
    boundaries = books[0].boundaries
    _check_layers(cache, boundaries[0], num_layers)
    while len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    for slots, begin, end in zip(books, boundaries, (*boundaries[1:], num_layers)):
        for i in range(begin, end):
            _wrap(cache, i)
            cache.layers[i].slots, cache.layers[i].leads = slots, i == slots.layer


def skip_layers(cache: Cache, like: Mapping[int, int], num_layers: int) -> Skipped:
    """Prepares a cache for skipping the layers that ``like`` names, each with a layer that is not skipped and whose
    lengths it reports; returns their books. Empty layers are replaced, and memory that they have reserved is freed. In
    a cache that the model has made itself, the layers before them may be filled already.

    Raises:
        ValueError: layers of a kind that is not supported; or it was filled otherwise.
    """
    layers = tuple(like)
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    _check_layers(cache, layers[0], num_layers)
    before = next((x.skipped for x in cache.layers if getattr(x, "skipped", None) is not None), None)
    if before is not None and before.layers == layers:
        return before
    if any(cache.layers[i].get_seq_length() > 0 for i in layers):
        given = "without skipping any" if before is None else _skipping(before.layers)
        raise ValueError(
            f"past_key_values: expected a cache filled {_skipping(layers)} or an empty one, got one filled {given}"
        )
    for i in () if before is None else before.layers:
        cache.layers[i].skipped = None
    books = Skipped(layers, cache.layers)
    for i, other in like.items():
        _wrap(cache, i)
        cache.layers[i].keys = cache.layers[i].values = None
        cache.layers[i].is_initialized = False
        cache.layers[i].skipped, cache.layers[i].like = books, other
    return books


def _wrap(cache: Cache, layer: int) -> None:
    """Replaces a cache layer by one of this module, with the same tensors."""
    inner = cache.layers[layer]
    if not isinstance(inner, WithdrawnLayer):
        cache.layers[layer] = KINDS[type(inner)].__new__(KINDS[type(inner)])
        cache.layers[layer].__dict__.update(inner.__dict__)


def _skipping(layers: tuple[int, ...]) -> str:
    return f"under skip_attention(layers={list(layers)})"


def _under(boundaries: tuple[int, ...]) -> str:
    return f"under withdraw(layer={', '.join(map(str, boundaries))})"


def _check_layers(cache: Cache, first: int, end: int) -> None:
    kinds = [type(x) for x in cache.layers[:end]]
    kinds += [cache.layer_class_to_replicate or type(None)] * (end - len(kinds))
    for i, kind in enumerate(kinds[first:], first):
        if not issubclass(kind, WithdrawnLayer) and kind not in KINDS:
            known = " or ".join(x.__name__ for x in KINDS)
            raise ValueError(f"past_key_values: expected layers of type {known}, got {kind.__name__} at {i}")
