"""``compare``: its numbers against the plain model with hidden keys, its choice, and the command."""

import json
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from command_records import RECORDS, after_lines, die, in_processes
from test_layer_search import IMAGES, one_by_one
from test_search_report import Page
from vlm import FAMILIES, LAYERS, Batch, append, make_batch, make_model

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.integration.policy_text import policy_text
from vtw_kernels.integration.verify import hide_keys
from vtw_kernels.layer_search import comparison as module
from vtw_kernels.layer_search import run
from vtw_kernels.layer_search.costs import measure_costs, measure_policies
from vtw_kernels.layer_search.decisions import Replayed, recording

pytest_plugins = ["command_records"]  # the fixtures place and source
pytestmark = pytest.mark.usefixtures("one_thread")
POLICIES = ["layer=1", "layer=3", f"layer={LAYERS}", "top-attention:1:0.5", "top-attention:2:1+layer=3"]


class Bright(vtw.Policy):
    """Visual rows stay whose hidden state is positive in the mean: another choice in each layer and sample."""

    boundaries = (1, 2)

    def keep(self, boundary):
        return boundary.hidden_states.mean(-1) > 0


# ------------------------------------------------------------------------------------------------------------ numbers


def most_attended(attentions, visual, amount):
    """Of one sample's visual tokens [S], so many of each image, by the weights [1, heads, S, S] of its last row."""
    weights, stays = attentions[0, :, -1].mean(0), torch.zeros_like(visual)
    starts = (visual & ~visual.roll(1)).nonzero().flatten().tolist()
    for start in starts:
        length = int((~visual[start:]).int().argmax())
        count = round(amount * length) if isinstance(amount, float) else amount
        stays[start + weights[start : start + length].topk(min(count, length)).indices] = True
    return stays


def hidden_by(policy, model, sample):
    """For each layer bool [1, S], the visual tokens that a policy hides: by the plain model's states."""
    gone, hidden = torch.zeros_like(sample.visual), []
    for layer in range(LAYERS):
        with hide_keys(model, hidden + [None] * (LAYERS - layer)):
            output = model(**sample.inputs(), output_attentions=True, output_hidden_states=True, use_cache=False)
        visual = sample.visual & ~gone
        stays = visual.clone()
        if isinstance(policy, Bright) and layer in policy.boundaries:
            stays &= output.hidden_states[layer].mean(-1) > 0
        for step in policy.split("+") if isinstance(policy, str) else []:
            name, *numbers = step.replace("=", ":").split(":")
            if int(numbers[0]) != layer:
                continue
            if name == "layer":
                stays &= False
            else:
                amount = float(numbers[1]) if "." in numbers[1] else int(numbers[1])
                stays &= most_attended(output.attentions[layer - 1], visual[0], amount)[None]
        gone = sample.visual & ~stays
        hidden.append(gone)
    return hidden


