"""KL divergence of logits against what one would otherwise write: pytest benchmarks/bench_kl.py [--device cuda]"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Case, cases, memory_budget, traits
from torch import Tensor

import vtw_kernels as vtw

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(1, 151_936), (32, 151_936), (128, 151_936), *((4096, 2**n) for n in range(12, 18))]
ON_CUDA = [(8192, 151_936)]


def eager(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) per row, in fp32 as ours is."""
    log_p, log_q = (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (p, q))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)


@traits(rtol=0.1)
def eager_in_bf16(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(p, dim=-1), F.log_softmax(q, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)


@traits(syncs=True, rtol=0.1)
def loop_with_item(p: Tensor, q: Tensor) -> Tensor:
    """As VTW's authors search for a layer: candidates one by one, in the dtype of the model, each read back."""
    divergence = torch.nn.KLDivLoss(reduction="batchmean")
    rows = zip(p.split(1), q.expand_as(p).split(1))
    return torch.tensor([divergence(F.log_softmax(y, dim=-1), F.softmax(x, dim=-1)).item() for x, y in rows])


def liger(p: Tensor, q: Tensor) -> Tensor:
    """The sum over rows, with the log-probabilities that it wants."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    log_p, log_q = (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (p, q))
    return LigerKLDivLossFunction.apply(log_q, log_p, "sum", True)


def with_backward(function: Callable) -> Callable:
    """The gradient of q, as in distillation. Liger's backward compares its incoming gradient with 1 on the host."""

    @traits(syncs=function is liger, rtol=getattr(function, "rtol", None))
    def step(p: Tensor, q: Tensor) -> Tensor:
        return torch.autograd.grad(function(p, q).sum(), q)[0]

    return step


def peers_of(device: str, dtype: torch.dtype) -> dict[str, Callable]:
    peers = {OURS: vtw.kl_divergence, "eager": eager, "compiled eager": torch.compile(eager, dynamic=False)}
    if dtype != torch.float32:
        peers |= {"eager in bf16": eager_in_bf16, "compiled in bf16": torch.compile(eager_in_bf16, dynamic=False)}
    if device == "cuda" and find_spec("liger_kernel"):
        peers["liger + log_softmax"] = liger
    return peers


def logits(rows: int, q_rows: int, vocab: int, dtype: torch.dtype, grad: bool) -> Callable[[str], tuple]:
    """Makes rows of p around those of q."""

    def make(device: str) -> tuple:
        q = torch.randn(q_rows, vocab, dtype=dtype, device=device).mul_(3)
        p = torch.randn(rows, vocab, dtype=dtype, device=device).add_(q)
        return p, q.requires_grad_(grad)

    return make


def shapes(device: str, on_any: list[tuple[int, int]] = SHAPES) -> Iterator[tuple[int, int, str]]:
    for rows, vocab in on_any + (ON_CUDA if device == "cuda" else []):
        # Both logits, their clones, and what eager keeps for its backward: 48 bytes for each pair of logits.
        fitting = int(memory_budget(device) / (48 * vocab))
        cut = f" (not {rows})" if fitting < rows else ""
        rows = min(rows, fitting)
        yield rows, vocab, f"{rows}{cut} x {vocab}"


def forward(device: str) -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        peers = peers_of(device, dtype)
        few = peers | {"loop with item": loop_with_item}
        moved, make = (27 + 1) * 32_000 * dtype.itemsize + 27 * 4, logits(27, 1, 32_000, dtype, grad=False)
        yield Case(f"kl, 27 x 32000 against one row, {name}", few, make, moved, rtol=1e-3)
        for rows, vocab, title in shapes(device):
            moved = 2 * rows * vocab * dtype.itemsize + 4 * rows
            make = logits(rows, rows, vocab, dtype, grad=False)
            yield Case(f"kl, {title}, {name}", few if rows <= 32 else peers, make, moved, rtol=1e-3)


def forward_and_backward(device: str) -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        peers = {peer: with_backward(function) for peer, function in peers_of(device, dtype).items()}
        rtol = 1e-3 if dtype == torch.float32 else 2e-2  # gradients are rounded to bf16
        for rows, vocab, title in shapes(device):
            moved, make = 3 * rows * vocab * dtype.itemsize, logits(rows, rows, vocab, dtype, grad=True)
            yield Case(f"kl and gradient of q, {title}, {name}", peers, make, moved, rtol=rtol, grad=True)


# As a loss: a scalar, and its gradient.


def mean_of(divergence: Callable) -> Callable:
    return lambda p, q: divergence(p, q).mean()


def step_of(loss: Callable) -> Callable:
    """What training takes of a distillation loss."""

    def step(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(p, q)
        return value.detach(), torch.autograd.grad(value, q)[0]

    return step


def training(device: str) -> Iterator[Case]:
    losses = {
        OURS: vtw.kl_divergence_loss,
        f"{OURS}, two reads": mean_of(vtw.kl_divergence),
        "eager": mean_of(eager),
        "compiled eager": torch.compile(mean_of(eager), dynamic=False),
    }
    peers = {peer: step_of(loss) for peer, loss in losses.items()}
    for name, dtype in DTYPES.items():
        rtol = 1e-3 if dtype == torch.float32 else 2e-2  # gradients are rounded to bf16
        for rows, vocab, title in shapes(device, [(128, 151_936), (4096, 32_000)]):
            moved, make = 3 * rows * vocab * dtype.itemsize, logits(rows, rows, vocab, dtype, grad=True)
            yield Case(f"kl loss and gradient of q, {title}, {name}", peers, make, moved, rtol=rtol, grad=True)


# KL of two projections: hidden states and weights in.


def linear_ours(p: Tensor, p_weight: Tensor, q: Tensor, q_weight: Tensor) -> Tensor:
    return vtw.linear_kl_divergence(p, p_weight, q, q_weight)


def products(p: Tensor, p_weight: Tensor, q: Tensor, q_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The roof: whoever computes logits needs at least these."""
    return F.linear(p, p_weight), F.linear(q, q_weight)


def project_then(divergence: Callable) -> Callable:
    def peer(*args: Tensor) -> Tensor:
        return divergence(*products(*args))

    return peer


def linear(device: str) -> Iterator[Case]:
    """The layer search of LLaVA-1.5-7B, and distillation at the vocabulary of Llama 3; smaller on the CPU."""
    sizes = [(27, 1024, 32_000), (512, 1024, 32_000)]
    if device == "cuda":
        sizes = [(27, 4096, 32_000), (8192, 4096, 128_256)]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peers = {
        OURS: linear_ours,
        "project, eager": project_then(eager),
        f"{OURS}, unfused": project_then(vtw.kl_divergence),
    }
    peers["compiled project, eager"] = torch.compile(project_then(eager), dynamic=False)
    for rows, hidden, vocab in sizes:

        def make(device: str, rows=rows, hidden=hidden, vocab=vocab) -> tuple:
            def side() -> tuple[Tensor, Tensor]:
                states, weight = (torch.randn(n, hidden, dtype=dtype, device=device) for n in (rows, vocab))
                return states, weight.mul_(hidden**-0.5)

            return *side(), *side()

        moved = 2 * (rows + vocab) * hidden * dtype.itemsize + 4 * rows
        title = f"linear kl, {rows} x {hidden} x {vocab}, {str(dtype).removeprefix('torch.')}"
        yield Case(title, peers, make, moved, rtol=1e-3 if device == "cpu" else 0.02, roof=products)


@cases(forward)
def test_forward(measure, case, peer):
    measure(case, peer)


@cases(forward_and_backward)
def test_forward_and_backward(measure, case, peer):
    measure(case, peer)


@cases(training)
def test_training(measure, case, peer):
    measure(case, peer)


@pytest.mark.skipif(not hasattr(vtw, "linear_kl_divergence"), reason="this vtw_kernels has no linear_kl_divergence")
@cases(linear)
def test_linear(measure, case, peer):
    """Bound by arithmetic at many rows: the ratio to the roof counts, not the GB/s."""
    measure(case, peer)
