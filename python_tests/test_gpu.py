"""What only a GPU can show: CUDA graphs, other streams and devices, more than 2^31 elements, equal bits run after run,
and the public functions there. ``pytest -m gpu`` runs these, and the cases of the other files on each backend of the
GPU; ``make test-cuda`` does so on pretend ones."""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pretend_gpu
import pytest
import torch
import vlm
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

import vtw_kernels as vtw

pytestmark = pytest.mark.gpu
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICE = os.environ.get("PRETEND_DEVICE", "cuda")
RUNS = 3 if pretend_gpu.WANTED else 20  # of which each draws other orders of blocks and threads

B, S, PAGE = 3, 331, 16


class Call(NamedTuple):
    """One op: its tensors on the CPU, of the same sizes for every seed, and from them on any device to its results."""

    inputs: Callable[[torch.Generator], list[Tensor]]
    run: Callable[..., list[Tensor]]
    exact: bool = True  # whether it only moves bytes


def keep(g: torch.Generator) -> Tensor:
    return torch.rand(B, S, generator=g) > 0.6


def source(g: torch.Generator) -> Tensor:
    return vtw.plan_compaction(keep(g)).source


def hidden(g: torch.Generator) -> Tensor:
    return torch.randn(B, S, 520, generator=g).bfloat16()


def keys(g: torch.Generator) -> Tensor:
    return torch.randn(B, 4, S, 64, generator=g).half()


def positions(g: torch.Generator) -> Tensor:
    return torch.randint(2**40, (B, S), generator=g)


def pages(g: torch.Generator) -> list[Tensor]:
    per_sequence = -(-S // PAGE)
    blocks = B * per_sequence
    table = torch.randperm(blocks, generator=g).view(B, per_sequence).int()
    lengths = torch.randint(1, S + 1, (B,), generator=g).int()
    caches = [torch.randn(blocks, PAGE, 2, 64, generator=g).bfloat16() for _ in range(2)]
    return [*caches, table, lengths, keep(g)]


def logits(g: torch.Generator, rows: int = 5, vocabulary: int = 32_003) -> Tensor:
    return torch.randn(rows, vocabulary, generator=g) * 3


def compact_(ops, *args: Tensor) -> list[Tensor]:
    *tensors, source = args
    ops.compact_(tensors, [2] * len(tensors), [0] * len(tensors), source)
    return tensors


def compact_paged_(ops, *args: Tensor) -> list[Tensor]:
    *caches, table, lengths, keep = args
    return [*caches, ops.compact_paged_(caches, table, lengths, keep, "NHD")]


def step(g: torch.Generator) -> list[Tensor]:
    """Of three sequences: a prompt with two images, one that is decoded, and one that has just ended."""
    lists = ([0, 300, 301, 301], [320, 90, 0], [[5, 205], [210, 330], [0, 80]], [0, 2, 3, 3])
    return [*(torch.tensor(x, dtype=torch.int32) for x in lists), torch.randperm(63, generator=g).int().view(3, 21)]


def plan_packed_(ops, *args: Tensor) -> list[Tensor]:
    plan = list(vtw.PackedPlan.empty(320, 3, args[0].device))
    ops.plan_packed_(plan, *args, 16)
    return plan


def backward(ops, p: Tensor, q: Tensor, slope: Tensor) -> list[Tensor]:
    _, state = ops.kl_divergence_with_state(p, q, 1.0)
    return list(ops.kl_divergence_backward(slope, p, q, state, 1.0, True, True))


def merged(ops, p: Tensor, q: Tensor) -> list[Tensor]:
    shards = zip(p.chunk(3, -1), q.chunk(3, -1))
    state = ops.merge_kl_states([ops.kl_divergence_with_state(x, y, 1.0)[1] for x, y in shards])
    return [ops.kl_from_state(state)]


def pair(g: torch.Generator) -> list[Tensor]:
    return [logits(g), logits(g)]


CALLS = {
    "plan_compaction": Call(lambda g: [keep(g)], lambda ops, keep: list(ops.plan_compaction(keep, -1, False))),
    "compact": Call(
        lambda g: [hidden(g), positions(g), source(g)],
        lambda ops, x, ids, source: ops.compact([x, ids], [1, 1], [0, 0], source),
    ),
    "compact_": Call(lambda g: [keys(g), keys(g), source(g)], compact_),
    "expand": Call(lambda g: [hidden(g), source(g)], lambda ops, x, source: ops.expand([x], [1], [0], source, S)),
    "compact_paged_": Call(pages, compact_paged_),
    "plan_packed_": Call(step, plan_packed_),
    "kl_divergence": Call(pair, lambda ops, p, q: [ops.kl_divergence_with_state(p, q, 0.7)[0]], exact=False),
    "kl_divergence of one row": Call(
        lambda g: [logits(g, 27), logits(g, 1)],
        lambda ops, p, q: [ops.kl_divergence_with_state(p, q, 1.0)[0]],
        exact=False,
    ),
    "kl_divergence_backward": Call(lambda g: [*pair(g), torch.randn(5, 5, generator=g)], backward, exact=False),
    "kl_divergence_with_gradients": Call(
        pair, lambda ops, p, q: list(ops.kl_divergence_with_gradients(p, q, None, 1.0, False, True))[::2], exact=False
    ),
    "merge_kl_states": Call(pair, merged, exact=False),
}
over_calls = pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])


