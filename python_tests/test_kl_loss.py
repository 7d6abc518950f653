"""kl_divergence_loss as training uses it: what autograd gets, what it keeps, and what may be done with the graph. Its
numbers on every backend are in test_kl_divergence.py."""

import pytest
import torch
from cases import bytes_of, logits

import vtw_kernels as vtw

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def pair(dtype=torch.float32, wanted="pq"):
    p = logits((1, 3, 2003), dtype, seed=0).requires_grad_("p" in wanted)
    return p, logits((2, 1, 2003), dtype, seed=1).requires_grad_("q" in wanted)


def in_two_steps(p, q, temperature, weight):
    kl = vtw.kl_divergence(p, q, temperature)
    return kl.mean() if weight is None else (kl * weight).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("wanted", ["p", "q", "pq", ""])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["mean", "weighted"])
@pytest.mark.parametrize("factor", [1.0, -0.7])
def test_equals_the_two_steps(dtype, wanted, weight, factor):
    """The sum over rows of broadcast logits included, with the same bits whatever comes from above."""
    p, q = pair(dtype, wanted)
    loss = vtw.kl_divergence_loss(p, q, 2.0, weight)
    expected = in_two_steps(p, q, 2.0, weight)
    assert loss.shape == () and loss.dtype == expected.dtype and loss.requires_grad == expected.requires_grad
    torch.testing.assert_close(loss, expected)
    leaves = [x for x in (p, q) if x.requires_grad]
    if leaves:
        grads = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        step = torch.finfo(dtype).eps
        for grad, want in zip(grads, torch.autograd.grad(expected * factor, leaves)):
            assert grad.dtype == dtype and grad.shape == want.shape
            torch.testing.assert_close(grad, want, rtol=4 * step, atol=8 * step * want.abs().max().item())
        again = torch.autograd.grad(loss * factor, leaves)
        assert [bytes_of(x) for x in again] == [bytes_of(x) for x in grads]


@pytest.mark.parametrize("weight", [torch.tensor([True, False, True]), torch.tensor([2, 0, 1])], ids=str)
def test_weights_of_any_dtype(weight):
    p, q = logits((3, 50)), logits((3, 50), seed=1)
    assert torch.equal(vtw.kl_divergence_loss(p, q, 1.0, weight), vtw.kl_divergence_loss(p, q, 1.0, weight.float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_of_weight_0_may_hold_anything(bad):
    q = logits((3, 50), seed=1).requires_grad_()
    p = logits((3, 50))
    clean = vtw.kl_divergence_loss(p[:2], q[:2], 1.0, torch.ones(2))
    p[2] = bad
    loss = vtw.kl_divergence_loss(p, q, 1.0, torch.tensor([True, True, False]))
    assert torch.equal(loss, clean)
    (want,), (grad,) = torch.autograd.grad(clean, q), torch.autograd.grad(loss, q)
    assert torch.equal(grad, want) and (grad[2] == 0).all()
    # So may rows of kl_divergence that nothing depends on.
    kl = vtw.kl_divergence(p, q)
    assert (torch.autograd.grad(kl[:2].sum(), q)[0] == want).all()


def test_only_the_gradient_is_kept():
    p, q = pair(wanted="q")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = vtw.kl_divergence_loss(p, q)
    assert [x.shape for x in kept] == [q.shape]
    (grad,) = torch.autograd.grad(loss, q)
    assert grad.data_ptr() == kept[0].data_ptr()  # scaled where it is


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize(
    "weight", [None, torch.rand(64, generator=torch.Generator().manual_seed(2)) / 64], ids=["mean", "weighted"]
)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_under_a_loss_scale(dtype, weight, scale):
    """Entries of some 1e-7, which fp16 can only hold once they are scaled: no less is left of them than of
    F.kl_div's."""
    p, q = logits((64, 8000), dtype, 1.0, seed=0), logits((64, 8000), dtype, 1.0, seed=1).requires_grad_()
    loss = vtw.kl_divergence_loss(p, q, 1.0, weight)
    (grad,) = torch.autograd.grad(loss * scale, q)
    factors = torch.full((64, 1), 1 / 64, dtype=torch.float64) if weight is None else weight[:, None].double()
    exact = (q.detach().double().softmax(-1) - p.double().softmax(-1)) * factors * scale
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(
        grad.double(), exact.to(dtype).double(), rtol=2 * step, atol=torch.finfo(dtype).tiny * step
    )
    if scale > 1:
        assert (grad == 0).double().mean() < 0.001 and (grad.double() - exact).norm() < 0.003 * exact.norm()


def test_a_graph_that_is_retained():
    p, q = pair()
    loss = vtw.kl_divergence_loss(p, q, 1.0, WEIGHT)
    first = torch.autograd.grad(loss * 3, (p, q), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (p, q))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (p, q))


def test_checkpointed():
    p, q = pair()
    loss = torch.utils.checkpoint.checkpoint(vtw.kl_divergence_loss, p * 2, q, use_reentrant=False)
    expected = torch.autograd.grad(vtw.kl_divergence_loss(p * 2, q), (p, q))
    assert all(map(torch.equal, torch.autograd.grad(loss, (p, q)), expected))


def test_what_is_not_supported_raises():
    p, q = pair()
    with pytest.raises(RuntimeError, match="kl_divergence_loss: weight: expected one that requires no gradient"):
        vtw.kl_divergence_loss(p, q, 1.0, WEIGHT.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="kl_divergence_loss: backward: expected to be differentiated once"):
        torch.autograd.grad(vtw.kl_divergence_loss(p, q), p, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(vtw.kl_divergence_loss(p, q), p, torch.ones(3), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="kl_divergence_with_gradients: expected kl_divergence_loss"):
        torch.ops.vtw_kernels.kl_divergence_with_gradients(p, q, None, 1.0, True, True)[0].sum().backward()


@pytest.mark.parametrize("wanted", ["", "pq"])
@pytest.mark.parametrize(
    "change, argument, message",
    [
        ({"q_logits": torch.zeros(2, 1, 7)}, "q_logits", "vocabulary size 2003 of p_logits, got 7"),
        ({"weight": torch.zeros(3)}, "weight", r"shape \[2, 3\], got shape \[3\]"),
        ({"weight": torch.zeros(2, 3, device="meta")}, "weight", "device"),
        ({"temperature": 0.0}, "temperature", "a number above 0, from 1.2e-38 to 3.4e38 as fp32 has it, got 0"),
    ],
)
def test_bad_input(wanted, change, argument, message):
    p, q = pair(wanted=wanted)
    arguments = dict(p_logits=p, q_logits=q, temperature=1.0, weight=WEIGHT) | change
    with pytest.raises(RuntimeError, match=f"kl_divergence_loss: {argument}: expected .*{message}"):
        vtw.kl_divergence_loss(**arguments)
