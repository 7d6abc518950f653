"""``vtw-kernels skip-attention``: records, stops, reports."""

import html
import json
import os
import re
import signal

import pytest
import torch
from command_records import after_lines, die, in_a_new_process
from vlm import make_model

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.layer_search import run, skip_command, skip_training, state
from vtw_kernels.layer_search.policy_scorer import PolicyScorer
from vtw_kernels.layer_search.skip_search import SkipLoss

pytest_plugins = ["command_records"]  # the fixtures place and source
pytestmark = pytest.mark.usefixtures("one_thread")
SEARCH = ["--skip", "2", "--steps", "6", "--every", "1", "--subsets", "2"]


def skip(action: str, out: str, *options: str) -> int:
    command = ["skip-attention", action, "--model", "model", "--data", "data.jsonl", "--out", out, "--limit", "4"]
    return main([*command, "--quiet", *options])


def test_search(place, monkeypatch, capsys):
    """Stopped in the middle, it goes on to the same result; the page tells all of it."""
    assert skip("search", "whole.json", *SEARCH, "--positions", "answer") == 0
    found = vtw.SkipSearch.load("whole.json")
    assert found.candidates == [0, 1, 2, 3] and len(found.tokens) == 4 and set(found.choices) == set(found.kl_of)
    assert list(found.choices) == ["alone", "greedy", "bandit"] and len(found.layers) == 2

    def stop(file, line):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "append_line", after_lines(2, stop))
        assert skip("search", "skip.json", *SEARCH, "--positions", "answer") == 130
    assert skip("search", "skip.json", *SEARCH, "--positions", "answer", "--report", "page.html") == 0
    assert "2 of 4 records were scored before" in capsys.readouterr().err
    assert (place / "skip.json").read_text() == (place / "whole.json").read_text()
    page = (place / "page.html").read_text()
    assert "bandit" in page and "skip-attention search" in page and (place / "page-greedy.png").exists()
    assert main(["report", "skip.json", "--out", "again.html"]) == 0
    assert skip("search", "skip.json", *SEARCH[:1], "3", *SEARCH[2:], "--positions", "answer") == 1
    assert "skip was 2 and is 3" in capsys.readouterr().err


TOGETHER = 16  # steps that look at all records: 8 of two greedy rounds, 4 of the bandit, and 4 for the KL of choices


@pytest.fixture
def forwards(monkeypatch, tmp_path):
    """How many there were since it was asked last, in all processes."""
    logits, path = PolicyScorer.logits, tmp_path / "forwards"

    def counted(self, reading):
        with path.open("ab") as file:
            file.write(b".")
        return logits(self, reading)

    def count() -> int:
        calls = path.stat().st_size if path.exists() else 0
        path.write_bytes(b"")
        return calls

    monkeypatch.setattr(PolicyScorer, "logits", counted)
    return count


def killed_after(steps: int, monkeypatch) -> None:
    """A search that is killed as it writes what this step found, in a process of its own."""
    pid = os.fork()
    if not pid:
        count, append = 0, state.append_line

        def append_or_die(file, line):
            nonlocal count
            count += 1
            (append if count <= steps else die)(file, line)

        monkeypatch.setattr(state, "append_line", append_or_die)
        try:
            skip("search", "skip.json", *SEARCH)
        finally:
            os._exit(1)  # not on with the tests
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("steps", [0, 2, 6, 9, 12, TOGETHER - 1])
def test_killed_while_all_records_are_looked_at(place, monkeypatch, capsys, forwards, steps):
    """To the bit what one process gives in one go; nothing but the step at hand, of at most 5 forwards, is repeated."""
    assert skip("search", "whole.json", *SEARCH) == 0
    wanted, of_records = forwards(), 4 * 5
    killed_after(steps, monkeypatch)
    assert vtw.SkipSearch.load("skip.json").greedy is None  # so far
    before = forwards()
    assert skip("search", "skip.json", *SEARCH) == 0
    assert (place / "skip.json").read_text() == (place / "whole.json").read_text()
    assert wanted < before + forwards() <= wanted + 5 and before > of_records
    said = capsys.readouterr().err
    done = f", and {steps} steps of what looks at all of them were done" if steps else ""
    assert f"skip.json: 4 of 4 records were scored before{done}\n" in said and "damaged" not in said
    assert not (place / "skip.json.partial").exists()


