"""The one-pass search against a naive loop that withdraws at every candidate."""

import json
from dataclasses import replace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from families_zoo import make_model as make_zoo_model
from families_zoo import make_prompts
from transformers import BatchFeature
from vlm import FAMILIES, LAYERS, ONE, VOCABULARY, Batch, append, make_batch, make_model

import vtw_kernels as vtw
from vtw_kernels.layer_search import METRICS, STATISTICS, scorer
from vtw_kernels.layer_search.scored import fewest_samples

IMAGES = [[2, 4, 3, 8, 4], [1, 4, 2], [4, 4, 3]]  # of different lengths, each with an image


def naive_kl(model, inputs, layer):
    """KL(withdrawn‖full) of the next token in fp64, from two whole forwards."""
    position = torch.arange(inputs["input_ids"].shape[1])
    last = torch.where(inputs["attention_mask"] != 0, position, 0).amax(1)
    rows = torch.arange(len(last))
    with torch.no_grad():
        full = model(**inputs).logits[rows, last].double().log_softmax(-1)
        with vtw.withdraw(model, layer):
            withdrawn = model(**inputs).logits[rows, last].double().log_softmax(-1)
    return (withdrawn.exp() * (withdrawn - full)).sum(-1)


pytestmark = pytest.mark.filterwarnings("ignore:No layer of")  # random models need their images to the end


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("lengths", [ONE, IMAGES], ids=["one", "three"])
def test_equals_naive_loop(family, attention, pad, lengths):
    model = make_model(family, attention)
    batches = [make_batch(family, lengths, pad, seed).inputs() for seed in (0, 1)]
    search = vtw.find_layer(model, batches, progress=False)
    assert search.candidates == list(range(1, LAYERS))
    assert search.per_sample.shape == (2 * len(lengths), LAYERS - 1)
    naive = torch.stack([torch.cat([naive_kl(model, x, k) for x in batches]) for k in search.candidates], dim=1)
    assert naive.min() > 1e-3  # these models do need their images
    torch.testing.assert_close(search.per_sample.double(), naive, atol=1e-5, rtol=0)
    torch.testing.assert_close(search.kl.double(), naive.mean(0), atol=1e-5, rtol=0)


def test_layers_of_different_masks():
    """A layer where no candidate joins may still have another mask than the one before it."""
    model = make_model("qwen2_vl")
    text = model.model.language_model
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    text.config.sliding_window, text.has_sliding_layers = 3, True
    set_kinds(text, kinds)
    inputs = make_batch("qwen2_vl", IMAGES).inputs() | {"use_cache": False}
    search = vtw.find_layer(model, [inputs], candidates=[1], progress=False)
    windowed = naive_kl(model, inputs, 1)
    set_kinds(text, ["full_attention"] * LAYERS)
    assert (naive_kl(model, inputs, 1) - windowed).abs().max() > 1e-3
    torch.testing.assert_close(search.per_sample[:, 0].double(), windowed, atol=1e-5, rtol=0)


def set_kinds(text, kinds):
    text.config.layer_types = kinds
    for layer, kind in zip(text.layers, kinds):
        layer.attention_type = kind  # where transformers 4.57 looks


def test_no_layer_runs_twice_on_shared_rows():
    """Each layer runs once at full length, and once more for all candidates that have joined, on the rows from the
    first visual token on."""
    model = make_model("llava")
    shapes = []
    for layer in model.model.language_model.layers:
        layer.forward = record_shape(layer.forward, shapes)
    inputs = make_batch("llava", ONE).inputs()
    vtw.find_layer(model, [inputs], progress=False)
    full, after = inputs["input_ids"].shape[1], ONE[0][2]
    assert shapes == [(1, full)] + [shape for k in range(1, LAYERS) for shape in ((1, full), (k, after))]


def record_shape(forward, shapes):
    def recorded(hidden_states, *args, **kwargs):
        shapes.append(tuple(hidden_states.shape[:2]))
        return forward(hidden_states, *args, **kwargs)

    return recorded


