"""Prefill under visual pruning: against the plain model, against withdrawal of as many FLOPs, and against the ideal,
which is layers of exactly the sizes that are left, on rows that are already split, with nothing between them."""

from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from bench_withdraw import bytes_of, timeit, wait_for
from harness import observe
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

import vtw_kernels as vtw
from vtw_kernels.integration.pruning.prune import prune_visual

pytestmark = pytest.mark.op("withdraw")
HIDDEN, INTERMEDIATE, LAYERS, HEADS, BEFORE, WINDOW = 1024, 2752, 16, 16, 35, 5
SIZES = {"576+85": (24, 85, 10), "4096+128": (64, 128, 3)}  # side of the image, tokens of text, rounds


def some_heads() -> Tensor:
    """All in the first two layers and half of them, at random, in the others."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
    for i, layer in enumerate(heads):
        layer[torch.randperm(HEADS, generator=generator)[: HEADS if i < 2 else HEADS // 2]] = True
    return heads


PRUNINGS = {
    "all, cut at half": vtw.VisualPruning(heads=some_heads(), window=WINDOW, ffn_ratio=2, layer_cut=LAYERS // 2),
    "no cut": vtw.VisualPruning(heads=some_heads(), window=WINDOW, ffn_ratio=2),
    "half of the heads": vtw.VisualPruning(heads=some_heads()),
    "half of the MLP": vtw.VisualPruning(ffn_ratio=2),
    "window": vtw.VisualPruning(window=WINDOW),
}


class Flops:
    """Of the products of a prefill, two for each multiplication, with what causality leaves of attention."""

    def __init__(self, visual: int, text: int):
        self.visual, self.text = visual, text

    def layer(self, kept: int = HEADS, window: bool = False, ratio: float = 1, visual: bool = True) -> float:
        v, t = self.visual if visual else 0, self.text
        linear = 2 * HIDDEN * (4 * HIDDEN * (t + v * kept / HEADS) + 3 * INTERMEDIATE * (t + v / ratio))
        before, after = BEFORE, t - BEFORE
        among = v * (WINDOW**2 if window else v / 2)
        pairs = kept * (among + v * before + v * after) + HEADS * t * t / 2
        return linear + 4 * pairs * HIDDEN / HEADS

    def pruned(self, pruning: vtw.VisualPruning) -> float:
        kept = [HEADS] * LAYERS if pruning.heads is None else pruning.heads.sum(1).tolist()
        cut = LAYERS if pruning.layer_cut is None else pruning.layer_cut
        parts = dict(window=pruning.window is not None, ratio=pruning.ffn_ratio or 1)
        return sum(self.layer(kept[i], **parts, visual=i < cut) for i in range(LAYERS))

    def withdrawn(self, layer: int) -> float:
        return sum(self.layer(visual=i < layer) for i in range(LAYERS))

    def as_withdrawn(self, pruning: vtw.VisualPruning) -> int:
        """The layer before which withdrawal leaves the number of FLOPs that is nearest."""
        wanted = self.pruned(pruning)
        return min(range(1, LAYERS + 1), key=lambda layer: abs(self.withdrawn(layer) - wanted))


class IdealLayer(nn.Module):
    """A decoder layer for text, and one of the size that is left for visual rows."""

    def __init__(self, layer: nn.Module, kept: int, window: bool, ratio: float):
        super().__init__()
        self.layer, self.kept, self.window, dim = layer, kept, window, HIDDEN // HEADS
        inner = kept * dim
        columns = int(INTERMEDIATE / ratio)
        self.q, self.k, self.v = (nn.Linear(HIDDEN, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, HIDDEN, bias=False)
        self.gate, self.up = (nn.Linear(HIDDEN, columns, bias=False) for _ in range(2))
        self.down = nn.Linear(columns, HIDDEN, bias=False)

    def forward(self, text: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        layer, attention, kept = self.layer, self.layer.self_attn, self.kept
        t, x = layer.input_layernorm(text), layer.input_layernorm(visual)
        qt, kt, vt = (self.heads(f(t)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        qx, kx, vx = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        keys, values = torch.cat((kx, kt[:, :kept]), dim=2), torch.cat((vx, vt[:, :kept]), dim=2)
        seeing = F.scaled_dot_product_attention(qt[:, :kept], keys, values)
        outputs = [seeing]
        if kept < HEADS:
            outputs.append(F.scaled_dot_product_attention(*(y[:, kept:] for y in (qt, kt, vt)), is_causal=True))
        if self.window:  # as many pairs as there are, of 64 rows with the same keys
            rows = qx.unflatten(2, (-1, 64)).transpose(1, 2).flatten(0, 1)
            some = keys[:, :, : WINDOW**2 + BEFORE].expand(len(rows), -1, -1, -1)
            images = F.scaled_dot_product_attention(rows, some, some)
            images = images.unflatten(0, (1, -1)).transpose(1, 2).flatten(2, 3)
        else:
            images = F.scaled_dot_product_attention(qx, kx, vx, is_causal=True)
        text = text + attention.o_proj(torch.cat(outputs, dim=1).transpose(1, 2).flatten(2))
        visual = visual + self.o(images.transpose(1, 2).flatten(2))
        text = text + layer.mlp(layer.post_attention_layernorm(text))
        x = layer.post_attention_layernorm(visual)
        return text, visual + self.down(F.silu(self.gate(x)) * self.up(x)), [keys, values, kt[:, kept:], vt[:, kept:]]

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2)


def run_ideal(layers: list[nn.Module], text: Tensor, visual: Tensor, rope: tuple) -> list:
    cached = []
    for layer in layers:
        if isinstance(layer, IdealLayer):
            text, visual, kept = layer(text, visual)
            cached.append(kept)
        else:
            text = layer(text, position_embeddings=rope)
    return cached


@pytest.fixture(scope="module")
def decoder(device, dtype) -> LlamaModel:
    torch.manual_seed(0)
    size = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS)
    config = LlamaConfig(**size, num_attention_heads=HEADS, vocab_size=32, dtype=dtype)
    with torch.device(device):
        return LlamaModel._from_config(config).eval()


@pytest.mark.parametrize("name", PRUNINGS)
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_prefill(benchmark, decoder, size, name, device):
    """Rounds of all four take turns: the machine's speed drifts by more than some of them differ."""
    side, text, rounds = SIZES[size]
    visual, pruning = side * side, PRUNINGS[name]
    benchmark.group = f"prefill of {visual} visual and {text} text tokens, visual pruning: {name}"
    embeds = torch.randn(1, visual + text, HIDDEN, generator=torch.Generator().manual_seed(0))
    embeds = embeds.to(decoder.device, decoder.dtype)
    mask = torch.zeros(1, visual + text, dtype=torch.bool)
    mask[:, BEFORE : BEFORE + visual] = True
    flops = Flops(visual, text)
    layer = flops.as_withdrawn(pruning)
    kept = [HEADS] * LAYERS if pruning.heads is None else pruning.heads.sum(1).tolist()
    cut = LAYERS if pruning.layer_cut is None else pruning.layer_cut
    with torch.device(device):
        ideal = [
            IdealLayer(x, kept[i], pruning.window is not None, pruning.ffn_ratio or 1).to(decoder.dtype)
            if i < cut
            else x
            for i, x in enumerate(decoder.layers)
        ]
    words = embeds[:, ~mask[0]]
    rope = decoder.rotary_emb(words, torch.arange(text, device=decoder.device)[None])
    peers: dict[str, Callable] = {
        "ideal": partial(run_ideal, ideal, words, embeds[:, mask[0]], rope),
        "plain": partial(run_model, decoder, embeds, None),
        "withdrawal": partial(run_model, decoder, embeds, lambda: vtw.withdraw(decoder, layer, visual_mask=mask)),
    }
    prune = lambda: prune_visual(decoder, pruning, visual_mask=mask)  # noqa: E731
    times: dict[str, list[float]] = {peer: [] for peer in peers}

    def setup():
        for peer, run in peers.items():
            times[peer].append(timeit(run, decoder.device))

    def target():
        cache = run_model(decoder, embeds, prune)
        wait_for(decoder.device)
        return cache

    cache = benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=1)
    if not benchmark.enabled:
        return
    own, info = benchmark.stats.stats.data, benchmark.extra_info
    for peer, taken in times.items():
        ratios = [x / y for x, y in zip(own, taken[-len(own) :])]
        info |= {f"of_{peer}": median(ratios), f"of_{peer}_worst": max(ratios)}
    info |= {"flops_of_plain": flops.pruned(pruning) / flops.withdrawn(LAYERS), "withdrawn_before": layer}
    info |= {"withdrawal_flops_of_plain": flops.withdrawn(layer) / flops.withdrawn(LAYERS)}
    info["kv_bytes"] = bytes_of(cache) + sum(x.keys.nbytes + x.values.nbytes for x in cache.blind.values())
    info["kv_bytes_plain"] = 2 * LAYERS * HIDDEN * (visual + text) * embeds.element_size()
    with vtw.withdraw(decoder, layer, visual_mask=mask):
        info["kv_bytes_withdrawal"] = bytes_of(run_model(decoder, embeds, None))
    info["copied_weight_bytes"] = (pruned := prune()).copied_bytes
    with pruned:
        info |= observe(run_model, (decoder, embeds, None), device)
    info["peak_extra_bytes_plain"] = observe(run_model, (decoder, embeds, None), device)["peak_extra_bytes"]


def run_model(decoder: LlamaModel, embeds: Tensor, under: Callable | None) -> DynamicCache:
    cache = DynamicCache()
    if under is None:
        decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    else:
        with under():
            decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return cache