@pytest.mark.parametrize("positions, pad", [("last", "right"), (4, "left"), ("answer", "right")])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_hidden_keys(family, positions, pad):
    """In ragged batches, what each sample gives alone with the plain model; policies decide before answers."""
    model, prompts = make_model(family, "eager"), make_batch(family, IMAGES, pad)
    policies = {text: text for text in POLICIES} | {"bright": Bright()}
    rows, answers = list(one_by_one(family, IMAGES)), [[11, 12, 13], [14], [15, 16]]
    if positions == 4:
        answers = [
            model.generate(**x.inputs(), max_new_tokens=4, do_sample=False)[0, x.ids.shape[1] :].tolist() for x in rows
        ]
        inputs = prompts.inputs()
    elif positions == "answer":
        inputs = with_answers(family, rows, answers, prompts)
    else:
        answers, inputs = [[0]] * 3, prompts.inputs()
    found = vtw.compare(model, [inputs], policies, positions=positions, progress=False, costed=0)
    for i, (sample, answer) in enumerate(zip(rows, answers)):
        text = Batch(family, torch.tensor([answer[:-1]]), torch.ones(1, len(answer) - 1, dtype=torch.long))
        longer = append(sample, text) if len(answer) > 1 else sample
        end = sample.ids.shape[1] - 1
        full = model(**longer.inputs(), use_cache=False).logits[0, end:].double().log_softmax(-1)
        for j, policy in enumerate(policies.values()):
            hidden = hidden_by(policy, model, sample)
            with hide_keys(model, hidden):
                withdrawn = model(**longer.inputs(), use_cache=False).logits[0, end:].double().log_softmax(-1)
            kl = (withdrawn.exp() * (withdrawn - full)).sum(-1).mean()
            reverse = (full.exp() * (full - withdrawn)).sum(-1).mean()
            torch.testing.assert_close(found.per_sample[i, j].double(), kl, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.per_sample_reverse[i, j].double(), reverse, atol=1e-5, rtol=0)
            other = (full.argmax(-1) != withdrawn.argmax(-1)).double().mean()
            torch.testing.assert_close(found.disagreement[i, j].double(), other, atol=1e-6, rtol=0)
            share = sum(x.sum() for x in hidden) / (LAYERS * sample.ids.shape[1])
            torch.testing.assert_close(found.rows_saved[i, j], share.float(), atol=1e-6, rtol=0)
    assert found.tokens.tolist() == [x.ids.shape[1] for x in rows] and len(found.kl.unique()) == len(policies)


def with_answers(family, rows, answers, prompts):
    """Inputs of the samples with their answers behind, padded on the right, and labels."""
    length = max(x.ids.shape[1] + len(answer) for x, answer in zip(rows, answers))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (x, answer) in enumerate(zip(rows, answers)):
        prompt, end = x.ids.shape[1], x.ids.shape[1] + len(answer)
        ids[i, :prompt], ids[i, prompt:end], mask[i, :end] = x.ids[0], torch.tensor(answer), 1
        labels[i, prompt:end] = torch.tensor(answer)
    images = [image | {"end": length} for image in prompts.images]
    return Batch(family, ids, mask, images).inputs() | {"labels": labels}


def test_layers_are_those_of_the_search():
    """To the bit, as one run scores them, and without a run of its own for each."""
    model, batches = make_model("llava"), [make_batch("llava", IMAGES).inputs()]
    found = vtw.compare(model, batches, [3, vtw.Withdraw(1), 2], progress=False, costed=0)
    with pytest.warns(UserWarning, match="No layer"):
        search = vtw.find_layer(model, batches, progress=False, threshold=0.0)
    assert found.policies == ["layer=3", "layer=1", "layer=2"]
    for name in ("per_sample", "per_sample_reverse", "disagreement"):
        assert torch.equal(getattr(found, name), getattr(search, name)[:, [2, 0, 1]])
    torch.testing.assert_close(found.saving(), search.saving[[2, 0, 1]])


def test_decisions_are_of_tokens():
    """Rows of padding stand for token 0 without being it."""
    rows = dict(image=torch.zeros(1, 4, dtype=torch.long), text=torch.tensor([[False, False, False, True]]))
    visual = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]])
    whole = vtw.Boundary(1, visual[0], token=torch.tensor([[0, 1, 2, 3]]), **rows)
    left = vtw.Boundary(2, visual[1], token=torch.tensor([[0, 0, 2, 3]]), **rows)  # token 0, and padding
    (policy,), decided = recording(vtw.TopAttention(1, 1.0), decisions := {}), decisions
    for boundary in (whole, left):
        policy.keep(replace(boundary, attention=torch.ones(1, 4)))
    assert [x.tolist() for x in decided.values()] == [[[True, True, False, False]], [[True, False, False, False]]]
    longer = replace(left, token=torch.tensor([[0, 0, 3, 4]]))  # with text behind
    assert Replayed(decided).keep(longer)[0, :2].tolist() == [True, True]


