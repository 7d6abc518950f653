"""``vtw-kernels search``: good and bad records, stopped at any moment, shared among ranks."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_records import RECORDS, SECONDS, TEMPLATE, after_lines, die, in_processes, make_processor
from jinja2 import TemplateError
from transformers import AutoProcessor, LlavaProcessor
from vlm import LAYERS, make_model

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.layer_search import run, state
from vtw_kernels.layer_search.records import BadRecord, Encoder, load_records
from vtw_kernels.layer_search.scorer import Scorer

pytest_plugins = ["command_records"]  # the fixtures place and source


def search(*options: str, out: str = "vtw.json") -> int:
    return main(["search", "--model", "model", "--data", "data.jsonl", "--out", out, "--no-costs", *options])


def whole(place, *options: str) -> str:
    """What a search gives that nothing disturbs."""
    assert search(*options, out="whole.json") == 0
    return (place / "whole.json").read_text()


def edit(place, changes: dict[int, str]) -> None:
    """Other lines in place of those with these numbers."""
    lines = (place / "data.jsonl").read_text().splitlines()
    for number, line in changes.items():
        lines[number - 1] = line
    (place / "data.jsonl").write_text("\n".join(lines) + "\n")


def search_as_ranks(ranks: int, *options: str, **prepare) -> list[int]:
    return in_processes(ranks, partial(search, *options), **prepare)


def test_equals_the_scorer(place, capsys):
    assert search("--metric", "reverse_kl", "--statistic", "max", "--threshold", "100", "--candidates", "3", "1") == 0
    assert "Withdraw before layer 1 of 4" in capsys.readouterr().out
    found = vtw.LayerSearch.load(place / "vtw.json")
    assert (found.candidates, found.layer, found.metric, found.statistic) == ([1, 3], 1, "reverse_kl", "max")
    assert list(found.settings["records"]) == [f"data.jsonl:{number}" for number in range(1, RECORDS + 1)]
    assert found.settings["finished"] and not found.settings["bad"]
    assert not (place / "vtw.json.partial").exists()

    encoder = Encoder(AutoProcessor.from_pretrained("model"))  # resizes with torchvision, where that is installed
    scorer = Scorer(make_model("llava"), candidates=[1, 3])
    for row, record in enumerate(load_records("data.jsonl")):
        scores = scorer.score(encoder(record))
        assert torch.equal(scores.kl[0], found.per_sample[row])
        assert torch.equal(scores.disagreement[0], found.disagreement[row])
        assert scores.tokens[0] == found.tokens[row] and scores.visual_tokens[0] == (4 if row % 3 else 8)


@pytest.mark.parametrize("positions", ["answer", "3"])
def test_more_positions(place, positions):
    last, more = json.loads(whole(place)), json.loads(whole(place, "--positions", positions, "--restart"))
    assert more["positions"] == (positions if positions == "answer" else 3)
    assert more["per_sample"] != last["per_sample"]


def test_labels(place):
    inputs = Encoder(make_processor())(load_records("data.jsonl")[1], with_answer=True)
    labels = inputs["labels"][0]
    assert labels[labels != -100].tolist() == [21, 41, 2]  # the answer and its end
    assert torch.equal(inputs["input_ids"][0, -3:], labels[-3:])
    prompt = Encoder(make_processor())(load_records("data.jsonl")[1])
    assert torch.equal(prompt["input_ids"][0], inputs["input_ids"][0, :-3]) and "labels" not in prompt
    assert inputs["input_ids"][0].tolist().count(1) == 1  # the template begins with what the tokenizer would add


def test_prompt_template(place):
    """The same prompt as the chat template's, so the same scores."""
    edit(place, {1: "", 4: "", 7: "", 10: ""})  # those with two images
    assert search("--prompt-template", "<s> user : <image> {question} assistant :", out="own.json") == 0
    by_chat, own = json.loads(whole(place)), json.loads((place / "own.json").read_text())
    assert own["per_sample"] == by_chat["per_sample"] and len(own["per_sample"]) == 8


BAD = {
    2: '{"image": "photos/1.png", "question": ',
    3: '{"image": "photos/none.png", "question": "w10"}',
    5: '{"image": "photos/1.png"}',
    6: '{"question": "w10"}',
    8: '["photos/1.png", "w10"]',
    9: '{"image": 3, "question": "w10"}',
    11: '{"image": "data.jsonl", "question": "w10"}',  # can be told only by opening it
}
REASONS = {
    2: "expected a JSON object, got Expecting value",
    3: "image: there is no file photos/none.png",
    5: "expected question, messages or conversations, got image",
    6: "expected image, images, video or videos, got question",
    8: "expected a JSON object, got list",
    9: "image: expected the name of a file, got int",
    11: "image: data.jsonl can't be read",
}


