"""KL divergence of logits against what one would otherwise write: pytest benchmarks/bench_kl.py [--device cuda]"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Case, Choice, cases, memory_budget, name_of, traits
from torch import Tensor

import vtw_kernels as vtw

SHAPES = [(1, 151_936), (32, 151_936), (128, 151_936), *((4096, 2**n) for n in range(12, 18))]
ON_CUDA = [(8192, 151_936)]


def eager(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) per row, in fp32 as ours is."""
    log_p, log_q = (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (p, q))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)


@traits(rtol=0.1)
def eager_as_given(p: Tensor, q: Tensor) -> Tensor:
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
        name, compiled = name_of(dtype), torch.compile(eager_as_given, dynamic=False)
        peers |= {f"eager in {name}": eager_as_given, f"compiled in {name}": compiled}
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


def dtypes_of(choice: Choice) -> tuple[torch.dtype, ...]:
    return choice.dtypes or (torch.float32, torch.bfloat16)


def vocabularies(choice: Choice) -> list[int]:
    """Those of the models that were asked for, each once."""
    return list(dict.fromkeys(model.vocabulary for model in choice.models))


def shapes(choice: Choice, usual: list[tuple[int, int]] = SHAPES) -> Iterator[tuple[int, int, str]]:
    device = choice.device
    chosen = [(rows, vocab) for vocab in vocabularies(choice) for rows in (1, 128, 1024)]
    for rows, vocab in chosen or usual + (ON_CUDA if device == "cuda" else []):
        # Both logits, their clones, and what eager keeps for its backward: 48 bytes for each pair of logits.
        fitting = int(memory_budget(device) / (48 * vocab))
        cut = f" (not {rows})" if fitting < rows else ""
        rows = min(rows, fitting)
        yield rows, vocab, f"{rows}{cut} x {vocab}"


def searches(choice: Choice) -> list[tuple[int, int]]:
    """Candidates of a layer search, and the vocabulary."""
    return list(dict.fromkeys((model.layers - 1, model.vocabulary) for model in choice.models)) or [(27, 32_000)]


def forward(choice: Choice) -> Iterator[Case]:
    for dtype in dtypes_of(choice):
        name = name_of(dtype)
        peers = peers_of(choice.device, dtype)
        few = peers | {"loop with item": loop_with_item}
        for rows, vocab in searches(choice):
            moved, make = (rows + 1) * vocab * dtype.itemsize + rows * 4, logits(rows, 1, vocab, dtype, grad=False)
            title = f"kl, {rows} x {vocab} against one row, {name}"
            yield Case(title, few, make, moved, rtol=1e-3, reads=True)
        for rows, vocab, title in shapes(choice):
            moved = 2 * rows * vocab * dtype.itemsize + 4 * rows
            make = logits(rows, rows, vocab, dtype, grad=False)
            yield Case(f"kl, {title}, {name}", few if rows <= 32 else peers, make, moved, rtol=1e-3, reads=True)


def forward_and_backward(choice: Choice) -> Iterator[Case]:
    for dtype in dtypes_of(choice):
        name = name_of(dtype)
        peers = {peer: with_backward(function) for peer, function in peers_of(choice.device, dtype).items()}
        rtol = 1e-3 if dtype == torch.float32 else 2e-2  # gradients are rounded to bf16
        for rows, vocab, title in shapes(choice):
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


def training(choice: Choice) -> Iterator[Case]:
    losses = {
        OURS: vtw.kl_divergence_loss,
        f"{OURS}, two reads": mean_of(vtw.kl_divergence),
        "eager": mean_of(eager),
        "compiled eager": torch.compile(mean_of(eager), dynamic=False),
    }
    peers = {peer: step_of(loss) for peer, loss in losses.items()}
    for dtype in dtypes_of(choice):
        name = name_of(dtype)
        rtol = 1e-3 if dtype == torch.float32 else 2e-2  # gradients are rounded to bf16
        for rows, vocab, title in shapes(choice, [(128, 151_936), (4096, 32_000)]):
            moved, make = 3 * rows * vocab * dtype.itemsize, logits(rows, rows, vocab, dtype, grad=True)
            yield Case(f"kl loss and gradient of q, {title}, {name}", peers, make, moved, rtol=rtol, grad=True)


# A vocabulary in shards: the state of each, and the divergence from all of them.


def state_by_hand(p: Tensor, q: Tensor) -> Tensor:
    m_p, m_q = p.amax(-1, keepdim=True), q.amax(-1, keepdim=True)
    e_p, e_q = (p - m_p).exp(), (q - m_q).exp()
    parts = m_p.squeeze(-1), e_p.sum(-1), (e_p * (p - q)).sum(-1), m_q.squeeze(-1), e_q.sum(-1)
    return torch.stack(parts, dim=-1)


def merged(states: list[Tensor]) -> Tensor:
    return vtw.kl_from_state(vtw.merge_kl_states(states))


