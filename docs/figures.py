"""Draws the pictures of the README and of these pages into ``images/``. Seconds; no model is run."""

import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import PercentFormatter

from vtw_kernels.demo import data, smollm2
from vtw_kernels.layer_search.plots import BLUE, FLOOR, GREEN, GREY, ORANGE, PINK, RED, new_figure
from vtw_kernels.layer_search.result import PAPER_THRESHOLD

IMAGES = Path(__file__).parent / "images"
ANSWERS = Path(__file__).parent / "answers"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
TRAININGS = {"as usual": ORANGE, "with withdrawal": BLUE}
METHODS = {"fixed layer": (BLUE, "o-"), "dynamic exit": (GREEN, "*-"), "FastV": (ORANGE, "s-"),
           "PyramidDrop": (RED, "^:"), "random": (PINK, "D--")}  # fmt: skip
MODELS = {"digits": "digits", "smollm2": "SmolLM2 with eyes"}
# What names of prunings have in common, by ingredient.
PRUNINGS = {"heads": ("of heads", BLUE, "o"), "window": ("window", GREEN, "^"), "narrower MLP": ("MLP", ORANGE, "s"),
            "layer cut": ("cut", RED, "v"), "all of them": ("all:", PINK, "*")}  # fmt: skip


def draw_layers() -> None:
    """KL and accuracy by layer of the demo's models, as ``examples/`` measured them after training."""
    figure, _ = new_figure(10, 5.2)
    figure.clear()
    panels = figure.subplots(2, 2, sharex="col")
    titles = "a LLaVA of 1.6 M parameters, digits", "SmolLM2-135M with eyes, shapes and colours"
    for column, source, title in zip(panels.T, (data, smollm2), titles):
        divergence, accuracy = column
        for training, curve in source.load_training_curves().items():
            layers = {int(layer): row for layer, row in curve["test"]["layers"].items()}
            never = len(layers) + 1
            label, colour = f"trained {training}", TRAININGS[training]
            divergence.plot(list(layers), [max(row["kl"], FLOOR) for row in layers.values()], ".-", color=colour)
            shares = [*(row["accuracy"]["all"] for row in layers.values()), curve["test"]["full"]["all"]]
            accuracy.plot([*layers, never], shares, ".-", color=colour, label=label)
            chosen = curve["chosen layer"]
            for axes in column:
                axes.axvline(chosen, color=colour, linestyle=":", lw=1.5)
            text = f"layer {chosen}" if chosen < never else "never"
            height = 4e-5 if training == "as usual" else 1.3e-4
            divergence.text(chosen - 0.01 * never, height, text, color=colour, ha="right", fontsize=9, bbox=WHITE)
        divergence.axhline(PAPER_THRESHOLD, color=RED, linestyle="--", lw=1)
        divergence.text(1, PAPER_THRESHOLD * 0.75, "threshold", color=RED, va="top", fontsize=9)
        divergence.set(title=title, yscale="log", ylim=(2e-5, 20))
        accuracy.set(xlabel="visual tokens withdrawn before layer", ylim=(0, 1.03), xlim=(0.6, never + 0.4))
        accuracy.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in column:
            axes.spines[["top", "right"]].set_visible(False)
    panels[1, 0].legend(frameon=False, loc="lower right")
    panels[0, 0].set_ylabel("KL(withdrawn‖full), nats")
    panels[1, 0].set_ylabel("right answers")
    figure.savefig(IMAGES / "layers.png", dpi=150)


