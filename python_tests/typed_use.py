"""The public functions as a stranger calls them: ``make lint`` has mypy read this file, and nothing runs it. Each
result is what it is said to be, and not ``Any``; each call that is wrong is one that mypy refuses."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import vtw_kernels as vtw
from vtw_kernels.integration import Withdrawal


class Everything(vtw.Policy):
    boundaries = (2, 3)

    def keep(self, boundary: vtw.Boundary) -> Tensor:
        assert_type(boundary.attention, Tensor | None)
        return boundary.visual | boundary.text


def of_models(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with vtw.withdraw(model, layer=16) as handle:
        assert_type(handle, Withdrawal)
    for policy in (16, range(8, 24), "vtw.json", Path("vtw.json"), None, Everything(), [vtw.TopAttention(2, 0.5)]):
        assert_type(vtw.apply(model, policy), Withdrawal)
    vtw.remove(model)
    vtw.withdraw(model, vtw.RandomVisual(2, 10, seed=1), visual_mask=torch.ones(1, 2, dtype=torch.bool), decoder=model)
    pruning = vtw.VisualPruning(heads=torch.ones(2, 4, dtype=torch.bool), window=5, ffn_ratio=2, layer_cut=1)
    with vtw.prune_visual(model, pruning, [vtw.TopAttention(1, 0.5)], grids=[[(24, 24)]]) as pruned:
        assert_type(pruned.copied_bytes, int)
    assert_type(vtw.find_visual_heads(model, [batch], keep=0.5), vtw.VisualHeads)
    vtw.VisualPruning(window="5")  # type: ignore[arg-type]
    vtw.withdraw(model, layer=1.5)  # type: ignore[arg-type]
    vtw.withdraw()  # type: ignore[call-arg]

    @vtw.withdraw(model, vtw.Withdraw(3))
    def answer(question: str) -> str:
        return question

    assert_type(answer("Which?"), str)

    search = vtw.find_layer(model, [batch], threshold=0.01, positions="answer")
    assert_type(search, vtw.LayerSearch)
    assert_type(search.layer, int | None)
    assert_type(search.choose(max_kl=0.1), int | None)
    assert_type(search.interval(), tuple[Tensor, Tensor])
    assert_type(vtw.LayerSearch.load("vtw.json").kl, Tensor)
    comparison = vtw.compare(model, [batch], {"at 3": vtw.Withdraw(3), "fewer": vtw.parse_policy("random:2:0.5")})
    assert_type(comparison, vtw.Comparison)
    assert_type(comparison.choose(max_kl=0.1), str | None)
    training = vtw.train_exit(model, [batch], positions=4)
    assert_type(training, vtw.ExitTraining)
    assert_type(training.routers, vtw.ExitRouters)
    assert_type(vtw.ExitRouters.load("exit.safetensors"), vtw.ExitRouters)
    assert_type(vtw.verify(model, batch, layer=16), vtw.Verification)

    with vtw.skip_attention(model, layers=[3, 5], adapters=vtw.SkipAdapters.from_pretrained("adapters")):
        pass
    vtw.compare(model, [batch], {"without": vtw.SkipAttention([3, 5])})
    found = vtw.find_skippable(model, [batch], skip=2, bandit=vtw.Bandit(steps=10))
    assert_type(found, vtw.SkipSearch)
    assert_type(found.kl, Tensor)
    adapted = vtw.train_skip(model, [batch], [3, 5], vtw.AdapterTraining(epochs=1))
    assert_type(adapted, vtw.SkipTraining)
    assert_type(adapted.adapters, vtw.SkipAdapters)
    vtw.find_layer(model, [batch], treshold=0.01)  # type: ignore[call-arg]


def of_tensors(x: Tensor, keep: Tensor) -> None:
    plan = vtw.plan_compaction(keep, length=5, pad="left")
    assert_type(plan, vtw.CompactionPlan)
    assert_type(plan.source, Tensor)
    assert_type(vtw.compact([x, x], plan, token_dims=[1, 1]), list[Tensor])
    assert_type(vtw.expand([x], plan, 5, token_dims=1), list[Tensor])
    assert_type(vtw.compact_paged_([x], x, x, keep, layout="HND"), Tensor)
    vtw.compact_([x], plan, token_dims=2)
    assert_type(vtw.plan_packed_(vtw.PackedPlan.empty(8, 2), x, x, x, x, x, block_size=16), None)
    vtw.plan_compaction(keep, pad="middle")  # type: ignore[arg-type]

    assert_type(vtw.kl_divergence(x, x, temperature=2.0), Tensor)
    assert_type(vtw.kl_divergence_loss(x, x), Tensor)
    assert_type(vtw.linear_kl_divergence(x, x, x, x, q_bias=x), Tensor)
    assert_type(vtw.kl_divergence_vocab_parallel(x, x), Tensor)
    assert_type(vtw.kl_from_state(vtw.merge_kl_states([vtw.kl_state(x, x)])), Tensor)
    assert_type(vtw.backend_info(), dict[str, Any])
    vtw.there_is_no_such_thing  # type: ignore[attr-defined]