def test_damaged_and_discarded_steps(place, monkeypatch, capsys, forwards):
    assert skip("search", "whole.json", *SEARCH) == 0
    wanted, whole = forwards(), (place / "whole.json").read_text()
    killed_after(10, monkeypatch)
    path = place / "skip.json.partial/run-1-together.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    number = re.search(r"\d\.\d", lines[3])[0]
    lines[3] = lines[3].replace(number, f"{(int(number[0]) + 1) % 10}.{number[2]}")
    path.write_text("".join(lines))
    forwards()
    assert skip("search", "skip.json", *SEARCH) == 0
    said = capsys.readouterr().err
    assert "run-1-together.jsonl:4: damaged, and ignored" in said and "and 9 steps of what looks" in said
    assert (place / "skip.json").read_text() == whole

    (place / "skip.json").unlink()
    killed_after(10, monkeypatch)
    assert skip("search", "skip.json", *SEARCH, "--bandit-seed", "1") == 1
    assert "bandit: seed was 0 and is 1 (--restart discards it)" in capsys.readouterr().err
    (place / "skip.json").unlink()
    assert skip("search", "skip.json", *SEARCH, "--bandit-seed", "1") == 1
    assert "settings: expected those of the 4 records" in capsys.readouterr().err
    forwards()
    assert skip("search", "skip.json", *SEARCH, "--restart") == 0 and forwards() == wanted
    assert (place / "skip.json").read_text() == whole


# ------------------------------------------------------------------------------------------------------------- training

TRAIN = ["--layers", "1,2", "--epochs", "3", "--accumulate", "2", "--held-out", "0.25", "--dim", "2"]


def test_train(place, monkeypatch, capsys):
    """Trained once; asked again, it writes the page without the model, and so does ``report``."""
    assert skip("train", "adapters", *TRAIN, "--report", "page.html") == 0
    adapters = vtw.SkipAdapters.from_pretrained("adapters")
    assert adapters.layers == (1, 2) and adapters.settings["training"]["epochs"] == 3
    assert len(adapters.settings["losses"]) == 3 and list(adapters.settings["records"])[0] == "data.jsonl:1"
    assert not (place / "adapters.partial").exists() and (place / "page-loss.png").exists()
    found = vtw.SkipTraining.load("adapters")
    assert found.batches == (3, 1) and found.held_out.keys() == {"whole", "skipped", "adapters"}
    page = (place / "page.html").read_text()
    for said in (
        found.verdict(),
        f"{found.held_out['adapters'][0]:.4g}",
        "train --model model",
        "3 trained with, 1 held",
    ):
        assert html.escape(said) in page, said
    assert page.count("<svg") == 1 and page.count("skip-attention train --model") == 1
    written = {x: (place / "adapters" / x).read_bytes() for x in os.listdir("adapters")}

    monkeypatch.setattr(skip_command, "load_model", None)
    assert main(["report", "adapters"]) == 0
    assert (place / "adapters.html").read_text() == page
    (place / "page.html").unlink()
    assert skip("train", "adapters", *TRAIN, "--report", "page.html") == 0
    assert (place / "page.html").read_text() == page
    assert "these adapters were trained before; the model is not run" in capsys.readouterr().err
    assert skip("train", "adapters", *TRAIN, "--dropout", "0.5") == 1
    assert "which are of another one: training: dropout was 0.1 and is 0.5 (--restart" in capsys.readouterr().err
    lines = (place / "data.jsonl").read_text().splitlines()
    (place / "data.jsonl").write_text("\n".join([lines[1], *lines[1:]]) + "\n")
    assert skip("train", "adapters", *TRAIN) == 1
    assert "which are of another one: records: data.jsonl:1 was '" in capsys.readouterr().err
    assert {x: (place / "adapters" / x).read_bytes() for x in os.listdir("adapters")} == written


def count_backwards() -> None:
    """Each one writes a byte, whatever process it is in."""
    backward = SkipLoss.backward

    def counted(self, *arguments):
        with open("backwards", "ab") as file:
            file.write(b".")
        return backward(self, *arguments)

    SkipLoss.backward = counted


@pytest.fixture
def backwards(monkeypatch, place):
    """How many there were since it was asked last, in all processes."""
    path = place / "backwards"

    def count() -> int:
        calls = path.stat().st_size if path.exists() else 0
        path.write_bytes(b"")
        return calls

    monkeypatch.setattr(SkipLoss, "backward", SkipLoss.backward)  # to be put back
    count_backwards()
    return count


def train_and_die(at: str, number: int, out: str, *options: str) -> None:
    """The command, in a process that kills itself at such a call, after so many of them."""
    skip_training.KEPT_SECONDS = 0
    count_backwards()
    owner, name = {
        "backward": (SkipLoss, "backward"),
        "write": (skip_training, "write_whole"),
        "replace": (os, "replace"),  # with the checkpoint written, and not yet in its place
        "evaluate": (SkipLoss, "evaluate"),
        "weights": (os, "replace"),  # that is done; next would be their config
        "remove": (state.State, "remove"),
    }[at]
    function, calls = getattr(owner, name), 0
    file = {"write": "training.pt", "replace": "training.pt", "weights": ".safetensors"}.get(at, "")

    def dies(*arguments):
        nonlocal calls
        calls += file in str(arguments)
        if at == "weights":
            function(*arguments)
        if calls > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return None if at == "weights" else function(*arguments)

    setattr(owner, name, dies)
    skip("train", out, *TRAIN, *options)