def test_bad_records_are_told_before_the_model_is_loaded(place, monkeypatch, capsys):
    edit(place, BAD)
    monkeypatch.setattr(run, "load_model", None)
    assert search() == 1
    error = capsys.readouterr().err
    assert "6 of 12 records are bad" in error and "and 1 more" in error
    for number in (2, 3, 5, 6, 8):
        assert f"data.jsonl:{number}: {REASONS[number]}" in error


def test_skip_bad(place, capsys):
    wanted = json.loads(whole(place))
    edit(place, BAD)
    assert search("--skip-bad") == 0
    found = json.loads((place / "vtw.json").read_text())
    assert list(found["settings"]["bad"]) == [f"data.jsonl:{number}" for number in BAD]
    for number, reason in REASONS.items():
        assert found["settings"]["bad"][f"data.jsonl:{number}"].startswith(reason)
    good = [row for row in range(RECORDS) if row + 1 not in BAD]
    assert list(found["settings"]["records"]) == [f"data.jsonl:{row + 1}" for row in good]
    assert found["per_sample"] == [wanted["per_sample"][row] for row in good]
    assert "7 bad records were skipped: data.jsonl:2: " in capsys.readouterr().err


def test_a_mended_record(place, capsys):
    """The run stops at a bad record; when it is mended, the run goes on, and a changed image is looked at anew."""
    wanted = whole(place)
    (place / "photos").unlink()
    (place / "photos").mkdir()
    for path in (place / "model").resolve().parent.glob("photos/*"):
        (place / "photos" / path.name).write_bytes(path.read_bytes())
    good = [(place / f"photos/{i}.png").read_bytes() for i in (2, 4)]
    (place / "photos/2.png").write_bytes(good[1])
    (place / "photos/4.png").write_bytes(b"\x89PNG broken")
    assert search() == 1
    error = capsys.readouterr().err
    assert "data.jsonl:5: image: photos/4.png can't be read" in error and "what was done is kept" in error
    assert not (place / "vtw.json").exists()
    (place / "photos/2.png").write_bytes(good[0])
    (place / "photos/4.png").write_bytes(good[1])
    assert search() == 0
    assert "3 of 12 records were scored before" in capsys.readouterr().err
    assert (place / "vtw.json").read_text() == wanted


def test_no_visual_token(place, capsys):
    assert search("--prompt-template", "{question} assistant :") == 1
    assert "data.jsonl:1: " in capsys.readouterr().err
    assert search("--prompt-template", "{question} assistant :", "--skip-bad", "--restart") == 1
    assert "expected at least one record that is not bad, got 12 bad ones; data.jsonl:1: " in capsys.readouterr().err


