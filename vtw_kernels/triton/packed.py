"""The plan for packed rows in Triton: the op of ``ops/packed.py``, for tensors on a GPU.

One program for each sequence. It adds up the text rows of the sequences before its own by itself, so that no program
waits for another; where a row goes follows from how many of the tokens before it are text. Whatever the values of the
lists are, nothing outside of the tensors is read or written."""

import triton
import triton.language as tl
from torch import Tensor

from vtw_kernels.ops.checks import check_packed, check_packed_disjoint
from vtw_kernels.triton.launch import launch

TILE = 256  # rows
SEQUENCES = 32
THREADS = 128


@triton.jit
def text_tokens(tokens, first, last, visual):
    """For a tile of numbers n (``tokens``): how many of the first n tokens are text, and whether token n is. ``first``
    and ``last`` say which ranges of ``visual`` count: one pair for each number, or one for all."""
    count = tokens
    is_text = tokens >= 0
    for i in range(0, tl.max(last - first, 0)):
        exists = first + i < last
        start = tl.load(visual + 2 * (first + i), mask=exists, other=0).to(tl.int64)
        stop = tl.load(visual + 2 * (first + i) + 1, mask=exists, other=0).to(tl.int64)
        count -= tl.maximum(tl.minimum(stop, tokens) - start, 0)
        is_text &= (tokens < start) | (stop <= tokens)
    return count, is_text


@triton.jit
def sequences(b, exists, query_start, seq_lens, visual_start, ranges):
    """For a tile of sequences: the first of their tokens that is a row of this step and the one behind the last, and
    the first of their visual ranges and the one behind the last."""
    end = tl.load(seq_lens + b, mask=exists, other=0).to(tl.int64)
    rows = tl.load(query_start + b + 1, mask=exists, other=0).to(tl.int64)
    rows -= tl.load(query_start + b, mask=exists, other=0).to(tl.int64)
    first = tl.maximum(tl.load(visual_start + b, mask=exists, other=0).to(tl.int64), 0)
    last = tl.minimum(tl.load(visual_start + b + 1, mask=exists, other=0).to(tl.int64), ranges)
    return end - rows, end, first, last


OF_STEP = ["batch", "ranges", "columns", "table_batch", "table_column", "block_size", "capacity"]


@triton.jit(do_not_specialize_on_alignment=OF_STEP)
def pack_kernel(
    query_start, seq_lens, visual, visual_start, table, batch, ranges, columns, table_batch, table_column, block_size,
    capacity, source, text_start, text_lens, slots, TILE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    before = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    for other in range(0, batch, SEQUENCES):
        b = other + tl.arange(0, SEQUENCES).to(tl.int64)
        begins, ends, firsts, lasts = sequences(b, b < batch, query_start, seq_lens, visual_start, ranges)
        more = text_tokens(ends, firsts, lasts, visual)[0] - text_tokens(begins, firsts, lasts, visual)[0]
        total += tl.sum(more, 0)
        before += tl.sum(tl.where(b < sequence, more, 0), 0)

    # With no sequence at all, there is still one program, which fills the plan with -1.
    one = sequence + tl.zeros((1,), tl.int64)
    exists = one < batch
    begin, end, first, last = sequences(one, exists, query_start, seq_lens, visual_start, ranges)
    text_before, text = text_tokens(begin, first, last, visual)[0], text_tokens(end, first, last, visual)[0]
    tl.store(text_start + one, tl.zeros((1,), tl.int32), mask=one == 0)
    tl.store(text_lens + one, text.to(tl.int32), mask=exists)
    tl.store(text_start + one + 1, (before + text - text_before).to(tl.int32), mask=exists)
    begun = tl.load(query_start + one, mask=exists, other=0).to(tl.int64)
    rows = tl.minimum(tl.sum(end - begin, 0), capacity)  # no more than fit, even if the values are wrong
    for tile in range(0, rows, TILE):
        row = tile + tl.arange(0, TILE).to(tl.int64)
        t, is_text = text_tokens(begin + row, first, last, visual)
        to = before + t - text_before
        written = is_text & (row < rows) & (to >= 0) & (to < capacity)
        column = t // block_size
        inside = written & (t >= 0) & (column < columns)
        block = tl.load(table + sequence * table_batch + column * table_column, mask=inside, other=-1).to(tl.int64)
        slot = tl.where(block < 0, -1, block * block_size + t % block_size)
        tl.store(source + to, (begun + row).to(tl.int32), mask=written)
        tl.store(slots + to, slot, mask=written)
    for rest in range(tl.maximum(total, 0) + sequence * TILE, capacity, tl.num_programs(0).to(tl.int64) * TILE):
        free = rest + tl.arange(0, TILE).to(tl.int64)
        tl.store(source + free, -1, mask=free < capacity)
        tl.store(slots + free, -1, mask=free < capacity)


def plan_packed_(
    plan: list[Tensor],
    query_start: Tensor,
    seq_lens: Tensor,
    visual: Tensor,
    visual_start: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    args = (query_start, seq_lens, visual, visual_start, block_table)
    check_packed(plan, *args, block_size)
    check_packed_disjoint(plan, *args)
    source, text_start, text_lens, slots = plan
    batch = seq_lens.shape[0]
    launch(
        pack_kernel, max(batch, 1), query_start, *args, batch, visual.shape[0], block_table.shape[1],
        *block_table.stride(), block_size, source.shape[0], source, text_start, text_lens, slots, TILE=TILE,
        SEQUENCES=SEQUENCES, threads=THREADS,
    )  # fmt: skip
