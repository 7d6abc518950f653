"""kl_divergence_vocab_parallel in real processes, against the whole vocabulary in one."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import assert_kl, bytes_of, kl_oracle, logits

import vtw_kernels as vtw

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch.distributed without gloo")
SECONDS = 120
SHARDS = {2: [[501, 502], [1000, 3]], 4: [[251, 250, 251, 251], [1, 0, 800, 202]]}


def cases():
    """(p, q, temperature) of the whole vocabulary."""
    infinite = [logits((3, 1003), seed=seed) for seed in (0, 1)]
    infinite[0][0, :600] = -torch.inf
    infinite[1][1, 1:] = -torch.inf
    return [
        *(
            (logits((4, 1003), dtype), logits((4, 1003), dtype, seed=1), 1.0)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (logits((1, 1003), torch.float64), logits((2, 5, 1003), torch.float64, seed=1), 0.5),
        (logits((2, 1, 1003)), logits((3, 1003), seed=1), 2.0),
        (*infinite, 1.0),
        (infinite[0], infinite[0], 0.7),
    ]


def divergence_and_gradients(divergence, p, q):
    p, q = p.detach().clone().requires_grad_(), q.detach().clone().requires_grad_()
    kl = divergence(p, q)
    weight = torch.linspace(-1, 2, kl.numel()).view_as(kl)
    return kl.detach(), *torch.autograd.grad((kl * weight).sum(), (p, q))


def rank_main(rank, ranks, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=SECONDS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
    results = []
    for sizes in SHARDS[ranks]:
        for p, q, temperature in cases():
            shards = p.split(sizes, -1)[rank], q.split(sizes, -1)[rank]
            results.append(
                divergence_and_gradients(lambda p, q: vtw.kl_divergence_vocab_parallel(p, q, temperature), *shards)
            )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", SHARDS)
def test_equals_the_whole(ranks, tmp_path):
    context = mp.spawn(rank_main, (ranks, tmp_path), ranks, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(1):
            assert time.monotonic() < end, "the ranks have not come to an end"
    finally:
        for process in context.processes:
            process.kill()
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    runs = [(sizes, *case) for sizes in SHARDS[ranks] for case in cases()]
    for (sizes, p, q, temperature), results in zip(runs, zip(*by_rank, strict=True), strict=True):
        kl, *want = divergence_and_gradients(lambda p, q: vtw.kl_divergence(p, q, temperature), p, q)
        for rank, (sharded_kl, *grads) in enumerate(results):
            assert bytes_of(sharded_kl) == bytes_of(results[0][0])
            assert_kl(sharded_kl, kl_oracle(p, q, temperature), p.dtype)
            for grad, whole in zip(grads, want):
                rounding = 1e-12 if p.dtype == torch.float64 else 1e-6
                step = max(rounding, 2 * torch.finfo(p.dtype).eps)
                part = whole.split(sizes, -1)[rank]
                torch.testing.assert_close(grad, part, rtol=step, atol=rounding, equal_nan=True)
