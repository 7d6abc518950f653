"""Skipped attention, prefill and decoding: against the plain model, and against a model that never had those blocks,
whose layers are a norm and an MLP."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from bench_withdraw import ROUNDS, decoder, embeds, timeit, wait_for  # noqa: F401  fixtures
from torch import Tensor, nn
from transformers import DynamicCache, LlamaModel

import vtw_kernels as vtw

pytestmark = pytest.mark.op("withdraw")
PEERS = ("vtw_kernels", "adapters", "adapters, not folded", "never had them", "plain model")


class WithoutAttention(nn.Module):
    """What is left of a decoder layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states: Tensor, **_) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.fixture(scope="module")
def without(decoder) -> Callable[[list[int]], LlamaModel]:  # noqa: F811
    """The same model, with the same weights, of which some layers never had attention."""

    def make(layers: list[int]) -> LlamaModel:
        with torch.device("meta"):
            model = LlamaModel(decoder.config).eval()
        for name in ("norm", "rotary_emb", "embed_tokens"):
            setattr(model, name, getattr(decoder, name))
        own = enumerate(decoder.layers)
        model.layers = nn.ModuleList(WithoutAttention(layer) if i in layers else layer for i, layer in own)
        return model

    return make


def skipped(decoder: nn.Module, share: str) -> list[int]:  # noqa: F811
    """Every other layer of the deep ones, as tasks let it."""
    count = {"quarter": len(decoder.layers) // 4, "half": len(decoder.layers) // 2}[share]
    return list(range(len(decoder.layers) - 1, 0, -2))[:count][::-1]


def adapters_of(decoder: nn.Module, layers: list[int]) -> vtw.SkipAdapters:  # noqa: F811
    adapters = vtw.SkipAdapters.for_model(decoder, layers, dim=8)
    for x in adapters.parameters():
        nn.init.normal_(x, std=0.01)
    return adapters.to(decoder.dtype)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("share", ["quarter", "half"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
@torch.inference_mode()
def test_skip(benchmark, decoder, embeds, without, step, share, peer, device, title):  # noqa: F811
    """Rounds take turns with the model that never had those blocks, as a machine's speed drifts by more than they
    differ."""
    layers, device = skipped(decoder, share), torch.device(device)
    what = f"prefill of {embeds.shape[1]} tokens" if step == "prefill" else f"one token after {embeds.shape[1]}"
    benchmark.group = f"{what}, attention skipped in {len(layers)} of {len(decoder.layers)} layers{title}"
    bare, inputs = without(layers), embeds if step == "prefill" else embeds[:, :1]
    adapters = adapters_of(decoder, layers) if "adapters" in peer else None

    def under():
        return vtw.skip_attention(decoder, layers, adapters, fold=peer == "adapters")

    def filled(model: nn.Module) -> DynamicCache:
        cache = DynamicCache()
        if step == "decode":
            model(inputs_embeds=embeds, past_key_values=cache)
        return cache

    def run(model: nn.Module, cache: DynamicCache) -> None:
        model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        wait_for(device)

    handle = under().apply() if peer not in ("never had them", "plain model") else None
    model = bare if peer == "never had them" else decoder
    ours = filled(model)
    if step == "decode":
        run(model, ours)  # folds, once after a prompt
    if handle is not None:
        handle.remove()
    theirs, ideals, handles, caches = filled(bare), [], [], []

    def setup():
        for old in handles:
            old.remove()
        handles[:] = []
        cache = cropped(theirs, bare)
        ideals.append(timeit(partial(run, bare, cache), device))
        if handle is not None:
            handles[:] = [under().apply()]
        caches[:] = [ours if step == "decode" else DynamicCache()]
        return (model, *caches), {}

    def cropped(cache: DynamicCache, of: nn.Module) -> DynamicCache:
        return DynamicCache() if step == "prefill" else copy.deepcopy(cache)

    try:
        benchmark.pedantic(run, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    finally:
        for old in handles:
            old.remove()
    held = [x for layer in caches[0].layers for x in (layer.keys, layer.values) if x is not None]
    benchmark.extra_info["kv_bytes"] = sum(x.numel() * x.element_size() for x in held)
    if benchmark.enabled and peer != "never had them":
        times = benchmark.stats.stats.data
        benchmark.extra_info["of_ideal"] = median(x / y for x, y in zip(times, ideals[-len(times) :]))