def test_costs():
    """Those of layers are what ``measure_costs`` counts; a policy has them of as many rows, whatever it looks at."""
    model, inputs = make_model("llava"), make_batch("llava", [[3, 4, 5]]).inputs()
    policies = {"a": 1, "b": 3, "c": vtw.TopAttention(2, 2), "d": vtw.RandomVisual(2, 2)}
    costs = measure_policies(model, [inputs, inputs], policies, repeats=2)
    of_layers = measure_costs(model, inputs, [1, 3], repeats=1)
    assert [costs.flops[i] for i in (0, 1, 4)] == of_layers.flops and costs.flops[2] == costs.flops[3]
    assert [costs.kv_bytes[i] for i in (0, 1, 4)] == of_layers.kv_bytes and costs.kv_bytes[2] == costs.kv_bytes[3]
    assert of_layers.flops[0] < costs.flops[2] < of_layers.flops[2]
    assert (costs.batches, costs.tokens, costs.visual_tokens) == (2, 24, 8)
    assert min(costs.prefill_seconds + costs.decode_seconds) > 0
    full, found = 4, vtw.compare(model, [inputs] * 5, list(policies.values()), progress=False, costed=2)
    assert found.costs.batches == 2
    torch.testing.assert_close(found.saving("flops")[0].item(), 1 - costs.flops[0] / costs.flops[full])
    torch.testing.assert_close(found.saving("kv_bytes"), found.saving())  # a cache has the rows
    with pytest.raises(ValueError, match="cost: expected 'rows', as no others were measured, got 'prefill'"):
        replace(found, costs=None).saving("prefill")


# ------------------------------------------------------------------------------------------------------------- choice


def make_comparison(seed: int, samples: int = 8, columns: int = 7) -> vtw.Comparison:
    """Of random numbers, with ties, and sometimes a NaN."""
    generator = torch.Generator().manual_seed(seed)
    kl = torch.randint(0, 4, (samples, columns), generator=generator) / 10
    kl = kl.mean(0).mul(5).round().div(5).expand(samples, -1).contiguous()
    if seed % 3 == 0:
        kl[1, 2] = torch.nan
    saved = (torch.randint(-1, 5, (columns,), generator=generator) / 5).expand(samples, -1).contiguous()
    tokens = torch.full((samples,), 10)
    names = [f"layer={i}" for i in range(1, columns + 1)]
    groups = [random.Random(seed + i).choice("ab") for i in range(samples)]
    return vtw.Comparison("Model", 9, names, kl, kl * 2, kl / 2, saved, tokens, tokens // 2, groups=groups)


@contextmanager
def without_attention(model, layer):
    attention = model.model.language_model.layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: (0 * output[0], *output[1:]))
    yield
    hook.remove()


def test_functions_of_the_model():
    """What saves other work than rows; and withdrawal as such a function is what it is as a layer."""
    model, batch = make_model("llava"), make_batch("llava", IMAGES)
    named = {"none in 2": partial(without_attention, layer=2), "3": 3, "3 again": lambda model: vtw.withdraw(model, 3)}
    found = vtw.compare(model, [batch.inputs()], named, progress=False, costed=1)
    with torch.no_grad():
        full = model(**batch.inputs()).logits[:, -1].double().log_softmax(-1)
        with without_attention(model, 2):
            changed = model(**batch.inputs()).logits[:, -1].double().log_softmax(-1)
    kl = (changed.exp() * (changed - full)).sum(-1)
    torch.testing.assert_close(found.per_sample[:, 0].double(), kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.per_sample[:, 2], found.per_sample[:, 1], atol=1e-6, rtol=1e-4)
    assert kl.min() > 1e-4 and found.saving()[1] > 0 and found.saving().tolist()[::2] == [0, 0]
    assert found.saving("flops").tolist() == [0, *[found.saving("flops")[1].item()] * 2]
    with pytest.raises(TypeError, match="expected functions by name"):
        vtw.compare(model, [batch.inputs()], [named["3 again"]])
    with pytest.raises(ValueError, match="layer"):  # before a batch is looked at
        vtw.compare(model, [], {"no layer of this model": lambda model: vtw.withdraw(model, 99)})


