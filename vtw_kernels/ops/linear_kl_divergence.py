"""KL divergence of two projections, without their logits: chunks of the vocabulary go through the matrix products, and
the states of the chunks merge. The backward makes the logits of each chunk again from the merged state."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtw_kernels.ops._registration import (
    refuse_sharded,
    register_autocast,
    register_composite,
    register_gradient,
    register_over_ops,
)
from vtw_kernels.ops.checks import check_linear_kl, real_dtype
from vtw_kernels.ops.kl_divergence import no_second_derivative
from vtw_kernels.ops.reference import grad_of_kl

OPS = torch.ops.vtw_kernels
# What the two logits of a chunk may take by default. The smaller, the closer they stay to the processor: this is about
# the last-level cache of a large GPU. But a matrix product also has to fill that GPU: for 8192 rows of bf16 a chunk has
# 2048 entries, which is some hundreds of tiles.
LOGITS_BYTES = 64 * 2**20
# A multiple of every tile of a matrix product, so that only the last chunk is ragged.
CHUNK_STEP = 1024


def linear_kl_divergence(
    p_hidden: Tensor,
    p_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    temperature: float = 1.0,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """``kl_divergence(F.linear(p_hidden, p_weight, p_bias), F.linear(q_hidden, q_weight, q_bias), temperature)``
    without ever holding ``[N, V]``, forward or backward.

    Args:
        p_hidden: ``[..., H_p]``, fp32, fp16, bf16 or fp64. All tensors have one dtype and device.
        p_weight: ``[V, H_p]``.
        q_hidden: ``[..., H_q]``. Leading dimensions broadcast, and a row that does is projected once.
        q_weight: ``[V, H_q]``; may be ``p_weight`` itself.
        temperature: a number above 0 that divides the logits of both.
        p_bias, q_bias: ``[V]`` or None. ``-inf`` gives an entry of the vocabulary a probability of 0.
        chunk: how many entries of the vocabulary to project at a time. By default the largest multiple of 1024 for
            which the two logits, ``2·N·chunk`` numbers, take at most 64 MiB, and at least 1024.

    Returns:
        ``[...]``, fp32 (fp64 for fp64 inputs), exact as ``kl_divergence`` is for the logits that it is given: those of
        F.linear in the dtype of the inputs, so rounded to bf16 for bf16, as a model's own are. Equal inputs with equal
        ``chunk`` give equal bits. Differentiable once, in all six tensors.

    Memory: with ``N`` rows after broadcasting and ``e`` bytes per number, the forward takes ``2·chunk·N·e`` bytes
    beyond its inputs and result, and the backward ``(2·chunk + max(2·chunk, H))·N·e``. In low precision it takes up to
    ``8·N·H`` more for each hidden that needs a gradient, as that is summed in fp32; gradients of weights are written
    where they belong.

    Under ``torch.autocast`` all tensors are cast to its dtype, fp64 excepted, as F.linear casts them, and the result is
    still fp32.

    Raises:
        RuntimeError: dtypes, devices or shapes that do not fit, a temperature that is not above 0, a chunk below 1.
    """
    tensors = p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias
    refuse_sharded("linear_kl_divergence", "write kl_divergence of two projections", tensors)
    return OPS.linear_kl_divergence_with_state(*tensors, temperature, chunk)[0]


class _Projection(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, entries: slice) -> Tensor:
        return F.linear(self.hidden, self.weight[entries], None if self.bias is None else self.bias[entries])


def _rows(p: _Projection, q: _Projection) -> torch.Size:
    return torch.broadcast_shapes(p.hidden.shape[:-1], q.hidden.shape[:-1])


def _sum_dtype(p: _Projection) -> torch.dtype:
    return real_dtype(p.hidden)


def _chunks(p: _Projection, q: _Projection, chunk: int | None) -> Iterator[slice]:
    if chunk is None:
        entry_bytes = 2 * max(1, _rows(p, q).numel()) * p.hidden.element_size()
        chunk = max(1, LOGITS_BYTES // (entry_bytes * CHUNK_STEP)) * CHUNK_STEP
    return (slice(begin, begin + chunk) for begin in range(0, len(p.weight), chunk))


def _with_state(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, temperature, chunk) -> tuple[Tensor, Tensor]:
    p, q = _Projection(p_hidden, p_weight, p_bias), _Projection(q_hidden, q_weight, q_bias)
    check_linear_kl(*p, *q, temperature, chunk)
    # From the state of an empty shard on; in fp64, so that many chunks round no more often than one.
    state = OPS.kl_state(p_hidden[..., :0], q_hidden[..., :0]).double()
    for entries in _chunks(p, q, chunk):
        part = OPS.kl_state(p.logits(entries), q.logits(entries), temperature)
        state = OPS.merge_kl_states([state, part.double()])
    return OPS.kl_from_state(state).to(_sum_dtype(p)), state.to(_sum_dtype(p))


def _with_state_fake(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, temperature, chunk):
    p, q = _Projection(p_hidden, p_weight, p_bias), _Projection(q_hidden, q_weight, q_bias)
    check_linear_kl(*p, *q, temperature, chunk)
    rows, dtype = _rows(p, q), _sum_dtype(p)
    return p_hidden.new_empty(rows, dtype=dtype), p_hidden.new_empty(*rows, 5, dtype=dtype)


def _backward(
    grad_state, p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, state, temperature, chunk, needs
) -> list[Tensor]:
    """The gradients of the six tensors, empty where not needed."""
    p, q = _Projection(p_hidden, p_weight, p_bias), _Projection(q_hidden, q_weight, q_bias)
    need_p, need_q = any(needs[:3]), any(needs[3:])
    dtypes = [_sum_dtype(p), None, None] * 2  # the gradient of a hidden is a sum over the chunks
    tensors: tuple[Any, ...] = *p, *q  # a bias that is None needs no gradient
    grads: list[Any] = [
        x.new_zeros(x.shape, dtype=dtype) if need else None for x, dtype, need in zip(tensors, dtypes, needs)
    ]
    for entries in _chunks(p, q, chunk):
        slopes = OPS.kl_divergence_backward(
            grad_state, p.logits(entries), q.logits(entries), state, temperature, need_p, need_q
        )
        if need_p:
            _add_chunk(_Projection(*grads[:3]), p, entries, slopes[0])
        if need_q:
            _add_chunk(_Projection(*grads[3:]), q, entries, slopes[1])
        del slopes  # not to be held while the logits of the next chunk are made
    return [p_hidden.new_empty(0) if x is None else x.to(p_hidden.dtype) for x in grads]


def _add_chunk(grads: _Projection, projection: _Projection, entries: slice, slope: Tensor) -> None:
    """Adds to the gradients of a projection what comes through the logits of some entries."""
    hidden, weight, _ = projection
    slope = slope.sum_to_size(*hidden.shape[:-1], slope.shape[-1]).reshape(-1, slope.shape[-1])
    if grads.hidden is not None:
        grads.hidden.add_((slope @ weight[entries]).view_as(hidden))
    if grads.weight is not None:
        torch.mm(slope.t(), hidden.reshape(len(slope), hidden.shape[-1]), out=grads.weight[entries])
    if grads.bias is not None:
        torch.sum(slope, 0, out=grads.bias[entries])


def _backward_fake(
    grad_state, p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, state, temperature, chunk, needs
) -> list[Tensor]:
    tensors = p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias
    return [x.new_empty(x.shape) if need else p_hidden.new_empty(0) for x, need in zip(tensors, needs)]


def _with_state_setup(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.chunk = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _with_state_backward(ctx, grad_kl: Tensor | None, grad_state: Tensor | None):
    *tensors, state = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    grads = [] if grad_state is None else [grad_state]
    if grad_kl is not None:
        grads.append(grad_of_kl(state, grad_kl))
    if not grads:
        return (None,) * 8
    grads = OPS.linear_kl_divergence_backward(sum(grads), *tensors, state, ctx.temperature, ctx.chunk, needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), None, None


register_composite("linear_kl_divergence", linear_kl_divergence)
register_over_ops("linear_kl_divergence_with_state", kernel=_with_state, fake=_with_state_fake)
register_over_ops("linear_kl_divergence_backward", kernel=_backward, fake=_backward_fake)
register_autocast("linear_kl_divergence_with_state", cast=True)
register_autocast("linear_kl_divergence_backward", cast=False)
register_gradient("linear_kl_divergence_with_state", _with_state_backward, _with_state_setup)
register_gradient("linear_kl_divergence_backward", no_second_derivative)
