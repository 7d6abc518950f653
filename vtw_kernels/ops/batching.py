"""Batching rules for torch.func.vmap.

KL: the dimension that vmap maps over is one more leading dimension that broadcasts, so nothing is expanded or copied,
and a tensor that is not mapped over is still read once. Compaction: with one plan for all it is one more dimension of
each tensor; with a plan for each, it is merged with the batch dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtw_kernels.ops.checks import require

OPS = torch.ops.vtw_kernels


def _batched_pair(p: Tensor, q: Tensor, p_dim: int | None, q_dim: int | None) -> tuple[Tensor, Tensor]:
    """Both tensors with the dimension of vmap in front, and behind it as many dimensions of size 1 as it takes for the
    two to broadcast."""
    pair = ((p, p_dim), (q, q_dim))
    rank = max(x.dim() - (dim is not None) for x, dim in pair)
    in_front = (x if dim is None else x.movedim(dim, 0) for x, dim in pair)
    p, q = (
        x if dim is None else x.reshape(len(x), *[1] * (rank + 1 - x.dim()), *x.shape[1:])
        for x, (_, dim) in zip(in_front, pair)
    )
    return p, q


def _batched(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """With the dimension of vmap in front, expanded where there is none."""
    return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


def _with_state(info, in_dims, p_logits: Tensor, q_logits: Tensor, temperature: float):
    return OPS.kl_divergence_with_state(*_batched_pair(p_logits, q_logits, *in_dims[:2]), temperature), (0, 0)


def _backward(info, in_dims, grad, p_logits, q_logits, state, temperature, need_p, need_q):
    grad_dim, p_dim, q_dim, state_dim = in_dims[:4]
    if p_dim is None and q_dim is None:  # many gradients of one result
        p_logits, p_dim = p_logits.expand(info.batch_size, *p_logits.shape), 0
    grads = OPS.kl_divergence_backward(
        _batched(grad, grad_dim, info.batch_size),
        *_batched_pair(p_logits, q_logits, p_dim, q_dim),
        _batched(state, state_dim, info.batch_size),
        *(temperature, need_p, need_q),
    )
    return grads, (0 if need_p else None, 0 if need_q else None)


def _loss(info, in_dims, p_logits, q_logits, temperature=1.0, weight=None):
    """From the divergence, whose gradient is used: what each result of vmap will count is not known beforehand, so the
    gradients can't be computed in the forward."""
    kl = OPS.kl_divergence_with_state(*_batched_pair(p_logits, q_logits, *in_dims[:2]), temperature)[0]
    if in_dims[:2] == (None, None):
        kl = kl.expand(info.batch_size, *kl.shape)
    if weight is None:
        return kl.unsqueeze(-1).flatten(1).mean(1), 0
    weight = _batched(weight, in_dims[3], info.batch_size)
    return torch.where(weight == 0, 0.0, weight * kl).unsqueeze(-1).flatten(1).sum(1), 0


def _merge(info, in_dims, states: Sequence[Tensor]):
    return OPS.merge_kl_states([_batched(x, dim, info.batch_size) for x, dim in zip(states, in_dims[0])]), 0


def _from_state(info, in_dims, state: Tensor):
    return OPS.kl_from_state(state.movedim(in_dims[0], 0)), 0


# --- compaction -----------------------------------------------------------------------------------


def _plan(info, in_dims, keep: Tensor, length: int = -1, pad_left: bool = False):
    keep = keep.movedim(in_dims[0], 0)
    outputs = OPS.plan_compaction(keep.flatten(0, 1), length, pad_left)
    return tuple(x.unflatten(0, keep.shape[:2]) for x in outputs), (0, 0)


def _from_front(op: str, name: str, tensors: Sequence[Tensor], in_dims: Sequence[int | None], dims: Sequence[int]):
    """Checks dimensions that count within the tensors that a function under vmap sees; returns them counted from the
    front."""
    require(len(dims) == len(tensors), op, name, f"one entry for each of the {len(tensors)} tensors", len(dims))
    ranks = [x.dim() - (dim is not None) for x, dim in zip(tensors, in_dims)]
    for i, (rank, dim) in enumerate(zip(ranks, dims)):
        require(-rank <= dim < rank, op, f"{name}[{i}]", f"a dimension in [{-rank}, {rank - 1}]", dim)
    return [dim % rank for rank, dim in zip(ranks, dims)]


def _next_to_batch(x: Tensor, dim: int | None, batch_dim: int, source: Tensor) -> Tensor:
    """The tensor with the dimension of vmap right before its batch dimension, as in ``source`` ``[N, B, T]``."""
    x = x.unsqueeze(batch_dim) if dim is None else x.movedim(dim, batch_dim)
    sizes = [-1] * x.dim()
    sizes[batch_dim] = source.shape[0]
    if x.shape[batch_dim + 1] == 1:
        sizes[batch_dim + 1] = source.shape[1]
    return x.expand(sizes)


