"""Prefill under each policy: against the plain model, and against the policy's own ideal, which is its layers on its
rows alone, with nothing between them. What a policy computes to decide is not in the ideal."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bench_withdraw import decoder, embeds, layers_alone, measure_prefill, run_model, visual  # noqa: F401  fixtures
from torch import Tensor
from transformers import DynamicCache, LlamaModel

import vtw_kernels as vtw
from vtw_kernels.layer_search.decisions import recording

pytestmark = pytest.mark.op("withdraw")
PEERS = ("vtw_kernels", "ideal", "plain model")
# By name, of a decoder with so many layers.
POLICIES: dict[str, Callable[[int], list[vtw.Policy]]] = {
    "all before layer 1/2": lambda layers: [vtw.Withdraw(layers // 2)],
    "FastV, half at 2": lambda layers: [vtw.TopAttention(2, 0.5)],
    "PyramidDrop, half at 1/4, 1/2, 3/4": lambda layers: [vtw.TopAttention(k * layers // 4, 0.5) for k in (1, 2, 3)],
    "random half at 2": lambda layers: [vtw.RandomVisual(2, 0.5)],
    "half at 2, none from 3/4": lambda layers: [vtw.TopAttention(2, 0.5), vtw.Withdraw(3 * layers // 4)],
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_prefill(benchmark, decoder, embeds, visual, name, peer, device, model_shape, title):  # noqa: F811
    tokens = f"{model_shape.visual} visual and {model_shape.text} text tokens"
    benchmark.group = f"prefill of {tokens}, {name}{title}"
    policies = POLICIES[name](len(decoder.layers))
    ideal = partial(run_ideal, decoder, stages_of(decoder, embeds, visual, policies))
    plain = partial(run_model, decoder, embeds, None, None, None, None, None)
    apply = partial(vtw.apply, decoder, policies, visual_mask=visual) if peer == "vtw_kernels" else None
    measure_prefill(benchmark, ideal if peer == "ideal" else plain, ideal, apply, device)


Stages = list[tuple[range, Tensor, tuple[Tensor, ...]]]


def stages_of(decoder: LlamaModel, embeds: Tensor, visual: Tensor, policies: list[vtw.Policy]) -> Stages:  # noqa: F811
    """The layers of each stage, and as many rows as the policies leave to it, with their rotary tables."""
    with vtw.withdraw(decoder, recording(policies, decided := {}), visual_mask=visual):
        decoder(inputs_embeds=embeds, use_cache=False)
    rope = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1], device=embeds.device)[None])
    boundaries, stages = [*decided, len(decoder.layers)], [(range(next(iter(decided))), embeds, rope)]
    for (layer, stays), end in zip(decided.items(), boundaries[1:]):
        rows = (stays | ~visual)[0].nonzero().flatten()
        stages.append((range(layer, end), embeds[:, rows], tuple(x[:, rows] for x in rope)))
    return stages


def run_ideal(decoder: LlamaModel, stages: Stages, cache: DynamicCache) -> None:  # noqa: F811
    for layers, rows, rope in stages:
        hidden = layers_alone(decoder, layers, rows, rope, cache)
    decoder.norm(hidden)