@pytest.mark.parametrize("lines", [0, 1, 7, RECORDS - 1])
def test_killed(place, capfd, lines):
    wanted = whole(place)
    assert search_as_ranks(1, prepare=lambda rank: setattr(run, "append_line", after_lines(lines, die))) == [
        -signal.SIGKILL
    ]
    assert not (place / "vtw.json").exists()
    assert search() == 0
    assert (place / "vtw.json").read_text() == wanted
    assert (f"{lines} of 12 records were scored before" in capfd.readouterr().err) == (lines > 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped(place, monkeypatch, capsys, number):
    wanted, handler = whole(place), signal.getsignal(number)

    def stop(file, line):
        os.kill(os.getpid(), number)
        state.append_line(file, line)

    with monkeypatch.context() as patched:
        patched.setattr(run, "append_line", after_lines(4, stop))
        assert search() == 128 + number
    assert "5 of 12 records" in capsys.readouterr().err
    partial, complete = vtw.LayerSearch.load(place / "vtw.json"), vtw.LayerSearch.load(place / "whole.json")
    assert torch.equal(partial.per_sample, complete.per_sample[:5]) and not partial.settings["finished"]
    assert signal.getsignal(number) is handler
    assert search("--threshold", "0.003") == 0
    assert (place / "vtw.json").read_text() == wanted


def test_other_settings(place, monkeypatch, capsys):
    def interrupt(file, line):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "append_line", after_lines(3, interrupt))
        assert search() == 130
    assert search("--dtype", "bfloat16") == 1
    error = capsys.readouterr().err
    assert "dtype was 'auto' and is 'bfloat16'" in error and "the 3 records" in error and "--restart" in error
    assert search("--dtype", "bfloat16", "--restart") == 0
    assert "were scored before" not in capsys.readouterr().err
    assert json.loads((place / "vtw.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_two_at_once(place, capsys):
    with state.State(place / "vtw.json.partial").open({}, restart=False):
        assert search() == 1
    assert "another run is at work in vtw.json.partial" in capsys.readouterr().err


ranks = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch.distributed without gloo")


@ranks
def test_ranks(place):
    edit(place, {5: BAD[3]})
    wanted = whole(place, "--skip-bad")
    assert search_as_ranks(4, "--skip-bad") == [0] * 4
    assert (place / "vtw.json").read_text() == wanted


@ranks
def test_torchrun(place):
    wanted = whole(place)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "vtw_kernels", "search"]
    options = ["--model", "model", "--data", "data.jsonl", "--no-costs"]
    subprocess.run([*command, *options], check=True, timeout=SECONDS, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (place / "vtw.json").read_text() == wanted


@ranks
def test_a_dead_rank(place, capfd):
    """What it left is said, and done by the next run, with another number of ranks."""
    wanted = whole(place)

    def prepare(rank):
        run.STALLED_SECONDS = 1
        if rank == 1:
            run.append_line = after_lines(2, die)

    assert search_as_ranks(2, prepare=prepare) == [1, -signal.SIGKILL]
    assert "4 records are missing" in capfd.readouterr().err
    assert search() == 0
    error = capfd.readouterr().err
    assert "8 of 12 records were scored before" in error
    assert "rank 1 of the last run left 4: data.jsonl:6, data.jsonl:8, data.jsonl:10, ..." in error
    assert (place / "vtw.json").read_text() == wanted


@ranks
def test_tensor_parallel(place):
    wanted = json.loads(whole(place))
    assert search_as_ranks(2, "--tp") == [0, 0]
    found = json.loads((place / "vtw.json").read_text())
    torch.testing.assert_close(torch.tensor(found["per_sample"]), torch.tensor(wanted["per_sample"]), atol=1e-5, rtol=0)
    assert found["settings"]["tensor_parallel"] == 2


def slow_to_read(key: str):
    def prepare(rank):
        if rank == 1:
            agree = run.Ranks.agree

            def slow(self, what, decide, readers):
                time.sleep(3 if what == key else 0)
                return agree(self, what, decide, readers)

            run.Ranks.agree = slow

    return prepare


@ranks
def test_a_rank_that_is_slow_to_read(place, capfd):
    """The first rank, which keeps what all read, stays until the others have read it: whether it has nothing to score,
    fails, or has a model together with them."""
    assert search("--limit", "2") == 0
    assert search_as_ranks(2, "--limit", "2", prepare=slow_to_read("plan")) == [0, 0]
    assert search_as_ranks(2, "--limit", "1", prepare=slow_to_read("plan")) == [1, 1]
    assert search_as_ranks(2, "--limit", "2", "--tp", "--restart", prepare=slow_to_read("chosen")) == [0, 0]
    error = capfd.readouterr().err
    assert "1 records that are no longer asked for" in error and "Error" not in error


@ranks
def test_tensor_parallel_stops(place):
    """A signal to one rank stops all at the same record."""

    def prepare(rank):
        if rank == 1:
            score = run.score

            def signalled(records, index, *arguments):
                if index == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return score(records, index, *arguments)

            run.score = signalled

    assert search_as_ranks(2, "--tp", prepare=prepare) == [128 + signal.SIGTERM] * 2
    partial = json.loads((place / "vtw.json").read_text())
    assert len(partial["per_sample"]) == 4 and not partial["settings"]["finished"]


def test_device_map(place):
    wanted = json.loads(whole(place))
    assert search("--device-map", "auto") == 0
    assert json.loads((place / "vtw.json").read_text())["per_sample"] == wanted["per_sample"]


def test_report_and_costs(place):
    options = ["--model", "model", "--data", "data.jsonl", "--report", "made/report.html"]
    assert main(["search", *options]) == 0
    found = vtw.LayerSearch.load(place / "vtw.json")
    assert found.costs.layers == [1, 2, 3, LAYERS] and found.costs.tokens in found.tokens.tolist()
    page = (place / "made/report.html").read_text()
    worst = load_records("data.jsonl")[int(found.by_sample()[:, found.values().argmin()].argmax())]
    assert worst.question in page and "vtw-kernels search --model model" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "js"], "metric: expected one of kl"),
        (["--statistic", "median"], "statistic: expected one of mean"),
        (["--threshold", "-1"], "threshold: expected a number of at least 0, got -1"),
        (["--positions", "first"], "positions: expected 'last', 'answer' or a number"),
        (["--candidates", "4"], "candidates: expected layers in 1..3, got"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--images", "nowhere"], "images: expected a folder, got nowhere"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--model", "photos"], "photos"),
        (["--out", "photos"], "out: expected a file, got the folder photos"),
        (["--device", "gpu"], "device: expected one of torch, such as cpu or cuda:1, got gpu"),
        (["--dtype", "fp16"], "dtype: expected auto or one of torch, such as bfloat16, got fp16"),
        (["--attention", "quick"], "quick"),
        (["--tp"], "tp: expected torchrun with several ranks"),
        (["--prompt-template", "<image>"], "prompt_template: expected {question} in it"),
    ],
)
def test_bad_options(place, capsys, options, message):
    assert search(*options) == 1
    assert message in capsys.readouterr().err
    assert not (place / "vtw.json").exists()


