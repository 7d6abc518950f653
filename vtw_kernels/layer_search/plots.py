"""The figures of a search and of a comparison, drawn into axes of matplotlib, in colours of Okabe and Ito."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from vtw_kernels.layer_search.costs import LayerCosts
from vtw_kernels.layer_search.scored import METRICS, STATISTICS, Scored

BLUE, ORANGE, GREEN, RED, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#888888"
GROUPS = (ORANGE, PINK, GREEN, "#56B4E9", RED, "#B2A429")  # of so many groups, the largest, there are lines
NAME = 24  # characters of a policy's name
FLOOR = 1e-7  # on a log axis, what is exactly 0 is drawn here


class Layers(NamedTuple):
    """What figures over layers stand on: those that were tried, how many the model has, and which one was chosen."""

    tried: list[int]
    total: int
    chosen: int | None


def new_figure(width: float = 7, height: float = 4) -> tuple[Figure, Axes]:
    """Inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    return figure, axes


def draw_values(axes: Axes, layers: Layers, scores: Scored, threshold: float) -> None:
    """What a layer is chosen by: value, interval, spread over samples, threshold; and the value of each group."""
    floor = _floor(scores)
    samples, (low, high) = scores.by_sample().clamp(min=floor), scores.interval()
    spread = samples.quantile(0.1, dim=0), samples.quantile(0.9, dim=0)
    interval = low.clamp(min=floor), high.clamp(floor, samples.max())
    axes.fill_between(layers.tried, *spread, alpha=0.2, color=GREY, lw=0, label="10 to 90 % of samples")
    if len(samples) > 1:
        axes.fill_between(layers.tried, *interval, alpha=0.35, color=BLUE, lw=0, label="95 % interval")
    values = scores.values().clamp(min=floor)
    axes.plot(layers.tried, values, color=BLUE, marker="o", ms=4, label=STATISTICS[scores.statistic])
    for group, colour, part in shown_groups(scores):
        axes.plot(layers.tried, part.values().clamp(min=floor), color=colour, lw=1, label=group)
    axes.axhline(max(threshold, floor), color=RED, linestyle="--", label=f"threshold {threshold:g}")
    _value_axis(axes, scores)
    _finish(axes, layers)


