"""Training of the gates of dynamic exit: its data, its results, and ``vtw-kernels train-exit``."""

import json
import os
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from command_records import after_lines, die, in_processes
from safetensors.torch import load_file
from test_exit_routers import HIDDEN, written_features
from torch import Tensor
from vlm import FAMILIES, LAYERS, make_batch, make_model
from vlm import run as run_model

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.layer_search import run, state
from vtw_kernels.layer_search.exit_scorer import ExitScorer
from vtw_kernels.layer_search.exit_training import Training, exit_labels, train_gates, train_routers

pytest_plugins = ["command_records"]  # the fixtures place and source
pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
PROMPTS = [[2, 4, 6], [1, 8, 5], [3, 4, 2, 4, 7], [1, 4, 6]]
SMALL = {"width": 8, "epochs": 3}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def answered(family: str, rows=PROMPTS, pad: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Inputs whose last tokens, two to four of each sequence, are an answer."""
    batch = make_batch(family, rows, pad, seed)
    labels = torch.full_like(batch.ids, -100)
    for i, mask in enumerate(batch.mask):
        answer = mask.nonzero().flatten()[-(2 + (i + seed) % 3) :]
        labels[i, answer] = batch.ids[i, answer]
    return batch.inputs() | {"labels": labels}


# ------------------------------------------------------------------------------------------ what gates are trained with


@pytest.mark.parametrize("pad", ["left", "right"])
def test_scores_by_running_each_layer(family, pad):
    """Features are those of the prompts alone, on the plain model; losses and top tokens those of models that are
    withdrawn one after the other, of sequences one after the other."""
    model, inputs = make_model(family), answered(family, pad=pad)
    scores = ExitScorer(model, positions="answer").score(inputs)
    for i, rows in enumerate(PROMPTS):
        images, ids = make_batch(family, PROMPTS, pad).images, inputs["input_ids"][i]
        alone = make_batch(family, [rows])
        kept = inputs["attention_mask"][i].bool()
        alone.ids, alone.images = ids[kept][None], [x for x in images if x["row"] == i]
        for image in alone.images:
            image["end"] = int(kept[: image["end"]].sum())
        labels = inputs["labels"][i][kept]
        said = (labels != -100).nonzero().flatten()
        prompt = int(said[0])
        with torch.no_grad():
            states = model(**alone.inputs(0, prompt), use_cache=False, output_hidden_states=True).hidden_states
        visual = alone.visual[0, :prompt].tolist()
        wanted = [written_features(states[x][0], visual, [not x for x in visual]) for x in (1, 2, 3)]
        torch.testing.assert_close(scores.features[i], torch.stack(wanted), atol=TOLERANCE, rtol=0)
        losses, tops = [], []
        for layer in (1, 2, 3, LAYERS):
            with torch.no_grad(), vtw.withdraw(model, layer):
                logits = model(**alone.inputs(), use_cache=False).logits[0, said - 1]
            losses.append(F.cross_entropy(logits, labels[said]))
            tops.append(logits.argmax(-1))
        torch.testing.assert_close(scores.loss[i], torch.stack(losses), atol=TOLERANCE, rtol=0)
        differ = torch.stack([(top != tops[-1]).float().mean() for top in tops[:-1]])
        assert torch.equal(scores.disagreement[i], differ)
        assert scores.tokens[i] == kept.sum() and scores.visual_tokens[i] == alone.visual.sum()


def test_own_answers(family):
    """They are what a given answer of the same tokens would be."""
    model, batch = make_model(family), make_batch(family, [[3, 4, 5]])
    own = ExitScorer(model, positions=3).score(batch.inputs())
    answer = model.generate(**batch.inputs(), max_new_tokens=3, do_sample=False)[:, -3:]
    batch.ids, batch.mask = torch.cat((batch.ids, answer), 1), torch.ones(1, 15, dtype=torch.long)
    labels = torch.full_like(batch.ids, -100)
    labels[:, -3:] = answer
    given = ExitScorer(model, positions="answer").score(batch.inputs() | {"labels": labels})
    for name in ("kl", "disagreement", "loss", "features"):
        torch.testing.assert_close(getattr(own, name), getattr(given, name), atol=TOLERANCE, rtol=0)


def test_logits_that_are_large(family, monkeypatch):
    model, inputs = make_model(family), answered(family)
    scorer = ExitScorer(model, positions="answer", max_candidates_in_flight=2)
    wanted = scorer.score(inputs)
    monkeypatch.setattr("vtw_kernels.layer_search.exit_scorer.LOGITS_BYTES", 1000)  # a row or two at a time
    monkeypatch.setattr(ExitScorer, "_logits_are_large", lambda *_: True)
    for given, value in zip(scorer.score(inputs), wanted):
        torch.testing.assert_close(given, value, atol=TOLERANCE, rtol=1e-4)


def test_an_answer_before_an_image(family):
    inputs = answered(family, [[3, 4, 5, 4, 3]])
    inputs["labels"][0, 8:10] = inputs["input_ids"][0, 8:10]
    with pytest.raises(ValueError, match="labels: expected those of an answer behind all visual tokens, .* in row 0"):
        ExitScorer(make_model(family), positions="answer").score(inputs)


def test_labels():
    """More than 99 % of the tokens, and less than 3 % more cross entropy."""
    disagreement = torch.tensor([[0.0, 0.005, 0.011, 0.0]])
    loss = torch.tensor([[1.029, 1.0, 0.5, 1.031, 1.0]])
    assert exit_labels(disagreement, loss).tolist() == [[True, True, False, False]]


# --------------------------------------------------------------------------------------------------------- training


def test_learns_what_can_be_told():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 2, 2 * HIDDEN, generator=generator)
    features[..., 0] = 5 * features[..., 0].sign()
    labels = torch.stack([features[:, 0, 0] > 0, features[:, 1, 0] < 0], dim=1)
    routers = vtw.ExitRouters((1, 3), HIDDEN, LAYERS, width=32)
    train_routers(features[:150], labels[:150], routers, Training(32, 60, 1e-2))
    for column, layer in enumerate((1, 3)):
        right = (routers.probabilities(layer, features[:, column]) > 0.5) == labels[:, column]
        assert right[:150].all() and right[150:].double().mean() >= 0.95


def trained(family: str, **options):
    model = make_model(family)
    batches = [answered(family, seed=seed) for seed in range(4)]
    groups = [f"of {i % 2}" for i in range(16)]
    return model, batches, vtw.train_exit(model, batches, groups=groups, progress=False, **SMALL | options)


def test_seeds():
    _, _, first = trained("llava")
    _, _, same = trained("llava")
    _, _, other = trained("llava", seed=1)
    assert all(x.equal(same.routers.state()[name]) for name, x in first.routers.state().items())
    assert not any(x.equal(other.routers.state()[name]) for name, x in first.routers.state().items())
    assert first.held_out().tolist() != other.held_out().tolist() and len(first.held_out()) == 3
    assert sorted([*first.split[0].tolist(), *first.split[1].tolist()]) == list(range(16))
    untrained = vtw.ExitRouters((1, 2, 3), HIDDEN, LAYERS, width=8).state()
    assert not any(x.equal(untrained[name]) for name, x in first.routers.state().items())


def test_held_out_samples_teach_nothing():
    _, _, training = trained("llava")

    def gates_of(rows: Tensor) -> dict[str, Tensor]:
        """With other features of these samples."""
        scores = {name: getattr(training, name).clone() for name in (*training.SCORES, *training.COUNTS)}
        scores["features"][rows] += 1
        of_model = (training.model, LAYERS, training.candidates)
        return train_gates(of_model, list(scores.values()), training.training, 0.5, "cpu").routers.state()

    trained_with, held_out = training.split
    assert all(x.equal(training.routers.state()[name]) for name, x in gates_of(held_out).items())
    assert not all(x.equal(training.routers.state()[name]) for name, x in gates_of(trained_with[:1]).items())


@torch.no_grad()
def test_what_is_said_is_what_happens(family):
    """To held-out samples, when the gates withdraw from them, in the forward of the prompt, and answers follow."""
    model, batches, inputs = make_model(family), [], []
    for seed in range(12):
        batches.append(make_batch(family, [PROMPTS[seed % 4]], seed=seed))
        inputs.append(answered(family, [PROMPTS[seed % 4]], seed=seed))
    options = {"epochs": 1, "width": 8, "learning_rate": 1e-3, "held_out": 0.5, "progress": False}
    training = vtw.train_exit(model, inputs, **options)
    assert len(training.held_out()) == 6
    values = training.probabilities[training.held_out()].flatten().sort().values
    between = ((values[1:] + values[:-1]) / 2)[values.diff() > 1e-4].tolist()
    exits = set()
    for threshold in (between[0], between[len(between) // 2], between[-1]):
        training.routers.threshold = threshold
        divergences, same = [], []
        for row in training.held_out().tolist():
            said = (inputs[row]["labels"][0] != -100).nonzero().flatten()
            ends = [int(said[0]), batches[row].ids.shape[1]]
            full = run_model(model, batches[row], ends)[0, said - 1]
            with vtw.withdraw(model, training.routers):
                withdrawn = run_model(model, batches[row], ends)[0, said - 1]
            divergences.append(vtw.kl_divergence(withdrawn, full).mean().item())
            same.append((withdrawn.argmax(-1) == full.argmax(-1)).double().mean().item())
        outcome = training.outcome()
        assert outcome.kl == pytest.approx(sum(divergences) / len(same), abs=1e-5)
        assert outcome.agreement == pytest.approx(sum(same) / len(same), abs=1e-6)
        assert training.at_exit().tolist() == pytest.approx(divergences, abs=1e-5)
        exits |= set(outcome.layers.tolist())
    assert len(exits) >= 3


def test_fixed_layers():
    """At a gate what was measured there; between two, in proportion; and nothing changes where nothing leaves."""
    _, _, training = trained("llava", every=2)
    rows = training.held_out()
    kl = training.per_sample[rows].double().mean(0).tolist()
    assert training.candidates == [1, 3]
    assert [training.fixed(x)[1] for x in (1, 3, LAYERS)] == pytest.approx([*kl, 0.0])
    assert training.fixed(1.5)[1] == pytest.approx(0.75 * kl[0] + 0.25 * kl[1])
    assert training.fixed(LAYERS)[0] == 1
    part = training.held_out("of 1")
    assert set(part.tolist()) == {x for x in rows.tolist() if x % 2}
    assert training.fixed(1, "of 1")[1] == pytest.approx(training.per_sample[part, 0].double().mean().item())
    with pytest.raises(ValueError, match=r"mean_layer: expected 1\.\.4, got 0.5"):
        training.fixed(0.5)


def test_table(tmp_path):
    _, _, training = trained("llava", threshold=0.45)
    table = training.table()
    assert "| 0.45 |" in table and "of 0:" in table and "3 held-out ones" in table
    assert sum(" chosen |" in line for line in table.splitlines()) == 1 + len(training.held_out_groups)
    training.plot(tmp_path / "curve.png")
    training.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Dynamic Visual-Token Exit" in page and "<h3>of 0</h3>" in page and page.count("<svg") == 3
    assert {x.name for x in tmp_path.iterdir()} >= {"curve.png", "page-exits.png", "page-agreement.png", "page-kl.png"}


def test_save_and_load(tmp_path):
    """Gates and what they were trained with, in one file, of which ``withdraw`` takes the gates."""
    model, batches, training = trained("llava")
    path = tmp_path / "exit.safetensors"
    training.save(path)
    loaded = vtw.ExitTraining.load(path)
    for name in ("model", "num_layers", "candidates", "positions", "training", "groups", "settings", "metric"):
        assert getattr(loaded, name) == getattr(training, name), name
    for name in (*training.SCORES, *training.COUNTS, "probabilities"):
        assert torch.equal(getattr(loaded, name), getattr(training, name)), name
    assert loaded.table() == training.table()
    gates = tmp_path / "gates.safetensors"
    vtw.ExitRouters.load(path).save(gates)
    assert load_file(gates).keys() == training.routers.state().keys()
    inputs = {name: x for name, x in batches[0].items() if name != "labels"}
    with torch.no_grad():
        results = []
        for layer in (path, gates, training.routers):
            with vtw.withdraw(model, layer):
                results.append(model(**inputs).logits)
    assert all(x.equal(results[0]) for x in results)
    with pytest.raises(ValueError, match="gates.safetensors: expected what ExitTraining.save wrote, got 'records'"):
        vtw.ExitTraining.load(gates)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"first": 0}, r"first, last: expected layers in 1\.\.3, got 0 and None"),
        ({"first": 3, "last": 2}, r"first, last: expected layers in 1\.\.3, got 3 and 2"),
        ({"last": 4}, r"first, last: expected layers in 1\.\.3, got None and 4"),
        ({"threshold": -0.1}, "threshold: expected a probability from 0 to 1, got -0.1"),
        ({"width": 0}, "width: expected a number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected a number of at least 1, got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"warm_up": 1.0}, "warm_up: expected a share of at least 0 and below 1, got 1.0"),
        ({"held_out": 0.0}, "held_out: expected a share above 0, got 0"),
        ({"positions": 0}, "positions: expected 'last', 'answer' or a number"),
        ({"groups": ["a"]}, "groups: expected one for each of 4 samples, got 1"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        vtw.train_exit(make_model("llava"), [answered("llava")], progress=False, **SMALL | options)


def test_one_sample():
    with pytest.raises(ValueError, match="batches: expected at least 2 samples, one of them to be held out, got 1"):
        vtw.train_exit(make_model("llava"), [answered("llava", [[2, 4, 6]])], progress=False, **SMALL)


# ---------------------------------------------------------------------------------------------------------- the command


def train(*options: str, out: str = "exit.safetensors") -> int:
    command = ["train-exit", "--model", "model", "--data", "data.jsonl", "--out", out, "--width", "8", "--epochs", "3"]
    return main([*command, "--quiet", *options])


def test_command(place, capsys):
    """What it writes is what the function gives of the same records, and can be withdrawn with."""
    assert train("--report", "page.html", "--every", "2", "--threshold", "0.4") == 0
    training = vtw.ExitTraining.load("exit.safetensors")
    assert training.candidates == [1, 3] and training.routers.threshold == 0.4 and len(training.tokens) == 12
    assert list(training.settings["records"])[0] == "data.jsonl:1" and training.features.shape == (12, 2, 2 * HIDDEN)
    assert not (place / "exit.safetensors.partial").exists()
    page = (place / "page.html").read_text()
    assert "train-exit --model model" in page and "data.jsonl:" in page
    assert main(["report", "exit.safetensors", "--out", "again.html"]) == 0
    assert "2 gates" in capsys.readouterr().out
    again = train_gates(
        (training.model, LAYERS, [1, 3]),
        [getattr(training, name) for name in (*training.SCORES, *training.COUNTS)],
        Training(**SMALL),
        0.4,
        "cpu",
    )
    assert all(x.equal(training.routers.state()[name]) for name, x in again.routers.state().items())
    vtw.apply(make_model("llava"), "exit.safetensors").remove()


def test_what_lines_hold():
    """To the bit, whatever a model's numbers are."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        features = torch.randn(3, 2, 5).to(dtype)[:, 1]  # of a stride of its own
        read = state.unpacked(json.loads(json.dumps(state.packed(features))))
        assert read.dtype == dtype and torch.equal(read, features)
    for numbers in (torch.tensor(7), torch.tensor([0.1, float("nan"), float("inf")])):
        read = state.unpacked(json.loads(json.dumps(state.packed(numbers))))
        torch.testing.assert_close(read, numbers, rtol=0, atol=0, equal_nan=True)


def test_killed_resumed_and_shared(place, monkeypatch, capsys):
    """To the bit what one process gives in one go; and another training of the same records needs no model."""
    assert train(out="whole.safetensors") == 0
    wanted = (place / "whole.safetensors").read_bytes()
    assert in_processes(1, train, lambda rank: setattr(run, "append_line", after_lines(5, die))) == [-signal.SIGKILL]
    assert not (place / "exit.safetensors").exists()
    assert train() == 0
    assert "5 of 12 records were scored before" in capsys.readouterr().err
    assert (place / "exit.safetensors").read_bytes() == wanted

    assert in_processes(2, partial(train, out="shared.safetensors")) == [0, 0]
    assert (place / "shared.safetensors").read_bytes() == wanted

    monkeypatch.setattr(run, "load_model", None)
    assert train("--training-seed", "1", "--threshold", "0.7") == 0
    other = vtw.ExitTraining.load("exit.safetensors")
    assert other.training.seed == 1 and other.routers.threshold == 0.7
    assert torch.equal(other.features, vtw.ExitTraining.load("whole.safetensors").features)
    assert train() == 0 and (place / "exit.safetensors").read_bytes() == wanted


def test_stopped(place, monkeypatch, capsys):
    """Nothing is trained with some of the records."""

    def stop(file, line):
        state.append_line(file, line)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(run, "append_line", after_lines(3, stop))
        assert train() == 128 + signal.SIGTERM
    assert "stopped: 4 of 12 records are done; the same command goes on from there" in capsys.readouterr().err
    assert not (place / "exit.safetensors").exists()
    assert train() == 0


def test_what_is_refused(place, capsys):
    (place / "exit.safetensors").write_bytes(b"mine")
    assert train() == 1 and "out: expected a new file or an earlier result" in capsys.readouterr().err
    assert (place / "exit.safetensors").read_bytes() == b"mine"
    assert train("--held-out", "1", out="other.safetensors") == 1
    assert "held_out: expected a share" in capsys.readouterr().err
    lines = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    del lines[4]["answer"]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(out="other.safetensors") == 1 and "data.jsonl:5: " in capsys.readouterr().err
    assert not (place / "other.safetensors").exists()