def merged_by_hand(states: list[Tensor]) -> Tensor:
    m_p, z_p, a, m_q, z_q = torch.stack(states).unbind(-1)
    top_p, top_q = m_p.amax(0), m_q.amax(0)
    weight = (m_p - top_p).exp()
    z_p, a, z_q = (weight * z_p).sum(0), (weight * a).sum(0), ((m_q - top_q).exp() * z_q).sum(0)
    return a / z_p - (top_p + z_p.log()) + (top_q + z_q.log())


def beside(ours: Callable, by_hand: Callable) -> dict[str, Callable]:
    return {OURS: ours, "eager": by_hand, "compiled eager": torch.compile(by_hand, dynamic=False)}


def states(choice: Choice) -> Iterator[Case]:
    """An eighth of the vocabulary: what each of eight ranks has."""
    for vocab in vocabularies(choice) or [151_936]:
        for rows in (1, 1024):
            moved, make = 2 * rows * (vocab // 8) * 4, logits(rows, rows, vocab // 8, torch.float32, grad=False)
            title = f"state of a shard, {rows} x {vocab // 8}, fp32"
            yield Case(title, beside(vtw.kl_state, state_by_hand), make, moved, rtol=1e-3, reads=True)


def merges(choice: Choice) -> Iterator[Case]:
    for shards, rows in ((2, 128), (8, 128), (8, 8192)):

        def make(device: str, shards=shards, rows=rows) -> tuple:
            halves = (torch.randn(2, rows, 4096, device=device).unbind() for _ in range(shards))
            return ([vtw.kl_state(p, q) for p, q in halves],)

        moved = (shards * 5 + 1) * rows * 4
        title = f"divergence from states, {shards} shards of {rows} rows"
        yield Case(title, beside(merged, merged_by_hand), make, moved, rtol=1e-3)


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


def linear_sizes(choice: Choice, dtype: torch.dtype) -> Iterator[tuple[int, int, int, str]]:
    """The layer search of LLaVA-1.5-7B, and distillation at the vocabulary of Llama 3; smaller on the CPU."""
    usual = [(27, 1024, 32_000), (512, 1024, 32_000)]
    if choice.device == "cuda":
        usual = [(27, 4096, 32_000), (8192, 4096, 128_256)]
    chosen = [(rows, m.hidden, m.vocabulary) for m in choice.models for rows in (m.layers - 1, 512)]
    for rows, wanted, vocab in dict.fromkeys(chosen) or usual:
        # Both weights, and their clones for the two peers that are compared.
        hidden = min(wanted, int(memory_budget(choice.device) / (6 * vocab * dtype.itemsize)))
        yield rows, hidden, vocab, f"{rows} x {hidden}{'' if hidden == wanted else f' (not {wanted})'} x {vocab}"


def linear(choice: Choice) -> Iterator[Case]:
    peers = {
        OURS: linear_ours,
        "project, eager": project_then(eager),
        f"{OURS}, unfused": project_then(vtw.kl_divergence),
    }
    peers["compiled project, eager"] = torch.compile(project_then(eager), dynamic=False)
    usual = torch.float32 if choice.device == "cpu" else torch.bfloat16
    chosen = [(*size, dtype) for dtype in choice.dtypes or (usual,) for size in linear_sizes(choice, dtype)]
    for rows, hidden, vocab, size, dtype in chosen:

        def make(device: str, rows=rows, hidden=hidden, vocab=vocab, dtype=dtype) -> tuple:
            def side() -> tuple[Tensor, Tensor]:
                states, weight = (torch.randn(n, hidden, dtype=dtype, device=device) for n in (rows, vocab))
                return states, weight.mul_(hidden**-0.5)

            return *side(), *side()

        moved = 2 * (rows + vocab) * hidden * dtype.itemsize + 4 * rows
        title, rtol = (
            f"linear kl, {size}, {str(dtype).removeprefix('torch.')}",
            1e-3 if dtype == torch.float32 else 0.02,
        )
        flops = 4 * rows * hidden * vocab
        yield Case(title, peers, make, moved, rtol, roof=products, reads=True, flops=flops, flops_dtype=dtype)


@pytest.mark.op("kl_divergence")
@cases(forward)
def test_forward(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("kl_divergence")
@cases(forward_and_backward)
def test_forward_and_backward(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("kl_divergence_loss")
@cases(training)
def test_training(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("kl_state")
@cases(states)
def test_state(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("merge_kl_states")
@cases(merges)
def test_merge(measure, case, peer):
    measure(case, peer)


@pytest.mark.skipif(not hasattr(vtw, "linear_kl_divergence"), reason="this vtw_kernels has no linear_kl_divergence")
@pytest.mark.op("linear_kl_divergence")
@cases(linear)
def test_linear(measure, case, peer):
    """Bound by arithmetic at many rows: the ratio to the roof counts, not the GB/s."""
    measure(case, peer)
