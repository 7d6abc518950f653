"""Withdrawal end to end, prefill and decoding: against the plain model, and against the ideal, which is K layers on all
rows and the others on the text alone, with nothing between them."""

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from harness import memory_budget, observe, size_in_bytes, skip_if_too_long
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

import vtw_kernels as vtw

pytestmark = pytest.mark.op("withdraw")
ROUNDS = 20


@pytest.fixture(scope="module")
def decoder(device, model_shape, dtype) -> LlamaModel:
    """The model's decoder with random weights; on the CPU with 12 layers and a hidden size of 512."""
    skip_if_too_long(model_shape, device)
    torch.manual_seed(0)
    m = model_shape
    size = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8)
    size["num_key_value_heads"] = max(1, 8 * m.kv_heads // m.heads)
    if device == "cuda":
        size = dict(hidden_size=m.hidden, intermediate_size=m.intermediate, num_hidden_layers=m.layers)
        size |= dict(num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim)
    config = LlamaConfig(**size, vocab_size=32, dtype=dtype)
    with torch.device("meta"):
        needed = 2 * size_in_bytes(list(LlamaModel._from_config(config).parameters()))
    if needed > memory_budget(device):
        pytest.skip(
            f"{m.name} takes {needed / 1e9:.0f} GB, of which this device gives {memory_budget(device) / 1e9:.0f}"
        )
    with torch.device(device):
        return LlamaModel._from_config(config).eval()


@pytest.fixture(scope="module")
def embeds(decoder, model_shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (1, model_shape.tokens, decoder.config.hidden_size)
    return torch.randn(size, generator=generator).to(decoder.device, decoder.dtype)


@pytest.fixture(scope="module")
def visual(embeds, model_shape) -> Tensor:
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    mask[:, model_shape.before : model_shape.before + model_shape.visual] = True
    return mask


@pytest.fixture(scope="module")
def text_of(model_shape) -> Callable[[Tensor], Tensor]:
    """From all rows, dimension -2, to those of the text."""
    before, end = model_shape.before, model_shape.before + model_shape.visual
    return lambda x: torch.cat((x[..., :before, :], x[..., end:, :]), dim=-2)


def layers_alone(decoder: nn.Module, layers: range, hidden: Tensor, rope: tuple, cache: DynamicCache) -> Tensor:
    for layer in decoder.layers[layers.start : layers.stop]:
        hidden = layer(hidden, position_embeddings=rope, past_key_values=cache, use_cache=True)
    return hidden


def prepared(decoder: nn.Module, embeds: Tensor, first: int, text_of: Callable) -> tuple[tuple, tuple, Tensor]:
    """Rotary tables of all rows and of the text, and rows of text to go on with: what the ideal need not compute."""
    rope = decoder.rotary_emb(embeds, torch.arange(first, first + embeds.shape[1], device=embeds.device)[None])
    if first:
        return rope, rope, embeds
    return rope, tuple(map(text_of, rope)), text_of(embeds)


def run_ideal(decoder, embeds, layer, text_of, rope, rope_of_text, text, cache) -> None:
    layers_alone(decoder, range(layer), embeds, rope, cache)
    decoder.norm(layers_alone(decoder, range(layer, len(decoder.layers)), text, rope_of_text, cache))


def run_by_hand(decoder, embeds, layer, text_of, rope, rope_of_text, text, cache) -> None:
    """As VTW's authors do: one torch.cat of slices per tensor."""
    hidden = layers_alone(decoder, range(layer), embeds, rope, cache)
    rope = tuple(map(text_of, rope))
    decoder.norm(layers_alone(decoder, range(layer, len(decoder.layers)), text_of(hidden), rope, cache))


def run_model(decoder, embeds, layer, text_of, rope, rope_of_text, text, cache) -> None:
    decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)


PEERS = {"vtw_kernels": run_model, "slices by hand": run_by_hand, "ideal": run_ideal, "plain model": run_model}


def layer_of(decoder: nn.Module, part: str) -> int:
    return {"quarter": 1, "half": 2, "three quarters": 3}[part] * len(decoder.layers) // 4


def bytes_of(cache: DynamicCache) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("part", ["quarter", "half", "three quarters"])
@torch.inference_mode()
def test_prefill(benchmark, decoder, embeds, part, peer, visual, device, model_shape, text_of, title):
    layer = layer_of(decoder, part)
    tokens = f"{model_shape.visual} visual and {model_shape.text} text tokens"
    benchmark.group = f"prefill of {tokens}, withdrawn before layer {layer}{title}"
    arguments = (decoder, embeds, layer, text_of, *prepared(decoder, embeds, 0, text_of))
    apply = partial(vtw.apply, decoder, layer, visual_mask=visual) if peer == "vtw_kernels" else None
    measure_prefill(benchmark, partial(PEERS[peer], *arguments), partial(run_ideal, *arguments), apply, device)


def measure_prefill(
    benchmark, peer: Callable, ideal: Callable, apply: Callable | None, device: torch.device | str
) -> None:
    """Times ``peer``, which is given a cache, under what ``apply`` puts into effect, if anything: then its rounds take
    turns with the ideal, as a machine's speed drifts by more than they differ."""
    handles, caches, ideals, device = [], [], [], torch.device(device)

    def setup():
        caches[:] = [DynamicCache()]
        if apply is not None:
            for handle in handles:
                handle.remove()
            ideals.append(timeit(lambda: ideal(DynamicCache()), device))
            handles[:] = [apply()]
        return tuple(caches), {}

    def target(cache):
        peer(cache)
        wait_for(device)

    try:
        benchmark.pedantic(target, setup=setup, rounds=ROUNDS, warmup_rounds=2)
        if benchmark.enabled:
            benchmark.extra_info |= observe(peer, (DynamicCache(),), str(device))
    finally:
        for handle in handles:
            handle.remove()
    benchmark.extra_info["kv_bytes"] = bytes_of(*caches)
    if benchmark.enabled and ideals:
        times = benchmark.stats.stats.data
        benchmark.extra_info["of_ideal"] = median(x / y for x, y in zip(times, ideals[-len(times) :]))


def timeit(function, device) -> float:
    begin = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - begin


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "slices by hand"])
@torch.inference_mode()
def test_decode(benchmark, decoder, embeds, visual, peer, device, text_of, title):
    layer = layer_of(decoder, "half")
    benchmark.group = f"one token more, withdrawn before layer {layer}{title}"
    token = embeds[:, :1]

    def target(*args):
        PEERS[peer](*args)
        wait_for(embeds.device)

    arguments = (decoder, token, layer, text_of, *prepared(decoder, token, embeds.shape[1], text_of))
    handle = vtw.apply(decoder, layer, visual_mask=visual) if peer == "vtw_kernels" else None
    try:
        filled = DynamicCache()
        filling = run_ideal if peer == "ideal" else run_model
        filling(decoder, embeds, layer, text_of, *prepared(decoder, embeds, 0, text_of), filled)
        setup = lambda: ((*arguments, copy.deepcopy(filled)), {})  # noqa: E731
        benchmark.pedantic(target, setup=setup, rounds=ROUNDS, warmup_rounds=2)
        if benchmark.enabled:
            benchmark.extra_info |= observe(PEERS[peer], setup()[0], device)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("peer", ["plain model", "withdrawn before 16", "withdrawn before 1"])
