"""KL divergence from logits in one read: ``KL(p‖q)`` is five running numbers per row, and two such *states* merge.

A state is ``(m_p, z_p, a, m_q, z_q)``: two maxima, two sums of exponentials ``z = Σ e^(x - m)``, and
``a = Σ e^(p - m_p)·(p - q)``, so that ``KL = a/z_p - (m_p + ln z_p) + (m_q + ln z_q)``. (The running form of ``a`` is
known from Fast-LLM's entropy kernels.) Where ``a`` would overflow, as in a shard in which q is masked by the least
finite number, ``m_p`` is a number above the maximum, which says the same. ``V`` is the size of the vocabulary.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from vtw_kernels.ops import reference
from vtw_kernels.ops._registration import (
    is_sharded,
    refuse_sharded,
    register,
    register_composite,
    register_gradient,
)
from vtw_kernels.ops.checks import check_backward, check_logits, check_state, check_states, real_dtype

_OPS = torch.ops.vtw_kernels
OWN_ROWS = "call it on every rank with x.to_local(), which has the rows of that rank"


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(p/temperature) ‖ softmax(q/temperature))`` per row, in nats.

    Note the order: ``F.kl_div(log_softmax(q), log_softmax(p), log_target=True)`` is this ``KL(p‖q)``.

    Args:
        p_logits: ``[..., V]``, fp32, fp16, bf16 or fp64, any strides.
        q_logits: ``[..., V]`` of the same dtype and device. Leading dimensions broadcast: one reference row against
            many candidates is never expanded.
        temperature: a number above 0 (of the normal ones of fp32) that divides both.

    Returns:
        ``[...]``, fp32 (fp64 for fp64 logits). Never below 0, and exactly 0 for equal rows. Near 0 an absolute error
        of about ``1e-7·|log-sum-exp|`` remains. A logit of ``-inf`` is a probability of 0: it adds 0 in ``p``, and
        makes the result ``+inf`` in ``q`` where ``p`` is above 0. NaN in gives NaN out, and so does a row without any
        finite logit. Differentiable once, in both; a row that nothing depends on gets a gradient of 0, even where its
        divergence is not finite. As a training loss, ``kl_divergence_loss`` is cheaper.

    DTensors may be sharded by rows, both alike; otherwise they are gathered (but see ``kl_divergence_vocab_parallel``).
    Leading dimensions may be those of ``torch.func.vmap``. ``torch.autocast`` changes nothing: logits are taken as they
    come, and everything is computed in fp32. ``torch.set_flush_denormal`` concerns the calling thread alone; under it
    the last bits may depend on the number of threads.

    Raises:
        RuntimeError: dtypes, devices or shapes that do not fit, or a temperature that is not above 0 or so large or
            small that fp32 has no normal number for it.
    """
    _know_sharding(p_logits, q_logits)
    return _OPS.kl_divergence_with_state.default(p_logits, q_logits, temperature)[0]