def test_candidates_and_threshold():
    model = make_model("llava")
    batches = [make_batch("llava", ONE).inputs()]
    every = vtw.find_layer(model, batches, progress=False)
    some = vtw.find_layer(model, batches, candidates=[3, 1], threshold=1e9, progress=False)
    assert some.candidates == [1, 3] and some.layer == 1
    torch.testing.assert_close(some.kl, every.kl[[0, 2]], atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="No layer of 1..3 qualifies"):
        nothing = vtw.find_layer(model, batches, threshold=0.0, progress=False)
    assert nothing.layer is None and "No layer" in nothing.verdict()
    exactly = vtw.find_layer(model, batches, threshold=every.kl[1].item(), progress=False)
    assert exactly.kl[1] <= exactly.threshold and exactly.layer in (1, 2)


# ------------------------------------------------------------------------------------- more positions and statistics


def naive_scores(model, inputs, layer, predicting):
    """Both divergences and the share of other top tokens, mean over the rows [S] of one sample, from two forwards."""
    with torch.no_grad():
        full = model(**inputs).logits[0, predicting].double().log_softmax(-1)
        with vtw.withdraw(model, layer):
            withdrawn = model(**inputs).logits[0, predicting].double().log_softmax(-1)
    kl = (withdrawn.exp() * (withdrawn - full)).sum(-1).mean()
    reverse = (full.exp() * (full - withdrawn)).sum(-1).mean()
    return torch.stack([kl, reverse, (full.argmax(-1) != withdrawn.argmax(-1)).double().mean()])


def assert_scores(search, wanted):
    """``wanted``: [N, C, 3]."""
    for i, metric in enumerate(METRICS):
        torch.testing.assert_close(search.by_sample(metric).double(), wanted[..., i], atol=1e-5, rtol=0)


def one_by_one(family, rows):
    """The same samples as ``make_batch(family, rows)``, each in a batch of its own without padding."""
    batch = make_batch(family, rows)
    for i in range(len(rows)):
        ids, images = batch.ids[i][batch.mask[i] != 0][None], [image for image in batch.images if image["row"] == i]
        pad = batch.ids.shape[1] - ids.shape[1]
        yield Batch(family, ids, torch.ones_like(ids), [image | {"end": image["end"] - pad} for image in images])


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_own_answers(family, pad, eos):
    """Teacher-forced over the greedy answer: equal to the forwards of each sample alone."""
    model, wanted, count = make_model(family), [], 5
    answers = [greedy(model, sample, count) for sample in one_by_one(family, IMAGES)]
    if eos:  # the first sample's second token ends its answer, and perhaps others
        model.generation_config.eos_token_id = [answers[0][1], 98]
    for sample, answer in zip(one_by_one(family, IMAGES), answers):
        ends = [i for i, token in enumerate(answer) if eos and token == answers[0][1]]
        answer = answer[: ends[0]] if ends else answer[:-1]
        whole = append(sample, make_text(family, answer)) if answer else sample
        last = sample.ids.shape[1] - 1
        predicting = range(last, last + len(answer) + 1)
        scores = [naive_scores(model, whole.inputs(), k, list(predicting)) for k in range(1, LAYERS)]
        wanted.append(torch.stack(scores))
    search = vtw.find_layer(model, [make_batch(family, IMAGES, pad).inputs()], positions=count, progress=False)
    assert_scores(search, torch.stack(wanted))
    assert search.disagreement.max() > 0
    assert search.visual_tokens.tolist() == [int(sample.visual.sum()) for sample in one_by_one(family, IMAGES)]


def greedy(model, sample, count):
    tokens = model.generate(**sample.inputs(), max_new_tokens=count, do_sample=False)
    return tokens[0, sample.ids.shape[1] :].tolist()


def make_text(family, ids):
    return Batch(family, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))


def test_token_types_of_a_model_without():
    """Its tokenizer may return them all the same, and its generate refuses them."""
    model, inputs = make_model("llava"), make_batch("llava", IMAGES).inputs()
    with_types = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    searches = [vtw.find_layer(model, [x], positions=2, progress=False) for x in (inputs, with_types)]
    assert torch.equal(searches[0].kl, searches[1].kl)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_given_answers(pad):
    """Labels say what is predicted, be it before the image or between two."""
    model, batch = make_model("llava"), make_batch("llava", IMAGES, pad)
    generator = torch.Generator().manual_seed(5)
    text = (batch.mask != 0) & ~batch.visual
    after_text = text & text.roll(1, dims=1) & (torch.arange(text.shape[1]) > 0)
    labels = torch.where(after_text & (torch.rand(text.shape, generator=generator) < 0.5), batch.ids, -100)
    labels[:, -1 if pad == "left" else 1] = 3
    search = vtw.find_layer(model, [batch.inputs() | {"labels": labels}], positions="answer", progress=False)
    wanted = []
    for i, sample in enumerate(one_by_one("llava", IMAGES)):
        predicting = (labels[i][batch.mask[i] != 0][1:] != -100).nonzero().flatten()
        assert len(predicting) > 0
        scores = [naive_scores(model, sample.inputs(), k, predicting) for k in range(1, LAYERS)]
        wanted.append(torch.stack(scores))
    assert_scores(search, torch.stack(wanted))


