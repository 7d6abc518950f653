"""Attention that is skipped, against a plain model whose blocks are replaced in the open: in fp64, without a cache."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from vlm import (
    FAMILIES,
    IMAGE,
    LAYERS,
    ONE,
    RAGGED,
    TEXT,
    TRANSFORMERS_5,
    append,
    generated,
    make_batch,
    make_cache,
    model_of,
    older_than,
    run,
    with_decode_steps,
)

import vtw_kernels as vtw
from vtw_kernels.integration import stage
from vtw_kernels.integration.compat import HAS_CACHE_POSITION
from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.masks import take_columns
from vtw_kernels.integration.verify import hide_keys
from vtw_kernels.layer_search.skip_search import learn

torch.set_num_threads(1)
LIMIT = 1e-9  # fp64
CACHED = (True, False)
LOOKUP = {"max_new_tokens": 20, "prompt_lookup_num_tokens": 3, "eos_token_id": IMAGE}  # wants one; it is suppressed


def model_with_norms(family: str):
    """Whose norms multiply by something."""
    model, generator = copy.deepcopy(model_of(family)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in find_parts(model).layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
    return model


def double(family: str):
    return model_with_norms(family).double()


def batch_of(family: str, rows=RAGGED, **options):
    batch = make_batch(family, rows, **options)
    for image in batch.images:
        image["pixels"] = image["pixels"].double()
    return batch


def adapters_of(model, layers, seed: int = 1, **options) -> vtw.SkipAdapters:
    """With weights that matter, all of them."""
    adapters = vtw.SkipAdapters.for_model(model, layers, dim=4, skipped_dim=6, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in adapters.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * (3.0 if x.shape[0] == 2 and x.ndim < 3 else 0.3))
    return adapters.to(next(model.parameters()).dtype)


# ------------------------------------------------------------------------------------------------------------- oracle


def pia(adapter, x: Tensor, prompt: Tensor) -> Tensor:
    """The paper's adapter, written out: convolutions of width 1 in two groups, and a mixture of two of them."""
    mean = torch.stack(
        [row[mask].mean(0) if mask.any() else row.new_zeros(row.shape[1]) for row, mask in zip(x, prompt)]
    )
    weights = ((mean @ adapter.router.weight.T + adapter.router.bias) / 10.0).softmax(-1)
    z = x @ adapter.down.weight.T + adapter.down.bias
    if hasattr(adapter, "pooled"):
        pooled = x @ adapter.pooled.weight.T + adapter.pooled.bias
        means = [p[mask].mean(0) if mask.any() else adapter.pooled.bias for p, mask in zip(pooled, prompt)]
        z = (z + torch.stack(means)[:, None]) / 2
    branches = [
        F.conv1d(z.mT, adapter.up[i][..., None], adapter.up_bias[i], groups=2).mT * weights[:, i, None, None]
        for i in range(2)
    ]
    return x + branches[0] + branches[1]


class Replaced(nn.Module):
    """A decoder layer without attention; ``prompt``: bool [B, S], of an adapter."""

    def __init__(self, layer, adapter=None, prompt=None):
        super().__init__()
        self.layer, self.adapter, self.prompt = layer, adapter, prompt

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden_states, *args, **kwargs):
        if self.adapter is None:
            out = hidden_states + self.layer.mlp(self.layer.post_attention_layernorm(hidden_states))
        else:
            x = pia(self.adapter, self.layer.input_layernorm(hidden_states), self.prompt)
            out = hidden_states + self.layer.mlp(self.layer.post_attention_layernorm.weight * x)
        return (out,) if "Qwen2VL" in type(self.layer).__name__ and not TRANSFORMERS_5 else out


class Adapted(nn.Module):
    """A norm with an adapter behind it."""

    def __init__(self, norm, adapter, prompt):
        super().__init__()
        self.norm, self.adapter, self.prompt = norm, adapter, prompt

    def forward(self, x):
        return pia(self.adapter, self.norm(x), self.prompt)


def replaced(model, layers, adapters=None, prompts=None):
    """A copy of the model with its blocks replaced; ``prompts``: bool [B, S] for each layer, what means are over."""
    model = copy.deepcopy(model)
    blocks = find_parts(model).layers
    for i, layer in enumerate(blocks):
        if i in layers:
            adapter = adapters.skipped[str(i)] if adapters is not None else None
            blocks[i] = Replaced(layer, adapter, prompts[i] if adapter is not None else None)
        elif adapters is not None and i in adapters.kept:
            layer.input_layernorm = Adapted(layer.input_layernorm, adapters.before[str(i)], prompts[i])
    return model


