"""A stage: a stretch of decoder layers that run on the same rows of a forward."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vtw_kernels.integration import compat
from vtw_kernels.integration.cache import shifted
from vtw_kernels.integration.masks import check_mask, take_blocks, take_columns
from vtw_kernels.ops import CompactionPlan, compact

# Of a layer's keys: how many it attends to, the slot of the first of them, and the token of the mask's first column.
# None for all slots and all tokens.
Window = tuple[int, int, int] | None


class Stage:
    """Gathers what a forward passes to the layers of one stage: rows by a plan, and mask columns by what is cached.

    A mask is never rebuilt from what is left, except the plain causal one that the model gives as None. Results are
    remembered, so that tensors which all layers share are gathered once, together, in one ``compact`` call.

    Args:
        tokens: rows of the forward, ``q``.
        plan: which of them are left; None for all.
        columns: int ``[B, slots]``, the token that each key stands for, or -1 for one that nothing may attend to. By
            default those of the plan: the keys are the rows. None together with no plan leaves masks alone.
        past: tokens before this forward, an int or int64 [].
        padded: whether -1 may be among ``columns``; then a mask of None (plain causal) is written out.
        flash: whether masks are ``[B, keys]``. Such attention takes gaps in ``position_ids`` for packed sequences, but
            not if it is given a mask.
        mask: the name of the layers' attention mask.
    """

    def __init__(
        self,
        tokens: int,
        plan: CompactionPlan | None,
        columns: Tensor | None = None,
        past: int | Tensor = 0,
        padded: bool = True,
        flash: bool = False,
        mask: str = "attention_mask",
    ):
        self.tokens, self.plan, self.past, self.flash, self.mask = tokens, plan, past, flash, mask
        self.needs_mask = padded or (flash and plan is not None)
        self.columns = plan.source if columns is None and plan is not None else columns
        self.done: list[tuple[Any, Any]] = []  # full length, gathered
        self.last: tuple[list, dict[str, Any]] | None = None  # what the last layer was given, and got
        self.causal: dict[Any, Tensor] = {}  # by window

    def __call__(
        self, kwargs: dict[str, Any], hidden_states: Tensor | None = None, window: Window = None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Gathers the keyword arguments of a decoder layer and, if given, its full-length input ``[..., B, q, H]``.

        Raises:
            TypeError: an attention mask of no known kind.
        """
        if self.columns is None:
            return kwargs, hidden_states
        mask = kwargs.get(self.mask)
        if self.plan is None and mask is None and not self.needs_mask:
            return kwargs, hidden_states  # a step of decoding, in every layer
        given = [window, *kwargs, *kwargs.values()]
        if hidden_states is None and self.last is not None and all(map(operator.is_, given, self.last[0])):
            return dict(self.last[1]), None  # a model gives all layers of one type the very same objects
        check_mask(mask)
        if mask is not None and not any(mask is x for x, _ in self.done):
            if isinstance(mask, BlockMask):
                self.done.append((mask, take_blocks(mask, self._rows(), self._mask_columns(window))))
            elif mask.ndim == 2:
                self.done.append((mask, take_columns(mask, self._mask_columns(window))))

        new: list[tuple[Tensor, int, int]] = []
        for name, value in kwargs.items():
            for x in _tensors(value):
                known = any(x is y for y, *_ in self.done) or any(x is y for y, *_ in new)
                if not known and (dims := self._dims(name, x, isinstance(value, tuple | list))) is not None:
                    new.append((x, *dims))
        moved = [x for x, *_ in new]
        if self.plan is not None:
            rows = new if hidden_states is None else [*new, (hidden_states, -2, -3)]
            if rows:
                moved, token_dims, batch_dims = map(list, zip(*rows))
                moved = compact_on_device(moved, self.plan, token_dims, batch_dims)
            if hidden_states is not None:
                hidden_states = moved.pop()
        self.done += [
            (x, take_columns(y, self._mask_columns(window)) if x is mask else y) for (x, *_), y in zip(new, moved)
        ]

        kwargs = {name: _replace(self.done, value) for name, value in kwargs.items()}
        if self.plan is not None:
            kwargs = compat.rows_left(kwargs, self.plan.source.shape[1])
        if mask is None and self.needs_mask and self.mask in kwargs:
            if window not in self.causal:
                self.causal[window] = self._causal_mask(window)
            kwargs[self.mask] = self.causal[window]
        self.last = given, kwargs
        return dict(kwargs), hidden_states

    def _dims(self, name: str, x: Tensor, in_tuple: bool) -> tuple[int, int] | None:
        """The token and the batch dimension of a layer's keyword argument, or None for one that has no tokens."""
        if name == self.mask:
            return -2, 0
        if self.plan is None:
            return None
        if name.startswith("position_embeddings") or (in_tuple and x.ndim > 1 and x.shape[-2] == self.tokens):
            return -2, -3  # rotary tables, [B, q, D], some with a dimension more in front
        integers = not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)
        if name == "position_ids" or (integers and x.ndim == 3 and x.shape[-1] == self.tokens):
            return -1, -2  # [B, q], or [3, B, q]
        return (1, 0) if x.ndim < 4 and x.shape[:2] == (self.plan.source.shape[0], self.tokens) else None

    def _columns(self, window: Window) -> Tensor:
        """The token of each key, int ``[B, keys]``, or -1 for those that nothing may attend to."""
        if window is None:
            return self.columns
        length, first, _ = window
        columns = self.columns[:, first : first + length]
        return F.pad(columns, (0, length - columns.shape[1]), value=-1)

    def _mask_columns(self, window: Window) -> Tensor:
        """The same as columns of the model's mask, negative for those that nothing may attend to."""
        return self._columns(window) - (0 if window is None else window[2])

    def _rows(self) -> Tensor:
        """int ``[B, q]``: which rows of the forward are left, or -1."""
        if self.plan is not None:
            return self.plan.source
        return torch.arange(self.tokens, device=self.columns.device).expand(len(self.columns), -1)

    def _causal_mask(self, window: Window) -> Tensor:
        if self.flash:
            return self._columns(window) >= 0
        rows, columns = shifted(self._rows(), self.past)[:, None, :, None], self._columns(window)[:, None, None, :]
        return (columns >= 0) & (columns <= rows)


def compact_on_device(tensors: list[Tensor], plan: CompactionPlan, token_dims: list[int], batch_dims: list[int]):
    """``compact`` on the device of the last tensor: that of the layer, which may not be where the plan was made."""
    device = tensors[-1].device
    return compact([x.to(device) for x in tensors], on_device(plan, device), token_dims, batch_dims)


def on_device(plan: CompactionPlan, device: torch.device) -> CompactionPlan:
    return CompactionPlan(*(x.to(device) for x in plan))


def _tensors(value: Any) -> Iterator[Tensor]:
    """An argument, or the tensors in a plain tuple or list. Caches, and dicts that layers write to, are left alone."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for x in value:
            yield from _tensors(x)


def _replace(done: list[tuple[Any, Any]], value: Any) -> Any:
    if isinstance(value, Tensor | BlockMask):
        return next((result for x, result in done if x is value), value)
    if type(value) in (tuple, list):
        return type(value)(_replace(done, x) for x in value)
    return value
