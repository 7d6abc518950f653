"""``vtw-kernels skip-attention``: records, stops, reports."""

import json
import os
import re
import signal

import pytest
import torch
from test_search_cli import after_lines, die, place, source  # noqa: F401
from vlm import make_model

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.layer_search import run, state
from vtw_kernels.layer_search.policy_scorer import PolicyScorer

pytestmark = pytest.mark.usefixtures("one_thread")
SEARCH = ["--skip", "2", "--steps", "6", "--every", "1", "--subsets", "2"]


def skip(action: str, out: str, *options: str) -> int:
    command = ["skip-attention", action, "--model", "model", "--data", "data.jsonl", "--out", out, "--limit", "4"]
    return main([*command, "--quiet", *options])


def test_search(place, monkeypatch, capsys):  # noqa: F811
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
        calls = path.stat().st_size
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
        os._exit(skip("search", "skip.json", *SEARCH))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("steps", [0, 2, 6, 9, 12, TOGETHER - 1])
def test_killed_while_all_records_are_looked_at(place, monkeypatch, capsys, forwards, steps):  # noqa: F811
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


def test_damaged_and_discarded_steps(place, monkeypatch, capsys, forwards):  # noqa: F811
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
    assert "run-1-together.jsonl:4: damaged, and so not believed" in said and "and 9 steps of what looks" in said
    assert (place / "skip.json").read_text() == whole

    (place / "skip.json").unlink()
    killed_after(10, monkeypatch)
    assert skip("search", "skip.json", *SEARCH, "--bandit-seed", "1") == 1
    assert "'seed': 0} and is {" in capsys.readouterr().err
    (place / "skip.json").unlink()
    assert skip("search", "skip.json", *SEARCH, "--bandit-seed", "1") == 1
    assert "settings: expected those of the 4 records" in capsys.readouterr().err
    forwards()
    assert skip("search", "skip.json", *SEARCH, "--restart") == 0 and forwards() == wanted
    assert (place / "skip.json").read_text() == whole


def test_train_and_evaluate(place, monkeypatch, capsys):  # noqa: F811
    options = ["--layers", "1,2", "--epochs", "3", "--accumulate", "2", "--held-out", "0.25", "--dim", "2"]
    assert skip("train", "whole", *options) == 0
    adapters = vtw.SkipAdapters.from_pretrained("whole")
    assert adapters.layers == (1, 2) and adapters.settings["training"]["epochs"] == 3
    assert len(adapters.settings["losses"]) == 3 and list(adapters.settings["records"])[0] == "data.jsonl:1"
    assert not (place / "whole.partial").exists()

    save, saved = torch.save, []

    def stop_after_two(state, path):
        save(state, path)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop_after_two)
        assert skip("train", "stopped", *options) == 130
    assert skip("train", "stopped", *options, "--dropout", "0.5") == 1
    assert "training was" in capsys.readouterr().err
    assert skip("train", "stopped", *options) == 0
    again = vtw.SkipAdapters.from_pretrained("stopped")
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), adapters.parameters()))
    (place / "folder").mkdir()
    (place / "folder" / "notes").write_text("mine")
    for wrong, message in (
        (["folder", *options], "out: expected a new folder or that of earlier adapters"),
        (["other"], "layers: expected --layers or --search, got neither"),
        (["other", "--layers", "1;2"], "layers: expected numbers with commas between"),
    ):
        assert skip("train", *wrong) == 1
        assert message in capsys.readouterr().err

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
