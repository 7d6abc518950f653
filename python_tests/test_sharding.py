"""The ops on DTensors, in real processes: sharded by rows, otherwise, and where no rule is."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import logits

import vtw_kernels as vtw

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch.distributed without gloo")
RANKS = 2


def divergence_and_gradients(p, q, distributed=torch.clone):
    p, q = (distributed(x).requires_grad_() for x in (p, q))
    kl = vtw.kl_divergence(p, q, 2.0)
    (kl * kl).sum().backward()
    return kl.detach(), p.grad, q.grad


def rank_main(rank, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": RANKS, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    p, q = logits((4, 3, 50)), logits((4, 3, 50), seed=1)
    want = divergence_and_gradients(p, q)
    for given, got in ((Shard(0), Shard(0)), (Shard(1), Shard(1)), (Shard(2), Replicate()), (Replicate(), Replicate())):
        actual = divergence_and_gradients(p, q, lambda x, given=given: distribute_tensor(x, mesh, [given]))
        assert actual[0].placements == (got,)
        for x, expected in zip(actual, want):
            torch.testing.assert_close(x.full_tensor(), expected, rtol=0, atol=0)
    # A reference that rows share is on every rank, and gets its gradient from all.
    for shared in (q[:1], q[0]):
        places = iter(([Shard(0)], [Replicate()]))
        want = divergence_and_gradients(p, shared)
        actual = divergence_and_gradients(p, shared, lambda x, places=places: distribute_tensor(x, mesh, next(places)))
        assert actual[0].placements == (Shard(0),)
        for x, expected in zip(actual, want):
            torch.testing.assert_close(x.full_tensor(), expected, rtol=1e-6, atol=1e-7)

    keep = torch.ones(4, 3, dtype=torch.bool)
    x, plan = distribute_tensor(p, mesh, [Shard(0)]), vtw.plan_compaction(keep)
    state = distribute_tensor(vtw.kl_state(p, q), mesh, [Shard(0)])
    pages = distribute_tensor(torch.zeros(8, 2, 1, 16), mesh, [Shard(0)])  # as many for each sequence as it may take
    table, lengths = torch.arange(8, dtype=torch.int32).view(4, 2), torch.full((4,), 3, dtype=torch.int32)
    for name, call, instead in (
        ("plan_compaction", lambda: vtw.plan_compaction(distribute_tensor(keep, mesh, [Shard(0)])), "to_local"),
        ("compact", lambda: vtw.compact([x], plan, 1), "to_local"),
        ("compact_", lambda: vtw.compact_([x], plan, 1), "to_local"),
        ("expand", lambda: vtw.expand([x], plan, 3, 1), "to_local"),
        ("compact_paged_", lambda: vtw.compact_paged_([pages], table, lengths, keep), "to_local"),
        ("plan_packed_", lambda: vtw.plan_packed_(vtw.PackedPlan.empty(4, 2), x, x, x, x, x, 2), "to_local"),
        ("merge_kl_states", lambda: vtw.merge_kl_states([state, state]), "to_local"),
        ("kl_from_state", lambda: vtw.kl_from_state(state), "to_local"),
        ("kl_divergence_loss", lambda: vtw.kl_divergence_loss(x, x), "kl_divergence"),
        ("linear_kl_divergence", lambda: vtw.linear_kl_divergence(x, x[0], x, x[0]), "kl_divergence"),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: expected plain tensors, got a DTensor; .*{instead}"):
            call()
    dist.destroy_process_group()


def test_sharded_tensors(tmp_path):
    mp.spawn(rank_main, (tmp_path,), RANKS)
