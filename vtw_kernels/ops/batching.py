"""Batching rules for torch.func.vmap: a batch dimension is one more leading dimension that broadcasts, so nothing is
expanded or copied, and a reference that is not batched is still read once.

Gradients are taken outside (``loss(vmap(...)).backward()``, or ``is_grads_batched=True``): torch.func.grad refuses
every op whose gradient is that of a plain autograd.Function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OPS = torch.ops.vtw_kernels


def _batched_pair(p: Tensor, q: Tensor, p_dim: int | None, q_dim: int | None) -> tuple[Tensor, Tensor]:
    """Batch dimensions in front, with ones behind them up to the rank of the other tensor."""
    pair = ((p, p_dim), (q, q_dim))
    rank = max(x.dim() - (dim is not None) for x, dim in pair)
    in_front = (x if dim is None else x.movedim(dim, 0) for x, dim in pair)
    return tuple(
        x if dim is None else x.reshape(len(x), *[1] * (rank + 1 - x.dim()), *x.shape[1:])
        for x, (_, dim) in zip(in_front, pair)
    )


def _batched(x: Tensor, dim: int | None, batch: int) -> Tensor:
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
    """The gradient is that of the divergence: how a result for each batch is weighed is not known before."""
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


torch.library.register_vmap("vtw_kernels::kl_divergence_with_state", _with_state)
torch.library.register_vmap("vtw_kernels::kl_divergence_backward", _backward)
torch.library.register_vmap("vtw_kernels::kl_divergence_loss", _loss)
torch.library.register_vmap("vtw_kernels::merge_kl_states", _merge)
torch.library.register_vmap("vtw_kernels::kl_from_state", _from_state)