def _under_one_plan(tensors, in_dims, token_dims: list[int], batch_dims: list[int]) -> tuple[list[Tensor], ...]:
    """Tensors with the dimension of vmap in front, and their token and batch dimensions there."""
    tensors = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims)]
    moved = ([d + (dim is not None) for d, dim in zip(dims, in_dims)] for dims in (token_dims, batch_dims))
    return tensors, *moved


def _gather_rule(name: str):
    op = getattr(OPS, name)

    def rule(info, in_dims, tensors, token_dims, batch_dims, source: Tensor, *length: int):
        of_tensors, of_source = in_dims[0], in_dims[3]
        token_dims = _from_front(name, "token_dims", tensors, of_tensors, token_dims)
        batch_dims = _from_front(name, "batch_dims", tensors, of_tensors, batch_dims)
        if of_source is None:
            moved = _under_one_plan(tensors, of_tensors, token_dims, batch_dims)
            return op(*moved, source, *length), [None if dim is None else 0 for dim in of_tensors]
        source = source.movedim(of_source, 0)
        merged = [
            # A tensor that all sequences of all calls share is broadcast, as without vmap.
            x if dim is None and x.shape[b] == 1 else _next_to_batch(x, dim, b, source).flatten(b, b + 1)
            for x, dim, b in zip(tensors, of_tensors, batch_dims)
        ]
        outputs = op(merged, token_dims, batch_dims, source.flatten(0, 1), *length)
        return [x.unflatten(b, source.shape[:2]) for x, b in zip(outputs, batch_dims)], batch_dims

    return rule


def _compact_inplace(info, in_dims, tensors, token_dims, batch_dims, source: Tensor):
    of_tensors, of_source = in_dims[0], in_dims[3]
    token_dims = _from_front("compact_", "token_dims", tensors, of_tensors, token_dims)
    batch_dims = _from_front("compact_", "batch_dims", tensors, of_tensors, batch_dims)
    if of_source is None:
        OPS.compact_(*_under_one_plan(tensors, of_tensors, token_dims, batch_dims), source)
        return None, None
    source = source.movedim(of_source, 0)
    for i, dim in enumerate(of_tensors):
        require(dim is not None, "compact_", f"tensors[{i}]", "one that vmap maps over, as over source", "one for all")
    # Merging the two dimensions gives a view only if memory allows it; otherwise a copy is compacted, and copied back.
    apart = [x.movedim(dim, b) for x, dim, b in zip(tensors, of_tensors, batch_dims)]
    merged = [x.flatten(b, b + 1) for x, b in zip(apart, batch_dims)]
    OPS.compact_(merged, token_dims, batch_dims, source.flatten(0, 1))
    for x, y, b in zip(apart, merged, batch_dims):
        if not y._is_view() or y._base is not x._base:
            x.copy_(y.unflatten(b, source.shape[:2]))
    return None, None


def _compact_paged_inplace(info, in_dims, caches, block_table, seq_lens, keep, layout="NHD"):
    shared = all(dim is None for dim in in_dims[0])
    require(shared, "compact_paged_", "caches", "pages that are the same for all that vmap maps over", "some for each")
    each = [_batched(x, dim, info.batch_size) for x, dim in zip((block_table, seq_lens, keep), in_dims[1:4])]
    lengths = OPS.compact_paged_(caches, *(x.flatten(0, 1) for x in each), layout)
    return lengths.unflatten(0, each[1].shape[:2]), 0


# --- KL of projections ----------------------------------------------------------------------------


def _one_by_one(name: str):
    """A rule that loops over the calls: the time goes into the matrix products, which are the same in a loop."""
    op = getattr(OPS, name)

    def rule(info, in_dims, *args):
        def of(i: int):
            return (x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims))

        outputs = [op(*of(i)) for i in range(info.batch_size)]
        kind = type(outputs[0])
        stacked = kind(torch.stack(x) for x in zip(*outputs))
        return stacked, kind(0 for _ in stacked)

    return rule


torch.library.register_vmap("vtw_kernels::plan_compaction", _plan)
torch.library.register_vmap("vtw_kernels::compact", _gather_rule("compact"))
torch.library.register_vmap("vtw_kernels::expand", _gather_rule("expand"))
torch.library.register_vmap("vtw_kernels::compact_", _compact_inplace)
torch.library.register_vmap("vtw_kernels::compact_paged_", _compact_paged_inplace)
torch.library.register_vmap(
    "vtw_kernels::linear_kl_divergence_with_state", _one_by_one("linear_kl_divergence_with_state")
)
torch.library.register_vmap("vtw_kernels::linear_kl_divergence_backward", _one_by_one("linear_kl_divergence_backward"))
torch.library.register_vmap("vtw_kernels::kl_divergence_with_state", _with_state)
torch.library.register_vmap("vtw_kernels::kl_divergence_backward", _backward)
torch.library.register_vmap("vtw_kernels::kl_divergence_loss", _loss)
torch.library.register_vmap("vtw_kernels::merge_kl_states", _merge)
torch.library.register_vmap("vtw_kernels::kl_from_state", _from_state)