@pytest.mark.parametrize("seed", range(20))
def test_pareto_and_choice(seed):
    found = make_comparison(seed)
    points = dict(zip(found.policies, zip(found.values().tolist(), found.saving().tolist())))
    front = []
    for name, (value, saved) in points.items():
        others = [*(x for other, x in points.items() if other != name), (0.0, 0.0)]
        dominated = any(v <= value and s >= saved and (v < value or s > saved) for v, s in others)
        if value == value and not dominated:
            front.append(name)
    assert sorted(found.pareto()) == sorted(front)
    assert [points[name][1] for name in found.pareto()] == sorted(points[name][1] for name in front)
    for limit in (0.0, 0.1, 0.3):
        below = [s for v, s in points.values() if v <= limit]
        chosen = found.choose(max_kl=limit)
        assert (chosen is None) == (not below)
        if below:
            assert points[chosen][1] == max(below) and points[chosen][0] <= limit
            assert points[chosen][0] == min(v for v, s in points.values() if s == max(below))
        above = [v for v, s in points.values() if s >= limit and v == v]
        chosen = found.choose(min_saving=limit)
        assert (chosen is None) == (not above)
        if above:
            assert points[chosen][0] == min(above) and points[chosen][1] >= limit
        assert found.choose(max_kl=limit, min_saving=1.0) is None


@pytest.mark.parametrize(
    "text, policy",
    [
        ("layer=16", 16),
        ("top-attention:2:0.5", vtw.TopAttention(2, 0.5)),
        ("top-attention:2:64", vtw.TopAttention(2, 64)),
        ("random:3:1.0", vtw.RandomVisual(3, 1.0)),
        ("random:3:1:7", vtw.RandomVisual(3, 1, seed=7)),
        (
            "top-attention:8:0.5+random:9:4+layer=12",
            [vtw.TopAttention(8, 0.5), vtw.RandomVisual(9, 4), vtw.Withdraw(12)],
        ),
    ],
)
def test_text(text, policy):
    assert repr(vtw.parse_policy(text)) == repr(policy) and policy_text(policy) == text


@pytest.mark.parametrize(
    "text", ["", "16", "layer=", "layer=-1", "layer=1.5", "layer=²", "top-attention:2", "top-attention:2:half",
             "top-attention:2:0.5:1", "random:1:2:3:4", "layer=3+", "fastv:2:0.5", "random:1:1e-1", "random:a:1"],
)  # fmt: skip
def test_text_that_is_none(text):
    with pytest.raises(ValueError, match="policy: expected layer=LAYER, top-attention:LAYER:KEEP, random"):
        vtw.parse_policy(text)


def test_text_out_of_range(tmp_path):
    with pytest.raises(
        ValueError, match=r"policy: keep: expected a share from 0.0 to 1.0 .* got 1.5 in 'random:1:1.5'"
    ):
        vtw.parse_policy("random:1:1.5")
    with pytest.raises(ValueError, match="policy: there is no file none.safetensors"):
        vtw.parse_policy("none.safetensors")
    (tmp_path / "vtw.json").write_text("{}")
    assert vtw.parse_policy(str(tmp_path / "vtw.json")) == tmp_path / "vtw.json"


# ------------------------------------------------------------------------------------------------------------- groups


