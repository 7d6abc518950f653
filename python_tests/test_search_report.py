"""The report of a layer search: what it says is what the search found, and the file needs no other."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from vtw_kernels import LayerSearch
from vtw_kernels.cli import main
from vtw_kernels.layer_search.costs import LayerCosts
from vtw_kernels.layer_search.report import Sample, write_report

PAPER = "https://arxiv.org/abs/2405.05803"
LAYERS, CANDIDATES = 6, [1, 2, 3, 5]
VOID = {"meta", "img", "br", "path", "use"}
EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)"> '"{{ 7 * 7 }}&amp;"""


class Page(HTMLParser):
    """Text, attributes and tables of a page; every tag must be closed, in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.rows, self.texts = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make_search(samples: int = 5, **changes) -> LayerSearch:
    generator = torch.Generator().manual_seed(0)
    kl = 10.0 ** -torch.arange(1, 5) * (0.5 + torch.rand(samples, 4, generator=generator))
    disagreement = (kl * 5).clamp(max=1)
    costs = LayerCosts(
        layers=[*CANDIDATES, LAYERS],
        tokens=661,
        visual_tokens=576,
        flops=[int(x * 1e12) for x in (2, 3, 4, 6, 7)],
        kv_bytes=[int(x * 1e6) for x in (20, 30, 40, 60, 70)],
        prefill_seconds=[0.2, 0.3, 0.45, 0.6, 0.8],
        prefill_iqr=[0.01, 0.02, 0.03, 0.04, 0.05],
        timed_layers=[1, 5, 6],
        device="a made-up machine",
    )
    tokens = torch.full((samples,), 100), torch.full((samples,), 80)
    search = LayerSearch("Model", LAYERS, CANDIDATES, kl, kl * 2, disagreement, *tokens, costs=costs)
    return replace(search, **changes)


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 200).save(file, "PNG")
    return file.getvalue()


def report(tmp_path, *arguments, **options) -> Page:
    write_report(tmp_path / "report.html", *arguments, **options)
    return Page(tmp_path / "report.html")


@pytest.fixture
def attention():
    return torch.rand(LAYERS, 3, generator=torch.Generator().manual_seed(0)).softmax(1)


def test_needs_no_other_file(tmp_path, attention):
    samples = [Sample("Why?", [png(), png(2000, 1000, "L")], "so", i) for i in range(5)]
    page = report(tmp_path, make_search(attention=attention), samples=samples, command="vtw-kernels search")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")) or (tag, value) == ("a", PAPER)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    html = (tmp_path / "report.html").read_text()
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)|url\(#([^)]+)', html)
    assert targets and {a or b for a, b in targets} <= set(ids)
    assert len(page.all("svg")) == 5
    written = {path.name: path.read_bytes()[:4] for path in tmp_path.glob("*.png")}
    names = ("divergence", "agreement", "choice", "attention", "savings")
    assert written == {f"report-{name}.png": b"\x89PNG" for name in names}


def test_numbers_are_those_of_the_search(tmp_path, attention):
    search = make_search(6)
    assert search.layer == 3
    page = report(tmp_path, replace(search, attention=attention))
    names, *rows = page.rows[: len(CANDIDATES) + 2]
    table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    low, high = search.interval()
    assert table.pop("layer") == ["1", "2", "3", "5", "6 (none)"]
    assert table.pop("95 % interval") == [f"{a:.3g} to {b:.3g}" for a, b in zip(low, high)] + [""]
    for name, values, form in (
        ("mean of KL(withdrawn‖full), nats", search.per_sample.mean(0), "{:.3g}"),
        ("worst tenth", search.per_sample.amax(0), "{:.3g}"),
        ("largest", search.per_sample.amax(0), "{:.3g}"),
        ("mean reverse KL", search.per_sample_reverse.mean(0), "{:.3g}"),
        ("other top token", search.disagreement.mean(0), "{:.1%}"),
        ("rows saved", 0.8 * (1 - torch.tensor(CANDIDATES) / LAYERS), "{:.0%}"),
    ):
        assert table.pop(name) == [form.format(x) for x in values.tolist()] + [""], name
    assert table.pop("FLOPs") == ["2.0 TFLOP", "3.0 TFLOP", "4.0 TFLOP", "6.0 TFLOP", "7.0 TFLOP"]
    assert table.pop("KV cache") == ["20.0 MB", "30.0 MB", "40.0 MB", "60.0 MB", "70.0 MB"]
    assert table.pop("prefill") == ["200.0 ms", "300.0 ms", "450.0 ms", "600.0 ms", "800.0 ms"]
    assert table.pop("its IQR") == ["10.0 ms", "20.0 ms", "30.0 ms", "40.0 ms", "50.0 ms"]
    assert not table
    assert [attributes.get("class") for attributes in page.all("tr")[1:6]] == [None, None, "chosen", None, None]
    assert search.verdict() in page.text
    for saved in ("rows of all layers −40% mean: 80 of 100 tokens visual", "−43% 7.0 TFLOP → 4.0 TFLOP"):
        assert saved in page.text
    for saved in ("KV cache −43% 70.0 MB → 40.0 MB", "prefill time −44% 800.0 ms → 450.0 ms"):
        assert saved in page.text
    assert "measured at the marked layers (1, 5, 6; 6 is no withdrawal), in turns" in page.text


@pytest.mark.parametrize(
    ("apart", "said"), [(0.13, "−16% 800.0 ms → 670.0 ms"), (0.12, "none 800.0 ms → 680.0 ms: within")]
)
def test_a_difference_within_the_spread_is_none(tmp_path, apart, said):
    """The spreads combine to hypot(0.05, 0.12) = 0.13 s; to be more than that, it takes a little more."""
    search = make_search()
    seconds, iqr = [0.2, 0.3, 0.8 - apart - 1e-6, 0.6, 0.8], [0.01, 0.02, 0.12, 0.04, 0.05]
    costs = replace(search.costs, prefill_seconds=seconds, prefill_iqr=iqr)
    assert costs.differ(3) == (apart == 0.13) and costs.differ(1)
    assert said in report(tmp_path, replace(search, costs=costs)).text


def test_what_was_skipped_stands_at_the_top(tmp_path):
    settings = {"bad": {"photos.jsonl:3": "no image", "photos.jsonl:5": "no question"}, "finished": False}
    page = report(tmp_path, make_search(settings=settings))
    top, _ = page.text.split("Layer by layer")
    assert "(5 samples so far, 2 bad records skipped, threshold 0.003 on" in top
    assert ["bad", "photos.jsonl:3: no image, photos.jsonl:5: no question"] in page.rows


def test_samples_are_named_by_file_and_line(tmp_path):
    records = {f"photos.jsonl:{line}": "digest" for line in (2, 3, 5, 8, 13)}
    page = report(tmp_path, make_search(settings={"records": records}))
    assert set(re.findall(r"(photos.jsonl:\d+): \S+ at layer 3", page.text)) == set(records)
    assert ["records", ", ".join(records)] in page.rows and "digest" not in page.text


def test_from_a_saved_search(tmp_path, attention, capsys):
    search = make_search(attention=attention, settings={"records": {f"photos.jsonl:{i}": "" for i in range(5)}})
    search.save(tmp_path / "vtw.json")
    search.report(tmp_path / "direct.html")
    assert main(["report", str(tmp_path / "vtw.json")]) == 0
    assert str(tmp_path / "vtw.html") in capsys.readouterr().out
    assert (tmp_path / "vtw.html").read_text() == (tmp_path / "direct.html").read_text()
    page = Page(tmp_path / "vtw.html")
    assert len(page.all("svg")) == 5 and "photos.jsonl:1: " in page.text
    assert main(["report", str(tmp_path / "vtw.json")]) == 0  # over the page of before
    (tmp_path / "notes.html").write_text("<title>mine</title>")
    assert main(["report", str(tmp_path / "vtw.json"), "--out", str(tmp_path / "notes.html")]) == 1
    assert "out: expected a new file or an earlier report, got something else in" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "<title>mine</title>"
    (tmp_path / "other.json").write_text("{")
    assert main(["report", str(tmp_path / "other.json")]) == 1
    assert "other.json: expected what LayerSearch.save wrote, got Expecting" in capsys.readouterr().err


def test_every_criterion_has_its_column(tmp_path):
    for metric, statistic in (("reverse_kl", "max"), ("disagreement", "worst_decile"), ("kl", "max")):
        search = make_search(metric=metric, statistic=statistic)
        page = report(tmp_path, search)
        assert page.rows[0][1] == search.criterion and len(set(page.rows[0])) == len(page.rows[0])
        assert [row[1] for row in page.rows[1:5]] == [f"{x:.3g}" for x in search.values().tolist()]


def test_worst_samples(tmp_path):
    """The worst come first, at the chosen layer; each says from where on it would have been fine."""
    kl = torch.tensor([[1.0, 1, 0.001, 0], [1, 0, 0.005, 0.001], [1, 0, 0, 0], [1, 1, 0.003, 0.01]])
    search = make_search(4, per_sample=kl, costs=None)
    assert search.layer == 3
    samples = [Sample(f"question {i}", [], f"answer {i}", i) for i in (2, 1, 3, 0)]
    page = report(tmp_path, search, samples=samples)
    said = re.findall(
        r"question (\d) Answer: answer \1 (Sample [^;]*; fine \w+ [\w ]+?) (?=question|Settings)", page.text
    )
    assert said == [
        ("1", "Sample 1: 0.005 at layer 3; fine from layer 5 on"),
        ("3", "Sample 3: 0.003 at layer 3; fine at no layer that was tried"),
        ("0", "Sample 0: 0.001 at layer 3; fine from layer 3 on"),
        ("2", "Sample 2: 0 at layer 3; fine from layer 2 on"),
    ]
    page = report(tmp_path, search, samples=samples[:1])
    assert page.text.count("Sample ") == 1 and "Sample 2: 0 at layer 3" in page.text
    page = report(tmp_path, search)
    assert "Answer" not in page.text and "Sample 1: 0.005 at layer 3; fine from layer 5 on" in page.text


def test_a_dozen_samples_are_shown(tmp_path):
    search = make_search(40)
    page = report(tmp_path, search, samples=[Sample("?", [], None, i) for i in range(40)])
    shown = [int(x) for x in re.findall(r"Sample (\d+):", page.text)]
    assert shown == search.per_sample[:, 2].argsort(descending=True).tolist()[:12]


@pytest.mark.parametrize("size, mode", [((2000, 1000), "RGB"), ((30, 20), "RGBA"), ((500, 400), "L"), ((9, 9), "P")])
def test_thumbnails(tmp_path, size, mode):
    (tmp_path / "image.png").write_bytes(png(*size, mode))
    page = report(tmp_path, make_search(), samples=[Sample("?", [tmp_path / "image.png", png(*size, mode)], None, 0)])
    assert len(page.all("img")) == 2
    for image in page.all("img"):
        shown = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))))
        assert 80 <= max(shown.size) <= 320
        assert shown.size[0] / shown.size[1] == pytest.approx(size[0] / size[1], rel=0.01)


def test_images_stand_upright(tmp_path):
    file, rotated = io.BytesIO(), Image.Exif()
    rotated[0x0112] = 6
    Image.new("RGB", (400, 200)).save(file, "JPEG", exif=rotated)
    page = report(tmp_path, make_search(), samples=[Sample("?", [file.getvalue()], None, 0)])
    shown = base64.b64decode(page.all("img")[0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(shown)).size == (160, 320)


def test_images_that_are_not_there_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    images = [tmp_path / "gone & <b>lost</b>.png", tmp_path / "text.png", b"12345", png()[:45]]
    page = report(tmp_path, make_search(), samples=[Sample("?", images, None, 0)])
    assert not page.all("img") and not page.all("b")
    assert f"Image missing: {images[0]}" in page.text
    assert f"Image can't be read: {images[1]}" in page.text and "Image can't be read: 5 bytes" in page.text
    assert "Image can't be read: 45 bytes" in page.text


def test_what_users_write_is_text(tmp_path):
    search = make_search(model=EVIL, settings={EVIL: EVIL})
    page = report(tmp_path, search, samples=[Sample(EVIL, [], EVIL, 0)], command=EVIL)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    # Title, heading, question, answer, command, model, and a setting's name and value.
    assert page.text.count(EVIL) == 8
    assert page.rows[-1] == [EVIL, EVIL]


def test_no_layer(tmp_path, attention):
    search = make_search(threshold=0.0)
    page = report(tmp_path, replace(search, attention=attention), samples=[Sample("?", [png()], None, 1)])
    assert "Keep the visual tokens: no layer qualifies" in page.text and search.verdict() in page.text
    assert "tokens visual" not in page.text and "Samples that withdrawal before layer 5 hurts most" in page.text
    assert "fine at no layer that was tried" in page.text
    assert "chosen" not in {attributes.get("class") for attributes in page.all("tr")}


def test_one_sample_without_costs_or_attention(tmp_path):
    search = make_search(1, costs=None)
    page = report(tmp_path, search)
    assert len(page.all("svg")) == 4 and page.rows[1][2] == "0 to inf" and "1 sample," in page.text
    assert "rows of all layers −40% 80 of 100 tokens visual" in page.text
    assert not {"FLOPs", "KV cache", "prefill", "its IQR"} & set(page.rows[0])
    assert not (tmp_path / "report-attention.png").exists()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_divergence_that_is_not_finite(tmp_path, value):
    search = make_search(3)
    search.per_sample[1, 2] = value
    page = report(tmp_path, search)
    assert search.layer == 5 and str(value) in page.text


def test_one_candidate_and_layers_without_attention(tmp_path, attention):
    one = {name: getattr(make_search(), name)[:, :1] for name in ("per_sample", "per_sample_reverse", "disagreement")}
    attention[:2] = torch.nan
    page = report(tmp_path, make_search(**one, candidates=[1], costs=None, threshold=1.0, attention=attention))
    assert "before layer 1 of 6" in page.text and len(page.all("svg")) == 5


def test_settings(tmp_path):
    records = [f"photos.jsonl:{i}" for i in range(120)]
    search = make_search(positions=16, settings={"device": "two of them", "records": records, "prompt": None})
    page = report(tmp_path, search, command="vtw-kernels search model photos.jsonl")
    settings = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert settings["positions"] == "up to 16 of the model's own answer" and settings["layers tried"] == "1, 2, 3, 5"
    assert settings["metric"] == "KL(withdrawn‖full), nats" and settings["threshold"] == "0.003"
    assert settings["torch"] == version("torch") and settings["device"] == "two of them"
    assert settings["costs measured on"] == "a made-up machine" and settings["samples"] == "5"
    assert settings["records"].endswith("photos.jsonl:49 and 70 more") and settings["prompt"] == "not set"
    assert "vtw-kernels search model photos.jsonl" in page.text


def test_saved_costs_are_loaded(tmp_path):
    search = make_search()
    search.save(tmp_path / "vtw.json")
    assert LayerSearch.load(tmp_path / "vtw.json").costs == search.costs
    assert json.loads((tmp_path / "vtw.json").read_text())["costs"]["timed_layers"] == [1, 5, 6]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(samples=[Sample("?", [], None, 5)]), r"samples: expected an index in 0\.\.4, got 5"),
        (dict(samples=[Sample("?", [], None, -1)]), r"samples: expected an index in 0\.\.4, got -1"),
        (dict(samples=[Sample("?", [], None, 1)] * 2), "samples: expected one for each index, got several"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", make_search(), **options)
    with pytest.raises(
        ValueError, match=r"search: expected costs of the layers \[1, 2, 3, 4, 6\], got \[1, 2, 3, 5, 6\]"
    ):
        write_report(tmp_path / "report.html", make_search(candidates=[1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"attention: expected shape \[6, 3\], got \[5, 3\]"):
        write_report(tmp_path / "report.html", make_search(attention=torch.rand(5, 3)))
    with pytest.raises(TypeError, match="found: expected a result of this package, got dict"):
        write_report(tmp_path / "report.html", {})
    assert not list(tmp_path.iterdir())
