"""Compaction against what one would otherwise write: pytest benchmarks/test_compaction.py"""

import pytest
import torch

import vtw_kernels as vtw

# LLaVA-1.5: 35 tokens before the image, 576 of the image, 50 after it.
TOKENS, FIRST, LAST = 661, 35, 611
KEPT = TOKENS - (LAST - FIRST)


def keep_mask(batch):
    keep = torch.ones(batch, TOKENS, dtype=torch.bool)
    keep[:, FIRST:LAST] = False
    return keep


def vtw_inplace(tensors, plan, index):
    vtw.compact_(tensors, plan, 2)


def slice_copy(tensors, plan, index):
    for x in tensors:
        x[:, :, FIRST:KEPT] = x[:, :, LAST:]


def cat(tensors, plan, index):
    return [torch.cat((x[:, :, :FIRST], x[:, :, LAST:]), dim=2) for x in tensors]


def index_select(tensors, plan, index):
    return [x.index_select(2, index) for x in tensors]


def gather(tensors, plan, index):
    return [x.gather(2, index.view(1, 1, -1, 1).expand(*x.shape[:2], -1, x.shape[3])) for x in tensors]


def vtw_compact(tensors, plan, index):
    return vtw.compact(tensors, plan, 2)


PEERS = {f.__name__: f for f in (slice_copy, cat, index_select, gather)}


def run(benchmark, function, tensors):
    plan = vtw.plan_compaction(keep_mask(1), length=KEPT)
    index = keep_mask(1)[0].nonzero().flatten()
    with torch.inference_mode():
        benchmark(function, tensors, plan, index)


@pytest.mark.parametrize("peer", ["vtw_kernels", *PEERS])
@pytest.mark.parametrize("count", [28, 64])
def test_kv_cache_in_place(benchmark, count, peer):
    """The keys and values of all layers; the peers that make new tensors leave the cache as long as it was."""
    benchmark.group = f"in place, {count} x [1, 32, {TOKENS}, 128] bf16 to {KEPT}"
    tensors = [torch.zeros(1, 32, TOKENS, 128, dtype=torch.bfloat16) for _ in range(count)]
    run(benchmark, PEERS.get(peer, vtw_inplace), tensors)


@pytest.mark.parametrize("peer", ["vtw_kernels", "cat", "index_select", "gather"])
@pytest.mark.parametrize("count", [28, 64])
def test_kv_cache_out_of_place(benchmark, count, peer):
    benchmark.group = f"out of place, {count} x [1, 32, {TOKENS}, 128] bf16 to {KEPT}"
    tensors = [torch.zeros(1, 32, TOKENS, 128, dtype=torch.bfloat16) for _ in range(count)]
    run(benchmark, PEERS.get(peer, vtw_compact), tensors)


@pytest.mark.parametrize("peer", ["vtw_kernels", "torch"])
@pytest.mark.parametrize("batch", [1, 8])
def test_layer_inputs(benchmark, batch, peer):
    """What one forward compacts at the withdrawal layer: hidden states, positions, cos and sin."""
    benchmark.group = f"hidden [{batch}, {TOKENS}, 4096] bf16, positions, cos, sin to {KEPT}"
    hidden = torch.zeros(batch, TOKENS, 4096, dtype=torch.bfloat16)
    positions = torch.arange(TOKENS).expand(batch, -1)
    cos, sin = torch.zeros(2, batch, TOKENS, 128, dtype=torch.bfloat16)
    tensors = [hidden, positions, cos, sin]
    plan = vtw.plan_compaction(keep_mask(batch), length=KEPT)

    def ours():
        return vtw.compact(tensors, plan, 1)

    def torch_cat():
        return [torch.cat((x[:, :FIRST], x[:, LAST:]), dim=1) for x in tensors]

    with torch.inference_mode():
        benchmark(ours if peer == "vtw_kernels" else torch_cat)