@pytest.mark.parametrize("positions", ["last", 3])
def test_groups_of_candidates(positions):
    model, inputs = make_model("qwen2_vl"), make_batch("qwen2_vl", IMAGES).inputs()
    calls, forward = [], model.model.language_model.layers[0].forward
    at_once = vtw.find_layer(model, [inputs], positions=positions, progress=False)
    model.model.language_model.layers[0].forward = record_shape(forward, calls)
    grouped = vtw.find_layer(model, [inputs], positions=positions, max_candidates_in_flight=2, progress=False)
    full_length = inputs["input_ids"].shape[1] + (0 if positions == "last" else positions - 1)
    assert [tokens for _, tokens in calls].count(full_length) == 2  # one full run for each group
    for metric in METRICS:
        torch.testing.assert_close(grouped.by_sample(metric), at_once.by_sample(metric), atol=1e-6, rtol=0)


def test_groups_that_fit(monkeypatch):
    """Where memory is short, groups are small, and nothing else changes."""
    model, inputs = make_model("llava"), make_batch("llava", IMAGES).inputs()
    at_once = vtw.find_layer(model, [inputs], progress=False)
    monkeypatch.setattr(scorer, "MEMORY_SHARE", 1e18)
    assert torch.allclose(vtw.find_layer(model, [inputs], progress=False).kl, at_once.kl, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_large_logits(family, monkeypatch):
    """Where logits would be large they are not made: the head is given a row or two at a time."""
    model, inputs, rows = make_model(family), make_batch(family, IMAGES).inputs(), []
    at_once = vtw.find_layer(model, [inputs], positions=3, progress=False)
    monkeypatch.setattr(scorer, "MEMORY_SHARE", 1e18)
    monkeypatch.setattr(scorer, "LOGITS_BYTES", 2 * 4 * VOCABULARY)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // VOCABULARY))
    search = scorer.Scorer(model, positions=3)
    scores = search.score(inputs)
    hook.remove()
    generated = 3 * len(inputs["input_ids"])  # its own answers, before
    assert max(rows[3:]) <= 2 and sum(rows) > generated
    for metric in METRICS:
        torch.testing.assert_close(getattr(scores, metric), at_once.by_sample(metric), atol=1e-6, rtol=0)


def test_large_logits_that_the_model_caps(monkeypatch):
    """They are more than a product with weights, and so are made as the model makes them."""
    model, inputs = make_model("llava"), make_batch("llava", IMAGES).inputs()
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.tanh()))
    at_once = vtw.find_layer(model, [inputs], progress=False)
    monkeypatch.setattr(scorer, "MEMORY_SHARE", 1e18)
    search = scorer.Scorer(model)
    assert search.head is model.lm_head
    torch.testing.assert_close(search.score(inputs).kl, at_once.per_sample, atol=1e-6, rtol=0)
    assert search.head is None


def test_rows_that_see_what_follows_are_not_shared():
    """A prefix that attends to the image (PaliGemma's does) is computed anew without it, and has no own answers."""
    model, inputs = make_zoo_model("paligemma"), make_prompts("paligemma", [[3, 4, 5], [2, 4, 3, 4, 4]])
    search = vtw.find_layer(model, [inputs], progress=False)
    naive = torch.stack([naive_kl(model, inputs, layer) for layer in search.candidates], dim=1)
    torch.testing.assert_close(search.per_sample.double(), naive, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="positions: expected a model whose answers see no later tokens"):
        vtw.find_layer(model, [inputs], positions=3, progress=False)