def draw_agreement(axes: Axes, layers: Layers, scores: Scored) -> None:
    """The share of positions whose most likely token stays the same."""
    shares = replace(scores, metric="disagreement", statistic="mean")
    if len(scores.per_sample) > 1:
        low, high = shares.interval()
        axes.fill_between(layers.tried, 1 - high, 1 - low, alpha=0.35, color=BLUE, lw=0, label="95 % interval")
    axes.plot(layers.tried, 1 - shares.values(), color=BLUE, marker="o", ms=4, label="mean")
    for group, colour, part in shown_groups(shares):
        axes.plot(layers.tried, 1 - part.values(), color=colour, lw=1, label=group)
    axes.set_ylabel("same most likely token")
    axes.set_ylim(top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(axes, layers)


def draw_choices(
    axes: Axes,
    layers: Layers,
    thresholds: Sequence[float],
    choices: Sequence[tuple[int, int, int]],
    threshold: float,
    groups: Sequence[tuple[str, str, Sequence[int]]],
) -> None:
    """The chosen layer as a function of the threshold.

    ``choices``: by threshold the chosen layer, and the first and the last one that other samples might choose;
    ``total`` stands for none. ``threshold``: the one that was set. ``groups``: of each its colour and layers.
    """
    chosen, first, last = zip(*choices)
    axes.fill_between(thresholds, first, last, step="mid", alpha=0.35, color=BLUE, lw=0, label="95 % interval")
    axes.step(thresholds, chosen, where="mid", color=BLUE, label="chosen layer")
    for group, colour, own in groups:
        axes.step(thresholds, own, where="mid", color=colour, lw=1, label=group)
    axes.axvline(threshold, color=RED, linestyle="--", label=f"threshold {threshold:g}")
    axes.set(xlabel="threshold", ylabel=f"layer ({layers.total}: none)", xscale="log", ylim=(0, layers.total + 0.5))
    axes.set_xlim(thresholds[0], thresholds[-1])
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    _legend(axes)


def draw_front(
    axes: Axes, policies: Sequence[str], scores: Scored, saved: Tensor, front: Sequence[str], what: str
) -> None:
    """The value of each policy over the share that it saves of ``what``, fp32 ``[C]``; the Pareto front as a line, and
    the names of those on it."""
    floor = _floor(scores)
    values, saved = scores.values().clamp(min=floor).tolist(), saved.tolist()
    place = dict(zip(policies, zip(saved, values)))
    kinds: dict[str, list[tuple[float, float]]] = {}
    for policy, point in place.items():
        steps = dict.fromkeys(step.split("=")[0].split(":")[0].split("(")[0] for step in policy.split("+"))
        kinds.setdefault(" + ".join(steps), []).append(point)
    if front:
        axes.step(*zip(*(place[policy] for policy in front)), where="post", color=GREY, lw=1, label="Pareto front")
    styles = zip((BLUE, *GROUPS), ("o", "s", "^", "D", "v", "P", "X"))
    for (kind, points), (colour, marker) in zip(kinds.items(), [*styles] * len(kinds)):
        axes.plot(*zip(*points), linestyle="none", color=colour, marker=marker, ms=5, label=kind)
    middle = (min(saved) + max(saved)) / 2
    for policy in front:
        name = policy if len(policy) <= NAME else policy[: NAME - 1] + "…"
        side = {"ha": "right", "xytext": (-5, 3)} if place[policy][0] > middle else {"xytext": (5, 3)}
        label = axes.annotate(name, place[policy], textcoords="offset points", fontsize=7, **side)
        label.set_in_layout(False)  # a long name is not to squeeze the axes
    axes.set_xlabel(f"{what} saved")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _value_axis(axes, scores)
    _legend(axes)


def draw_attention(axes: Axes, mass: Tensor, chosen: int | None) -> None:
    """``mass``: as ``attention_mass`` returns it."""
    layers, bottom = range(len(mass)), mass.new_zeros(len(mass))
    names = "text before (system)", "visual tokens", "text after"
    for name, share, colour in zip(names, mass.T, (GREY, ORANGE, BLUE)):
        axes.bar(layers, share, bottom=bottom, width=0.85, color=colour, lw=0, label=name)
        bottom = bottom + share
    if chosen is not None:
        axes.axvline(chosen - 0.5, color=GREEN, linestyle=":", lw=2, label=f"withdrawn before {chosen}")
    axes.set(xlabel="decoder layer", ylabel="attention of the last position", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes)


def draw_savings(
    axes: Axes,
    layers: Layers,
    costs: LayerCosts | None,
    what: str,
    saved: Tensor,
    groups: Sequence[tuple[str, str, Tensor]],
) -> None:
    """Of one prefill, if costs were measured; else of ``what``, shares fp32 ``[C]``. ``groups``: of each its colour and
    what is saved."""
    for group, colour, own in groups:
        axes.plot(layers.tried, own, color=colour, lw=1, label=f"{what.split()[0]}, {group}")
    if costs is None:
        axes.plot(layers.tried, saved, color=BLUE, label=what)
    else:
        flops, kv_bytes, seconds = (
            [1 - x / values[-1] for x in values] for values in (costs.flops, costs.kv_bytes, costs.prefill_seconds)
        )
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
    _finish(axes, layers)


def shown_groups(scores: Scored) -> list[tuple[str, str, Scored]]:
    """The largest groups, in their order, each with a colour."""
    parts = scores.by_group()
    shown = sorted(parts, key=lambda group: len(parts[group].tokens), reverse=True)[: len(GROUPS)]
    return [(group, colour, parts[group]) for colour, group in zip(GROUPS, [x for x in parts if x in shown])]


def _floor(scores: Scored) -> float:
    return 0 if scores.metric == "disagreement" else FLOOR


def _value_axis(axes: Axes, scores: Scored) -> None:
    is_share = scores.metric == "disagreement"
    axes.set(ylabel=METRICS[scores.metric], yscale="linear" if is_share else "log")
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def draw_exits(axes: Axes, layers: Sequence[int], total: int) -> None:
    """How many samples leave before which layer; those that never do stand at ``total``."""
    counts = Counter(layers)
    for leaves, colour, label in ((True, BLUE, "leaves"), (False, GREY, "never")):
        shown = [layer for layer in sorted(counts) if (layer < total) == leaves]
        if shown:
            axes.bar(shown, [counts[layer] for layer in shown], width=0.85, color=colour, lw=0, label=label)
    axes.set(xlabel="visual tokens leave before layer", ylabel="held-out samples", xlim=(0, total + 0.8))
    _legend(axes)


def draw_bars(
    axes: Axes, places: Sequence[int], values: Sequence[float], name: str, log: bool = False, xlabel: str = "layer"
) -> None:
    """A value of each layer, or number of layers."""
    heights = [max(x, FLOOR) for x in values] if log else list(values)
    axes.bar(list(places), heights, color=BLUE)
    axes.set(xlabel=xlabel, ylabel=name, yscale="log" if log else "linear")


def draw_losses(axes: Axes, losses: Sequence[float], held_out: Mapping[str, float]) -> None:
    """The loss of each epoch, and by name those of what was held out."""
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, marker="o", ms=4, label="trained with, by epoch")
    for (name, loss), colour, line in zip(held_out.items(), (GREY, ORANGE, GREEN), (":", "--", "-.")):
        axes.axhline(loss, color=colour, linestyle=line, label=f"held out, {name}")
    axes.set(xlabel="epoch", ylabel="cross entropy", ylim=(0, None))
    _legend(axes)


def draw_exit_curve(
    axes: Axes,
    gates: Sequence[tuple[float, float]],
    fixed: Sequence[tuple[float, float]],
    chosen: float,
    name: str,
    log: bool = False,
) -> None:
    """Points of mean exit layer and value, of gates by their threshold and of fixed layers; and the chosen threshold's
    mean layer."""
    floor = FLOOR if log else 0
    for points, colour, marker, label in ((fixed, GREY, "o", "one layer for all"), (gates, BLUE, ".", "gates")):
        layers, values = zip(*points)
        axes.plot(layers, [max(x, floor) for x in values], color=colour, marker=marker, ms=4, label=label)
    axes.axvline(chosen, color=GREEN, linestyle=":", lw=2, label="the threshold of the gates")
    axes.set(xlabel="mean exit layer", ylabel=name, yscale="log" if log else "linear")
    if not log:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes)


def _finish(axes: Axes, layers: Layers) -> None:
    if layers.chosen is not None:
        axes.axvline(layers.chosen, color=GREEN, linestyle=":", lw=2, label=f"chosen: layer {layers.chosen}")
    axes.set(xlabel="withdrawn before layer", xlim=(layers.tried[0] - 0.5, layers.total + 0.5))
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
