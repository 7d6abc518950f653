"""KL divergence of logits against what one would otherwise write: pytest benchmarks/test_kl_divergence.py"""

import pytest
import torch
import torch.nn.functional as F

import vtw_kernels as vtw


def expression(p, q):
    """KL(p‖q) per row."""
    kl = F.kl_div(F.log_softmax(q, dim=-1), F.log_softmax(p, dim=-1), log_target=True, reduction="none")
    return kl.sum(dim=-1)


PEERS = {
    "vtw_kernels": vtw.kl_divergence,
    "eager": expression,
    "torch.compile": torch.compile(expression, dynamic=False),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 32064), (32, 32064), (32, 151936)], ids=str)
def test_forward(benchmark, shape, dtype, peer):
    benchmark.group = f"kl forward {shape} {dtype}"
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(shape, generator=generator)).to(dtype)
    q = (p + torch.randn(shape, generator=generator)).to(dtype)
    with torch.inference_mode():
        benchmark(PEERS[peer], p, q)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(32, 32064), (32, 151936)], ids=str)
def test_forward_and_backward(benchmark, shape, dtype, peer):
    """Of q, as in distillation."""
    benchmark.group = f"kl forward + backward {shape} {dtype}"
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(shape, generator=generator)).to(dtype)
    q = (p + torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    def step():
        q.grad = None
        PEERS[peer](p, q).sum().backward()

    benchmark(step)
