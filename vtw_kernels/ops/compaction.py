"""Compaction: a *plan* says, per sequence, which rows along the token axis survive; one call applies it to a list.

Throughout, ``B`` is the number of sequences, ``S`` of tokens before and ``T`` of rows after. The batch and the token
dimension may be anywhere in a tensor and may be counted from the end; all other dimensions are carried along.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vtw_kernels.ops import reference
from vtw_kernels.ops._registration import (
    EACH_RANK,
    call_on_list,
    refuse_sharded,
    register,
    register_gradient,
    register_mutation,
)
from vtw_kernels.ops.checks import check_keep, check_paged, check_tensors, require

_OPS = torch.ops.vtw_kernels


class _Rows(NamedTuple):
    source: Tensor
    lengths: Tensor


class CompactionPlan(_Rows):
    """Which rows survive; ``source, lengths = plan``.

    ``source`` int32 ``[B, T]``: ascending source rows, ``-1`` for a padding row; ``lengths`` int32 ``[B]``: how many
    rows of each sequence are kept; ``tokens``: the ``S`` that the plan was made for, so that no tensor of another size
    loses rows to it, or None where that is not known (``CompactionPlan(source, lengths)``), and then nothing is
    checked."""

    tokens: int | None = None

    def __new__(cls, source: Tensor, lengths: Tensor, tokens: int | None = None) -> "CompactionPlan":
        plan = super().__new__(cls, source, lengths)
        plan.tokens = tokens
        return plan


def plan_compaction(keep: Tensor, length: int | None = None, pad: Literal["right", "left"] = "right") -> CompactionPlan:
    """Turns a keep mask into a plan.

    Args:
        keep: bool ``[B, S]``, any strides.
        length: ``T``, the rows per sequence after compaction; ``None`` means ``S``, so nothing is read back to the
            host. A sequence that keeps more rows than ``length`` loses its last kept rows when padding is right, its
            first when left.
        pad: the side on which shorter sequences are padded.

    Returns:
        ``CompactionPlan(source, lengths)``.

    Raises:
        RuntimeError: ``keep`` is not bool ``[B, S]``, or ``length`` is negative.
        ValueError: ``pad`` is neither "right" nor "left".
    """
    if pad not in ("right", "left"):
        raise ValueError(f"plan_compaction: pad: expected 'right' or 'left', got {pad!r}")
    if length is not None:
        require(length >= 0, "plan_compaction", "length", "a number of rows, or None for all of S", length)
    refuse_sharded("plan_compaction", EACH_RANK, keep)
    source, lengths = _OPS.plan_compaction.default(keep, -1 if length is None else length, pad == "left")
    return CompactionPlan(source, lengths, keep.shape[1])


def compact(
    tensors: Sequence[Tensor],
    plan: CompactionPlan,
    token_dims: int | Sequence[int],
    batch_dims: int | Sequence[int] = 0,
    *,
    longer: bool = False,
) -> list[Tensor]:
    """Gathers the surviving rows of every tensor into new, contiguous tensors.

    On a GPU, one launch takes up to 176 tensors (20 before CUDA 12.1); of Triton's, up to 16 tensors of like geometry.

    Args:
        tensors: any number of tensors on one device, of any dtypes, ranks and strides (stride 0 included). A tensor
            whose batch size is 1 is broadcast over ``B``.
        plan: what ``plan_compaction`` returned.
        token_dims: the dimension of size ``S``, one for all tensors or one each.
        batch_dims: the dimension of size ``B`` (or 1), likewise.
        longer: takes tensors of more than ``S`` rows as well, such as a static cache that is not full.

    Returns:
        One tensor per input, with ``T`` in place of ``S`` and ``B`` in the batch dimension; padding rows are zero.
        Differentiable in the floating-point tensors.

    Raises:
        RuntimeError: a dimension, dtype, device or batch size that does not fit, or a number of rows other than the
            ``S`` that the plan was made for; on the CPU also a ``plan.source`` that is out of range or not ascending.
        TypeError: ``plan`` is not a ``CompactionPlan``, or ``tensors`` not a list.
    """
    op = "compact"
    tensors = _as_list(op, tensors)
    token_dims, batch_dims = _per_tensor(token_dims, tensors), _per_tensor(batch_dims, tensors)
    _check_plan(op, plan, tensors, token_dims, longer)
    return call_on_list(_OPS.compact.default, tensors, token_dims, batch_dims, plan.source)


def compact_(
    tensors: Sequence[Tensor],
    plan: CompactionPlan,
    token_dims: int | Sequence[int],
    batch_dims: int | Sequence[int] = 0,
    *,
    longer: bool = False,
) -> None:
    """Moves the surviving rows of every tensor to the front, in place.

    Rows at and after a sequence's length are left as they were, and nothing before the first dropped row is touched.
    Takes right-padded plans only. On a GPU, all tensors move in as few launches as in ``compact``, each after a fill of
    counters if the plan has more than 128 rows (4 bytes for at most 32 KB that move). The arguments are those of
    ``compact``, except that every tensor has batch size ``B`` and memory of its own for each element.

    Raises:
        RuntimeError: as ``compact``; also for a left-padded plan, a tensor that overlaps itself, another one or
            ``plan.source``, one that requires a gradient, or, under torch.compile, a view whose offset depends on a
            dynamic shape.
        TypeError: as ``compact``.
    """
    op = "compact_"
    tensors = _as_list(op, tensors)
    token_dims, batch_dims = _per_tensor(token_dims, tensors), _per_tensor(batch_dims, tensors)
    _check_plan(op, plan, tensors, token_dims, longer)
    call_on_list(_OPS.compact_.default, tensors, token_dims, batch_dims, plan.source, in_place=True)


def expand(
    tensors: Sequence[Tensor],
    plan: CompactionPlan,
    length: int,
    token_dims: int | Sequence[int],
    batch_dims: int | Sequence[int] = 0,
) -> list[Tensor]:
    """The inverse of ``compact``: rows go back to where they came from, and every other row is zero.

    Args:
        tensors: tensors with ``T`` rows in their token dimension and batch size ``B`` (or 1: broadcast).
        plan: the plan that compacted them.
        length: ``S``, the number of rows to go back to, or more.
        token_dims, batch_dims: as in ``compact``.

    Returns:
        One new, contiguous tensor per input, with ``length`` in place of ``T``. Differentiable in the floating-point
        tensors.

    Raises:
        RuntimeError: as ``compact``; also for a ``length`` below the ``S`` that the plan was made for, and on the CPU
            when the plan names a row at or beyond ``length``.
        TypeError: as ``compact``.
    """
    op = "expand"
    tensors = _as_list(op, tensors)
    token_dims, batch_dims = _per_tensor(token_dims, tensors), _per_tensor(batch_dims, tensors)
    _check_plan(op, plan)
    enough = plan.tokens is None or length >= plan.tokens
    require(enough, op, "length", f"at least the {plan.tokens} rows that plan was made for", length)
    return call_on_list(_OPS.expand.default, tensors, token_dims, batch_dims, plan.source, length)


def compact_paged_(
    caches: Sequence[Tensor],
    block_table: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    layout: Literal["NHD", "HND"] = "NHD",
) -> Tensor:
    """Moves the surviving tokens of paged KV caches to the front of their sequences, in place and in logical order.

    Token ``t`` of sequence ``b`` lies in slot ``t % block_size`` of page ``block_table[b, t // block_size]``. Nothing
    before the first dropped token is touched, nor anything at or after the new length; pages beyond the new length are
    the caller's to release. On a GPU, all caches move in as few launches as in ``compact``, after one for the plan.

    Args:
        caches: the keys and values of all layers, ``[blocks, block_size, heads, dim]`` ("NHD") or
            ``[blocks, heads, block_size, dim]`` ("HND"), any dtypes, heads, dims and strides; for example the two
            halves of a ``[2, blocks, block_size, heads, dim]`` cache of vLLM.
        block_table: int32 ``[B, pages]``, any strides. Entries beyond a sequence's last page are not looked at. A page
            that several sequences share may hold the part that stays, but must not be one that changes.
        seq_lens: int32 ``[B]``, tokens per sequence.
        keep: bool ``[B, S]``: which tokens survive; those at or beyond ``seq_lens[b]`` are not looked at.
        layout: "NHD" or "HND".

    Returns:
        The new lengths, int32 ``[B]``.

    Raises:
        RuntimeError: a shape, dtype, device or layout that does not fit, caches that overlap (one another, themselves,
            or what is read) or require a gradient, under torch.compile views as in ``compact_``; on the CPU also
            lengths or pages out of range, and shared pages that would change. On a GPU, where values are not looked
            at, a token without a page in range stays where it is.
    """
    if isinstance(caches, Tensor):
        raise TypeError("compact_paged_: caches: expected a list of tensors, got one tensor; write [cache]")
    return call_on_list(_OPS.compact_paged_.default, list(caches), block_table, seq_lens, keep, layout, in_place=True)


def _check_plan(
    op: str, plan: CompactionPlan, tensors: Sequence[Tensor] = (), token_dims: Sequence[int] = (), longer: bool = False
) -> None:
    """Checks that tensors have as many rows as the plan was made for. The op itself sees only ``source``, and would
    silently lose rows to a stale plan or a wrong token dimension."""
    if not isinstance(plan, CompactionPlan):
        raise TypeError(f"{op}: plan: expected what plan_compaction returns, got {type(plan).__name__}")
    if plan.tokens is None:
        return
    try:
        sizes = [x.shape[dim] for x, dim in zip(tensors, token_dims)]
    except IndexError:
        return  # the op says of which tensor the dimension is out of range
    for i, size in enumerate(sizes):
        if size == plan.tokens or (longer and size > plan.tokens):
            continue
        wanted = f"the {plan.tokens} rows in dimension {token_dims[i]} that plan was made for"
        hint = "" if longer else "; if it is longer on purpose, as a static cache is, write longer=True"
        require(False, op, f"tensors[{i}]", f"at least {wanted}" if longer else wanted, f"{size}{hint}")


def _as_list(op: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{op}: tensors: expected a list of tensors, got one tensor; write [tensor]")
    return list(tensors)


def _per_tensor(dims: int | Sequence[int], tensors: list[Tensor]) -> list[int]:
    return [dims] * len(tensors) if isinstance(dims, int) else list(dims)


def _resized(x: Tensor, token_dim: int, tokens: int, batch_dim: int, batch: int) -> Tensor:
    shape = list(x.shape)
    shape[token_dim], shape[batch_dim] = tokens, batch
    return x.new_empty(shape)


def _plan_compaction_fake(keep: Tensor, length: int = -1, pad_left: bool = False) -> tuple[Tensor, Tensor]:
    check_keep(keep, length)
    kept = keep.shape[1] if length < 0 else length
    return keep.new_empty(keep.shape[0], kept, dtype=torch.int32), keep.new_empty(keep.shape[0], dtype=torch.int32)


def _compact_fake(tensors, token_dims, batch_dims, source):
    dims = check_tensors("compact", tensors, token_dims, batch_dims, source)
    batch, kept = source.shape
    return [_resized(x, token_dim, kept, batch_dim, batch) for x, (token_dim, batch_dim) in zip(tensors, dims)]


def _check_offsets(op: str, name: str, tensors: list[Tensor], instead: str = "") -> None:
    """Refuses views at an offset that depends on a dynamic shape: Inductor makes the views that an op writes to again,
    without that offset, and the op would write elsewhere."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # takes seconds; under torch.compile it is there

    for i, x in enumerate(tensors):
        offset = x.storage_offset()
        given = f"a view at offset {offset}; {instead}make its shape static (torch._dynamo.mark_static)"
        wanted = "memory that begins at a place known to torch.compile"
        require(is_concrete_int(offset), op, f"{name}[{i}]", wanted, given)


def _compact_inplace_fake(tensors, token_dims, batch_dims, source):
    check_tensors("compact_", tensors, token_dims, batch_dims, source)
    _check_offsets("compact_", "tensors", tensors, "write x.copy_(compact([x], ...)[0]) instead, or ")


def _expand_fake(tensors, token_dims, batch_dims, source, length):
    dims = check_tensors("expand", tensors, token_dims, batch_dims, source)
    require(length >= 0, "expand", "length", "a number of rows", length)
    return [
        _resized(x, token_dim, length, batch_dim, source.shape[0]) for x, (token_dim, batch_dim) in zip(tensors, dims)
    ]


def _compact_paged_inplace_fake(caches, block_table, seq_lens, keep, layout="NHD"):
    check_paged(caches, block_table, seq_lens, keep, layout)
    _check_offsets("compact_paged_", "caches", caches)
    return torch.empty_like(seq_lens)


def _setup_context(ctx, inputs, output):
    tensors, token_dims, batch_dims, source = inputs[:4]
    ctx.save_for_backward(source)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(y for x, y in zip(tensors, output) if not x.requires_grad))
    ctx.token_dims, ctx.batch_dims = token_dims, batch_dims
    ctx.shapes = [x.shape for x in tensors]


