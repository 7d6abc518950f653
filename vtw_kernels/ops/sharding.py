"""Sharding rules of DTensor for the divergence: rows may be shared out, and what broadcasts over them is then on every
rank; logits that are shared out otherwise are gathered first, as DTensor does. For a sharded vocabulary
``kl_divergence_vocab_parallel`` exchanges 20 bytes per row instead."""

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

OPS = torch.ops.vtw_kernels


def _placements(p, q):
    """Of the results, of p and of q, on one dimension of the mesh: everything, or rows along one dimension."""
    yield Replicate(), Replicate(), Replicate()
    shape = torch.broadcast_shapes(p.shape[:-1], q.shape[:-1])
    for dim, size in enumerate(shape):
        own = [dim - len(shape) + x.ndim - 1 for x in (p, q)]
        varies = [d >= 0 and x.shape[d] == size for d, x in zip(own, (p, q))]
        yield Shard(dim), *(Shard(d) if there else Replicate() for d, there in zip(own, varies))


@register_sharding(OPS.kl_divergence_with_state.default)
def _with_state(p_logits, q_logits, temperature):
    return [([rows, rows], [p, q, None]) for rows, p, q in _placements(p_logits, q_logits)]


@register_sharding(OPS.kl_divergence_backward.default)
def _backward(grad, p_logits, q_logits, state, temperature, need_p, need_q):
    return [([rows, rows], [rows, p, q, rows, None, None, None]) for rows, p, q in _placements(p_logits, q_logits)]
