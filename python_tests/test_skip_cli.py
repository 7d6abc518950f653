"""``vtw-kernels skip-attention``: records, stops, reports."""

import json

import pytest
import torch
from test_search_cli import after_lines, place, source  # noqa: F401
from vlm import make_model

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.layer_search import run

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