def _backward(ctx, grads: list[Tensor | None], inverse) -> list[Tensor | None]:
    """Applies the inverse op to the gradients that exist, and sums over a batch that the forward broadcast."""
    (source,) = ctx.saved_tensors
    wanted = [i for i, grad in enumerate(grads) if grad is not None]
    token_dims, batch_dims = [ctx.token_dims[i] for i in wanted], [ctx.batch_dims[i] for i in wanted]
    moved = inverse([grads[i] for i in wanted], token_dims, batch_dims, source, wanted) if wanted else []
    result: list[Tensor | None] = [None] * len(grads)
    for i, grad in zip(wanted, moved):
        result[i] = grad.sum_to_size(ctx.shapes[i])
    return result


def _compact_backward(ctx, grads):
    def inverse(grads, token_dims, batch_dims, source, wanted):
        # Tensors of one list may differ in S (a static cache is longer than its prompt), and expand takes one length.
        lengths = [ctx.shapes[i][ctx.token_dims[i]] for i in wanted]
        moved: list[Tensor | None] = [None] * len(grads)
        for first, length in enumerate(lengths):
            if moved[first] is None:
                group = [j for j, other in enumerate(lengths) if other == length]
                args = ([values[j] for j in group] for values in (grads, token_dims, batch_dims))
                for j, grad in zip(group, _OPS.expand.default(*args, source, length)):
                    moved[j] = grad
        return moved

    return _backward(ctx, grads, inverse), None, None, None


def _expand_backward(ctx, grads):
    def inverse(grads, token_dims, batch_dims, source, wanted):
        return _OPS.compact.default(grads, token_dims, batch_dims, source)

    return _backward(ctx, grads, inverse), None, None, None, None


register("plan_compaction", reference=reference.plan_compaction, fake=_plan_compaction_fake, triton="compaction")
register("compact", reference=reference.compact, fake=_compact_fake, triton="compaction")
register("compact_", reference=reference.compact_, fake=_compact_inplace_fake, triton="compaction")
register("expand", reference=reference.expand, fake=_expand_fake, triton="compaction")
register("compact_paged_", reference=reference.compact_paged_, fake=_compact_paged_inplace_fake, triton="compaction")
register_mutation("compact_")
register_mutation("compact_paged_")
register_gradient("compact", _compact_backward, _setup_context)
register_gradient("expand", _expand_backward, _setup_context)