def test_visual_mask_and_decoder():
    model, batch = make_model("llava"), make_batch("llava", IMAGES)
    usual = vtw.find_layer(model, [batch.inputs()], progress=False)
    masked = batch.inputs() | {"visual_mask": batch.visual}
    decoder = model.model.language_model
    assert torch.equal(vtw.find_layer(model, [masked], decoder=decoder, progress=False).kl, usual.kl)
    fewer = batch.visual & (torch.arange(batch.ids.shape[1]) > 8)
    search = vtw.find_layer(model, [batch.inputs() | {"visual_mask": fewer}], progress=False)
    assert (search.kl - usual.kl).abs().max() > 1e-3
    with pytest.raises(ValueError, match="visual_mask: expected bool of shape"):
        vtw.find_layer(model, [batch.inputs() | {"visual_mask": fewer[:1]}], progress=False)


def test_compiled_model():
    model, inputs = make_model("llava"), make_batch("llava", ONE).inputs()
    usual = vtw.find_layer(model, [inputs], progress=False)
    assert torch.equal(vtw.find_layer(torch.compile(model), [inputs], progress=False).kl, usual.kl)


# -------------------------------------------------------------------------------------------------- what a search says


def make_search(samples=20, layers=8, **options):
    """Made up: divergence halves with each layer, and varies between samples."""
    generator = torch.Generator().manual_seed(1)
    candidates = list(range(1, layers))
    kl = 0.5 ** torch.tensor(candidates) * torch.rand(samples, 1, generator=generator).add(0.5)
    kl = kl * torch.rand(samples, layers - 1, generator=generator).add(0.5)
    tokens = torch.full((samples,), 40)
    return vtw.LayerSearch("made up", layers, candidates, kl, 2 * kl, kl.clamp(max=1), tokens, tokens // 2, **options)


@pytest.mark.parametrize("samples", [1, 2, 9, 10, 11, 40])
def test_statistics(samples):
    search = make_search(samples)
    kl = search.per_sample.numpy()
    np.testing.assert_allclose(search.values("kl", "mean"), kl.mean(0), rtol=1e-5)
    np.testing.assert_allclose(search.values("reverse_kl", "max"), 2 * kl.max(0), rtol=1e-5)
    worst = np.sort(kl, axis=0)[::-1][: -(-samples // 10)].mean(0)
    np.testing.assert_allclose(search.values("kl", "worst_decile"), worst, rtol=1e-5)
    low, high = search.interval()
    assert (low <= high).all()
    if samples < 6:
        assert (low == 0).all() and high.isinf().all() and search.plausible_layers() == (1, 8)
    else:
        assert (low <= search.values()).all() and (search.values() <= high).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_threshold_on_any_value(metric, statistic):
    search = make_search(metric=metric, statistic=statistic)
    for layer, value in zip(search.candidates, search.values().tolist()):
        chosen = replace(search, threshold=value).layer
        assert chosen is not None and chosen <= layer and (chosen == layer or value >= search.values()[chosen - 1])


def test_interval_covers():
    """Of samples with a known mean, about 95 % of the intervals hold it."""
    generator, held = torch.Generator().manual_seed(3), []
    for _ in range(5):
        kl = torch.rand(60, 40, generator=generator)
        tokens = torch.full((60,), 40)
        search = vtw.LayerSearch("uniform", 41, list(range(1, 41)), kl, kl, kl, tokens, tokens // 2)
        low, high = search.interval()
        held.append((low <= 0.5) & (0.5 <= high))
    assert 0.88 < torch.cat(held).float().mean() < 0.99


def test_what_few_samples_tell():
    """The more samples, the smaller the range of layers that may be the right one."""
    threshold = 0.05
    ranges = [make_search(n, threshold=threshold).plausible_layers() for n in (6, 1000)]
    assert ranges[0][1] - ranges[0][0] >= 1 > ranges[1][1] - ranges[1][0]
    few, many = (make_search(n, threshold=threshold) for n in (6, 1000))
    assert "too few to tell the layers" in few.verdict() and "does not move the choice" in many.verdict()
    assert many.plausible_layers() == (many.layer, many.layer)
    assert make_search(6, threshold=0.0).plausible_layers() == (8, 8)
    for samples in (1, 2, 5):
        one = make_search(samples, threshold=threshold)
        assert one.verdict().endswith("Fewer than 6 samples do not tell how far others would move the choice.")
        assert one.plausible_layers() == (1, 8) and one.plausible_layers(0.5) == ((1, 8) if samples == 1 else ANY)


def test_few_samples_do_not_hold_their_median():
    """Of what 6 samples span, and 5 do not, at 95 %: the median of what they are drawn from."""
    generator = torch.Generator().manual_seed(0)
    for samples, holds in ((5, False), (6, True)):
        drawn = torch.rand(100_000, samples, generator=generator)
        share = ((drawn.amin(1) <= 0.5) & (0.5 <= drawn.amax(1))).float().mean().item()
        assert share == pytest.approx(1 - 2 ** (1 - samples), abs=2e-3) and (share >= 0.95) == holds
    assert [fewest_samples(level) for level in (0.5, 0.9, 0.95, 0.99)] == [2, 5, 6, 8]


def with_nan(search, row, candidate):
    kl = search.per_sample.clone()
    kl[row, candidate] = torch.nan
    return replace(search, per_sample=kl)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nan_is_never_chosen(statistic):
    """Nor the lowest, nor what samples drawn without it would choose."""
    search = make_search(threshold=0.2, statistic=statistic)
    layer = search.layer
    row = layer - search.candidates[0]
    broken = with_nan(search, 3, row)
    assert broken.layer == layer + 1 and layer not in broken.plausible_layers()
    assert broken.choose(max_kl=1e9) == (1 if row else 2)
    lowest = with_nan(search, 3, -1)
    assert search.choose(min_saving=0) == 7 and lowest.choose(min_saving=0) == 6
    for found in (broken, lowest):
        assert found.verdict().endswith("At some layers 1 of the samples are NaN: how sure this is can't be told.")
    nothing = replace(search, per_sample=torch.full_like(search.per_sample, torch.nan))
    assert nothing.layer is None and nothing.choose(min_saving=0) is None and nothing.choose(max_kl=1) is None
    assert nothing.plausible_layers() == (8, 8) and "20 of the samples are NaN" in nothing.verdict()
    assert "needs its visual tokens" not in nothing.verdict()


def test_choose_where_everything_allowed_is_infinite():
    kl = torch.full((6, 7), torch.inf)
    assert replace(make_search(6), per_sample=kl).choose(min_saving=0.2) == 1
    kl[:, 5:] = 0
    search = replace(make_search(6), per_sample=kl)
    assert search.choose(min_saving=search.saving[4].item()) == 1 and search.choose(min_saving=0) == 6


def test_nan_logits_are_told():
    model = make_model("llava")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="model: expected logits that are numbers, got NaN in row 0"):
        vtw.find_layer(model, [make_batch("llava", IMAGES).inputs()], progress=False)


def test_choose():
    search = make_search()
    kl = search.kl.tolist()
    assert search.saving.tolist() == pytest.approx([0.5 * (1 - k / 8) for k in range(1, 8)])
    assert search.choose(max_kl=kl[3]) == next(k for k in range(1, 8) if kl[k - 1] <= kl[3])
    assert search.choose(min_saving=0.25) == 1 + kl.index(min(kl[:4]))
    assert search.choose(max_kl=kl[2], min_saving=0.4375) is None
    assert search.choose(max_kl=1e9, min_saving=0.4375) == 1
    assert search.choose(max_kl=2.0, metric="reverse_kl", statistic="max") == next(
        k for k in range(1, 8) if 2 * search.per_sample[:, k - 1].max() <= 2.0
    )
    for arguments, message in (
        ({}, "expected max_kl, min_saving or both"),
        ({"max_kl": -1}, "max_kl: expected a number of at least 0"),
        ({"max_kl": float("nan")}, "max_kl: expected a number of at least 0"),
        ({"min_saving": 1.5}, "min_saving: expected a share"),
        ({"max_kl": 1, "metric": "l2"}, "metric: expected one of kl, reverse_kl, disagreement, got 'l2'"),
        ({"max_kl": 1, "statistic": "median"}, "statistic: expected one of mean, worst_decile, max, got 'median'"),
    ):
        with pytest.raises(ValueError, match=message):
            search.choose(**arguments)


def test_save_load_table_plot(tmp_path):
    batches = [make_batch("llava", IMAGES).inputs()]
    options = dict(threshold=1e9, metric="reverse_kl", statistic="max", positions=2)
    search = vtw.find_layer(make_model("llava"), batches, progress=False, **options)
    search.save(tmp_path / "vtw.json")
    loaded = vtw.LayerSearch.load(tmp_path / "vtw.json")
    for name, value in vars(search).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(getattr(loaded, name), value), name
    assert loaded.layer == 1 and loaded.table() == search.table()
    assert json.loads((tmp_path / "vtw.json").read_text())["layer"] == 1
    assert "| 1 |" in search.table() and "chosen" in search.table()
    content = json.loads((tmp_path / "vtw.json").read_text())
    for other, message in (
        ('{"layer": 3}', "nothing for model, num_layers"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "maximum recursion"),
        ("3", "not iterable"),
        (
            json.dumps(content | {"per_sample": content["per_sample"][1:]}),
            r"per_sample of shape \[2, 3\] for 3 samples",
        ),
        (json.dumps(content | {"per_sample": "many"}), "str"),
        (json.dumps(content | {"candidates": [1, 2, 4]}), r"3 samples at layers \[1, 2, 4\] of 4"),
        (json.dumps(content | {"metric": "js"}), "metric: expected one of kl"),
        (json.dumps(content | {"costs": {"layers": [1]}}), "missing"),
        (json.dumps(content | {"threshold": float("nan")}), "threshold nan"),
    ):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(ValueError, match=f"other.json: expected what LayerSearch.save wrote, got .*{message}"):
            vtw.LayerSearch.load(tmp_path / "other.json")
    search.plot(tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_leaves_the_model_as_it_was():
    model = make_model("llava").train()
    inputs = make_batch("llava", ONE).inputs()
    model(**inputs)  # transformers adds hooks of its own in the first forward
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    vtw.find_layer(model, [inputs], progress=False)
    assert model.training
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": [0]}, "candidates: expected layers in 1..3"),
        ({"candidates": [LAYERS]}, "candidates: expected layers in 1..3"),
        ({"candidates": []}, "candidates: expected layers in 1..3"),
        ({"threshold": -1.0}, "threshold: expected a number of at least 0"),
        ({"threshold": float("nan")}, "threshold: expected a number of at least 0"),
        ({"batches": []}, "batches: expected at least one batch"),
        ({"metric": "l2"}, "metric: expected one of kl, reverse_kl, disagreement, got 'l2'"),
        ({"statistic": "median"}, "statistic: expected one of mean, worst_decile, max, got 'median'"),
        ({"positions": "all"}, "positions: expected 'last', 'answer' or a number of at least 1, got 'all'"),
        ({"positions": 0}, "positions: expected 'last', 'answer' or a number of at least 1, got 0"),
        ({"positions": True}, "positions: expected 'last', 'answer' or a number of at least 1, got True"),
        ({"positions": "answer"}, "labels: expected .* with positions='answer', got none"),
        ({"max_candidates_in_flight": 0}, "max_candidates_in_flight: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"batches": [make_batch("llava", ONE).inputs()]} | arguments
    with pytest.raises(ValueError, match=message):
        vtw.find_layer(make_model("llava"), progress=False, **arguments)


def test_batches_that_are_none():
    model, inputs = make_model("llava"), make_batch("llava", ONE).inputs()
    with pytest.raises(
        TypeError, match=r"batches: expected an iterable of batches, got one, a BatchFeature: pass \[batch\]"
    ):
        vtw.find_layer(model, BatchFeature(inputs), progress=False)
    with pytest.raises(
        TypeError, match="batches: expected keyword arguments of the model's forward in each, got a Tensor"
    ):
        vtw.find_layer(model, inputs["input_ids"], progress=False)


def test_bad_samples():
    model = make_model("llava")
    text_only = make_batch("llava", [[2, 4, 3], [9]]).inputs()
    with pytest.raises(ValueError, match="at least one visual token in each sample, got none in row 1"):
        vtw.find_layer(model, [text_only], progress=False)
    image_last = make_batch("llava", [[2, 4, 3], [5, 4]]).inputs()
    with pytest.raises(
        ValueError, match="expected predictions from text tokens alone, got one from a visual token in row 1"
    ):
        vtw.find_layer(model, [image_last], progress=False)
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="inside withdraw"):
        vtw.find_layer(model, [make_batch("llava", ONE).inputs()], progress=False)
