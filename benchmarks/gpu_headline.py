"""The headline cases on a GPU, few enough for a machine that is borrowed for minutes: gpu_headline.py JSON [SECONDS]

Each case is timed beside the best eager peers, in CUDA graphs over copies of its arguments that are cold in L2
(harness.py), and beside the measured speeds of a copy and of a read. JSON is written again after every case, in the
format that `vtw-kernels bench --compare` takes; cases for which no time is left are not in it. roofline.md predicts the
results.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import bench_compaction as compaction
import bench_kl as kl
import torch
from harness import OURS, Case, Speed, capture, check, cold_copies, graph_round, side_stream
from torch import Tensor

import vtw_kernels as vtw

ROWS, VOCABULARY = int(os.environ.get("ROWS", 8192)), 151_936  # fewer for a rehearsal, where the host computes them
ROUNDS = 7
QUARTER = replace(compaction.VIDEO, share=4)
# Peers that are compiled, that wait for the device, or that have never been the best one, are left out.
EAGER = ("eager", "eager in bf16", "cat", "index_select", "foreach copy", "index_select + copy")
EAGER += ("index_select + index_copy_", "cumsum + scatter")


def backward(grad: Tensor, p: Tensor, q: Tensor, state: Tensor) -> Tensor:
    return torch.ops.vtw_kernels.kl_divergence_backward(grad, p, q, state, 1.0, False, True)[1]


def backward_inputs(device: str) -> tuple:
    p, q = kl.logits(ROWS, ROWS, VOCABULARY, torch.bfloat16, grad=False)(device)
    return torch.ones(ROWS, device=device), p, q, vtw.kl_state(p, q)


def kl_cases() -> Iterator[Case]:
    bf16, size = torch.bfloat16, ROWS * VOCABULARY * 2
    peers = {OURS: vtw.kl_divergence, "eager": kl.eager, "eager in bf16": kl.eager_as_given}
    one_row = kl.logits(27, 1, 32_000, bf16, grad=False)
    yield Case("KL forward, 27 x 32000, one row of q", peers, one_row, 28 * 64_000, rtol=1e-3, reads=True)
    many = kl.logits(ROWS, ROWS, VOCABULARY, bf16, grad=False)
    yield Case(f"KL forward, {ROWS} x {VOCABULARY}", peers, many, 2 * size, rtol=1e-3, reads=True)
    yield Case(f"KL gradient of q, {ROWS} x {VOCABULARY}", {OURS: backward}, backward_inputs, 3 * size)
    losses = {OURS: kl.step_of(vtw.kl_divergence_loss), "eager": kl.step_of(kl.mean_of(kl.eager))}
    training = kl.logits(ROWS, ROWS, VOCABULARY, bf16, grad=True)
    yield Case(f"KL loss and gradient of q, {ROWS} x {VOCABULARY}", losses, training, 3 * size, rtol=2e-2, grad=True)


def plan_inputs(device: str) -> tuple:
    return compaction.rows_of(QUARTER, device).keep, QUARTER.kept


def compaction_cases() -> Iterator[Case]:
    llava = compaction.LLAVA
    hidden, kv = [compaction.hidden_spec(llava)], compaction.kv_specs(llava, 64)
    long_kv = compaction.kv_specs(QUARTER, 56)
    yield compaction.compaction_case("hidden", llava, hidden)
    yield compaction.compaction_case("64 KV tensors", llava, kv)
    yield compaction.compaction_case("hidden in place", llava, hidden, in_place=True)
    yield compaction.compaction_case("64 KV tensors in place", llava, kv, in_place=True)
    yield compaction.paged_case("64 KV tensors", llava, 64)
    yield compaction.compaction_case("56 KV tensors", QUARTER, long_kv)
    yield compaction.compaction_case("56 KV tensors in place", QUARTER, long_kv, in_place=True)
    yield compaction.paged_case("56 KV tensors", QUARTER, 56)
    peers = {OURS: compaction.vtw_plan, "cumsum + scatter": compaction.cumsum_and_scatter}
    moved = QUARTER.tokens + 4 * QUARTER.kept
    yield Case(f"plan, {QUARTER}", peers, plan_inputs, moved, result=lambda args, returned: returned.int())


def seconds_per_call(function: Callable, args: tuple, moved: int) -> list[float]:
    copies = cold_copies(args, moved)
    with side_stream():
        function(*copies[0])
    calls = max(len(copies), min(64, int(2e9 / moved)))
    graph = capture(function, copies, calls)
    graph_round(graph, calls)
    return [graph_round(graph, calls) for _ in range(ROUNDS)]


def measure(case: Case, speed: Speed) -> list[dict]:
    torch.manual_seed(0)
    found = []
    with torch.set_grad_enabled(case.grad):
        args = case.make("cuda")
        for peer, function in case.peers.items():
            if peer not in (OURS, *EAGER):
                continue
            try:
                if peer != OURS:
                    check(case, peer, args)
                times = seconds_per_call(function, args, case.moved)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{case.name}: {peer}: {error}", flush=True)
                continue
            low, middle, high = quantiles(times, n=4)
            found.append({
                "group": case.name, "name": f"{case.name}-{peer}", "fullname": f"gpu_headline.py::headline[{peer}]",
                "params": {"case": case.name, "peer": peer},
                "stats": {"median": middle, "iqr": high - low, "min": min(times), "max": max(times), "rounds": ROUNDS},
                "extra_info": {
                    "bytes": case.moved, "gb_per_second": case.moved / middle / 1e9, "mode": "graph",
                    "percent_of_roof": 100 * case.ideal_seconds(speed) / middle,
                },
            })  # fmt: skip
            torch.cuda.empty_cache()
    return found


def main(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    speed = Speed("cuda")
    moving = {"copy": speed.copy / 1e9, "read": speed.read / 1e9}
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    run = {"machine_info": machine | {"device": "cuda", "bandwidth_gb_per_second": moving}, "benchmarks": []}
    for case in (*compaction_cases(), *kl_cases()):
        if time.monotonic() > end:
            print(f"{case.name}: no time left", flush=True)
            continue
        run["benchmarks"] += (found := measure(case, speed))
        times = {x["params"]["peer"]: f"{x['stats']['median'] * 1e6:.1f} us" for x in found}
        print(case.name, times, flush=True)
        path.write_text(json.dumps(run, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 90)
