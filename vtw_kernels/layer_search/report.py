"""The reports of searches, comparisons and trainings: HTML files that need nothing else, and their figures beside
them."""

import base64
import io
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import singledispatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageOps
from torch import Tensor

from vtw_kernels.layer_search.comparison import SAVED, Comparison
from vtw_kernels.layer_search.exit_training import ExitTraining
from vtw_kernels.layer_search.plots import (
    BLUE,
    GREY,
    Layers,
    draw_agreement,
    draw_attention,
    draw_bars,
    draw_choices,
    draw_exit_curve,
    draw_exits,
    draw_front,
    draw_losses,
    draw_savings,
    draw_values,
    new_figure,
    shown_groups,
)
from vtw_kernels.layer_search.result import LayerSearch
from vtw_kernels.layer_search.scored import METRICS, STATISTICS, Scored
from vtw_kernels.layer_search.skip_search import SkipSearch
from vtw_kernels.layer_search.skip_training import SkipTraining

Plot = tuple[str, str, str, Callable[[Axes], None]]  # name, title, caption, what draws it
Table = tuple[list[str], list[tuple[bool, list[str]]]]  # headings; and by row whether it is chosen, and its cells
THRESHOLDS = np.geomspace(1e-4, 1e-1, 61).tolist()
SHOWN = 12  # samples
TITLE = "Withdrawal of visual tokens"
THUMBNAIL = 320  # pixels of the longer side
LISTED = 50  # values of a setting
INK = "#1a1a1b"  # text and axes
ON_THE_PAGE = {INK: "currentColor", BLUE.lower(): "var(--blue)", GREY: "var(--grey)"}  # which dark mode lightens


class Sample(NamedTuple):
    """What was asked. images: files, or what is in them. index: the sample's row in ``per_sample``."""

    question: str
    images: list[Path | bytes]
    answer: str | None
    index: int


class Page(NamedTuple):
    """What a page says of a result. settings: by name. groups: of each its name, what is said of it, and its table.
    worst: rows of samples to show, and what is said of each. costs: what costs are of. savings: as of ``_savings``."""

    template: str
    plots: list[Plot]
    table: Table
    settings: dict[str, str]
    groups: Sequence[tuple[str, str, Table]] = ()
    worst: Sequence[tuple[int, str]] = ()
    costs: str = ""
    savings: Sequence[tuple[str, str, str]] = ()