def test_no_chat_template():
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="prompt_template: expected one, as LlavaProcessor has no chat template"):
        Encoder(processor)
    with pytest.raises(ValueError, match="expected a processor of images"):
        Encoder(processor.tokenizer)


def test_lines_as_they_were_written(place, capsys):
    path, lines = place / "lines.jsonl", [{"name": "a", "kl": [0.1, 1e-30]}, {"name": "b", "bad": "it"}]
    with path.open("ab") as file:
        for line in lines:
            state.append_line(file, line)
    assert state.read_lines(path) == lines
    path.write_bytes(path.read_bytes()[:-3])
    assert state.read_lines(path) == lines[:1]
    assert not capsys.readouterr().err


def test_video(place):
    """A file is the processor's to decode, and frames are images of one video; nothing is decoded here."""
    (place / "clip.mp4").write_bytes(b"1")
    lines = [{"video": "clip.mp4", "question": "w10"}, {"video": ["photos/0.png", "photos/1.png"], "question": "w10"}]
    (place / "video.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = []

    class Processor(LlavaProcessor):
        def __call__(self, **options):
            given.append(options)
            return {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    processor = make_processor()
    template = TEMPLATE.replace("'<image> ' if", "'<video> ' if part.type == 'video' else '<image> ' if")
    encoder = Encoder(Processor(processor.image_processor, processor.tokenizer, chat_template=template))
    records = load_records("video.jsonl")
    for record in records:
        encoder(record)
    (file,), (frames,) = (options["videos"] for options in given)
    assert file == "clip.mp4" and [frame.size for frame in frames] == [(16, 12)] * 2
    assert [options.get("do_sample_frames") for options in given] == [None, False]
    assert all("images" not in options and options["text"].count("<video>") == 1 for options in given)
    assert records[0].digest() != records[1].digest()


def test_data_set(place):
    """Of the package datasets, where it is installed: here a folder of images with a list of questions."""
    pytest.importorskip("datasets")
    lines = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "image" in line]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "set").mkdir()
    with (place / "set/metadata.jsonl").open("w") as file:
        for line in lines:
            name = line.pop("image").removeprefix("photos/")
            (place / "set" / name).write_bytes((place / "photos" / name).read_bytes())
            file.write(json.dumps({"file_name": name} | line) + "\n")
    wanted = json.loads(whole(place))
    assert search("--data", "set") == 0
    found = json.loads((place / "vtw.json").read_text())
    assert found["per_sample"] == wanted["per_sample"]
    assert list(found["settings"]["records"]) == [f"set[train]:{row}" for row in range(len(lines))]