@pytest.mark.parametrize("tokens", [12, 1], ids=["prefill", "decode"])
@torch.inference_mode()
def test_host(benchmark, device, tokens, peer):
    """What Python and the dispatcher take: 32 layers of next to no size, so the difference is that of hooks and ops."""
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=32, num_attention_heads=1, vocab_size=8)
    with torch.device(device):
        tiny = LlamaModel(LlamaConfig(**size)).eval()
        embeds = torch.randn(1, 12, 8)
        visual = torch.tensor([[False] * 3 + [True] * 6 + [False] * 3])
    benchmark.group = f"the host's share of {'a prefill' if tokens > 1 else 'one token more'}, 32 layers"
    layer = {"plain model": 32, "withdrawn before 16": 16, "withdrawn before 1": 1}[peer]

    def setup():
        cache = DynamicCache()
        if tokens == 1:
            tiny(inputs_embeds=embeds, past_key_values=cache)
        return (embeds[:, :tokens], cache), {}

    def target(embeds: Tensor, cache: DynamicCache) -> None:
        tiny(inputs_embeds=embeds, past_key_values=cache)
        wait_for(embeds.device)

    with vtw.withdraw(tiny, layer, visual_mask=visual):
        benchmark.pedantic(target, setup=setup, rounds=5 * ROUNDS, warmup_rounds=5)