def write_report(
    path: str | Path, found: Scored | SkipTraining, *, samples: Sequence[Sample] = (), command: str = ""
) -> None:
    """Writes ``path``, one HTML file with all its figures and images in it, and each figure as ``STEM-NAME.png`` beside
    it.

    It says what was found, in words, figures and tables; with which settings; and of ``samples``, it shows the dozen
    that are hurt most: by withdrawal before the chosen layer (where no layer qualifies, before the one with the lowest
    value), under any policy, where gates let them leave, or without the attention of one of the layers that matter
    least alone.

    Args:
        found: a ``LayerSearch``, ``Comparison``, ``ExitTraining``, ``SkipSearch`` or ``SkipTraining``.
        samples: any number of them; only these are shown, or the numbers of the worst rows where none are given. An
            image that can't be read is named in its place.
        command: what made the result.

    Raises:
        ValueError: a sample's index is out of range or not the only one; of a search, attention of another shape, or
            costs of other layers than its own. Nothing is written then.
        OSError: it can't be written.
    """
    path, rows = Path(path), len(found.per_sample) if isinstance(found, Scored) else 0
    for sample in samples:
        if not 0 <= sample.index < rows:
            raise ValueError(f"samples: expected an index in 0..{rows - 1}, got {sample.index}")
    if len({sample.index for sample in samples}) < len(samples):
        raise ValueError("samples: expected one for each index, got several")
    page = _page(found, samples)
    figures = _draw(page.plots)
    templates = Environment(
        loader=PackageLoader("vtw_kernels.layer_search"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = templates.get_template(page.template).render(
        page._asdict()
        | {
            "title": TITLE,
            "found": found,
            "figures": [(title, caption, _svg(figure, name)) for name, title, caption, figure in figures],
            "worst": _shown(found, page.worst, samples),
            "with_questions": bool(samples),
            "command": command,
        }
    )
    path.write_text(html, encoding="utf-8")
    for name, _, _, figure in figures:
        figure.savefig(path.with_name(f"{path.stem}-{name}.png"), dpi=150)


@singledispatch
def _page(found: Any, samples: Sequence[Sample]) -> Page:
    raise TypeError(f"found: expected a result of this package, got {type(found).__name__}")


@_page.register
def _page_of_search(search: LayerSearch, samples: Sequence[Sample]) -> Page:
    layers, attention = [*search.candidates, search.num_layers], search.attention
    if attention is not None and attention.shape != (search.num_layers, 3):
        raise ValueError(f"attention: expected shape {[search.num_layers, 3]}, got {list(attention.shape)}")
    if search.costs is not None and search.costs.layers != layers:
        raise ValueError(f"search: expected costs of the layers {layers}, got {search.costs.layers}")
    at_layer = search.by_sample()[:, search.candidates.index(search.shown_layer)]
    return Page(
        "report.html",
        _plots(search),
        _table(search),
        _settings(search),
        groups=[(group, part.verdict(), _table(part)) for group, part in search.by_group().items()],
        worst=[(row, _facts(search, row, value)) for row, value in _worst(at_layer, samples)],
        savings=_savings(search),
    )


@_page.register
def _page_of_comparison(comparison: Comparison, samples: Sequence[Sample]) -> Page:
    """The value of each policy over what it saves, with the Pareto fronts, of all samples and of each group."""
    values, costs = comparison.by_sample().nan_to_num(nan=torch.inf), comparison.costs
    said = "" if costs is None else (
        f"Time, operations and bytes are those of {costs.batches} samples, {costs.tokens} tokens with "
        f"{costs.visual_tokens} visual ones among them, on {costs.device}. Of the model as it is, one takes "
        f"{_flops(costs.flops[-1])}, {_bytes(costs.kv_bytes[-1])}, {_seconds(costs.prefill_seconds[-1])} of prefill "
        f"(interquartile range {_seconds(costs.prefill_iqr[-1])}) and {_seconds(costs.decode_seconds[-1])} a token "
        f"({_seconds(costs.decode_iqr[-1])})."
    )  # fmt: skip
    return Page(
        "comparison.html",
        _front_plots(comparison),
        _marked_table(comparison.columns()),
        _comparison_settings(comparison),
        groups=[
            (group, part.verdict(), _marked_table(part.columns())) for group, part in comparison.by_group().items()
        ],
        worst=[
            (row, f"{value:.3g} under {comparison.policies[int(values[row].argmax())]}")
            for row, value in _worst(values.amax(dim=1), samples)
        ],
        costs=said,
    )


@_page.register
def _page_of_exits(training: ExitTraining, samples: Sequence[Sample]) -> Page:
    """Where held-out samples leave, and what that changes, over the mean layer where they do, against one layer for all
    of them."""
    values = torch.full((len(training.tokens),), -torch.inf).index_copy(0, training.held_out(), training.at_exit())
    layers = torch.zeros(len(values), dtype=torch.int64).index_copy(0, training.held_out(), training.outcome().layers)
    worst = [(row, value) for row, value in _worst(values, samples) if value > -torch.inf]
    return Page(
        "exit.html",
        _exit_plots(training),
        _marked_table(training.columns()),
        _exit_settings(training),
        groups=[(group, "", _marked_table(training.columns(group))) for group in training.held_out_groups],
        worst=[(row, f"{value:.3g} at layer {layers[row]}") for row, value in worst],
    )


@_page.register
def _page_of_skips(search: SkipSearch, samples: Sequence[Sample]) -> Page:
    """What skipping each layer's attention changes, one at a time, greedily and, if there was one, by the scores of the
    bandit."""
    columns = [search.candidates.index(layer) for layer in search.choices["alone"]]
    values, layers = search.by_sample()[:, columns].max(dim=1)
    settings = {
        "model": search.model,
        "decoder layers": search.num_layers,
        "candidates": search.candidates,
        "samples": len(search.tokens),
        "positions": _positions(search.positions),
    }
    return Page(
        "skip.html",
        _skip_plots(search),
        _marked_table(search.columns()),
        _with_versions(settings, search.settings),
        groups=[(group, "", _marked_table(part.columns())) for group, part in search.by_group().items()],
        worst=[
            (row, f"{value:.3g} without attention in layer {search.choices['alone'][layers[row]]}")
            for row, value in _worst(values, samples)
        ],
    )


@_page.register
def _page_of_adapters(training: SkipTraining, samples: Sequence[Sample]) -> Page:
    """How the loss fell, and what it is on what was held out."""
    adapters, (trained, held_out) = training.adapters, training.batches
    settings = {
        "model": training.model,
        "decoder layers": adapters.num_layers,
        "attention skipped in": list(adapters.layers),
        "batches": f"{trained} trained with, {held_out} held out, drawn by the seed",
        "weights": f"{adapters.nbytes} bytes",
    }
    known = {name: x for name, x in training.settings.items() if name not in (*training.FIGURES, "command")}
    if "positions" in known:
        known["positions"] = _positions(known["positions"])
    plot = (
        "loss",
        "Cross entropy by epoch",
        "Of the batches that were trained with, the mean over each epoch, as adapters were then and with dropout; and "
        "of the held-out ones, in the end: of the whole model, skipped without adapters, and with them.",
        lambda axes: draw_losses(axes, training.losses, {name: loss for name, (loss, _) in training.held_out.items()}),
    )
    return Page("adapters.html", [plot], _marked_table(training.columns()), _with_versions(settings, known))


def check_page(name: str, path: Path) -> None:
    """Raises ValueError if at ``path``, an argument's, there is something that ``write_report`` has not written."""
    if path.exists() and (begin := path.read_bytes()[:1000]) and f"<title>{TITLE}".encode() not in begin:
        raise ValueError(f"{name}: expected a new file or an earlier report, got something else in {path}")


def _plots(search: LayerSearch) -> list[Plot]:
    layers, groups = Layers(search.candidates, search.num_layers, search.layer), shown_groups(search)
    attention = search.attention
    costs = search.costs
    saved = "The share of rows that the decoder layers need not compute, which is that of the KV cache."
    visual = "" if costs is None else f", {costs.visual_tokens} of them visual"
    if search.image_layers is not None:
        saved, visual = "The share of layers that would look at images and do not, nor project or cache them.", ""
    measured = (
        saved
        if costs is None
        else f"Of one prefill of {costs.tokens} tokens{visual}. Time was measured at the "
        f"marked layers ({', '.join(map(str, costs.timed_layers))}; {search.num_layers} is no withdrawal), in turns, "
        "and is interpolated between them; the band is the interquartile range of the runs."
    )
    plots: list[Plot] = [
        (
            "divergence",
            "How much the prediction changes",
            f"{search.criterion[0].upper()}{search.criterion[1:]}, if the visual tokens are withdrawn before a "
            "layer. The first layer at or below the threshold is chosen.",
            lambda axes: draw_values(axes, layers, search, search.threshold),
        ),
        (
            "agreement",
            "How often the most likely token stays",
            "The share of positions at which the withdrawn and the full model would say the same.",
            lambda axes: draw_agreement(axes, layers, search),
        ),
        (
            "choice",
            "Which layer another threshold chooses",
            "The first layer whose value is at or below the threshold, and between which layers it lies if other "
            "samples of the same kind are drawn (95 %).",
            lambda axes: draw_choices(
                axes,
                layers,
                THRESHOLDS,
                [(_layer_at(search, x), *search.plausible_layers(threshold=x)) for x in THRESHOLDS],
                search.threshold,
                [(group, colour, [_layer_at(part, x) for x in THRESHOLDS]) for group, colour, part in groups],
            ),
        ),
    ]
    if attention is not None:
        caption = (
            "Attention of the last prompt position, mean over heads and some samples. Withdrawal rests on deep layers "
            "hardly looking at visual tokens."
        )
        plots.append(
            ("attention", "Where attention goes", caption, lambda axes: draw_attention(axes, attention, search.layer))
        )
    rows = [(group, colour, part.saving) for group, colour, part in groups]
    plots.append(
        (
            "savings",
            "What withdrawal saves",
            measured,
            lambda axes: draw_savings(axes, layers, costs, search.what_is_saved, search.saving, rows),
        )
    )
    return plots


def _layer_at(search: LayerSearch, threshold: float) -> int:
    layer = search.layer_at(threshold)
    return search.num_layers if layer is None else layer


def _front_plots(comparison: Comparison) -> list[Plot]:
    """Over what each of the costs saves; and over rows, the share of other top tokens, and the groups."""
    by_tokens = replace(comparison, metric="disagreement", statistic="mean")

    def front(name: str, title: str, caption: str, of: Comparison, cost: str = "rows") -> Plot:
        def draw(axes: Axes) -> None:
            draw_front(axes, of.policies, of, of.saving(cost), of.pareto(cost), SAVED[cost])

        return name, title, caption, draw

    criterion = f"{comparison.criterion[0].upper()}{comparison.criterion[1:]}"
    plots = [front("front", "The Pareto front", f"{criterion}, over the rows of all layers saved.", comparison)]
    plots.append(front("agreement", "Other top tokens", "How often another token is the most likely one.", by_tokens))
    for cost in comparison.measured[1:]:
        caption = f"The same over what is saved of the {SAVED[cost]}, as measured."
        plots.append(front(cost, SAVED[cost], caption, comparison, cost))
    for number, (group, _, part) in enumerate(shown_groups(comparison)):
        plots.append(front(f"group-{number}", group, f"The same for {len(part.tokens)} samples of this kind.", part))
    return plots


def _exit_plots(training: ExitTraining) -> list[Plot]:
    outcome = training.outcome()

    def curve(name: str, title: str, caption: str, label: str, log: bool) -> Plot:
        return (
            name,
            title,
            caption,
            lambda axes: draw_exit_curve(axes, *training.curve(name), outcome.mean_layer, label, log),
        )

    never = f"Layer {training.num_layers} stands for never. By the threshold of {outcome.threshold:g}."
    return [
        (
            "exits",
            "Where the visual tokens leave",
            never,
            lambda axes: draw_exits(axes, outcome.layers.tolist(), training.num_layers),
        ),
        curve(
            "agreement",
            "How often the most likely token stays",
            "Of the held-out samples, by gates at ever higher thresholds and, at equal cost, by one layer for all.",
            "same most likely token",
            False,
        ),
        curve("kl", "How much the prediction changes", "The same of the divergence.", METRICS["kl"], True),
    ]


def _skip_plots(search: SkipSearch) -> list[Plot]:
    plots: list[Plot] = [
        (
            "alone",
            "What attention matters",
            "Each layer's attention skipped alone.",
            lambda axes: draw_bars(axes, search.candidates, search.values().tolist(), search.criterion, log=True),
        )
    ]
    if search.greedy is not None:
        plots.append(
            (
                "greedy",
                "One layer more at a time",
                f"In the order {', '.join(map(str, search.greedy['layers']))}.",
                lambda axes: draw_bars(
                    axes,
                    range(1, search.skip + 1),
                    search.greedy["kl"],
                    METRICS["kl"],
                    log=True,
                    xlabel="layers skipped",
                ),
            )
        )
    if search.bandit is not None:
        plots.append(
            (
                "bandit",
                "The bandit's scores",
                "High ones are of layers that can be skipped.",
                lambda axes: draw_bars(axes, search.candidates, search.bandit["scores"], "score"),
            )
        )
    return plots


def _draw(plots: list[Plot]) -> list[tuple[str, str, str, Figure]]:
    """Name, title, caption and figure."""
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


def _table(search: LayerSearch) -> Table:
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


def _marked_table(columns: dict[str, list[str]]) -> Table:
    """Rows that have something in the column without a heading are marked."""
    marks = columns.pop("", [""] * len(next(iter(columns.values()))))
    return list(columns), [(bool(mark), list(row)) for mark, row in zip(marks, zip(*columns.values()))]


_flops, _bytes, _seconds = (EngFormatter(unit, places=1, sep="\N{NO-BREAK SPACE}") for unit in ("FLOP", "B", "s"))


def _savings(search: LayerSearch) -> list[tuple[str, str, str]]:
    """What the chosen layer saves: of what, how much, and from what to what."""
    if search.layer is None:
        return []
    chosen, costs = search.candidates.index(search.layer), search.costs
    visual, tokens = (x.double().mean().item() for x in (search.visual_tokens, search.tokens))
    mean = "mean: " if len(search.tokens) > 1 else ""
    change = f"{mean}{visual:.0f} of {tokens:.0f} tokens visual"
    if search.image_layers is not None:
        change = f"{len(search.image_layers)} → {sum(layer < search.layer for layer in search.image_layers)}"
    shares = [(search.what_is_saved, search.saving[chosen].item(), change)]
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


def _worst(values: Tensor, samples: Sequence[Sample]) -> list[tuple[int, float]]:
    """Rows of the samples to show, by default of any, and their values ``[N]``, of which the largest come first."""
    given = [sample.index for sample in samples] or range(len(values))
    # NaN is worse than anything.
    order = sorted(given, key=lambda row: values[row].nan_to_num(nan=torch.inf).item(), reverse=True)
    return [(row, values[row].item()) for row in order[:SHOWN]]


def _facts(search: LayerSearch, row: int, value: float) -> str:
    values, fine_from = search.by_sample()[row], len(search.candidates)
    while fine_from and values[fine_from - 1] <= search.threshold:
        fine_from -= 1
    fine = "fine at no layer that was tried"
    if fine_from < len(search.candidates):
        fine = f"fine from layer {search.candidates[fine_from]} on"
    return f"{value:.3g} at layer {search.shown_layer}; {fine}"


def _shown(
    found: Scored | SkipTraining, worst: Sequence[tuple[int, str]], samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    names = list(found.settings.get("records", ()))
    if worst and len(names) != len(found.per_sample):
        names = [f"Sample {row}" for row in range(len(found.per_sample))]
    given = {sample.index: sample for sample in samples}
    shown = []
    for row, fact in worst:
        sample = given.get(row)
        images = [] if sample is None else [_thumbnail(image) for image in sample.images]
        of_sample = {} if sample is None else {"question": sample.question, "answer": sample.answer}
        shown.append({"name": names[row], "fact": fact, "images": images} | of_sample)
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
    settings = {
        "model": search.model,
        "decoder layers": search.num_layers,
        "layers tried": tried,
        "samples": len(search.per_sample),
        "positions": _positions(search.positions),
        "metric": METRICS[search.metric],
        "statistic": STATISTICS[search.statistic],
        "threshold": f"{search.threshold:g}",
    }
    return _with_versions(settings, search.settings, search.costs)


def _comparison_settings(comparison: Comparison) -> dict[str, str]:
    settings = {
        "model": comparison.model,
        "decoder layers": comparison.num_layers,
        "samples": len(comparison.per_sample),
        "positions": _positions(comparison.positions),
        "metric": METRICS[comparison.metric],
        "statistic": STATISTICS[comparison.statistic],
    }
    return _with_versions(settings, comparison.settings, comparison.costs)


def _exit_settings(training: ExitTraining) -> dict[str, str]:
    trained, held_out = map(len, training.split)
    settings = {
        "model": training.model,
        "decoder layers": training.num_layers,
        "gates": training.candidates,
        "samples": f"{trained} trained with, {held_out} held out, drawn by the seed",
        "positions": _positions(training.positions),
        "threshold": f"{training.routers.threshold:g}",
        "weights": f"{training.routers.nbytes} bytes",
    }
    return _with_versions(settings | training.training._asdict(), training.settings)


def _positions(positions: int | str) -> str:
    said = {"last": "the last of the prompt", "answer": "those of the given answer"}
    return said.get(positions, f"up to {positions} of the model's own answer")


def _with_versions(settings: dict[str, Any], further: dict[str, Any], costs: Any = None) -> dict[str, str]:
    """In words, with what else reproduces a result."""
    if costs is not None:
        settings["costs measured on"] = costs.device
    versions = {name: version(name) for name in ("vtw_kernels", "torch", "transformers")}
    settings |= {"Python": platform.python_version()} | versions | further
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
