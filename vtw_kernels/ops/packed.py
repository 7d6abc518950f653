"""The plan for packed rows: those of a step of continuous batching, one sequence behind another, without padding.

An engine such as vLLM runs a decoder on the rows of all requests of a step at once, and keeps their keys and values in
blocks. Rows of such a step are a batch of one, so that ``compact`` and ``expand`` move them as they are; what is new is
the plan: which rows are text, how many that makes of each request, and where their keys and values go.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vtw_kernels.ops import reference
from vtw_kernels.ops._registration import EACH_RANK, call_on_list, refuse_sharded, register, register_mutation
from vtw_kernels.ops.checks import check_packed

_OPS = torch.ops.vtw_kernels


class PackedPlan(NamedTuple):
    """The text rows of a step; ``N`` rows at most, of ``B`` sequences.

    ``source`` int32 ``[N]``: for each text row, which of the packed rows it is, ascending, and -1 behind them;
    ``source[None, :n]`` of the first ``n`` is what ``compact`` and ``expand`` take. ``query_start`` int32 ``[B + 1]``:
    where each sequence begins among the text rows, and their number. ``seq_lens`` int32 ``[B]``: text tokens of each
    sequence so far, those of this step included. ``slots`` int64 ``[N]``: where keys and values of each text row are
    kept, and -1 behind them."""

    source: Tensor
    query_start: Tensor
    seq_lens: Tensor
    slots: Tensor

    @classmethod
    def empty(cls, rows: int, sequences: int, device: torch.device | str | None = None) -> "PackedPlan":
        """Uninitialised memory for steps of at most so many rows and exactly so many sequences."""
        return cls(
            torch.empty(rows, dtype=torch.int32, device=device),
            torch.empty(sequences + 1, dtype=torch.int32, device=device),
            torch.empty(sequences, dtype=torch.int32, device=device),
            torch.empty(rows, dtype=torch.int64, device=device),
        )


def plan_packed_(
    plan: PackedPlan,
    query_start: Tensor,
    seq_lens: Tensor,
    visual: Tensor,
    visual_start: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    """Plans a step of continuous batching without its visual rows, into memory that the caller owns.

    The rows ``query_start[b]`` to ``query_start[b + 1]`` are the last ones of the ``seq_lens[b]`` tokens that sequence
    ``b`` has so far. Text token ``t`` of a sequence, counting text alone, lies in slot ``t % block_size`` of its block
    ``t // block_size``. Nothing is allocated and nothing is read back to the host: a CUDA graph can capture it.

    Args:
        plan: what is written, all of it; contiguous.
        query_start: int32 ``[B + 1]``, ascending from 0 to at most ``N``; contiguous, as all lists are.
        seq_lens: int32 ``[B]``.
        visual: int32 ``[R, 2]``, the first visual token of each image and the one behind its last, counted from the
            start of its sequence; of one sequence, ascending and apart. Tokens that do not exist yet may be among them.
        visual_start: int32 ``[B + 1]``, ascending from 0 to at most ``R``: the images of sequence ``b`` are those from
            ``visual_start[b]`` to ``visual_start[b + 1]``.
        block_table: int32 ``[B, blocks]``, any strides. A row in no block, or in one with a negative number, has slot
            -1.
        block_size: tokens in a block.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit, or ``plan`` sharing memory with what is read;
            on the CPU also values that do not. On a GPU values are not looked at; the kernels keep to the tensors.
    """
    tensors = list(plan)
    args = (query_start, seq_lens, visual, visual_start, block_table)
    refuse_sharded("plan_packed_", EACH_RANK, *tensors, *args)
    call_on_list(_OPS.plan_packed_.default, tensors, *args, block_size, in_place=True)


def _plan_packed_fake(plan, query_start, seq_lens, visual, visual_start, block_table, block_size):
    check_packed(plan, query_start, seq_lens, visual, visual_start, block_table, block_size)


register("plan_packed_", reference=reference.plan_packed_, fake=_plan_packed_fake, triton="packed")
register_mutation("plan_packed_")