@torch.no_grad()
def in_the_open(model, batch, layers, adapters=None, prompt: int | None = None, withdrawn: int = LAYERS) -> Tensor:
    """Logits [B, S, V] of one forward over all of a batch, of which the first ``prompt`` columns are the prompt."""
    columns = torch.arange(batch.ids.shape[1]) < (batch.ids.shape[1] if prompt is None else prompt)
    rows = batch.mask.bool() & columns
    prompts = [rows & ~batch.visual if i >= withdrawn else rows for i in range(LAYERS)]
    plain = replaced(model, layers, adapters, prompts)
    options = {"position_ids": batch.positions(model), "use_cache": False}
    if withdrawn == LAYERS:
        return plain(**batch.inputs(), **options).logits
    hidden = [batch.visual if i >= withdrawn and i not in layers else None for i in range(LAYERS)]
    with hide_keys(plain, hidden):
        return plain(**batch.inputs(), **options).logits


def difference(logits: Tensor, expected: Tensor, batch, text: bool = False) -> float:
    """The largest one where something is attended."""
    counts = batch.mask.bool() & (~batch.visual if text else True)
    return (logits - expected)[counts].abs().max().item()


# ---------------------------------------------------------------------------------------------------- equal to oracle


@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("layers", [[0], [1, 3], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_replaced(family, layers, with_adapters):
    model = double(family)
    adapters = adapters_of(model, sorted(layers)) if with_adapters else None
    prompt = batch_of(family, pad="left")
    batch, ends = with_decode_steps(prompt, 3)
    expected = in_the_open(model, batch, layers, adapters, ends[0])
    full = in_the_open(model, batch, [])
    assert difference(full, expected, batch) > 0.1
    for kind in ("dynamic", "static", "plain"):
        cache = make_cache(model, kind, batch.ids.shape[1])
        with vtw.skip_attention(model, layers, adapters):
            assert difference(run(model, batch, ends, cache), expected, batch) < LIMIT, kind
        for i in layers:
            assert cache.layers[i].keys is None and cache.layers[i].values is None
            assert cache.get_seq_length(i) == batch.ids.shape[1]
    assert difference(run(model, batch, ends), full, batch) < LIMIT  # restored


@pytest.mark.parametrize("first", ["withdraw", "skip"])
@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize(("layers", "layer"), [([0, 2], 2), ([1], 3), ([2, 3], 1)])
def test_with_withdrawal(layers, layer, with_adapters, first):
    model = double("llava")
    adapters = adapters_of(model, layers) if with_adapters else None
    prompt = batch_of("llava")
    batch, ends = with_decode_steps(prompt, 3)
    expected = in_the_open(model, batch, layers, adapters, ends[0], withdrawn=layer)
    assert difference(in_the_open(model, batch, layers, adapters, ends[0]), expected, batch, text=True) > 1e-3
    for kind in ("dynamic", "static"):
        cache = make_cache(model, kind, batch.ids.shape[1])
        contexts = [vtw.withdraw(model, layer), vtw.skip_attention(model, layers, adapters)]
        with contexts[first == "skip"], contexts[first != "skip"]:
            assert difference(run(model, batch, ends, cache), expected, batch, text=True) < LIMIT, kind


@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
def test_cache_that_the_model_makes(with_adapters):
    model, layers = double("llava"), [1, 3]
    adapters = adapters_of(model, layers) if with_adapters else None
    batch, (end, last, *_) = with_decode_steps(batch_of("llava"), 1)
    positions = batch.positions(model)
    with torch.no_grad(), vtw.skip_attention(model, layers, adapters):
        first = model(**batch.inputs(0, end), position_ids=positions[:, :end])
        logits = run(model, batch, [last], first.past_key_values, begin=end)
    expected = in_the_open(model, batch, layers, adapters, end)
    assert difference(torch.cat([first.logits, logits], 1), expected, batch) < LIMIT


SLIDING = ["sliding_attention", "full_attention"] * 2


def windows_model(layer_types=SLIDING):
    torch.manual_seed(0)
    options = {"use_sliding_window": True, "sliding_window": 6, "layer_types": layer_types}
    return Qwen2ForCausalLM(Qwen2Config(**TEXT | options)).double().eval()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layers", [[0], [0, 2], [1, 3], [2, 3]], ids=str)  # [0, 2]: all the windows, [1, 3]: none
def test_sliding_windows(layers, kind, monkeypatch):
    def within(mask: Tensor, columns: Tensor) -> Tensor:
        assert columns.max() < mask.shape[-1]  # torch does not look
        return take_columns(mask, columns)

    monkeypatch.setattr(stage, "take_columns", within)
    model = windows_model()
    ids = torch.randint(10, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(2, 14, dtype=torch.bool)
    visual[0, 2:8] = visual[1, 4:7] = True
    for withdrawn in (LAYERS, 1, 2):
        plain = replaced(model, layers)
        hidden = [visual if i >= withdrawn and i not in layers else None for i in range(LAYERS)]
        with torch.no_grad(), hide_keys(plain, hidden):
            expected = plain(ids, use_cache=False).logits
        cache, logits = make_cache(model, kind, 14), []
        with (
            torch.no_grad(),
            vtw.skip_attention(model, layers),
            vtw.withdraw(model, withdrawn, visual_mask=visual),
        ):
            for begin, end in ((0, 9), (9, 10), (10, 12), (12, 13), (13, 14)):
                options = {"cache_position": torch.arange(begin, end)} if HAS_CACHE_POSITION else {}
                logits.append(model(ids[:, begin:end], past_key_values=cache, **options).logits)
        seen = ~visual if withdrawn < LAYERS else torch.ones_like(visual)
        assert (torch.cat(logits, 1) - expected)[seen].abs().max() < LIMIT, withdrawn


# -------------------------------------------------------------------------------------------------- generate and cache


@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
def test_generate(with_adapters):
    """Tokens and logits of each way to generate, against the open model's logits of what was generated."""
    model, layers = double("llava"), [0, 2]
    adapters = adapters_of(model, layers) if with_adapters else None
    batch = batch_of("llava")
    length = batch.ids.shape[1]
    with vtw.skip_attention(model, layers, adapters):
        sequences, logits = generated(model, batch.inputs())
        for options in ({"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(generated(model, batch.inputs(), **options)[0], sequences), options
        # Before 5.18, a plain model finds other beams without a cache.
        other = {"cache_implementation": "static"} if older_than("5.18") else {"use_cache": False}
        beams = [generated(model, batch.inputs(), num_beams=3, **x)[0] for x in ({}, other)]
        assert torch.equal(*beams) and not torch.equal(beams[0], sequences)
        sampled = [
            generated(model, batch.inputs(), do_sample=True, num_return_sequences=2, use_cache=x)[0] for x in CACHED
        ]
        assert torch.equal(*sampled)
    answer = batch_of("llava", [[sequences.shape[1] - length]] * len(sequences))
    answer.ids = sequences[:, length:]
    whole = append(batch, answer)
    expected = in_the_open(model, whole, layers, adapters, length)[:, length - 1 : -1]
    assert (logits.transpose(0, 1) - expected).abs().max() < 1e-6  # generate gives fp32
    assert not torch.equal(generated(model, batch.inputs())[0], sequences)


@pytest.mark.parametrize("with_adapters", [False, True], ids=["plain", "adapters"])
def test_assisted_decoding_crops(with_adapters):
    model, layers = double("llava"), [0, 2]
    adapters = adapters_of(model, layers) if with_adapters else None
    batch = batch_of("llava", ONE)
    with vtw.skip_attention(model, layers, adapters):
        for context in (nullcontext(), vtw.withdraw(model, 1)):
            with context:
                sequences, _ = generated(model, batch.inputs(), max_new_tokens=20)
                looked_up, _ = generated(model, batch.inputs(), **LOOKUP)
            # Up to 4.57, the last step may add a token too many.
            assert torch.equal(looked_up[:, : sequences.shape[1]], sequences)


def test_further_turn_keeps_first_prompts_mean():
    model, layers = double("llava"), [1, 2]
    adapters = adapters_of(model, layers)
    first = batch_of("llava")
    end = first.ids.shape[1]
    both = append(first, batch_of("llava", [[3, 4, 2], [9], [5, 4, 0]], pad="left", seed=3))
    both.mask[:] = both.mask | (torch.arange(both.ids.shape[1]) >= end)
    expected = in_the_open(model, both, layers, adapters, end)
    other = in_the_open(model, both, layers, adapters)
    with vtw.skip_attention(model, layers, adapters):
        logits = run(model, both, [end, both.ids.shape[1]])
        assert difference(logits, expected, both) < LIMIT
    assert difference(logits, other, both) > 1e-3


def test_cache_of_beams_keeps_their_prompts():
    model, layers = double("llava"), [1]
    adapters = adapters_of(model, layers)
    prompt = batch_of("llava")
    batch, ends = with_decode_steps(prompt, 2)
    expected = in_the_open(model, batch, layers, adapters, ends[0])
    rows = torch.tensor([2, 0, 1])
    with torch.no_grad(), vtw.skip_attention(model, layers, adapters):
        for change, order in (
            (lambda cache: cache.reorder_cache(rows), rows),
            (lambda cache: cache.batch_select_indices(rows), rows),
            (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        ):
            cache = DynamicCache(config=model.config)
            run(model, batch, ends[:1], cache)
            cache = copy.deepcopy(cache)
            change(cache)
            positions = batch.positions(model)[order, ends[0] : ends[1]]
            logits = model(
                input_ids=batch.ids[order, ends[0] : ends[1]],
                attention_mask=batch.mask[order, : ends[1]],
                position_ids=positions,
                past_key_values=cache,
            ).logits
            assert (logits[:, 0] - expected[order, ends[0]]).abs().max() < LIMIT


def emptied(cache):
    cache.reset()
    if cache.get_seq_length() > 0:  # before 5.18, dynamic ones are filled with zeros
        cache = DynamicCache()
    return cache


def test_caches_that_do_not_fit():
    model = double("llava")
    batch, ends = with_decode_steps(batch_of("llava", ONE), 3)
    for kind in ("dynamic", "static"):
        cache = make_cache(model, kind, 64)
        run(model, batch, ends[:1], cache)
        held = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
        with (
            vtw.skip_attention(model, [1]),
            pytest.raises(ValueError, match=r"filled under skip_attention\(layers=\[1\]\) or an .* got .* without"),
        ):
            run(model, batch, ends[1:2], cache, begin=ends[0])
        assert all(torch.equal(x.keys, k) and torch.equal(x.values, v) for x, (k, v) in zip(cache.layers, held))
        cache = emptied(cache)
        with vtw.skip_attention(model, [1]):
            logits = run(model, batch, ends[:2], cache)
        with pytest.raises(ValueError, match=r"filled under skip_attention\(layers=\[1\]\) and can only be used there"):
            run(model, batch, ends[2:3], cache, begin=ends[1])
        with vtw.skip_attention(model, [0, 1]), pytest.raises(ValueError, match=r"got one filled under .*\[1\]"):
            run(model, batch, ends[2:3], cache, begin=ends[1])
        cache = emptied(cache)
        assert difference(run(model, batch, ends, cache), in_the_open(model, batch, []), batch) < LIMIT
        cache = emptied(cache)
        with vtw.skip_attention(model, [1]):
            assert torch.equal(run(model, batch, ends[:2], cache), logits)
    adapters, cache = adapters_of(model, [1]), DynamicCache(config=model.config)
    with vtw.skip_attention(model, adapters=adapters):
        run(model, batch, ends[:1], cache)
        cache.crop(-3)
        with pytest.raises(ValueError, match="all of the prompt, 12 tokens, .* cropped to 9"):
            run(model, batch, ends[1:2], cache, begin=ends[0])
        with pytest.raises(ValueError, match="the whole prompt, 12 tokens, in the first forward on a cache"):
            generated(model, batch_of("llava", ONE).inputs(), prefill_chunk_size=5)


# ------------------------------------------------------------------------------------------------------------- adapters


def test_folded_weights(monkeypatch):
    """One sequence is decoded with folded weights, several are not: the same numbers, in fp32."""
    model, layers = model_with_norms("qwen2_vl"), [1, 2]  # query, key and value have biases
    adapters = adapters_of(model, layers)
    batch, ends = with_decode_steps(make_batch("qwen2_vl", ONE), 4)
    folds, fold = [], vtw.SkipAdapters.for_model(model, [0]).adapter(0, True).__class__.fold
    monkeypatch.setattr(
        "vtw_kernels.integration.skipping.adapters.BlockAdapter.fold", lambda *x: folds.append(x) or fold(*x)
    )
    with vtw.skip_attention(model, adapters=adapters):
        cache = DynamicCache(config=model.config)
        folded = run(model, batch, ends, cache)
        assert len(folds) == 2 * 2 + 2 * 3  # once for each matrix, whatever is decoded
        assert not copy.deepcopy(cache).layers[1].skipped.folded
        two = make_batch("qwen2_vl", ONE * 2)
        run(model, *with_decode_steps(two, 2))
        assert len(folds) == 10
    with vtw.skip_attention(model, adapters=adapters, fold=False):
        unfolded = run(model, batch, ends)
    assert len(folds) == 10
    scale = unfolded.abs().max()
    assert (folded - unfolded).abs().max() < 1e-4 * scale
    assert not torch.equal(folded[:, ends[0] :], unfolded[:, ends[0] :])

    x = torch.randn(1, 5, 32)
    for adapter, gain in ((adapters.adapter(1, True), torch.rand(32) + 0.5), (adapters.adapter(0, False), None)):
        state = adapter.read(x, torch.ones(1, 5, dtype=torch.bool))
        for bias in (None, torch.randn(7)):
            weight = torch.randn(7, 32)
            moved = adapter(x, state) if gain is None else adapter(x, state) * gain
            expected = F.linear(moved, weight, bias)
            assert (
                F.linear(x, *adapter.fold(weight, bias, state, *([] if gain is None else [gain]))) - expected
            ).abs().max() < 1e-4


def test_some_layers_have_no_adapter(monkeypatch):
    model, layers = double("llava"), [1]
    adapters = adapters_of(model, layers, kept=[3])
    batch, ends = with_decode_steps(batch_of("llava"), 2)
    expected = in_the_open(model, batch, layers, adapters, ends[0])
    attention = type(find_parts(model).layers[0].self_attn)
    forward = attention.forward

    def spy(*args, **kwargs):
        assert not any(name.startswith("vtw") for name in kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", spy)
    with vtw.skip_attention(model, adapters=adapters):
        assert difference(run(model, batch, ends), expected, batch) < LIMIT


def test_answers_do_not_leak():
    """What a row says depends on no later one, in training as while an answer is generated."""
    model, layers = double("llava"), [0, 3]
    adapters = adapters_of(model, layers, dropout=0.0).train()
    batch = batch_of("llava")
    answer = batch_of("llava", [[6]] * len(batch.ids), seed=5)
    whole, length = append(batch, answer), batch.ids.shape[1]
    labels = torch.where(torch.arange(length + 6) < length, -100, whole.ids)
    expected = in_the_open(model, whole, layers, adapters, length)
    changed = copy.deepcopy(whole)
    changed.ids[:, -1] = 11
    with torch.no_grad(), vtw.skip_attention(model, layers, adapters):
        for batch_ in (whole, changed):
            logits = model(**batch_.inputs(), labels=labels, position_ids=batch_.positions(model)).logits
            assert (logits - expected)[:, :-1][batch_.mask[:, :-1].bool()].abs().max() < LIMIT
        leaking = model(**changed.inputs()).logits
    assert (leaking - expected)[:, :-1][whole.mask[:, :-1].bool()].abs().max() > 1e-4


def test_saved_adapters(tmp_path):
    model = copy.deepcopy(model_of("llava"))
    adapters = adapters_of(model, [1, 2], settings={"records": 3})
    adapters.save_pretrained(tmp_path / "adapters")
    assert sorted(x.name for x in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = vtw.SkipAdapters.from_pretrained(tmp_path / "adapters")
    assert loaded.made_for() | {"layers": (1, 2), "kept": (0, 3)} == adapters.made_for()
    batch = make_batch("llava", ONE)
    with vtw.skip_attention(model, adapters=adapters):
        expected, _ = generated(model, batch.inputs())
    with vtw.skip_attention(model, adapters=tmp_path / "adapters"):
        assert torch.equal(generated(model, batch.inputs())[0], expected)
    (tmp_path / "adapters" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="SkipAdapters.save_pretrained wrote, got adapters of the type 'LORA'"):
        vtw.SkipAdapters.from_pretrained(tmp_path / "adapters")
    with pytest.raises(OSError, match="nothing"):
        vtw.SkipAdapters.from_pretrained(tmp_path / "nothing")


def test_beside_lora():
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model_of("llava"))
    adapters = adapters_of(model, [1, 2])
    options = {"target_modules": r".*language_model.*(q_proj|gate_proj|up_proj)", "init_lora_weights": False}
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **options)).eval()
    batch = make_batch("llava", ONE)
    with vtw.skip_attention(lora, adapters=adapters):
        sequences, logits = generated(lora, batch.inputs())
    merged = copy.deepcopy(lora).merge_and_unload()
    with vtw.skip_attention(merged, adapters=adapters):
        again, expected = generated(merged, batch.inputs())
    assert torch.equal(sequences, again) and (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    with vtw.skip_attention(model, adapters=adapters):
        assert not torch.equal(generated(model, batch.inputs())[0], sequences)


# --------------------------------------------------------------------------------------------------------------- rest


def test_stays_until_removed():
    model = copy.deepcopy(model_of("llava"))
    batch = make_batch("llava", ONE)
    before = generated(model, batch.inputs())[1]
    with pytest.warns(UserWarning, match="nothing was skipped"):
        vtw.skip_attention(model, [1])
    handle = vtw.skip_attention(model, [1]).apply()
    copied = copy.deepcopy(model)
    skipped = generated(model, batch.inputs())[1]
    assert not torch.equal(before, skipped) and torch.equal(generated(copied, batch.inputs())[1], skipped)
    with pytest.raises(ValueError, match=r"got one under skip_attention\(layers=\[1\]\)"):
        vtw.skip_attention(model, [2]).apply()
    handle.remove()
    handle.remove()
    assert torch.equal(generated(model, batch.inputs())[1], before)
    assert not any("forward" in vars(module) for module in model.modules())

    @vtw.skip_attention(model, [1])
    def inside():
        return generated(model, batch.inputs())[1]

    assert torch.equal(inside(), skipped) and torch.equal(generated(model, batch.inputs())[1], before)


def test_compiled_decoding_is_one_graph():
    model = double("llava")
    batch, ends = with_decode_steps(batch_of("llava"), 4)
    cache = make_cache(model, "static", batch.ids.shape[1])
    with torch.no_grad(), vtw.skip_attention(model, [0, 2]):
        logits = [run(model, batch, ends[:1], cache)]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for begin, end in zip(ends, ends[1:]):
            options = {"position_ids": batch.positions(model)[:, begin:end], "past_key_values": cache}
            logits.append(compiled(**batch.inputs(begin, end), **options).logits)
    assert difference(torch.cat(logits, 1), in_the_open(model, batch, [0, 2]), batch) < LIMIT


def test_gradient_checkpointing():
    losses = []
    for checkpointing in (False, True):
        model = copy.deepcopy(model_of("llava")).train().requires_grad_(False)
        adapters = adapters_of(model, [1, 2], dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = make_batch("llava", RAGGED)
        labels = torch.where(batch.visual | (batch.mask == 0), -100, batch.ids)
        labels[:, :-4] = -100
        with vtw.skip_attention(model, adapters=adapters):
            loss = model(**batch.inputs(), labels=labels, use_cache=False).loss
            loss.backward()
        losses.append([loss.detach(), *(x.grad for x in adapters.parameters())])
        assert all(x is not None and x.abs().max() > 0 for x in losses[-1])
    assert all((a - b).abs().max() < 1e-5 * b.abs().max() + 1e-7 for a, b in zip(*losses))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": []}, ValueError, r"layers: expected different ones in 0..3, at least one, got \[\]"),
        ({"layers": [1, 1]}, ValueError, "different ones"),
        ({"layers": [4]}, ValueError, r"in 0..3, at least one, got \[4\]"),
        ({"layers": [True]}, TypeError, "layers: expected numbers of decoder layers"),
        ({"layers": 2}, TypeError, "layers: expected numbers of decoder layers, got 2"),
        ({"layers": [0, 1, 2, 3]}, ValueError, "at least one of 4 to keep its attention, got all"),
        ({}, ValueError, "layers: expected some decoder layers, got None without adapters"),
        ({"adapters": 3}, TypeError, "adapters: expected SkipAdapters or their folder, got int"),
        ({"adapters": vtw.SkipAdapters([1], 16, 4)}, ValueError, "hidden states of 16, as these adapters were made"),
        ({"layers": [0], "adapters": vtw.SkipAdapters([1], 32, 4)}, ValueError, r"some of \[1\], which have .* \[0\]"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        vtw.skip_attention(model_of("llava"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2, 1]}, "layers: expected layers in 0..3, ascending"),
        ({"dim": 3}, "dim: expected an even number of at least 2, got 3"),
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"dropout": 1}, "dropout: expected a share of at least 0 and below 1, got 1"),
    ],
)
def test_bad_adapters(options, message):
    with pytest.raises(ValueError, match=message):
        vtw.SkipAdapters(**{"layers": [1], "hidden_size": 32, "num_layers": 4} | options)


def test_layers_of_another_shape():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**TEXT | {"head_dim": 8}))
    with pytest.raises(NotImplementedError, match="Llama's shape, got decoder layer 0 .*pre_feedforward_layernorm"):
        vtw.skip_attention(model, [1])


# ------------------------------------------------------------------------------------------------------------- compare


def test_compared_with_policies(tmp_path):
    model = copy.deepcopy(model_of("llava"))
    adapters = adapters_of(model, [0, 2])
    adapters.save_pretrained(tmp_path / "adapters")
    batch = make_batch("llava", RAGGED[:1] + RAGGED[2:])
    batches = [batch.inputs() | {"labels": torch.where(torch.arange(batch.ids.shape[1]) < 15, -100, batch.ids)}]
    texts = ["layer=2", "skip:1,3", f"skip:{tmp_path / 'adapters'}", "skip:1,3+layer=2"]
    found = vtw.compare(model, batches, texts, positions="answer", costed=1, progress=False)
    assert found.policies == texts
    whole = copy.deepcopy(batch)
    with torch.no_grad():
        full = model(**batch.inputs(), position_ids=batch.positions(model)).logits
    for column, (layers, tuned, withdrawn) in enumerate(
        [([], None, 2), ([1, 3], None, LAYERS), ([0, 2], adapters, LAYERS), ([1, 3], None, 2)]
    ):
        logits = in_the_open(model, whole, layers, tuned, 15, withdrawn)
        rows = slice(14, batch.ids.shape[1] - 1)
        kl = F.kl_div(full[:, rows].log_softmax(-1), logits[:, rows].log_softmax(-1), reduction="none", log_target=True)
        assert (found.per_sample[:, column] - kl.sum(-1).mean(1)).abs().max() < 1e-4, texts[column]
    prompt = batch.mask[:, :15].sum(1)
    visual = batch.visual.sum(1)
    expected = torch.stack([visual * 2 / (prompt * 4), prompt * 2 / (prompt * 4)], 1)
    assert torch.allclose(found.rows_saved[:, :2], expected.float())
    assert torch.allclose(found.rows_saved[:, 3], ((prompt * 2 + visual) / (prompt * 4)).float())
    flops, kv_bytes = found.costs.flops, found.costs.kv_bytes
    assert kv_bytes[1] == kv_bytes[2] == kv_bytes[4] / 2 and kv_bytes[3] < kv_bytes[1]
    assert flops[1] < flops[4] and flops[3] < flops[1]
    with pytest.raises(ValueError, match="at most one skip in each, got 2"):
        vtw.compare(model, batches, ["skip:1+skip:2"], progress=False)


# -------------------------------------------------------------------------------------------------------------- search


def answered(batch, first: int = 15):
    return batch.inputs() | {"labels": torch.where(torch.arange(batch.ids.shape[1]) < first, -100, batch.ids)}


def test_found_by_kl():
    """One at a time and greedily, against logits of the open model."""
    model = copy.deepcopy(model_of("llava"))
    batches = [answered(make_batch("llava", [RAGGED[0], RAGGED[2]])), answered(make_batch("llava", RAGGED[:1], seed=4))]
    found = vtw.find_skippable(model, batches, 2, positions="answer", bandit=None, progress=False)

    def kls(layers):
        rows = []
        for batch in (make_batch("llava", [RAGGED[0], RAGGED[2]]), make_batch("llava", RAGGED[:1], seed=4)):
            full, skipped = (in_the_open(model, batch, x)[:, 14:-1].log_softmax(-1) for x in ([], layers))
            rows.append(F.kl_div(full, skipped, reduction="none", log_target=True).sum(-1).mean(1))
        return torch.cat(rows)

    alone = torch.stack([kls([i]) for i in range(LAYERS)], 1)
    assert found.candidates == [0, 1, 2, 3] and (found.per_sample - alone).abs().max() < 1e-4
    order = alone.mean(0).argsort().tolist()
    assert found.choices["alone"] == sorted(order[:2])
    pairs = {i: kls(sorted([order[0], i])).mean().item() for i in range(LAYERS) if i != order[0]}
    second = min(pairs, key=pairs.get)
    assert found.greedy["layers"] == [order[0], second]
    assert abs(found.greedy["kl"][1] - pairs[second]) < 1e-4 and abs(found.greedy["kl"][0] - alone.mean(0).min()) < 1e-4
    assert abs(found.kl_of["greedy"] - pairs[second]) < 1e-4
    assert found.layers == found.choices[min(found.kl_of, key=found.kl_of.get)]


@pytest.mark.parametrize("chances", ["softmax", "sigmoid"])
def test_bandits_update(chances):
    """By the formula of the paper's codes, written out."""
    bandit = vtw.Bandit(chances=chances, learning_rate=1.5)
    scores = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
    before, subsets, losses = scores.tolist(), [[0, 1], [1, 3], [2, 3]], [1.0, 0.2, 3.0]
    learn(scores, bandit, subsets, losses)
    e = [math.exp(10 * x) for x in before]
    p = [x / sum(e) for x in e] if chances == "softmax" else [1 / (1 + math.exp(-x)) for x in before]
    rewards = [math.exp(-x) for x in losses]
    for subset, reward in zip(subsets, rewards):
        for i in subset:
            before[i] += (reward - sum(rewards) / 3) * p[i] * (1 - p[i]) * 1.5
    assert scores.tolist() == pytest.approx(before, abs=1e-12)
    drawn = [vtw.Bandit(steps=100, warm_up=0.4).drawn(step, 4) for step in range(100)]
    assert drawn[:20] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5 and set(drawn[20:]) == {4}


def test_bandit_finds_what_does_nothing(monkeypatch):
    """Attention that puts out zeros is skipped at no loss; adapters are trained on the way, and the model is not."""
    model = copy.deepcopy(model_of("llava"))
    with torch.no_grad():
        for i, scale in enumerate((4, 0, 4, 0)):
            find_parts(model).layers[i].self_attn.o_proj.weight.mul_(scale)
        model.lm_head.weight.mul_(6)  # it is sure of what it says
    batches = [make_batch("llava", ONE, seed=i).inputs() for i in range(3)]
    bandit = vtw.Bandit(steps=60, warm_up=0.1, every=1, subsets=4, learning_rate=5.0)
    options = {"greedy": False, "progress": False}
    for chances in ("softmax", "sigmoid"):
        found = vtw.find_skippable(model, batches, 2, bandit=bandit._replace(chances=chances), **options)
        assert found.choices == {"alone": [1, 3], "bandit": [1, 3]} and found.kl_of["bandit"] < 1e-6
    few = [vtw.find_skippable(model, batches, 2, bandit=bandit._replace(steps=9, seed=x), **options) for x in (0, 0, 1)]
    assert few[0].bandit == few[1].bandit and few[0].bandit["scores"] != few[2].bandit["scores"]

    adapters = vtw.SkipAdapters.for_model(model, range(LAYERS), kept=range(LAYERS))
    before = [x.clone() for x in (*adapters.parameters(), *model.parameters())]
    vtw.find_skippable(model, batches, 2, bandit=bandit._replace(steps=8), adapters=adapters, **options)
    changed = [not torch.equal(x, y) for x, y in zip((*adapters.parameters(), *model.parameters()), before)]
    count = len(list(adapters.parameters()))
    assert sum(changed[:count]) > count / 2 and not any(changed[count:])
    assert all(x.grad is None for x in model.parameters())


def test_saved_search(tmp_path):
    model = copy.deepcopy(model_of("llava"))
    batches = [make_batch("llava", ONE, seed=i).inputs() for i in range(2)]
    found = vtw.find_skippable(model, batches, 1, bandit=vtw.Bandit(steps=6, every=1), progress=False)
    found.save(tmp_path / "skip.json")
    loaded = vtw.SkipSearch.load(tmp_path / "skip.json")
    assert loaded.table() == found.table() and loaded.layers == found.layers
    assert "bandit's score" in found.table() and "greedy" in found.verdict()
    for options, message in (
        ({"skip": 4}, r"skip: expected a number of layers in 1..3, got 4"),
        ({"skip": 1, "candidates": [5]}, r"layers: expected different ones in 0..3"),
        ({"skip": 1, "bandit": vtw.Bandit(chances="max")}, "chances: expected one of softmax, sigmoid, got 'max'"),
        ({"skip": 1, "adapters": adapters_of(model, [1])}, r"adapters: expected some for each of \[0, 1, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            vtw.find_skippable(model, batches, progress=False, **options)


# ------------------------------------------------------------------------------------------------------------- training


def test_training(tmp_path):
    """Adapters learn what the model said before its attention was skipped; the model stays; a stopped training goes on
    to the same weights."""
    model = copy.deepcopy(model_of("llava"))
    batches = []
    for i in range(6):
        whole = make_batch("llava", [[3, 4, 5]], seed=i)
        prompt = make_batch("llava", [[3, 4, 2]], seed=i)
        whole.ids = generated(model, prompt.inputs() | {"input_ids": whole.ids[:, :9]}, max_new_tokens=3)[0]
        batches.append(answered(whole, 9))
    before = [x.clone() for x in model.parameters()]
    how = vtw.AdapterTraining(dim=8, epochs=20, accumulate=2, learning_rate=1e-2, held_out=0.2)
    found = vtw.train_skip(model, batches, [1, 2], how, progress=False)
    assert found.losses[-1] < 0.85 * found.losses[0] and found.batches == (5, 1)
    assert found.held_out["whole"][0] < found.held_out["skipped"][0]
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before))
    assert all(x.grad is None for x in model.parameters())
    assert "with adapters" in found.table() and not found.adapters.training

    class Stopped(list):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            if self.reads > 12:  # in the third epoch
                raise KeyboardInterrupt
            return super().__getitem__(i)

    options = {"progress": False, "checkpoint": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        vtw.train_skip(model, Stopped(batches), [1, 2], how, **options)
    again = vtw.train_skip(model, batches, [1, 2], how, **options)
    assert again.losses == found.losses
    assert all(torch.equal(x, y) for x, y in zip(again.adapters.parameters(), found.adapters.parameters()))
    for changed, message in (
        ({"accumulate": 0}, "accumulate: expected a number of at least 1"),
        ({"epochs": 0}, "epochs: expected"),
        ({"dim": 3}, "dim: expected an even number"),
    ):
        with pytest.raises(ValueError, match=message):
            vtw.train_skip(model, batches, [1], how._replace(**changed), progress=False)
    batches[1]["labels"] = batches[1]["labels"].roll(1, 1)
    with pytest.raises(ValueError, match="labels: expected those tokens of input_ids that are the answer, got others"):
        vtw.train_skip(model, batches, [1], how, progress=False)
