"""The report of a layer search: one HTML file that needs nothing else, and its figures beside it."""

import base64
import io
import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageOps
from torch import Tensor

from vtw_kernels.layer_search.plots import (
    BLUE,
    GREY,
    draw_agreement,
    draw_attention,
    draw_savings,
    draw_values,
    new_figure,
)
from vtw_kernels.layer_search.result import METRICS, STATISTICS, LayerSearch

SHOWN = 12  # samples
TITLE = "Withdrawal of visual tokens"
THUMBNAIL = 320  # pixels of the longer side
LISTED = 50  # values of a setting
INK = "#1a1a1b"  # text and axes
ON_THE_PAGE = {INK: "currentColor", BLUE.lower(): "var(--blue)", GREY: "var(--grey)"}  # which dark mode lightens


class Sample(NamedTuple):
    """What was asked. images: files, or what is in them. index: the sample's row in ``search.per_sample``."""

    question: str
    images: list[Path | bytes]
    answer: str | None
    index: int


def write_report(
    path: str | Path,
    search: LayerSearch,
    *,
    samples: Sequence[Sample] = (),
    attention: Tensor | None = None,
    command: str = "",
) -> None:
    """Writes ``path``, one HTML file with all its figures and images in it, and each figure as ``STEM-NAME.png`` beside
    it.

    It says what was found and what that saves; shows divergence, agreement, attention and savings per layer; and of
    ``samples``, the dozen that withdrawal before the chosen layer hurts most (where no layer qualifies: before the one
    with the lowest value).

    Args:
        samples: any number of them; only these are shown, or the numbers of the worst rows where none are given. An
            image that can't be read is named in its place.
        attention: fp32 ``[L, 3]``, as ``attention_mass`` returns it; by default that of the search.
        command: what made the search.

    Raises:
        ValueError: a sample's index is out of range or not the only one, attention of another shape, costs of other
            layers than those of the search. Nothing is written then.
        OSError: it can't be written.
    """
    path = Path(path)
    attention = search.attention if attention is None else attention
    rows, layers = len(search.per_sample), [*search.candidates, search.num_layers]
    for sample in samples:
        if not 0 <= sample.index < rows:
            raise ValueError(f"samples: expected an index in 0..{rows - 1}, got {sample.index}")
    if len({sample.index for sample in samples}) < len(samples):
        raise ValueError("samples: expected one for each index, got several")
    if attention is not None and attention.shape != (search.num_layers, 3):
        raise ValueError(f"attention: expected shape {[search.num_layers, 3]}, got {list(attention.shape)}")
    if search.costs is not None and search.costs.layers != layers:
        raise ValueError(f"search: expected costs of the layers {layers}, got {search.costs.layers}")

    figures = _figures(search, attention)
    templates = Environment(
        loader=PackageLoader("vtw_kernels.layer_search"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = templates.get_template("report.html").render(
        title=TITLE,
        search=search,
        savings=_savings(search),
        figures=[(title, caption, _svg(figure, name)) for name, title, caption, figure in figures],
        table=_table(search),
        worst=_worst(search, samples),
        with_questions=bool(samples),
        settings=_settings(search),
        command=command,
    )
    path.write_text(html, encoding="utf-8")
    for name, _, _, figure in figures:
        figure.savefig(path.with_name(f"{path.stem}-{name}.png"), dpi=150)


def check_page(name: str, path: Path) -> None:
    """Raises ValueError if at ``path``, an argument's, there is something that ``write_report`` has not written."""
    if path.exists() and (begin := path.read_bytes()[:1000]) and f"<title>{TITLE}".encode() not in begin:
        raise ValueError(f"{name}: expected a new file or an earlier report, got something else in {path}")


def _figures(search: LayerSearch, attention: Tensor | None) -> list[tuple[str, str, str, Figure]]:
    """Name, title, caption and figure."""
    costs = search.costs
    measured = (
        "The share of rows that the decoder layers need not compute, which is that of the KV cache."
        if costs is None
        else f"Of one prefill of {costs.tokens} tokens, {costs.visual_tokens} of them visual. Time was measured at the "
        f"marked layers ({', '.join(map(str, costs.timed_layers))}; {search.num_layers} is no withdrawal), in turns, "
        "and is interpolated between them; the band is the interquartile range of the runs."
    )
    plots: list[tuple[str, str, str, Callable[[Axes], None]]] = [
        (
            "divergence",
            "How much the prediction changes",
            f"{search.criterion[0].upper()}{search.criterion[1:]}, if the visual tokens are withdrawn before a layer. "
            "The first layer at or below the threshold is chosen.",
            lambda axes: draw_values(axes, search),
        ),
        (
            "agreement",
            "How often the most likely token stays",
            "The share of positions at which the withdrawn and the full model would say the same.",
            lambda axes: draw_agreement(axes, search),
        ),
    ]
    if attention is not None:
        caption = (
            "Attention of the last prompt position, mean over heads and some samples. Withdrawal rests on deep layers "
            "hardly looking at visual tokens."
        )
        plots.append(
            ("attention", "Where attention goes", caption, lambda axes: draw_attention(axes, search, attention))
        )
    plots.append(("savings", "What withdrawal saves", measured, lambda axes: draw_savings(axes, search)))
    result = []
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context({name: INK for name in inks} | {"svg.fonttype": "none", "font.size": 10}):
        for name, title, caption, draw in plots:
            figure, axes = new_figure(4.5, 3.4)
            draw(axes)
            result.append((name, title, caption, figure))
    return result


def _svg(figure: Figure, name: str) -> Markup:
    """An element to stand in the page: with its text as text, in the page's colour, and ids of its own."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name_on_page in ON_THE_PAGE.items():
        svg = svg.replace(colour, name_on_page)
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg))


def _table(search: LayerSearch) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """Headings; and by layer whether it is the chosen one, and its cells."""
    columns, costs = search.columns(), search.costs
    if costs is not None:
        columns["layer"] = [*columns["layer"], f"{search.num_layers} (none)"]
        columns = {name: cells + [""] * (len(costs.layers) - len(cells)) for name, cells in columns.items()}
        columns |= {
            "FLOPs": list(map(_flops, costs.flops)),
            "KV cache": list(map(_bytes, costs.kv_bytes)),
            "prefill": list(map(_seconds, costs.prefill_seconds)),
            "its IQR": list(map(_seconds, costs.prefill_iqr)),
        }
    rows = [list(row) for row in zip(*columns.values())]
    return list(columns), [(row[0] == str(search.layer), row) for row in rows]


_flops, _bytes, _seconds = (EngFormatter(unit, places=1, sep="\N{NO-BREAK SPACE}") for unit in ("FLOP", "B", "s"))


def _savings(search: LayerSearch) -> list[tuple[str, str, str]]:
    """What the chosen layer saves: of what, how much, and from what to what."""
    if search.layer is None:
        return []
    chosen, costs = search.candidates.index(search.layer), search.costs
    visual, tokens = (x.double().mean().item() for x in (search.visual_tokens, search.tokens))
    mean = "mean: " if len(search.tokens) > 1 else ""
    shares = [("rows of all layers", search.saving[chosen].item(), f"{mean}{visual:.0f} of {tokens:.0f} tokens visual")]
    if costs is not None:
        for name, values, text in (
            ("FLOPs of the decoder", costs.flops, _flops),
            ("KV cache", costs.kv_bytes, _bytes),
            ("prefill time", costs.prefill_seconds, _seconds),
        ):
            shares.append((name, 1 - values[chosen] / values[-1], f"{text(values[-1])} → {text(values[chosen])}"))
    # Small models may take longer.
    said = [(name, f"{-share:+.0%}".replace("-", "−"), change) for name, share, change in shares]
    if costs is not None and not costs.differ(search.layer):
        name, _, change = said.pop()
        said.append((name, "none", f"{change}: within the spread of the runs"))
    return said


def _worst(search: LayerSearch, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    values = search.by_sample()
    at_layer = values[:, search.candidates.index(search.shown_layer)]
    names = list(search.settings.get("records", ()))
    if len(names) != len(values):
        names = [f"Sample {row}" for row in range(len(values))]
    given = {sample.index: sample for sample in samples} or dict.fromkeys(range(len(values)))
    # NaN is worse than anything.
    order = sorted(given, key=lambda row: at_layer[row].nan_to_num(nan=torch.inf).item(), reverse=True)
    shown = []
    for row in order[:SHOWN]:
        fine_from = len(search.candidates)
        while fine_from and values[row, fine_from - 1] <= search.threshold:
            fine_from -= 1
        shown.append(
            {
                "name": names[row],
                "value": f"{at_layer[row].item():.3g}",
                "fine_from": search.candidates[fine_from] if fine_from < len(search.candidates) else None,
                "question": given[row] and given[row].question,
                "answer": given[row] and given[row].answer,
                "images": [_thumbnail(image) for image in given[row].images] if given[row] else [],
            }
        )
    return shown


def _thumbnail(source: Path | bytes) -> tuple[str, str]:
    """A data URI and no message, or the other way round."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image = ImageOps.exif_transpose(image)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image = image.convert("RGBA")
    except FileNotFoundError:
        return "", f"missing: {name}"
    except Exception as error:  # a broken file makes Pillow raise about anything
        return "", f"can't be read: {name} ({error})"
    if (enlarged := THUMBNAIL // 2 // max(image.size)) > 1:  # browsers would blur it
        image = image.resize([x * enlarged for x in image.size], Image.Resampling.NEAREST)
    paper = Image.new("RGBA", image.size, "white")
    file = io.BytesIO()
    Image.alpha_composite(paper, image).convert("RGB").save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", ""


def _settings(search: LayerSearch) -> dict[str, str]:
    tried = f"{search.candidates[0]} to {search.candidates[-1]}"
    if len(search.candidates) <= search.candidates[-1] - search.candidates[0]:
        tried = ", ".join(map(str, search.candidates))
    positions = {
        "last": "the last of the prompt",
        "answer": "those of the given answer",
    }
    settings = {
        "model": search.model,
        "decoder layers": search.num_layers,
        "layers tried": tried,
        "samples": len(search.per_sample),
        "positions": positions.get(search.positions, f"up to {search.positions} of the model's own answer"),
        "metric": METRICS[search.metric],
        "statistic": STATISTICS[search.statistic],
        "threshold": f"{search.threshold:g}",
    }
    if search.costs is not None:
        settings["costs measured on"] = search.costs.device
    versions = {name: version(name) for name in ("vtw_kernels", "torch", "transformers")}
    settings |= {"Python": platform.python_version()} | versions | search.settings
    if "records" in settings:
        settings["records"] = list(settings["records"])  # without their digests
    return {name: _in_words(value) for name, value in settings.items()}


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}: {x}" for name, x in value.items()]
    if isinstance(value, list | tuple):
        more = f" and {len(value) - LISTED} more" if len(value) > LISTED else ""
        return ", ".join(map(str, value[:LISTED])) + more
    return "not set" if value is None else str(value)