def draw_policies(model: str, columns: int) -> None:
    """Right answers over the rows that policies save, as ``examples/compare_policies.py`` measured them, in a panel for
    all questions and one for each kind."""
    methods = json.loads((ANSWERS / f"{model}.json").read_text())
    (plain,) = methods.pop("the model as it is").values()
    figure, _ = new_figure(2.6 * columns, 2.7 * -(-len(plain) // columns))
    figure.clear()
    panels = figure.subplots(-(-len(plain) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes, kind in zip(panels.flat, plain, strict=True):
        axes.axhline(plain[kind]["right"], color=GREY, linestyle="--", lw=1, label="the model as it is")
        for method, policies in methods.items():
            colour, style = METHODS[method]
            points = sorted((by_kind[kind]["saved"], by_kind[kind]["right"]) for by_kind in policies.values())
            axes.plot(*zip(*points), style, color=colour, ms=9 if style[0] == "*" else 5, lw=1, label=method)
        axes.set(title=kind, ylim=(0, 1.03))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("rows of all layers that are saved", fontsize=10)
    figure.supylabel("right answers", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(IMAGES / f"policies-{model}.png", dpi=150)


def draw_pruning() -> None:
    """Right answers of the demo's models over the operations that visual pruning leaves, as
    ``examples/visual_pruning.py`` measured them: as they are, and after training with it."""
    figure, _ = new_figure(9, 3.8)
    figure.clear()
    for axes, (model, title) in zip(figure.subplots(1, 2), MODELS.items()):
        results = json.loads((ANSWERS / f"pruning-{model}.json").read_text())
        axes.axhline(results["as it is"]["plain"]["right"], color=GREY, linestyle="--", lw=1, label="nothing pruned")
        for kind, (start, colour, marker) in PRUNINGS.items():
            for when, filled in (("after training", True), ("as it is", False)):
                rows = [row for name, row in results[when].items() if start in name]
                points = sorted((row["flops"], row["right"]) for row in rows)
                axes.plot(
                    *zip(*points), marker + "-", color=colour, lw=1, ms=6, mfc=colour if filled else "white",
                    alpha=1 if filled else 0.7, label=kind if filled else None,
                )  # fmt: skip
        axes.set(title=title, ylim=(0, 1.03), xlim=(1.02, 0.55), xlabel="operations of the decoder that are left")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("right answers")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(IMAGES / "pruning.png", dpi=150)


def blank(width: float, height: float, columns: float, rows: float) -> Axes:
    figure, axes = new_figure(width, height)
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    axes.axis("off")
    return axes


def save(axes: Axes, name: str) -> None:
    """The same bytes each time."""
    with rc_context({"svg.hashsalt": "vtw_kernels"}):
        axes.figure.savefig(IMAGES / name, metadata={"Date": None})


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str = "", colour: str = GREY) -> None:
    shape = FancyBboxPatch(
        (x + 0.06, y + 0.06), width - 0.12, height - 0.12, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=colour, edgecolor="none", alpha=0.85,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black", "lw": 1})


def draw_forward() -> None:
    """A prefill whose visual tokens leave before layer 2 of 4, and the cache that it leaves."""
    axes = blank(9, 4.6, 20, 10)
    kinds = "TTVVVVVTTT"
    for layer in range(4):
        rows = [i for i, kind in enumerate(kinds) if layer < 2 or kind == "T"]
        y = 8 - 2 * layer
        for place, i in enumerate(rows):
            box(axes, place, y, 1, 1, str(i), ORANGE if kinds[i] == "V" else BLUE)
        axes.text(-0.3, y + 0.5, f"layer {layer}", ha="right", va="center", fontsize=9)
        for place, i in enumerate(rows):
            box(axes, 12.4 + 0.6 * place, y + 0.2, 0.6, 0.6, "", ORANGE if kinds[i] == "V" else BLUE)
    axes.text(0, 5.4, "plan: rows 0 1 7 8 9 go on", fontsize=9, va="center", color=GREEN)
    axes.axhline(5.5, 0.32, 0.97, color=GREEN, linestyle=":", lw=1.5)
    axes.text(12.4, 0.9, "keys and values that are kept", fontsize=9, va="center")
    axes.text(0, 0.9, "rows that a layer runs on (blue: text, orange: visual)", fontsize=9, va="center")
    axes.set(xlim=(-2, 19), ylim=(9.4, 0.3))
    save(axes, "forward.svg")


def draw_compaction() -> None:
    """Which row goes where, out of place."""
    axes = blank(8, 3, 12, 4)
    kept = [0, 1, 7, 8, 9]
    for i in range(10):
        box(axes, i, 0.4, 1, 1, str(i), BLUE if i in kept else ORANGE)
    for j in range(10):
        box(axes, j, 2.6, 1, 1, str(kept[j]) if j < len(kept) else "0", BLUE if j < len(kept) else GREY)
    for j, i in enumerate(kept):
        arrow(axes, (i + 0.5, 1.4), (j + 0.5, 2.6))
    axes.text(10.2, 0.9, "keep = T T F F F F F T T T", fontsize=8, va="center")
    axes.text(10.2, 3.1, "source = 0 1 7 8 9 -1 -1 -1 -1 -1", fontsize=8, va="center")
    axes.set(xlim=(0, 15), ylim=(4, 0))
    save(axes, "compaction.svg")


def draw_kl() -> None:
    """Two rows of logits, in parts: each gives five numbers, which merge in pairs."""
    axes = blank(8, 3.4, 16, 6)
    for part in range(4):
        box(axes, 4 * part, 0.2, 4, 0.8, f"p[{part}]", BLUE)
        box(axes, 4 * part, 1.0, 4, 0.8, f"q[{part}]", ORANGE)
        box(axes, 4 * part + 0.6, 2.4, 2.8, 0.8, "$m_p\\ z_p\\ a\\ m_q\\ z_q$", GREY)
        arrow(axes, (4 * part + 2, 1.8), (4 * part + 2, 2.4))
        arrow(axes, (4 * part + 2, 3.2), (4 if part < 2 else 12, 4.0))
    for pair in range(2):
        box(axes, 8 * pair + 2.6, 4.0, 2.8, 0.8, "merge", GREEN)
        arrow(axes, (8 * pair + 4, 4.8), (8, 5.4))
    box(axes, 5, 5.4, 6, 0.9, "KL = $a/z_p - (m_p + \\ln z_p) + (m_q + \\ln z_q)$", RED)
    axes.set(xlim=(0, 16), ylim=(6.4, 0))
    save(axes, "kl.svg")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for draw in (draw_layers, draw_forward, draw_compaction, draw_kl):
        draw()
    draw_policies("digits", columns=4)
    draw_policies("smollm2", columns=5)
    draw_pruning()