def training_killed(at: str, number: int, out: str = "adapters", *options: str) -> None:
    assert in_a_new_process(train_and_die, at, number, out, *options) == -signal.SIGKILL


KILLED = [
    ("backward", 0),
    ("backward", 3),
    ("backward", 5),
    ("write", 2),
    ("replace", 2),
    ("evaluate", 2),
    ("evaluate", 5),
]


@pytest.mark.parametrize(("at", "number"), KILLED)
def test_killed_training(place, monkeypatch, capsys, backwards, at, number):
    """To the bit what one process gives in one go, and only the step at hand is repeated."""
    monkeypatch.setattr(skip_training, "KEPT_SECONDS", 0)
    assert skip("train", "whole", *TRAIN) == 0
    assert backwards() == 9
    training_killed(at, number)
    assert not (place / "adapters").exists()
    assert skip("train", "adapters", *TRAIN) == 0
    assert 9 <= backwards() <= 9 + 2
    looked_at = 2 if (at, number) == ("evaluate", 2) else 4
    begun = "; the training has begun, and goes on" if number > 1 and at != "evaluate" or number == 5 else ""
    assert f"adapters: {looked_at} of 4 records were looked at before{begun}\n" in capsys.readouterr().err
    whole, again = (vtw.SkipTraining.load(x) for x in ("whole", "adapters"))
    assert again.losses == whole.losses and again.held_out == whole.held_out
    assert all(torch.equal(x, y) for x, y in zip(again.adapters.parameters(), whole.adapters.parameters()))
    assert not (place / "adapters.partial").exists()


def test_killed_while_adapters_are_written(place, capsys):
    """Weights without their config are none; and of an earlier training's, no other weights stand beside them."""
    for before in ([], ["--restart", "--epochs", "1"]):
        training_killed("weights", 0, "adapters", *before)
        assert os.listdir("adapters") == ["adapter_model.safetensors"]
        assert skip("train", "adapters", *TRAIN, *before[1:]) == 0
        assert len(vtw.SkipTraining.load("adapters").losses) == (1 if before else 3)
    training_killed("remove", 0, "other")
    assert (place / "other.partial/training.pt").exists()
    assert skip("train", "other", *TRAIN) == 0 and not (place / "other.partial").exists()
    assert "other: these adapters were trained before; the model is not run" in capsys.readouterr().err


def test_stopped_training(place, monkeypatch, capsys):
    """While records are looked at, as a search is; later at the last step that was written down."""

    def stop(number):
        def stops(*arguments):
            os.kill(os.getpid(), number)
            return append_line(*arguments)

        append_line = state.append_line
        return stops

    for number in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr(skip_command, "append_line", stop(number))
            assert skip("train", "adapters", *TRAIN) == 128 + number
        assert "of 4 records were looked at; the same command goes on from there" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(SkipLoss, "backward", stop(signal.SIGINT))
        assert skip("train", "adapters", *TRAIN) == 130
    said = capsys.readouterr().err
    assert "2 of 4 records were looked at before" in said
    assert "interrupted; what was done is kept, and the same command goes on from there" in said
    assert skip("train", "adapters", *TRAIN, "--dropout", "0.5") == 1
    said = capsys.readouterr().err
    assert "training: dropout was 0.1 and is 0.5 (--restart discards what was done)" in said
    assert skip("train", "adapters", *TRAIN, "--dropout", "0.5", "--restart") == 0


def test_damaged_training(place, capsys):
    training_killed("backward", 7)
    path = place / "adapters.partial/training.pt"
    intact = path.read_bytes()
    middle = len(intact) // 2
    for damaged in (b"", intact[:middle], intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]):
        path.write_bytes(damaged)
        assert skip("train", "adapters", *TRAIN) == 1
        said = capsys.readouterr().err
        assert "checkpoint: expected what a training with the same arguments and batches wrote to" in said
        assert "adapters.partial/training.pt, got " in said and "remove it to begin anew" in said
    path.write_bytes(intact)
    lines = (place / "data.jsonl").read_text().splitlines()
    (place / "data.jsonl").write_text("\n".join([lines[1], *lines[1:]]) + "\n")
    assert skip("train", "adapters", *TRAIN) == 1
    assert "training.pt, got one where records: data.jsonl:1 was '" in capsys.readouterr().err
    assert skip("train", "adapters", *TRAIN, "--restart") == 0