def test_without_datasets(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert search("--data", "org/questions") == 1
    assert "the package datasets installed, got org/questions" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what is there already, and whose it is


def test_the_choice_is_made_anew(place, monkeypatch, capsys):
    """Of a finished search, by the same command: without a model, and with a report if one is asked for."""
    wanted = json.loads(whole(place))
    assert search() == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(run, "load_model", None)
        options = ["--threshold", "100", "--statistic", "max", "--metric", "reverse_kl"]
        assert search(*options) == 0
        said = capsys.readouterr()
        assert "vtw.json: 12 of 12 records were scored before; the model is not run" in said.err
        assert "Withdraw before layer 1 of 4" in said.out and "threshold 100 on the maximum" in said.out
    chosen = json.loads((place / "vtw.json").read_text())
    assert (chosen["layer"], chosen["statistic"], chosen["per_sample"]) == (1, "max", wanted["per_sample"])
    assert not (place / "vtw.json.partial").exists()

    command = ["search", "--model", "model", "--data", "data.jsonl", "--report", "page.html"]
    assert main(command) == 0  # measures costs and attention
    measured = vtw.LayerSearch.load(place / "vtw.json")
    assert measured.costs is not None and measured.attention.shape == (LAYERS, 3)
    page = (place / "page.html").read_text()
    monkeypatch.setattr(run, "load_model", None)
    assert main(command) == 0
    again = vtw.LayerSearch.load(place / "vtw.json")
    assert again.costs == measured.costs and torch.equal(again.attention, measured.attention)
    assert (place / "page.html").read_text() == page


def test_more_records(place, monkeypatch, capsys):
    """Only what is new is scored; the result is as of one go."""
    wanted, scored = whole(place), []
    original = run.score
    monkeypatch.setattr(run, "score", lambda records, i, *rest: scored.append(i) or original(records, i, *rest))
    assert search("--limit", "5") == 0
    assert search() == 0
    assert scored == list(range(RECORDS)) and "5 of 12 records were scored before" in capsys.readouterr().err
    assert (place / "vtw.json").read_text() == wanted


def test_a_record_that_changes_while_the_search_is_stopped(place, monkeypatch, capsys):
    """Its score is not that of the record any more; those of the others are."""

    def stop(file, line):
        os.kill(os.getpid(), signal.SIGINT)
        state.append_line(file, line)

    with monkeypatch.context() as patched:
        patched.setattr(run, "append_line", after_lines(4, stop))
        assert search() == 128 + signal.SIGINT
    edit(place, {2: json.dumps({"image": "photos/1.png", "question": "w11 w12"})})
    wanted = whole(place)
    assert search() == 0
    assert "vtw.json: 4 of 12 records were scored before" in capsys.readouterr().err
    assert (place / "vtw.json").read_text() == wanted


def test_nan_in_a_result_is_scored_anew(place, capsys):
    wanted = whole(place)
    broken = vtw.LayerSearch.load(place / "whole.json")
    broken.per_sample[3, 1] = torch.nan
    broken.save(place / "vtw.json")
    assert search() == 0
    assert "11 of 12 records were scored before" in capsys.readouterr().err
    assert (place / "vtw.json").read_text() == wanted


def test_another_searchs_result_is_kept(place, capsys):
    assert search() == 0
    before = (place / "vtw.json").read_bytes()
    for options, message in (
        (["--positions", "3"], "of another one: positions was 'last' and is 3 (--restart"),
        (
            ["--limit", "5"],
            "also of 7 records that are no longer asked for, or have changed: data.jsonl:6, data.jsonl:7",
        ),
    ):
        assert search(*options) == 1
        assert message in capsys.readouterr().err
        assert (place / "vtw.json").read_bytes() == before and not (place / "vtw.json.partial").exists()
    assert search("--limit", "5", "--restart") == 0
    assert len(json.loads((place / "vtw.json").read_text())["per_sample"]) == 5
    # Of find_layer, say.
    settings = {"model": "model"}
    replace(vtw.LayerSearch.load(place / "vtw.json"), settings=settings).save(place / "vtw.json")
    before = (place / "vtw.json").read_bytes()
    assert search() == 1
    assert "which is of another one: it does not say of which records it is" in capsys.readouterr().err
    assert (place / "vtw.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "data.jsonl"], "out: expected another file than that of data, got data.jsonl"),
        (["--out", "sub/../data.jsonl"], "out: expected another file than that of data"),
        (["--out", "link.jsonl"], "out: expected another file than that of data, got link.jsonl"),
        (["--report", "data.jsonl"], "report: expected another file than that of data, got data.jsonl"),
        (["--out", "new.json", "--report", "new.json"], "report: expected another file than that of out, got new.json"),
        (["--out", "notes.json"], "out: expected a new file or an earlier result, got something else: notes.json"),
        (["--out", "model/config.json"], "out: expected a new file or an earlier result, got something else"),
        (["--report", "notes.json"], "report: expected a new file or an earlier report, got something else in notes"),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_nothing_else_is_overwritten(place, monkeypatch, capsys, options, message, restart):
    (place / "sub").mkdir()
    os.link(place / "data.jsonl", place / "link.jsonl")
    (place / "notes.json").write_text('{"layer": 3}')
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    monkeypatch.setattr(run, "load_model", None)
    assert search(*options, *["--restart"] * restart) == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_an_empty_file_is_a_new_one(place):
    for name in ("vtw.json", "page.html"):
        (place / name).touch()
    assert search("--report", "page.html") == 0
    assert vtw.LayerSearch.load(place / "vtw.json") and "<svg" in (place / "page.html").read_text()


def test_strays_in_the_state(place, capsys):
    """What a search has not made is left alone, and does not fail it; what it has made and left is removed."""
    folder = place / "vtw.json.partial"
    (folder / "run-7.json").mkdir(parents=True)
    (folder / "run-notes.txt").write_text("mine")
    (folder / "settings.json.part").write_text("{")
    (folder / "run-2.json.part").write_text("{")
    assert search() == 0
    assert "vtw.json.partial: kept, as there are files of something else in it" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"run-7.json", "run-notes.txt"}
    assert search() == 0 and (folder / "run-notes.txt").read_text() == "mine"


DAMAGE = {
    "another number": lambda text: text.replace('"kl": [', '"kl": [1'),
    "fewer numbers": lambda text: json.dumps(json.loads(text) | {"kl": [0.0]}),
    "NaN": lambda text: json.dumps(json.loads(text) | {"kl": [float("nan")] * (LAYERS - 1)}),
    "no scores": lambda text: json.dumps({"name": "data.jsonl:2", "record": json.loads(text)["record"]}),
    "a list": lambda text: "[]",
    "a number": lambda text: "3",
    "no JSON": lambda text: text[:30],
    "deep": lambda text: "[" * 100_000,
    "no UTF-8": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_scored_anew(place, monkeypatch, capsys, damage):
    def interrupt(file, line):
        raise KeyboardInterrupt

    wanted = whole(place)
    with monkeypatch.context() as patched:
        patched.setattr(run, "append_line", after_lines(3, interrupt))
        assert search() == 130
    path = place / "vtw.json.partial/run-1-rank-0.jsonl"
    first, second, third, _ = path.read_text().split("\n")
    lines = "\n".join([first, damage(second), third, ""])
    path.write_bytes(lines.encode(errors="surrogateescape"))
    (place / "vtw.json.partial/run-1.json").write_text("[3]\n")
    assert search() == 0
    error = capsys.readouterr().err
    assert f"{path.relative_to(place)}:2: damaged, and ignored" in error
    assert "run-1.json:1: damaged" in error and "2 of 12 records were scored before" in error
    assert (place / "vtw.json").read_text() == wanted


@pytest.mark.parametrize("settings", ["", "[]", None])
def test_lines_without_their_settings(place, monkeypatch, capsys, settings):
    def interrupt(file, line):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "append_line", after_lines(3, interrupt))
        assert search() == 130
    path = place / "vtw.json.partial/settings.json"
    path.unlink() if settings is None else path.write_text(settings)
    assert search() == 1
    error = capsys.readouterr().err
    assert "settings" in error and "--restart discards" in error
    assert search("--restart") == 0


# --------------------------------------------------------------------------------------- what a record may be and do


def uri(path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def as_messages(fields, place):
    image = {"type": "image_url", "image_url": {"url": uri(place / fields["image"])}}
    asked = {"role": "user", "content": [image, {"type": "text", "text": fields["question"]}]}
    return {"messages": [asked, {"role": "assistant", "content": fields["answer"]}]}


def as_conversations(fields, place):
    asked, said = (
        {"from": "human", "value": "<image>\n" + fields["question"]},
        {"from": "gpt", "value": fields["answer"]},
    )
    return {"id": "1", "image": fields["image"], "conversations": [asked, said]}


SHAPES = {
    "messages": as_messages,
    "conversations": as_conversations,
    "a file URI": lambda fields, place: fields | {"image": (place / fields["image"]).as_uri()},
    "a data URI": lambda fields, place: fields | {"image": uri(place / fields["image"])},
    "placeholders": lambda fields, place: {
        "images": [fields["image"]],
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": fields["question"]}]}],
        "answer": fields["answer"],
    },
    "no placeholder": lambda fields, place: (
        as_conversations(fields, place)
        | {"conversations": [{"role": "user", "content": fields["question"]}], "answer": fields["answer"]}
    ),
}


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_records_as_people_have_them(place, shape, array):
    """The same question, image and answer, so the same inputs, in every shape."""
    usual = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    usual = [fields for fields in usual if "image" in fields]
    others = [shape(fields, place) for fields in usual]
    (place / "usual.jsonl").write_text("\n".join(map(json.dumps, usual)))
    text = "\ufeff" + json.dumps(others, indent=2) if array else "\n".join(map(json.dumps, others))
    (place / "others.json").write_text(text)
    encoder = Encoder(make_processor())
    records = load_records("others.json")
    assert [records.name(i) for i in (0, 1)] == (
        ["others.json[0]", "others.json[1]"] if array else ["others.json:1", "others.json:2"]
    )
    assert len(records) == len(usual)
    for record, other in zip(load_records("usual.jsonl"), records):
        assert (other.question, other.answer, other.digest()) == (record.question, record.answer, record.digest())
        assert other.image_bytes() == record.image_bytes()
        for with_answer in (False, True):
            inputs, wanted = (encoder(x, with_answer) for x in (other, record))
            assert inputs.keys() == wanted.keys() and all(torch.equal(inputs[name], wanted[name]) for name in wanted)


def test_several_turns(place):
    """The last question counts, the rest is context; images stay where they were shown."""
    said = [
        {"role": "system", "content": "w10"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w11"}]},
        {"role": "assistant", "content": "w12"},
        {"role": "user", "content": "w13 <image> w14"},
        {"role": "assistant", "content": "w15"},
    ]
    (place / "chat.jsonl").write_text(json.dumps({"messages": said, "images": ["photos/1.png", "photos/2.png"]}))
    (record,) = load_records("chat.jsonl")
    assert (record.question, record.answer) == ("w13\nw14", "w15")
    assert [path.name for path in record.images] == ["1.png", "2.png"]
    encoder = Encoder(make_processor())
    tokens = encoder.processor.tokenizer.convert_ids_to_tokens(encoder(record)["input_ids"][0])
    image = "<image> " * 4
    wanted = f"<s> w10 w10 user : {image}w11 assistant : w12 </s> user : w13 {image}w14 assistant :"
    assert tokens == wanted.replace("w10 w10", "<unk> : w10").split()  # "system" is no word of this tokenizer
    labels = encoder(record, with_answer=True)["labels"][0]
    assert labels[labels != -100].tolist() == [15, 2]
    assert record._replace(chat=record.chat[1:]).digest() != record.digest()
    with pytest.raises(BadRecord, match="no place for what was said before it, got 4 turns"):
        Encoder(make_processor(), "<image> {question}")(record)


def test_videos_in_chats(place):
    """LLaVA's data say <image> where a video is to stand."""
    (place / "clip.mp4").write_bytes(b"1")
    turn = {"from": "human", "value": "<image>\nw10"}
    lines = [
        {"video": "clip.mp4", "conversations": [turn]},
        {"videos": ["clip.mp4"], "messages": [{"role": "user", "content": "<video> w10"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "w10"}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "clip.mp4"}}, "w10"]}]},
        {"video": "clip.mp4", "question": "w10"},
    ]
    (place / "video.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = list(load_records("video.jsonl"))
    assert len({record.digest() for record in records}) == 1 and records[0].videos == [Path("clip.mp4")]
    assert all([part["type"] for part in record.chat[0]["content"]] == ["video", "text"] for record in records)


ASKED = {"role": "user", "content": "w10"}
PHOTO = "photos/1.png"
UNUSABLE = {
    "http": (
        {"image": "https://example.com/cat.png", "question": "w10"},
        "got https://example.com/cat.png: download it first",
    ),
    "s3": (
        {"image": "s3://bucket/cat.png", "question": "w10"},
        "expected a file, or its file:// or data: URI, got s3://",
    ),
    "another host": ({"image": "file://host/cat.png", "question": "w10"}, "got file://host/cat.png"),
    "lost file": ({"image": "file:///nowhere/cat.png", "question": "w10"}, "image: there is no file /nowhere/cat.png"),
    "bare base64": ({"image": "iVBORw0KGgo" * 1000, "question": "w10"}, "... (11000 characters)"),
    "broken data": ({"image": "data:image/png;base64,x" + "A" * 5000, "question": "w10"}, "can't be decoded"),
    "no image in data": (
        {"image": "data:image/png;base64,AAAA" + "AAAA" * 5000, "question": "w10"},
        "bytes can't be read",
    ),
    "both": ({"image": PHOTO, "question": "w10", "messages": [ASKED]}, "got question and messages"),
    "two answers": (
        {"image": PHOTO, "messages": [ASKED, {"role": "assistant", "content": "w11"}], "answer": "w12"},
        "answer: expected one, got another one at the end of messages",
    ),
    "no question": (
        {"image": PHOTO, "messages": [{"role": "system", "content": "w10"}]},
        "expected a question of the user's",
    ),
    "no turns": ({"image": PHOTO, "messages": []}, "messages: expected a list of what was said, got []"),
    "no object": ({"image": PHOTO, "messages": ["w10"]}, "messages: expected JSON objects, got str"),
    "role": ({"image": PHOTO, "messages": [{"role": "tool", "content": "w10"}]}, "expected a role of user, human"),
    "role of no kind": (
        {"image": PHOTO, "messages": [{"role": ["user"], "content": "w10"}]},
        "data.jsonl:3: can't be read",
    ),
    "no address": ({"image": "http://[::1/cat.png", "question": "w10"}, "data.jsonl:3: can't be read: ValueError"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages: expected parts of type text"),
    "too few images": ({"image": PHOTO, "question": "<image> <image> w10"}, "image: expected one for each place in"),
    "too many": (
        {"images": [PHOTO] * 3, "question": "<image> w10"},
        "image: expected 1, as there are places in question, got 3",
    ),
    "surrogate": ({"image": PHOTO, "question": "w10 \ud800"}, "question: expected text, got half of a surrogate pair"),
    "odd name": ({"image": "photos/\ud800.png", "question": "w10"}, "image: there is no file photos/\\ud800.png"),
    "null": ({"image": "photos/\0.png", "question": "w10"}, "image: there is no file"),
    "text": ({"image": PHOTO, "question": 3}, "question: expected text, got 3"),
    "answer with images": (
        {"image": PHOTO, "conversations": [ASKED, {"from": "gpt", "value": "<image> w10"}]},
        "conversations: expected an answer of text",
    ),
}


@pytest.mark.parametrize(("fields", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_records(place, capsys, fields, message):
    """Each is named in a line, and a search goes on without it."""
    edit(place, {3: json.dumps(fields)})
    assert search() == 1
    error = capsys.readouterr().err
    assert "data.jsonl:3: " in error and message in error and "Traceback" not in error
    assert max(map(len, error.splitlines())) < 600
    assert search("--skip-bad", "--report", "page.html") == 0
    found = json.loads((place / "vtw.json").read_text())
    assert list(found["settings"]["bad"]) == ["data.jsonl:3"] and len(found["per_sample"]) == RECORDS - 1
    assert message.removeprefix("data.jsonl:3: ") in found["settings"]["bad"]["data.jsonl:3"]
    assert "11 samples, 1 bad record skipped" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 50_000, '{"question": "\udcff"}', "9" * 5000, "null"])
def test_unusable_lines(place, capsys, line):
    edit(place, {3: line.encode(errors="surrogateescape").decode("latin-1")})
    assert search("--skip-bad") == 0
    assert "1 bad records were skipped: data.jsonl:3: expected" in capsys.readouterr().err


def test_an_array_that_is_none(place, capsys):
    (place / "data.jsonl").write_text('[\n{"image": "photos/1.png"},\n{"question"')
    assert search() == 1
    assert "data: expected a JSON array, or one JSON object a line, got Expecting" in capsys.readouterr().err


class Fails:
    """In place of a function, that raises at one of its calls."""

    def __init__(self, function, call, error):
        self.function, self.calls, self.call, self.error = function, 0, call, error

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return self.function(*args, **kwargs)


ERRORS = {
    "template": (
        LlavaProcessor,
        "apply_chat_template",
        TemplateError("roles must alternate"),
        "--prompt-template takes",
    ),
    "processor": (LlavaProcessor, "__call__", IndexError("no frames"), "IndexError: no frames"),
    "memory": (Scorer, "score", torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
    "host": (Scorer, "score", MemoryError(), "MemoryError"),
    "long": (Scorer, "score", RuntimeError("long " * 1000), "RuntimeError: long"),
}


@pytest.mark.parametrize(("place_of", "name", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_whatever_a_record_does(place, monkeypatch, capsys, place_of, name, error, message):
    for skip in (False, True):
        failing = Fails(getattr(place_of, name), 3, error)
        with monkeypatch.context() as patched:
            patched.setattr(place_of, name, lambda self, *args, **kwargs: failing(self, *args, **kwargs))
            assert search("--restart", *["--skip-bad"] * skip) == (0 if skip else 1)
        said = capsys.readouterr().err
        assert "data.jsonl:3: " in said and message in said and max(map(len, said.splitlines())) < 800
    found = json.loads((place / "vtw.json").read_text())
    assert list(found["settings"]["bad"]) == ["data.jsonl:3"] and len(found["per_sample"]) == RECORDS - 1


def test_a_device_that_has_failed_for_good(place, monkeypatch, capsys):
    """Then no record after it can be scored: they are not skipped as well."""
    monkeypatch.setattr(run, "still_works", lambda device: False)
    failing = Fails(Scorer.score, 3, RuntimeError("device-side assert"))
    monkeypatch.setattr(Scorer, "score", lambda self, batch: failing(self, batch))
    assert search("--skip-bad") == 1
    assert "data.jsonl:3: RuntimeError: device-side assert; what was done is kept" in capsys.readouterr().err
    assert not (place / "vtw.json").exists()


def test_nan_logits_of_one_record(place, monkeypatch, capsys):
    def with_nan(self, batch):
        if len(calls) == 2:
            self.model.lm_head.weight.data[3] = torch.nan
        calls.append(1)
        return original(self, batch)

    calls, original = [], Scorer.score
    monkeypatch.setattr(Scorer, "score", with_nan)
    assert search() == 1
    assert "data.jsonl:3: model: expected logits that are numbers, got NaN in row 0" in capsys.readouterr().err


def test_a_seeded_sample(place, capsys):
    assert search("--limit", "5", "--seed", "1", "--quiet") == 0
    said = capsys.readouterr()
    assert not said.out and "records/s" not in said.err and "%|" not in said.err
    found = json.loads((place / "vtw.json").read_text())
    drawn = [int(name.removeprefix("data.jsonl:")) for name in found["settings"]["records"]]
    assert len(set(drawn)) == 5 and drawn == sorted(drawn) and drawn != [1, 2, 3, 4, 5]
    names = {
        seed: [records.name(i) for i in range(5)]
        for seed in range(20)
        for records in [load_records("data.jsonl", limit=5, seed=seed)]
    }
    assert names[1] == list(found["settings"]["records"]) and len(set(map(tuple, names.values()))) > 10
    every = load_records("data.jsonl", limit=50, seed=1)
    assert [every.name(i) for i in range(len(every))] == [f"data.jsonl:{i + 1}" for i in range(RECORDS)]
    assert search("--seed", "1") == 1
    assert "seed: expected a limit with it" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta"])
def test_a_device_that_is_not_here(place, monkeypatch, capsys, device):
    monkeypatch.setattr(run, "load_model", None)
    assert search("--device", device) == 1
    assert f"device: expected one that torch {torch.__version__} finds here, cpu" in capsys.readouterr().err