def kl_state(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The state of a shard of the vocabulary: ``[..., 5]`` from ``[..., V]``, otherwise as ``kl_divergence``.

    For tensor-parallel logits and for chunks: merge the states of all shards, then call ``kl_from_state``. An empty
    shard (``V`` = 0) has the neutral state. Gradients flow through ``z`` and ``a``; the maxima are constants, which
    is exact for everything that doesn't depend on the choice of the maxima, as the divergence doesn't.
    """
    _know_sharding(p_logits, q_logits)
    return _OPS.kl_divergence_with_state.default(p_logits, q_logits, temperature)[1]


def merge_kl_states(states: Sequence[Tensor] | Tensor) -> Tensor:
    """Merges the states of disjoint shards, in the order given.

    Args:
        states: a list of ``[..., 5]`` states, or one tensor ``[shards, ..., 5]``.

    Returns:
        The state ``[..., 5]`` of the whole. Equal inputs in equal order give equal bits. Differentiable.
    """
    states = list(states)
    refuse_sharded("merge_kl_states", OWN_ROWS, states)
    return _OPS.merge_kl_states.default(states)


def kl_from_state(state: Tensor) -> Tensor:
    """``KL(p‖q)`` ``[...]`` of a state ``[..., 5]``; computed in fp64, returned in the dtype of ``state``."""
    refuse_sharded("kl_from_state", OWN_ROWS, state)
    return _OPS.kl_from_state.default(state)


def _know_sharding(*logits: Tensor) -> None:
    """DTensor takes a second to import, so its rules wait for one."""
    if any(type(x) is not Tensor for x in logits) and is_sharded(*logits):
        import_module("vtw_kernels.ops.sharding")


def _with_state_fake(p_logits: Tensor, q_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_logits("kl_divergence", p_logits, q_logits, temperature)
    rows = torch.broadcast_shapes(p_logits.shape[:-1], q_logits.shape[:-1])
    dtype = real_dtype(p_logits)
    return p_logits.new_empty(rows, dtype=dtype), p_logits.new_empty(*rows, 5, dtype=dtype)


def _merge_fake(states: list[Tensor]) -> Tensor:
    check_states(states)
    return states[0].new_empty(states[0].shape)


def _from_state_fake(state: Tensor) -> Tensor:
    check_state("kl_from_state", "state", state)
    return state.new_empty(state.shape[:-1])


def _backward_fake(grad, p_logits, q_logits, state, temperature, need_p, need_q):
    check_backward(grad, p_logits, q_logits, state, temperature)
    shape = torch.broadcast_shapes(p_logits.shape, q_logits.shape)
    return p_logits.new_empty(shape if need_p else 0), q_logits.new_empty(shape if need_q else 0)


def _with_state_setup(ctx, inputs, output):
    p_logits, q_logits, ctx.temperature = inputs
    ctx.set_materialize_grads(False)  # whoever uses one output only has no gradient of the other, not even zeros
    ctx.save_for_backward(p_logits, q_logits, output[1])


def _with_state_backward(ctx, grad_kl: Tensor | None, grad_state: Tensor | None):
    p_logits, q_logits, state = ctx.saved_tensors
    grad = grad_kl if grad_state is None else grad_state
    if grad is None:
        return None, None, None
    if grad_kl is not None and grad_state is not None:
        grad = grad_state + reference.grad_of_kl(state, grad_kl)
    need_p, need_q = ctx.needs_input_grad[:2]
    grad_p, grad_q = _OPS.kl_divergence_backward.default(
        grad, p_logits, q_logits, state, ctx.temperature, need_p, need_q
    )
    return (
        _sum_to(grad_p, p_logits) if need_p else None,
        _sum_to(grad_q, q_logits) if need_q else None,
        None,
    )


def _sum_to(grad: Tensor, x: Tensor) -> Tensor:
    return grad if grad.shape == x.shape else grad.sum_to_size(x.shape)


def no_second_derivative(ctx, *grads):
    raise RuntimeError("kl_divergence: expected to be differentiated once, got a second derivative")


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[0], output)


def _merge_backward(ctx, grad: Tensor):
    *states, merged = ctx.saved_tensors
    grads = []
    for state in states:
        scale = torch.where(state == -torch.inf, 0.0, (state - merged).exp())
        scale_p, scale_q = scale[..., 0], scale[..., 3]
        zero = torch.zeros_like(scale_p)
        grads.append(grad * torch.stack((zero, scale_p, scale_p, zero, scale_q), dim=-1))
    return grads


def _from_state_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _from_state_backward(ctx, grad_kl: Tensor):
    (state,) = ctx.saved_tensors
    return reference.grad_of_kl(state, grad_kl)


register_composite("kl_divergence", kl_divergence)
register_composite("kl_state", kl_state)
register(
    "kl_divergence_with_state",
    reference=reference.kl_divergence_with_state,
    fake=_with_state_fake,
    triton="kl_divergence",
)
register(
    "kl_divergence_backward", reference=reference.kl_divergence_backward, fake=_backward_fake, triton="kl_divergence"
)
register("merge_kl_states", reference=reference.merge_kl_states, fake=_merge_fake, triton="kl_divergence")
register("kl_from_state", reference=reference.kl_from_state, fake=_from_state_fake, triton="kl_divergence")
register_gradient("kl_divergence_with_state", _with_state_backward, _with_state_setup)
register_gradient("kl_divergence_backward", no_second_derivative)
register_gradient("merge_kl_states", _merge_backward, _merge_setup)
register_gradient("kl_from_state", _from_state_backward, _from_state_setup)
