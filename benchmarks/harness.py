"""What a benchmark states (`Case`), and how one of its peers is timed.

On the CPU these are plain calls. On CUDA they are calls inside a CUDA graph, over enough copies of the arguments that
whatever a call touches has left the L2 cache before the next call on the same copy.
"""

import ctypes
import math
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from vtw_kernels.bench import DTYPES, OURS, ROOF, Model

COLD = 4  # times the size of L2 that other calls touch before a call meets the same copy again
ROUND_SECONDS = 5e-3  # a timed round is about this long in eager calls, so that its events and its launch do not count
SPIN_CYCLES = 1_000_000  # about 0.5 ms
MAX_COPIES, MAX_ROUNDS = 512, 50
LONG = 8192  # tokens


class Choice(NamedTuple):
    """What a run was asked for: where, and models and dtypes, or none for the usual ones."""

    device: str
    models: tuple[Model, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison: a table of the summary, with a row for each peer.

    Args:
        name: its title, and the first half of the test id.
        peers: functions of the arguments that `make` returns; `vtw_kernels` is what they must equal.
        make: from a device to the arguments, random and the same on each call.
        moved: bytes that must be moved: what is needed, read once, and what results, written once. Counted by hand.
        rtol: the largest error of a peer, relative to the largest number of the result; 0 asks for equal bits.
        result: from the arguments and what a peer returned to the tensors that are compared.
        grad: whether the peers need autograd.
        roof: what no peer can beat, if it isn't a copy of as many bytes.
        reads: whether hardly any of `moved` is written, so that the speed of reading is its bound.
        flops: floating point operations of its matrix products, and in which dtype.
    """

    name: str
    peers: dict[str, Callable]
    make: Callable[[str], tuple]
    moved: int
    rtol: float = 0.0
    result: Callable[[tuple, Any], Any] = lambda args, returned: returned
    grad: bool = False
    roof: Callable | None = None
    reads: bool = False
    flops: int = 0
    flops_dtype: torch.dtype = torch.float32

    def names(self) -> list[str]:
        return [*self.peers, ROOF]

    def prepare(self, peer: str, args: tuple, device: str) -> tuple[Callable, tuple]:
        """The function to time and its arguments."""
        if peer != ROOF:
            return self.peers[peer], args
        if self.roof is not None:
            return self.roof, args
        return torch.Tensor.copy_, tuple(torch.rand(2, max(1, self.moved // 8), device=device).unbind())

    def ideal_seconds(self, speed: "Speed") -> float:
        """What the speeds of this machine allow at best, where data come from memory."""
        moving = self.moved / (speed.read if self.reads else speed.copy)
        return max(moving, self.flops / speed.matmul(self.flops_dtype)) if self.flops else moving


cases = pytest.mark.cases.with_args  # decorates a test with the function that yields its cases, for a `Choice`


def traits(*, syncs: bool = False, rtol: float | None = None) -> Callable:
    """Marks a peer that waits for the device, so that no CUDA graph can hold it, or that is less exact than others."""

    def mark(function: Callable) -> Callable:
        function.syncs, function.rtol = syncs, rtol
        return function

    return mark


def keep_freed_memory() -> None:
    """Has glibc give freed memory out again, however large the block, as jemalloc and tcmalloc do.

    By itself it gives blocks of 32 MiB and more back to the system. Whoever allocates the next one then waits for as
    many page faults, which take longer than most of what is measured here, and as long for every peer.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
            raise OSError("mallopt: glibc refused; run with --fresh-memory")


def clone(args: tuple) -> tuple:
    return tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), args)


def size_in_bytes(args: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))


def memory_budget(device: str) -> float:
    """Bytes that a case may take, with everything that its hungriest peer allocates."""
    return 2e9 if device == "cpu" else 0.6 * torch.cuda.get_device_properties(device).total_memory


def skip_if_too_long(model: Model, device: str) -> None:
    """For what runs a whole decoder."""
    if device == "cpu" and model.tokens > LONG:
        pytest.skip(f"{model.name}: {model.tokens} tokens take minutes a round on the CPU; use --device cuda")


def check(case: Case, peer: str, args: tuple) -> None:
    """Raises if a peer doesn't return what `vtw_kernels` does: no wrong answer is worth timing."""
    outcomes = []
    for name in (OURS, peer):
        own = clone(args)
        outcomes.append(tree_leaves(case.result(own, case.peers[name](*own))))
    rtol = getattr(case.peers[peer], "rtol", None)
    rtol = case.rtol if rtol is None else rtol
    for ours, theirs in zip(*outcomes, strict=True):
        if theirs.dim() == 0:  # a peer that returns the sum over rows only
            ours = ours.sum()
        same = ours.shape == theirs.shape and (torch.equal(ours, theirs) if rtol == 0 else error(theirs, ours) <= rtol)
        if not same:
            raise AssertionError(f"{case.name}: {peer} and {OURS} differ by more than {rtol}")


