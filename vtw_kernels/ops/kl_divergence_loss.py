"""KL divergence as a training loss. What each row weighs is known before, so the gradient is computed with the
divergence while the logits are at hand: they are read once, and nothing but the gradient is kept for the backward."""

import torch
from torch import Tensor

from vtw_kernels.ops import reference
from vtw_kernels.ops._registration import (
    apply,
    refuse_sharded,
    refuse_tangents,
    register,
    register_autograd_kernel,
    register_gradient,
    register_mutation,
    register_over_ops,
)
from vtw_kernels.ops.checks import check_loss, check_scaled, real_dtype, require

OPS = torch.ops.vtw_kernels


def kl_divergence_loss(
    p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """``Σ weight·kl_divergence(p_logits, q_logits, temperature)``, or without weights the mean over rows, for training.

    ``kl_divergence`` reads both logits again in its backward. This reads them once: on the CPU the gradient of a row is
    computed while the row is in the cache, with CUDA C++ on sm_90 and later while it is in the shared memory of a
    cluster. Elsewhere, and for rows that are not whole 16-byte vectors or do not fit, the same is done in two reads.

    Args:
        p_logits: ``[..., V]``, fp32, fp16, bf16 or fp64, any strides; for distillation the teacher's.
        q_logits: ``[..., V]`` of the same dtype and device. Leading dimensions broadcast.
        temperature: a number above 0 that divides both.
        weight: what each row counts, of the shape of ``kl_divergence``'s result, any dtype (a mask, for example);
            computed with in fp32. A row of weight 0 adds nothing to the loss or to a gradient, whatever its logits are.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), differentiable once in both logits. Numbers are as ``kl_divergence``
        gives them, infinities and NaN included. Without any row the mean is NaN.

    Memory: for each logits that require a gradient, one tensor of the shape of the broadcast logits and of their dtype,
    which becomes the gradient; if the logits broadcast, its sum as well. The logits are not kept. The backward
    multiplies in place by what it gets from above, so factors belong in ``weight``: where it gets 1, as
    ``loss.backward()`` gives it, it does nothing. If the graph is retained the backward multiplies out of place and may
    be repeated.

    fp16 has no room for a gradient that a loss scale (``torch.amp.GradScaler``) multiplies afterwards: most of it would
    be 0 by then. So fp16 logits are kept instead, and the backward reads them again, as that of ``kl_divergence`` does.

    Logits are taken as they come under ``torch.autocast``. Under ``torch.func`` (``vmap``, ``grad``, ...) this is the
    weighted sum of ``kl_divergence``, gradients in a second read. Not supported, and raising an error:
    ``create_graph=True``, ``is_grads_batched=True`` and a gradient of ``weight``.

    Raises:
        RuntimeError: dtypes, devices or shapes that do not fit, a temperature that is not above 0, or a weight that
            requires a gradient.
    """
    refuse_sharded("kl_divergence_loss", "write kl_divergence(...).mean()", p_logits, q_logits)
    if weight is not None:
        weight = weight.to(real_dtype(p_logits))
    return OPS.kl_divergence_loss(p_logits, q_logits, temperature, weight)


def _total(kl: Tensor, weight: Tensor | None) -> Tensor:
    return kl.mean() if weight is None else torch.where(weight == 0, 0.0, weight * kl).sum()


def _forward(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0, weight: Tensor | None = None) -> Tensor:
    check_loss("kl_divergence_loss", p_logits, q_logits, weight, temperature)
    return _total(OPS.kl_divergence_with_state(p_logits, q_logits, temperature)[0], weight)


def _forward_fake(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0, weight: Tensor | None = None) -> Tensor:
    check_loss("kl_divergence_loss", p_logits, q_logits, weight, temperature)
    return p_logits.new_empty((), dtype=real_dtype(p_logits))


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_logits, q_logits, temperature, weight):
        needs = ctx.needs_input_grad
        check_loss("kl_divergence_loss", p_logits, q_logits, weight, temperature)
        kl, *grads = OPS.kl_divergence_with_gradients(p_logits, q_logits, weight, temperature, *needs[:2])
        grads = [grad.sum_to_size(x.shape) for grad, x, need in zip(grads, (p_logits, q_logits), needs) if need]
        ctx.save_for_backward(*grads)
        return _total(kl, weight)

    @staticmethod
    def backward(ctx, grad_loss):
        given = "create_graph=True"
        require(not torch.is_grad_enabled(), "kl_divergence_loss", "backward", "to be differentiated once", given)
        grads = list(ctx.saved_tensors)
        if torch._C._autograd._get_current_graph_task_keep_graph():  # they will be needed again
            grads = [grad.clone() for grad in grads]
        OPS.scale_(grads, grad_loss)
        return *(grads.pop(0) if need else None for need in ctx.needs_input_grad[:2]), None, None


def _autograd(keyset, p_logits, q_logits, temperature=1.0, weight=None):
    """Here, where all tensors are plain ones whatever transforms them, it is known which gradients are needed."""
    refuse_tangents("kl_divergence_loss", (p_logits, q_logits, weight))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (p_logits, q_logits, weight)):
        no_gradient = weight is None or not weight.requires_grad
        require(no_gradient, "kl_divergence_loss", "weight", "one that requires no gradient", "one that does")
        if p_logits.dtype == torch.float16 or torch._C._are_functorch_transforms_active():
            return _forward(p_logits, q_logits, temperature, weight)
        return apply(_WithGradients, p_logits, q_logits, temperature, weight)
    below = keyset & torch._C._after_autograd_keyset
    with torch._C._AutoDispatchBelowAutograd():
        return OPS.kl_divergence_loss.default.redispatch(below, p_logits, q_logits, temperature, weight)


def _with_gradients_fake(p_logits, q_logits, weight, temperature, need_p, need_q):
    check_loss("kl_divergence_with_gradients", p_logits, q_logits, weight, temperature)
    rows = torch.broadcast_shapes(p_logits.shape[:-1], q_logits.shape[:-1])
    dtype = real_dtype(p_logits)
    shape = (*rows, p_logits.shape[-1])
    grads = (x.new_empty(shape if need else 0) for x, need in ((p_logits, need_p), (q_logits, need_q)))
    return p_logits.new_empty(rows, dtype=dtype), *grads


def _no_backward(ctx, *grads):
    raise RuntimeError("kl_divergence_with_gradients: expected kl_divergence_loss to be differentiated, got this op")


register_over_ops("kl_divergence_loss", kernel=_forward, fake=_forward_fake)
register_autograd_kernel("kl_divergence_loss", _autograd)
register(
    "kl_divergence_with_gradients",
    reference=reference.kl_divergence_with_gradients,
    fake=_with_gradients_fake,
    triton="kl_divergence",
)
register_gradient("kl_divergence_with_gradients", _no_backward)
register("scale_", reference=reference.scale_, fake=check_scaled, triton="kl_divergence")
register_mutation("scale_")
