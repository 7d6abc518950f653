"""Attention masks of withdrawn layers: those that the model made, with the rows and columns that are left.

A mask is gathered, never rebuilt: whatever the model put into it (padding, packed sequences, images that see all of
themselves, windows) comes along.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask, flex_attention_mask


def kind_of_masks(attention: str) -> str:
    """What an attention implementation (a name in transformers) gets: "dense" ``[B, heads, q, keys]``, "padding"
    ``[B, keys]``, as flash attention, or "blocks", as flex attention.

    Raises:
        ValueError: one whose masks are not known.
    """
    function = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(attention)
    if function is None or "paged" in attention:
        raise ValueError(
            "model: expected attention that transformers makes masks for, as 'eager', 'sdpa', 'flex_attention' or "
            f"'flash_attention_2', got {attention!r}"
        )
    return {flash_attention_mask: "padding", flex_attention_mask: "blocks"}.get(function, "dense")


def check_mask(mask: Any) -> None:
    """Raises a TypeError for an ``attention_mask`` of no known kind."""
    if mask is None or isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        return
    given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise TypeError(f"attention_mask: expected [B, heads, q, keys], [B, keys], a BlockMask or None, got {given}")


def take_columns(mask: Tensor, columns: Tensor) -> Tensor:
    """The columns ``[B, keys]`` of ``[B, heads, q, all]`` or ``[B, all]``; nothing may attend to column -1."""
    columns = columns.to(mask.device).long()
    columns = columns[:, None, None] if mask.ndim == 4 else columns
    hidden = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else False
    return torch.take_along_dim(mask, columns.clamp(min=0), dim=-1).masked_fill_(columns < 0, hidden)


def take_blocks(mask: BlockMask, rows: Tensor, columns: Tensor) -> BlockMask:
    """The same of flex attention's mask, and its rows ``[B, q]``."""
    rows, columns = rows.to(mask.kv_indices.device), columns.to(mask.kv_indices.device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, key: Tensor) -> Tensor:
        row, column = rows[batch, q], columns[batch, key]
        return (row >= 0) & (column >= 0) & mask.mask_mod(batch, head, row.clamp(min=0), column.clamp(min=0))

    batch, heads = len(columns), None if mask.shape[1] == 1 else mask.shape[1]
    # Compiled, it need not hold [B, q, keys]; but compiling takes longer than the CPU's small masks do.
    on_gpu = columns.is_cuda
    return create_block_mask(
        visible, batch, heads, rows.shape[1], columns.shape[1], device=columns.device, _compile=on_gpu
    )


def attended_tokens(attention_mask: Any, visual: Tensor, past: int = 0) -> Tensor:
    """bool ``[B, S]``: all tokens of a forward but padding.

    Args:
        attention_mask: of a model of transformers: None, ``[B, past + S]``, or already made for the layers, as with
            static caches: ``[B, heads, S, keys]``, a BlockMask, or a dict of those. There, padding is what may not look
            at itself.
        visual: ``[B, S]``.
        past: tokens before this forward.
    """
    batch, tokens = visual.shape
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if isinstance(attention_mask, BlockMask):
        rows = torch.arange(tokens, device=visual.device).expand(batch, tokens)
        which = torch.arange(batch, device=visual.device)[:, None]
        return attention_mask.mask_mod(which, torch.zeros_like(which), rows, rows + past).expand_as(visual)
    if not isinstance(attention_mask, Tensor):
        return torch.ones_like(visual)
    if attention_mask.ndim == 2:
        return attention_mask[:, past : past + tokens] != 0
    first = max(0, past + tokens - attention_mask.shape[-1])  # the token of a sliding window's first column
    itself = attention_mask[:, 0].diagonal(offset=past - first, dim1=-2, dim2=-1)[:, :tokens]
    if itself.dtype != torch.bool:
        itself = itself > torch.finfo(itself.dtype).min / 2  # what is not hidden may have a bias
    return itself.expand_as(visual)
