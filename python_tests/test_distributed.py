"""Withdrawal in models that are copied to, or split over, several processes: equal to one process."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from vlm import RAGGED, make_batch, make_model

import vtw_kernels as vtw

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch.distributed without gloo")
SECONDS, RANKS = 120, 2
FAMILIES = ("llava", "qwen2_vl")


def rank_main(rank, port, task, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # as torchrun says it
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS))
    try:
        task(rank, folder)
    finally:
        dist.destroy_process_group()


def in_ranks(task, folder):
    store = dist.TCPStore("localhost", 0, is_master=True)
    mp.spawn(rank_main, args=(store.port, task, folder), nprocs=RANKS)


def loss_of(model, batch):
    return model(**batch.inputs(), use_cache=False).logits[:, -1].log_softmax(-1)[:, 11].mean()


def train(rank, folder):
    """Each rank has a batch of its own; gradients are averaged, also those of modules wrapped afterwards."""
    for family in FAMILIES:
        parallel = DistributedDataParallel(make_model(family), find_unused_parameters=True)
        with vtw.withdraw(parallel, 2):
            loss_of(parallel, make_batch(family, RAGGED, seed=rank)).backward()
        if rank == 0:
            torch.save({name: x.grad for name, x in parallel.module.named_parameters()}, folder / f"{family}.pt")


def test_data_parallel(tmp_path):
    in_ranks(train, tmp_path)
    for family in FAMILIES:
        model = make_model(family)
        with vtw.withdraw(model, 2):
            (sum(loss_of(model, make_batch(family, RAGGED, seed=rank)) for rank in range(RANKS)) / RANKS).backward()
        given = torch.load(tmp_path / f"{family}.pt")
        for name, x in model.named_parameters():
            assert (given[name] is None) == (x.grad is None)
            if x.grad is not None:
                torch.testing.assert_close(given[name], x.grad, atol=1e-6, rtol=1e-4)


def generate(rank, folder):
    for family in FAMILIES:
        model = type(make_model(family)).from_pretrained(folder / family, tp_plan="auto").eval()
        assert model.tp_size == RANKS
        torch.save((generated(model, family), searched(model, family)), folder / f"{family}-{rank}.pt")


def generated(model, family):
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with vtw.withdraw(model, 2):
        output = model.generate(**make_batch(family, RAGGED).inputs(), **options)
    return torch.stack(output.logits)


def searched(model, family, positions=3):
    inputs = make_batch(family, [row for row in RAGGED if len(row) > 1]).inputs()
    return vtw.find_layer(model, [inputs], positions=positions, threshold=1e9, progress=False).per_sample


def test_tensor_parallel(tmp_path):
    wanted = {}
    for family in FAMILIES:
        model = make_model(family)
        model.save_pretrained(tmp_path / family)
        wanted[family] = generated(model, family), searched(model, family)
    in_ranks(generate, tmp_path)
    for family in FAMILIES:
        for rank in range(RANKS):
            torch.testing.assert_close(torch.load(tmp_path / f"{family}-{rank}.pt"), wanted[family], atol=1e-4, rtol=0)


def search_in_shards(rank, folder):
    """Weights that are split again as soon as a layer has run."""
    for family in FAMILIES:
        model = make_model(family)
        for layer in model.model.language_model.layers:
            fully_shard(layer, reshard_after_forward=True)
        fully_shard(model, reshard_after_forward=True)
        torch.save(searched(model, family, positions="last"), folder / f"{family}-{rank}.pt")


def test_fully_sharded(tmp_path):
    in_ranks(search_in_shards, tmp_path)
    for family in FAMILIES:
        wanted = searched(make_model(family), family, positions="last")
        for rank in range(RANKS):
            torch.testing.assert_close(torch.load(tmp_path / f"{family}-{rank}.pt"), wanted, atol=1e-5, rtol=0)