def inputs_of(call: Call, seed: int) -> list[Tensor]:
    return call.inputs(torch.Generator().manual_seed(seed))


def assert_right(call: Call, results: list[Tensor], seed: int) -> None:
    """As on the CPU."""
    expected = call.run(torch.ops.vtw_kernels, *inputs_of(call, seed))
    assert len(results) == len(expected)
    for actual, want in zip(results, expected):
        assert actual.shape == want.shape and actual.dtype == want.dtype
        if call.exact:
            assert torch.equal(actual.cpu(), want)
        else:
            torch.testing.assert_close(actual.cpu(), want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def capture(device: str, run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of a run, which was warmed up on another stream, and its results."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            results = run()
    return graph, results


def replay(device: str, graph: torch.cuda.CUDAGraph) -> None:
    with torch.cuda.device(device):
        graph.replay()
        torch.cuda.synchronize()


@over_calls
def test_cuda_graph(gpu_backend, call):
    """Captured once, replayed on other values: no op reads anything back, and none keeps what it saw at capture."""
    static = [x.to(gpu_backend.device) for x in inputs_of(call, 0)]
    graph, results = capture(gpu_backend.device, lambda: call.run(gpu_backend, *static))
    for seed in (1, 2):
        for x, new in zip(static, inputs_of(call, seed)):
            x.copy_(new)
        replay(gpu_backend.device, graph)
        assert_right(call, results, seed)


@over_calls
def test_other_stream(gpu_backend, call):
    """Launched on the current stream of the tensors' device, whichever device is the current one: on another stream,
    the op would overtake the copy of its inputs."""
    static = [x.to(gpu_backend.device) for x in inputs_of(call, 0)]
    later = [x.to(gpu_backend.device) for x in inputs_of(call, 1)]
    call.run(gpu_backend, *(x.clone() for x in static))  # compiled before it counts
    torch.cuda.synchronize(gpu_backend.device)
    stream = torch.cuda.Stream(gpu_backend.device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        for x, new in zip(static, later):
            x.copy_(new)
        with torch.cuda.device(0):
            results = call.run(gpu_backend, *static)
            assert torch.cuda.current_device() == 0
    stream.synchronize()
    assert_right(call, results, 1)


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def runs_of(call: Call, backend, inputs: list[Tensor], disturb: Callable[[], None]) -> list[list[Tensor]]:
    """Runs, from the third on beside other work, so that blocks are scheduled in other orders."""
    runs = []
    for i in range(RUNS):
        own = [x.to(backend.device) for x in inputs]
        if i > 1:
            disturb()
        runs.append([bytes_of(x) for x in call.run(backend, *own)])
    return runs


@pytest.mark.parametrize("name", CALLS)
def test_equal_bits_run_after_run(gpu_backend, name):
    busy = torch.randn(1024, 1024, device=gpu_backend.device)
    stream = torch.cuda.Stream(gpu_backend.device)

    def disturb() -> None:
        with torch.cuda.stream(stream):
            torch.mm(busy, busy)

    first, *others = runs_of(CALLS[name], gpu_backend, inputs_of(CALLS[name], 0), disturb)
    assert all(torch.equal(x, y) for run in others for x, y in zip(first, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(1, 151_936), (140 if pretend_gpu.WANTED else 300, 4099)])
def test_equal_bits_of_many_blocks(gpu_backend, rows, vocabulary, dtype):
    """One row that many blocks share, and more rows than there are multiprocessors."""
    g = torch.Generator().manual_seed(0)
    p, q = (logits(g, rows, vocabulary).to(gpu_backend.device, dtype) for _ in range(2))

    def run() -> list[Tensor]:
        results = gpu_backend.kl_divergence_with_state(p, q, 1.0)
        return [bytes_of(x) for x in (*results, *gpu_backend.kl_divergence_with_gradients(p, q, None, 1.0, True, True))]

    first = run()
    for _ in range(RUNS):
        assert all(torch.equal(x, y) for x, y in zip(first, run()))


# Rows enough, and aligned, for the kernel that reads them once for the divergence and its gradients. A pretend device
# takes fewer, just enough for its 132 multiprocessors.
ROWS = {32_000: 66, 151_936: 33} if pretend_gpu.WANTED else {32_000: 264, 151_936: 264}
WANTED = {"q": (False, True), "p": (True, False), "pq": (True, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary, wanted", [*((32_000, wanted) for wanted in WANTED), (151_936, "q")])
def test_gradients_of_many_aligned_rows(gpu_backend, vocabulary, wanted, dtype):
    """Captured in a graph, and replayed on other logits."""
    g = torch.Generator().manual_seed(0)
    host = [logits(g, ROWS[vocabulary], vocabulary).to(dtype) for _ in range(2)]
    p, q = (torch.zeros_like(x).to(gpu_backend.device) for x in host)

    def run() -> list[Tensor]:
        return list(gpu_backend.kl_divergence_with_gradients(p, q, None, 1.0, *WANTED[wanted]))

    graph, results = capture(gpu_backend.device, run)
    p.copy_(host[0]), q.copy_(host[1])
    replay(gpu_backend.device, graph)
    expected = torch.ops.vtw_kernels.kl_divergence_with_gradients(*host, None, 1.0, *WANTED[wanted])
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0].cpu(), expected[0], rtol=1e-5, atol=0)
    for actual, want in zip(results[1:], expected[1:]):
        assert actual.shape == want.shape
        atol = 2 * step * float(want.abs().max()) if want.numel() else 0
        torch.testing.assert_close(actual.cpu(), want, rtol=max(1e-4, 2 * step), atol=atol)


# More than 2^31 elements, all of them there: what is far apart in memory only is in the other files.


def skip_without_memory(needed: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory on the device, {free / 1e9:.0f} are free")


def check_compaction_of(ops, device: str, tokens: int, width: int) -> None:
    token = torch.arange(tokens, device=device)
    x = (token * 37 % 251).to(torch.uint8)[:, None] + (torch.arange(width, device=device) % 5).to(torch.uint8)
    x = x[None]
    keep = (token % 3 != 0)[None]
    source, lengths = ops.plan_compaction(keep, -1, False)
    kept = int(keep.sum())
    assert lengths.tolist() == [kept]
    assert torch.equal(source[0, :kept].long(), token[keep[0]])
    source = source[:, :kept].contiguous()
    want = x[:, keep[0]]
    (out,) = ops.compact([x], [1], [0], source)
    assert torch.equal(out, want)
    (wide,) = ops.expand([out], [1], [0], source, tokens)
    del out
    assert torch.equal(wide, x * keep[..., None])
    del wide
    last = x[:, -1].clone()
    ops.compact_([x], [1], [0], source)
    assert torch.equal(x[:, :kept], want) and torch.equal(x[:, -1], last)


def check_kl_of(ops, device: str, rows: int, vocabulary: int) -> None:
    """Some rows, by themselves, have the same divergence and gradient."""
    p, q = (torch.randn(rows, vocabulary, dtype=torch.bfloat16, device=device) for _ in range(2))
    ones = torch.ones(rows, device=device)  # otherwise gradients are of the mean over rows
    kl, _, grad = ops.kl_divergence_with_gradients(p, q, ones, 1.0, False, True)
    assert bool(kl.isfinite().all())
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=device)
    want, _, want_grad = ops.kl_divergence_with_gradients(p[some], q[some], ones[:5], 1.0, False, True)
    torch.testing.assert_close(kl[some], want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[some], want_grad, rtol=1e-2, atol=1e-8)
    forward, _ = ops.kl_divergence_with_state(p, q, 1.0)
    torch.testing.assert_close(forward, kl, rtol=1e-5, atol=0)


def test_compaction_of_more_than_2_31_elements(gpu_backend):
    skip_without_memory(14e9)
    check_compaction_of(gpu_backend, gpu_backend.device, 2**20 + 8, 2**11)


def test_kl_of_more_than_2_31_elements(gpu_backend):
    skip_without_memory(18e9)
    check_kl_of(gpu_backend, gpu_backend.device, 2**15 + 1, 2**16)


# The public functions, with their gradients: on the device as on the CPU.


def plan_of(x: Tensor) -> vtw.CompactionPlan:
    return vtw.plan_compaction(torch.arange(x.shape[1], device=x.device)[None] % 3 > 0)


PUBLIC = {
    "compact": (lambda x: vtw.compact([x], plan_of(x), 1)[0], [(1, 40, 8)]),
    "expand": (lambda x: vtw.expand([x], plan_of(x), 50, 1)[0], [(1, 40, 8)]),
    "kl_divergence": (lambda p, q: vtw.kl_divergence(p, q, 0.7), [(3, 1001), (1, 1001)]),
    "kl_divergence_loss": (lambda p, q: vtw.kl_divergence_loss(p, q), [(3, 1001), (3, 1001)]),
    "linear_kl_divergence": (
        lambda p, q, head: vtw.linear_kl_divergence(p, head, q, head),
        [(5, 32), (5, 32), (1001, 32)],
    ),
}


def check_public(name: str, device: str) -> None:
    function, sizes = PUBLIC[name]
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=g) for size in sizes]
    outcomes = []
    for place in (device, "cpu"):
        inputs = [x.to(place).requires_grad_() for x in values]
        result = function(*inputs)
        result.square().sum().backward()
        outcomes.append([result.detach().cpu(), *(x.grad.cpu() for x in inputs)])
    for actual, want in zip(*outcomes):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5 * max(1, float(want.abs().max())))