def test_groups(tmp_path):
    """Each is as if it had been compared alone, in the tables, in the page, and after saving."""
    model, rows = make_model("llava"), list(one_by_one("llava", IMAGES * 2))
    groups, policies = ["count", "read", "count"] * 2, ["layer=1", "top-attention:1:0.5"]
    batches = [x.inputs() for x in rows]
    found = vtw.compare(model, batches, policies, groups=groups, progress=False, costed=1)
    alone = vtw.compare(model, [x for x, y in zip(batches, groups) if y == "read"], policies, progress=False, costed=0)
    parts = found.by_group()
    assert list(parts) == ["count", "read"] and torch.equal(parts["read"].per_sample, alone.per_sample)
    assert parts["read"].table() == alone.table() and alone.table() in found.table()
    found.save(tmp_path / "comparison.json")
    again = vtw.Comparison.load(tmp_path / "comparison.json")
    assert again.table() == found.table() and again.costs == found.costs
    found.report(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert len(page.all("svg")) == 2 + 4 + 2 and (tmp_path / "page-group-1.png").exists()
    assert all(part.verdict() in page.text for part in (found, *parts.values()))
    with pytest.warns(UserWarning, match="No layer"):
        search = vtw.find_layer(model, batches, groups=groups, progress=False, threshold=0.0)
        lone = vtw.find_layer(model, batches[1::3], progress=False, threshold=0.0)
    assert search.columns()["read: 2 samples"] == lone.columns()[search.criterion]
    assert f"read: {lone.verdict()}" in search.table()
    search.report(tmp_path / "search.html")
    page = Page(tmp_path / "search.html")
    assert "By kind of task" in page.text and page.text.count("read") >= 4 and lone.verdict() in page.text


# -------------------------------------------------------------------------------------------------------- the command


def compare(*options: str, out: str = "comparison.json", policies=("layer=1", "top-attention:2:0.5+layer=3")) -> int:
    chosen = [x for policy in policies for x in ("--policy", policy)]
    return main(["compare", "--model", "model", "--data", "data.jsonl", "--out", out, *chosen, *options])


def set_groups(folder, field: str, groups: list) -> None:
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    lines = [line | ({field: group} if group is not None else {}) for line, group in zip(lines, groups)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_command(place, capsys, monkeypatch):
    """Killed and resumed, shared among ranks, or in one go: the same bits. Groups can change without the model."""
    set_groups(place, "task", ["count", None, "read", 4] * (RECORDS // 4))
    assert compare("--report", "page.html") == 0
    said = capsys.readouterr().out
    found = vtw.Comparison.load(place / "comparison.json")
    assert found.table() in said and found.groups == ["count", "none", "read", "4"] * (RECORDS // 4)
    assert list(found.by_group()["read"].settings["records"]) == [f"data.jsonl:{i}" for i in (3, 7, 11)]
    assert found.costs.batches == 4 and not (place / "comparison.json.partial").exists()
    page = Page(place / "page.html")
    assert "Samples that are hurt most" in page.text and "task" not in found.settings and len(page.all("img")) >= 8
    assert main(["report", "comparison.json", "--out", "again.html"]) == 0
    assert found.verdict() in Page(place / "again.html").text

    def prepare(rank: int) -> None:
        run.append_line = after_lines(3, die)

    into_whole = partial(compare, "--no-costs", out="whole.json")
    assert in_processes(1, into_whole, prepare) == [-9]
    assert in_processes(2, into_whole) == [0, 0]
    whole = vtw.Comparison.load(place / "whole.json")
    for name in (*whole.SCORES, *whole.COUNTS):
        assert torch.equal(getattr(whole, name), getattr(found, name)), name

    set_groups(place, "group", ["all"] * RECORDS)
    monkeypatch.setattr(run, "load_model", None)
    assert compare("--statistic", "max", "--quiet") == 0
    again = vtw.Comparison.load(place / "comparison.json")
    assert set(again.groups) == {"all"} and again.statistic == "max" and again.costs == found.costs
    assert compare(policies=["layer=2"]) == 1
    assert "policies was ['layer=1', 'top-attention:2:0.5+layer=3'] and is ['layer=2']" in capsys.readouterr().err


def test_file_of_a_policy(place, capsys):
    """What a search wrote is a policy; when it changes, so have the scores, and it is not overwritten."""
    options = ["--model", "model", "--data", "data.jsonl", "--no-costs", "--threshold", "100", "--candidates"]
    assert main(["search", *options, "1"]) == 0
    assert compare("--no-costs", policies=["vtw.json", "layer=1"]) == 0
    found = vtw.Comparison.load(place / "comparison.json")
    assert torch.equal(found.per_sample[:, 0], found.per_sample[:, 1]) and found.kl[0] > 0
    assert compare("--no-costs", policies=["vtw.json"], out="vtw.json") == 1
    assert "expected another file than that of out, got vtw.json" in capsys.readouterr().err
    assert main(["search", *options, "2", "--restart"]) == 0
    assert compare("--no-costs", policies=["vtw.json", "layer=1"]) == 1
    assert "policy_files: policy vtw.json was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, policies, message",
    [
        ([], ["layer=1", "layer=1"], "policies: expected one of each name, got two of 'layer=1'"),
        ([], ["layer=one"], "policy: expected layer=LAYER"),
        ([], ["layer=9"], "layer: expected 1..4 (4 withdraws nothing), got 9"),
        ([], ["random:2:1+layer=2"], "layer: expected policies at different layers, got two at 2"),
        ([], ["none.safetensors"], "policy: there is no file none.safetensors"),
        (["--metric", "bleu"], ["layer=1"], "metric: expected one of kl"),
        (["--positions", "first"], ["layer=1"], "positions: expected 'last', 'answer' or a number"),
    ],
)
def test_bad_options(place, capsys, options, policies, message):
    assert compare(*options, policies=policies) == 1
    assert message in capsys.readouterr().err and not (place / "comparison.json").exists()


@pytest.mark.parametrize("group", [1.5, [], "", True, {"a": 1}])
def test_bad_groups(place, capsys, group):
    set_groups(place, "group", [group])
    assert compare() == 1
    assert "data.jsonl:1: group: expected text" in capsys.readouterr().err


def test_bad_input(tmp_path):
    model, inputs = make_model("llava"), make_batch("llava", IMAGES).inputs()
    for options, error, message in (
        (dict(policies=[]), ValueError, "policies: expected at least one, got none"),
        (dict(policies=1), TypeError, "policies: expected several of them, got one, a int"),
        (dict(policies="layer=1"), TypeError, "policies: expected several of them, got one, a str"),
        (dict(policies=vtw.Withdraw(1)), TypeError, "policies: expected several of them, got one, a Withdraw"),
        (dict(policies=[[1, 2]]), TypeError, r"policies: expected one layer, or policies, got the layers \[1, 2\]"),
        (dict(policies=[5.0]), TypeError, "layer: expected an int, or some, got float"),
        (dict(policies=[1], costed=-1), ValueError, "costed: expected a number of batches, 0 or more, got -1"),
        (dict(policies=[1], groups=["a"]), ValueError, "groups: expected one for each of 3 samples, got 1"),
        (dict(policies=[1], groups=[1, 2, 3]), TypeError, "groups: expected texts, got int"),
        (dict(policies=[1], batches=inputs), TypeError, "batches: expected an iterable of batches, got one"),
        (dict(policies=[1], batches=[]), ValueError, "batches: expected at least one batch, got none"),
    ):
        with pytest.raises(error, match=message):
            vtw.compare(model, **{"batches": [inputs], "progress": False} | options)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1], labels[0, 1] = 11, 11  # the first sample's first image comes after
    with pytest.raises(ValueError, match="labels: expected those of an answer behind all visual tokens.* in row 0"):
        vtw.compare(model, [inputs | {"labels": labels}], ["random:1:1"], positions="answer", progress=False)
    with pytest.raises(ValueError, match="max_kl, min_saving or both, got neither"):
        make_comparison(1).choose()
    make_comparison(1).save(tmp_path / "saved.json")
    content = json.loads((tmp_path / "saved.json").read_text())
    for change, message in (
        ({"policies": ["layer=1"]}, "per_sample of shape"),
        ({"groups": ["a"]}, "groups: expected one for each of 8 samples"),
        ({"metric": "bleu"}, "metric: expected one of"),
        ({"rows_saved": None}, "'NoneType' object has no attribute 'shape'"),
    ):
        (tmp_path / "changed.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=f"expected what Comparison.save wrote, got .*{message}"):
            vtw.Comparison.load(tmp_path / "changed.json")
    assert module.Comparison.wrote(tmp_path / "saved.json")
