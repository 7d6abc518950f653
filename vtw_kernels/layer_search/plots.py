"""The figures of a search, each drawn into axes of matplotlib. Colours are those of Okabe and Ito."""

from dataclasses import replace
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

if TYPE_CHECKING:
    from vtw_kernels.layer_search.result import LayerSearch

BLUE, ORANGE, GREEN, RED, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#888888"
FLOOR = 1e-7  # on a log axis, what is exactly 0 is drawn here


def new_figure(width: float = 7, height: float = 4) -> tuple[Figure, Axes]:
    """Inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    return figure, axes


def draw_values(axes: Axes, search: "LayerSearch") -> None:
    """What a layer is chosen by: value, interval, spread over samples, threshold."""
    from vtw_kernels.layer_search.result import METRICS, STATISTICS

    is_share = search.metric == "disagreement"
    floor = 0 if is_share else FLOOR
    samples, (low, high) = search.by_sample().clamp(min=floor), search.interval()
    spread = samples.quantile(0.1, dim=0), samples.quantile(0.9, dim=0)
    interval = low.clamp(min=floor), high.clamp(floor, samples.max())
    axes.fill_between(search.candidates, *spread, alpha=0.2, color=GREY, lw=0, label="10 to 90 % of samples")
    if len(samples) > 1:
        axes.fill_between(search.candidates, *interval, alpha=0.35, color=BLUE, lw=0, label="95 % interval")
    values = search.values().clamp(min=floor)
    axes.plot(search.candidates, values, color=BLUE, marker="o", ms=4, label=STATISTICS[search.statistic])
    axes.axhline(max(search.threshold, floor), color=RED, linestyle="--", label=f"threshold {search.threshold:g}")
    axes.set(ylabel=METRICS[search.metric], yscale="linear" if is_share else "log")
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes, search)


def draw_agreement(axes: Axes, search: "LayerSearch") -> None:
    """The share of positions whose most likely token stays the same."""
    shares = replace(search, metric="disagreement", statistic="mean")
    if len(search.per_sample) > 1:
        low, high = shares.interval()
        axes.fill_between(search.candidates, 1 - high, 1 - low, alpha=0.35, color=BLUE, lw=0, label="95 % interval")
    axes.plot(search.candidates, 1 - shares.values(), color=BLUE, marker="o", ms=4, label="mean")
    axes.set_ylabel("same most likely token")
    axes.set_ylim(top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes, search)


def draw_attention(axes: Axes, search: "LayerSearch", mass: Tensor) -> None:
    """``mass``: as ``attention_mass`` returns it."""
    layers, bottom = range(len(mass)), mass.new_zeros(len(mass))
    names = "text before (system)", "visual tokens", "text after"
    for name, share, colour in zip(names, mass.T, (GREY, ORANGE, BLUE)):
        axes.bar(layers, share, bottom=bottom, width=0.85, color=colour, lw=0, label=name)
        bottom = bottom + share
    if search.layer is not None:
        axes.axvline(search.layer - 0.5, color=GREEN, linestyle=":", lw=2, label=f"withdrawn before {search.layer}")
    axes.set(xlabel="decoder layer", ylabel="attention of the last position", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes)


def draw_savings(axes: Axes, search: "LayerSearch") -> None:
    """Of one prefill, if costs were measured; else of rows."""
    costs = search.costs
    if costs is None:
        axes.plot(search.candidates, search.saving, color=BLUE, label="rows of all layers")
    else:
        saved = (
            [1 - x / values[-1] for x in values] for values in (costs.flops, costs.kv_bytes, costs.prefill_seconds)
        )
        flops, kv_bytes, seconds = saved
        axes.plot(costs.layers, flops, color=BLUE, label="FLOPs")
        axes.plot(costs.layers, kv_bytes, color=ORANGE, linestyle="--", label="KV cache")
        timed = [costs.layers.index(layer) for layer in costs.timed_layers]
        total = costs.prefill_seconds[-1]
        low, high = ([x + sign * iqr / 2 / total for x, iqr in zip(seconds, costs.prefill_iqr)] for sign in (-1, 1))
        axes.fill_between(costs.layers, low, high, color=PINK, alpha=0.2, lw=0)
        axes.plot(costs.layers, seconds, color=PINK, linestyle="-.", marker="^", markevery=timed, label="prefill time")
        axes.axhline(0, color=GREY, lw=0.8)
    axes.set_ylabel("saved")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes, search)


def _finish(axes: Axes, search: "LayerSearch") -> None:
    if search.layer is not None:
        axes.axvline(search.layer, color=GREEN, linestyle=":", lw=2, label=f"chosen: layer {search.layer}")
    axes.set(xlabel="withdrawn before layer", xlim=(search.candidates[0] - 0.5, search.num_layers + 0.5))
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