@GPU
@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name):
    check_public(name, DEVICE)


def check_withdrawal(device: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=32
    )
    decoder = LlamaModel(config).eval()
    embeds, visual = torch.randn(2, 40, 64), torch.zeros(2, 40, dtype=torch.bool)
    visual[0, 3:30] = visual[1, 10:20] = True
    outcomes = []
    for place in (device, "cpu"):
        decoder.to(place)
        with torch.inference_mode(), vtw.withdraw(decoder, 2, visual_mask=visual.to(place)):
            prefill = decoder(inputs_embeds=embeds.to(place), use_cache=True)
            step = embeds[:, :1].to(place)
            one_more = decoder(inputs_embeds=step, past_key_values=prefill.past_key_values, use_cache=True)
        outcomes.append([prefill.last_hidden_state.cpu()[~visual], one_more.last_hidden_state.cpu()])
    for actual, want in zip(*outcomes):
        torch.testing.assert_close(actual, want, rtol=1e-3, atol=1e-3)


@GPU
def test_withdrawal():
    """A prefill of two prompts that keep different numbers of rows, and a token more."""
    check_withdrawal(DEVICE)


@GPU
@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_withdrawal_does_not_make_the_host_wait(family):
    """Not more often than the plain model does, in a prefill with images and a step of decoding."""
    model, batch = vlm.make_model(family).to(DEVICE), vlm.make_batch(family, vlm.RAGGED)
    longer = vlm.append(batch, vlm.make_batch(family, [[1]] * len(batch.ids), seed=1))
    positions, length = longer.positions(model).to(DEVICE), batch.ids.shape[1]
    steps = [
        {name: x.to(DEVICE) for name, x in inputs.items()} | {"position_ids": positions[..., span]}
        for inputs, span in ((batch.inputs(), slice(length)), (longer.inputs(length), slice(length, None)))
    ]

    @torch.inference_mode()
    def waits() -> int:
        cache = DynamicCache(config=model.config)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for inputs in steps:
                    model(**inputs, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(x.message) for x in caught)

    waits()  # what is done but once
    plain = waits()
    with vtw.withdraw(model, 2):
        waits()
        assert waits() == plain > 0