def error(x: Tensor, reference: Tensor) -> float:
    reference = reference.float()
    return float((x.float() - reference).abs().amax() / reference.abs().amax())


class DeviceClock:
    """The timer of pytest-benchmark on CUDA: whoever has measured something on the device moves it on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        self.seconds += seconds

    def now(self) -> float:
        return self.seconds


device_clock = DeviceClock()


def cold_copies(args: tuple, moved: int) -> list[tuple]:
    """Clones of the arguments, as many as it takes to keep L2 cold."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    wanted = math.ceil(COLD * properties.L2_cache_size / max(1, moved))
    fitting = int(properties.total_memory / 4 / max(1, size_in_bytes(args)))
    return [clone(args) for _ in range(max(1, min(wanted, fitting, MAX_COPIES)))]


def eager_round(function: Callable, copies: list[tuple], calls: int) -> float:
    """Seconds per call of calls issued back to back, until the last one is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        function(*copies[i % len(copies)])
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def capture(function: Callable, copies: list[tuple], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Results live until their copy's next turn: memory that is reused at once would stay in L2 and never be written.
    results = [None] * len(copies)
    with torch.cuda.graph(graph):
        for i in range(calls):
            results[i % len(copies)] = function(*copies[i % len(copies)])
    return graph


def graph_round(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Seconds per call of one replay, as the device counts them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)  # the device is busy until all three are queued, so no gap is timed
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@contextmanager
def side_stream():
    """Where torch wants the calls that precede a capture: what they set up isn't captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def observe(function: Callable, args: tuple, device: str) -> dict[str, int]:
    """What one call launches and allocates.

    launches: on CUDA what the profiler sees the device do, kernels, copies and fills; on the CPU the operators that it
    sees, nested ones too. peak_extra_bytes: what torch's allocator gives out at most, results included; scratch
    memory that a kernel takes elsewhere is not in it.
    """
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=device == "cpu", acc_events=True) as trace:
        result = function(*args)  # alive until the end, so that it counts
        if device != "cpu":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
    del result
    events = [event for event in trace.profiler.kineto_results.events() if not event.is_user_annotation()]
    if device == "cpu":
        memory = [event for event in events if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
        peak = max(accumulate(changes, initial=0))
        return {"launches": len(events) - len(memory), "peak_extra_bytes": peak}
    on_device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return {"launches": len(on_device), "peak_extra_bytes": peak}


def time_on_cuda(benchmark, function: Callable, args: tuple, moved: int, max_time: float, min_rounds: int) -> dict:
    """Fills the benchmark with seconds per call; returns what else was seen."""
    copies = cold_copies(args, moved)
    with side_stream():
        for _ in range(3):
            function(*copies[0])
    eager = median(eager_round(function, copies, max(10, len(copies))) for _ in range(3))
    calls = max(len(copies), math.ceil(ROUND_SECONDS / eager))
    if getattr(function, "syncs", False):
        mode, one_round = "eager", lambda: eager_round(function, copies, calls)
    else:
        graph = capture(function, copies, calls)
        mode, one_round = "graph", lambda: graph_round(graph, calls)
    one_round()
    rounds = int(max_time / (calls * one_round()))
    benchmark.pedantic(lambda: device_clock.advance(one_round()), rounds=max(min_rounds, min(rounds, MAX_ROUNDS)))
    return {
        "mode": mode,
        "eager_seconds": eager,
        "calls_per_round": calls,
        "cold_copies": len(copies),
    }


class Speed:
    """What this machine reaches.

    Attributes:
        copy, read: bytes per second, of a copy, read and written, and of a sum.
        products: FLOP per second of a large matrix product, by dtype: of those that were asked for.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        size = 2**29 if device == "cpu" else 2**30  # far beyond any cache
        source, target = torch.rand(2, size // 4, device=device).unbind()
        self.copy = 2 * size / median(seconds_of(lambda: target.copy_(source), device))
        self.read = size / median(seconds_of(source.sum, device))
        self.products: dict[torch.dtype, float] = {}
        self.matmul(torch.float32 if device == "cpu" else torch.bfloat16)

    def matmul(self, dtype: torch.dtype) -> float:
        if dtype not in self.products:
            n = 2048 if self.device == "cpu" else 8192
            a, b = torch.randn(2, n, n, device=self.device).to(dtype).unbind()
            self.products[dtype] = 2 * n**3 / median(seconds_of(lambda: torch.mm(a, b), self.device, rounds=5))
        return self.products[dtype]


def seconds_of(function: Callable, device: str, rounds: int = 9) -> list[float]:
    function()
    if device != "cpu":
        graph = capture(function, [()], calls := 10)
        return [graph_round(graph, calls) for _ in range(rounds)]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times