def test_bad_records_of_a_training(place, capsys):
    """Named before it begins, whether they can't be read or the model refuses them."""
    lines = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    lines[1]["image"] = "data.jsonl"
    del lines[2]["answer"]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert skip("train", "adapters", *TRAIN) == 1
    said = capsys.readouterr().err
    assert "data.jsonl:2: image: data.jsonl can't be read" in said and "pass --skip-bad, and run the same" in said
    assert skip("train", "adapters", *TRAIN, "--skip-bad", "--report", "page.html") == 0
    said = capsys.readouterr().err
    assert (
        "adapters: 1 of 4 records were looked at before" in said and "2 bad records were skipped: data.jsonl:2" in said
    )
    found = vtw.SkipTraining.load("adapters")
    assert found.batches == (1, 1) and list(found.settings["bad"]) == ["data.jsonl:2", "data.jsonl:3"]
    assert list(found.settings["records"]) == ["data.jsonl:1", "data.jsonl:4"]
    assert (
        "(2 bad records skipped)" in found.verdict() and "(2 bad records skipped)" in (place / "page.html").read_text()
    )
    assert skip("train", "adapters", *TRAIN, "--skip-bad") == 0
    assert "the model is not run" in capsys.readouterr().err


def test_what_a_training_refuses(place, monkeypatch, capsys):
    (place / "folder").mkdir()
    (place / "folder" / "notes").write_text("mine")
    (place / "file").write_text("mine")
    vtw.SkipAdapters.for_model(make_model("llava"), [1]).save_pretrained("untrained")
    monkeypatch.setattr(skip_command, "load_model", None)
    for wrong, message in (
        (["folder", *TRAIN], "out: expected a new folder or that of earlier adapters, got something else"),
        (["file", *TRAIN, "--restart"], "out: expected a new folder or that of earlier adapters, got something else"),
        (["untrained", *TRAIN], "untrained: expected adapters that train_skip has trained, got KeyError('losses')"),
        (["other"], "layers: expected --layers or --search, got neither"),
        (["other", "--layers", "1;2"], "layers: expected numbers with commas between"),
        (["other", *TRAIN, "--report", "folder"], "report: expected a file, got the folder folder"),
        (["other", *TRAIN, "--report", "file"], "report: expected a new file or an earlier report"),
        (["other", *TRAIN, "--report", "data.jsonl"], "report: expected another file than that of data"),
        (["other", *TRAIN, "--tp"], "tp: expected torchrun with several ranks"),
        (["other", *TRAIN, "--dtype", "float17"], "dtype: expected auto or one of torch"),
    ):
        assert skip("train", *wrong) == 1
        assert message in capsys.readouterr().err, message
    assert sorted(os.listdir("folder")) == ["notes"] and (place / "file").read_text() == "mine"
    assert not (place / "other").exists()


def test_evaluate(place, monkeypatch, capsys, forwards):
    """As ``compare`` does: it names bad records, goes on where it was stopped, and has a page."""
    assert skip("train", "whole", *TRAIN) == 0
    options = ["--layers", "1,2", "--adapters", "whole", "--policy", "layer=2"]
    lines = (place / "data.jsonl").read_text().splitlines()
    (place / "data.jsonl").write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    assert skip("evaluate", "other.json", *options) == 1
    assert "1 of 4 records are bad (--skip-bad): data.jsonl:2: " in capsys.readouterr().err
    (place / "data.jsonl").write_text("\n".join(lines) + "\n")
    forwards()
    assert skip("evaluate", "undisturbed.json", *options, "--no-costs") == 0
    wanted = forwards()
    with monkeypatch.context() as patch:
        patch.setattr(run, "append_line", after_lines(2, lambda file, line: os.kill(os.getpid(), signal.SIGINT)))
        assert skip("evaluate", "stopped.json", *options, "--no-costs") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    before = forwards()
    assert skip("evaluate", "stopped.json", *options, "--no-costs", "--report", "page.html") == 0
    assert before + forwards() <= wanted + wanted // 4  # of four records, the one at hand is repeated
    assert "stopped.json: 2 of 4 records were scored before\n" in capsys.readouterr().err
    assert (place / "stopped.json").read_text() == (place / "undisturbed.json").read_text()
    assert "skip:whole" in (place / "page.html").read_text()
    assert skip("evaluate", "stopped.json", *options[:2], "--no-costs") == 1
    assert "policies was [" in capsys.readouterr().err

    assert skip("evaluate", "comparison.json", "--layers", "1,2", "--adapters", "whole", "--policy", "layer=2") == 0
    comparison = vtw.Comparison.load("comparison.json")
    assert comparison.policies == ["skip:1,2", "skip:whole", "layer=2"]
    assert (
        comparison.rows_saved[:, :2].eq(0.5).all() and comparison.costs.kv_bytes[0] == comparison.costs.kv_bytes[-1] / 2
    )
    assert json.loads((place / "comparison.json").read_text())["settings"]["policy_files"].keys() == {
        "policy skip:whole"
    }
    with vtw.skip_attention(make_model("llava"), adapters="whole"):
        pass
