"""``vtw-kernels bench``: the models that benchmarks are shaped like, and how runs are started, reported and compared.

The benchmarks themselves are in ``benchmarks/``, which an installed package has inside it. A run is what
pytest-benchmark writes as JSON.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch

from vtw_kernels.extras import require

OURS, ROOF = "vtw_kernels", "roof"
BOUNDS = (ROOF, "ideal")  # rows that are no peers: what cannot be beaten
OPS = (
    "plan_compaction",
    "compact",
    "compact_",
    "compact_paged_",
    "expand",
    "kl_divergence",
    "kl_divergence_loss",
    "kl_state",
    "merge_kl_states",
    "linear_kl_divergence",
    "withdraw",
    "search",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A model's decoder, and a prompt of it: text tokens before the visual ones, those, and text tokens after them."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    before: int
    visual: int
    after: int
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        return self.before + self.visual + self.after

    @property
    def text(self) -> int:
        return self.before + self.after


# Decoders as in the config.json of each model: Vicuna 7B and 13B v1.5, Qwen2.5 7B, InternLM2.5 7B. Visual tokens: 24 x
# 24 patches; five times that, LLaVA-NeXT's most; an image of 1568 x 952 at 28 x 28 pixels a token; 256 for each of 12
# tiles and the thumbnail; and 64 pairs of frames of 756 x 504.
MODELS = {
    model.name: model
    for model in (
        Model("llava-1.5-7b", 32, 32, 32, 4096, 11_008, 32_000, 35, 576, 50),
        Model("llava-1.5-13b", 40, 40, 40, 5120, 13_824, 32_000, 35, 576, 50),
        Model("llava-next-7b", 32, 32, 32, 4096, 11_008, 32_000, 35, 2880, 50),
        Model("qwen2.5-vl-7b", 28, 28, 4, 3584, 18_944, 152_064, 16, 1904, 128),
        Model("internvl2-8b", 32, 32, 8, 4096, 14_336, 92_553, 35, 3328, 50),
        Model("long-video", 28, 28, 4, 3584, 18_944, 152_064, 16, 31_104, 880),
    )
}


# Runs.


def find_benchmarks() -> Path:
    """The folder: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "benchmarks", package.parent / "benchmarks"):
        if (folder / "harness.py").exists():
            return folder
    raise OSError(f"benchmarks/ is neither in {package} nor beside it; install vtw_kernels again")


def run_benchmarks(
    device: str,
    ops: Sequence[str] = (),
    models: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    json_path: Path | None = None,
    pytest_arguments: Sequence[str] = (),
) -> int:
    """Runs ``pytest benchmarks/``. Returns its exit code; 5 means that nothing was chosen.

    Raises:
        ImportError: a package of the extra ``bench`` is missing.
        OSError: without the folder that ``json_path`` is in.
    """
    require("bench", "bench")
    import pytest

    folder = find_benchmarks()
    # No configuration of the current directory is for these tests.
    arguments = ["-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-q", "--disable-warnings"]
    arguments += ["--benchmark-quiet", "--benchmark-storage", "file://.", "--device", device]
    for option, values in (("--op", ops), ("--model-shape", models), ("--dtype", dtypes)):
        for value in values:
            arguments += [option, value]
    if json_path is not None:
        if not json_path.parent.is_dir():
            raise OSError(f"--json: expected a file in a folder that exists, got {json_path}")
        arguments += ["--benchmark-json", str(json_path)]
    return int(pytest.main([*arguments, *pytest_arguments, *map(str, sorted(folder.glob("bench_*.py")))]))


def read_run(path: Path) -> dict:
    try:
        run = json.loads(path.read_text())
        for bench in run["benchmarks"]:
            bench["stats"]["median"], bench["stats"]["iqr"], bench["fullname"], bench["name"]
        run["machine_info"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected what vtw-kernels bench --json writes, got {error!r}") from error
    return run


def test_of(bench: dict) -> str:
    """File and function: where the folder is does not matter."""
    return PurePath(bench["fullname"].partition("[")[0]).name


def peer_of(bench: dict) -> str:
    return (bench["params"] or {}).get("peer", OURS)


def is_peer(name: str) -> bool:
    return name not in BOUNDS and not name.startswith(OURS)


def groups_of(run: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """By test and case: the benchmark of each peer."""
    groups = defaultdict(dict)
    for bench in run["benchmarks"]:
        groups[test_of(bench), bench["group"] or bench["name"]][peer_of(bench)] = bench
    return groups


# Tables in Markdown, padded so that they can also be read as they are.


def seconds(t: float) -> str:
    return f"{t * 1e6:.1f} us" if t < 1e-3 else f"{t * 1e3:.2f} ms"


def size(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right; columns without any content are left out."""
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    cells = [[row[i] for i in used] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells]
    return [
        lines[0],
        "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|",
    ] + lines[1:]


COLUMNS = ["", "median", "IQR", "ratio", "GB/s", "of roof", "launches", "extra memory", "eager", "mode"]


def row_of(bench: dict, ours: float | None) -> list[str]:
    info, stats = bench["extra_info"], bench["stats"]

    def cell(key: str, show) -> str:
        return show(info[key]) if info.get(key) is not None else ""

    return [
        peer_of(bench),
        seconds(stats["median"]),
        seconds(stats["iqr"]),
        f"{stats['median'] / ours:.2f}x" if ours else "",
        cell("gb_per_second", "{:.1f}".format),
        cell("percent_of_roof", lambda percent: f"{percent:.0f} %" + above_roof(percent, info)),
        cell("launches", str),
        cell("peak_extra_bytes", size),
        cell("eager_seconds", seconds),
        cell("mode", str),
    ]


def above_roof(percent: float, info: dict) -> str:
    """What it means to be faster than the roof: the speeds of memory, and of a product, are those measured here."""
    if percent <= 100:
        return ""
    return ", faster than the product measured" if info.get("flops") else ", from the cache"


def best_peers(run: dict) -> dict[str, list[tuple[float, str, str]]]:
    """By test: for each case the time of the best peer, divided by ours; that peer; and the case."""
    ratios = defaultdict(list)
    for (test, group), peers in groups_of(run).items():
        others = [(bench["stats"]["median"], peer) for peer, bench in peers.items() if is_peer(peer)]
        if OURS in peers and others:
            time, peer = min(others)
            ratios[test].append((time / peers[OURS]["stats"]["median"], peer, group))
    return ratios


def machine_line(machine: dict) -> str:
    parts = [machine.get("gpu") or machine.get("cpu", {}).get("brand_raw"), f"torch {machine.get('torch')}"]
    speed = machine.get("bandwidth_gb_per_second")
    if speed:
        parts.append(f"{speed['copy']:.1f} GB/s copied (read + written), {speed['read']:.1f} GB/s read")
    parts += [f"{x:.2f} TFLOP/s in {dtype}" for dtype, x in machine.get("matmul_tflop_per_second", {}).items()]
    return "; ".join(part for part in parts if part)


def report(run: dict) -> str:
    """Markdown: every case with its peers, then how far the best peer of each test is from ours."""
    lines = [machine_line(run["machine_info"])]
    lines += ["`of roof`: of what these speeds would allow.", ""]
    for (_, group), peers in groups_of(run).items():
        ours = peers[OURS]["stats"]["median"] if OURS in peers else None
        lines += [f"### {group}", "", *table(COLUMNS, [row_of(bench, ours) for bench in peers.values()]), ""]
    rows = []
    for test, ratios in sorted(best_peers(run).items()):
        (worst, peer, group), best = min(ratios), max(ratios)[0]
        rows.append([test, str(len(ratios)), f"{best:.2f}x", f"{worst:.2f}x", f"{peer}; {group}"])
    if rows:
        lines += [f"### Time of the best peer, divided by that of {OURS}", ""]
        lines += table(["", "cases", "best", "worst", "the worst"], rows)
    return "\n".join(lines) + "\n"


def cases_of(run: dict) -> dict[tuple[str, str], dict]:
    return {(test_of(bench), bench["name"]): bench for bench in run["benchmarks"]}


def change_of(before: dict, after: dict) -> tuple[float, float, float]:
    """Both medians, and the two interquartile ranges combined."""
    x, y = before["stats"], after["stats"]
    return x["median"], y["median"], math.hypot(x["iqr"], y["iqr"])


def slower(before: Path, after: Path, percent: float) -> list[str]:
    """The cases in which the median of vtw_kernels grew by more than the spread, as of ``compare``, and by more than so
    many percent, in words.

    Raises:
        OSError, ValueError: a file that is not there, or not a run; runs without a case of vtw_kernels in common.
    """
    if not percent >= 0:
        raise ValueError(f"--fail-if-slower: expected a percentage of at least 0, got {percent}")
    a, b = (cases_of(read_run(path)) for path in (before, after))
    ours = [key for key in a if key in b and peer_of(a[key]).startswith(OURS)]
    if not ours:
        raise ValueError(f"--compare: expected runs with cases of {OURS} in common, got none in {before} and {after}")
    found = []
    for key in ours:
        x, y, spread = change_of(a[key], b[key])
        if y - x > max(spread, x * percent / 100):
            name = f"{a[key]['group'] or a[key]['name']}: {peer_of(a[key])}"
            found.append(f"{name}: {seconds(x)} before, {seconds(y)} after ({100 * (y - x) / x:+.1f} %)")
    return found


def compare(before: Path, after: Path) -> str:
    """Markdown: which medians of two runs differ by more than their spread.

    A difference counts when it exceeds the two interquartile ranges combined, sqrt(IQR_a² + IQR_b²).

    Raises:
        OSError, ValueError: a file that is not there, or not a run.
    """
    runs = [read_run(path) for path in (before, after)]
    a, b = (cases_of(run) for run in runs)
    lines = [
        f"a: {before}: {machine_line(runs[0]['machine_info'])}",
        f"b: {after}: {machine_line(runs[1]['machine_info'])}",
    ]
    for key in ("device", "gpu", "driver", "cuda", "torch", "triton", "threads"):
        values = [run["machine_info"].get(key) for run in runs]
        if values[0] != values[1]:
            lines.append(f"The runs differ in {key}: {values[0]} and {values[1]}.")
    rows, moved = [], 0
    shared = [key for key in a if key in b]
    for key in shared:
        x, y, spread = change_of(a[key], b[key])
        if abs(y - x) > spread:
            verdict = "faster" if y < x else "slower"
            moved += peer_of(a[key]) == ROOF
            case = a[key]["group"] or a[key]["name"]
            percent = [f"{100 * change / x:+.1f} %" for change in (y - x, spread)]
            rows.append([f"{case}: {peer_of(a[key])}", seconds(x), seconds(y), percent[0], percent[1][1:], verdict])
    lines += ["", f"{len(rows)} of {len(shared)} differ by more than their combined spread, sqrt(IQR_a² + IQR_b²).", ""]
    if moved:
        lines += [f"{moved} of these are a roof, a plain copy or product: there the machine itself has changed.", ""]
    if rows:
        lines += table(["", "a", "b", "change", "spread", "b is"], rows) + [""]
    for name, run, other in (("a", runs[0], b), ("b", runs[1], a)):
        for (test, group), peers in groups_of(run).items():
            missing = [peer for peer, bench in peers.items() if (test, bench["name"]) not in other]
            if missing:
                lines.append(f"Only in {name}: {test}: {group}: {', '.join(missing)}")
    return "\n".join(lines) + "\n"


# Plots.


def plot(run: dict, stem: Path) -> list[Path]:
    """Writes ``STEM-roofline.png`` and ``STEM-ratio.png``, each only where there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    paths = [Path(f"{stem}-roofline.png"), Path(f"{stem}-ratio.png")]
    return [path for path, draw in zip(paths, (plot_roofline, plot_ratios)) if draw(run, path)]


def plot_roofline(run: dict, path: Path) -> bool:
    """Speed over size: bytes under the bandwidth measured, and where there is arithmetic, that under the product's."""
    import matplotlib.pyplot as plt

    ours = [(test, bench) for (test, _), peers in groups_of(run).items() if (bench := peers.get(OURS))]
    machine, panels = run["machine_info"], []
    copy_and_read = machine.get("bandwidth_gb_per_second", {})
    panels.append(("bytes", 1e9, "bytes moved", "GB/s", {f"{k}: {v:.0f} GB/s": v for k, v in copy_and_read.items()}))
    matmul = machine.get("matmul_tflop_per_second", {})
    panels.append(("flops", 1e12, "FLOP", "TFLOP/s", {f"product, {k}: {v:.2f} TFLOP/s": v for k, v in matmul.items()}))
    panels = [panel for panel in panels if any(bench["extra_info"].get(panel[0]) for _, bench in ours)]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, (key, unit, x_label, y_label, roofs) in zip(axes[0], panels):
        points = defaultdict(list)
        for test, bench in ours:
            if work := bench["extra_info"].get(key):
                points[test].append((work, work / bench["stats"]["median"] / unit))
        for (label, height), style in zip(roofs.items(), ("-", "--", ":", "-.")):
            axis.axhline(height, color="black", linestyle=style, linewidth=1, label=label)
        for test, xy in points.items():
            axis.plot(*zip(*sorted(xy)), "o", label=test.removeprefix("bench_").replace(".py::test_", ": "))
        axis.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axis.legend(fontsize="small")
    figure.suptitle(machine.get("gpu") or machine.get("cpu", {}).get("brand_raw", ""))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def plot_ratios(run: dict, path: Path) -> bool:
    """A line for each case, a dot on it for each peer: its time divided by ours."""
    import matplotlib.pyplot as plt

    groups = [(group, peers) for (_, group), peers in groups_of(run).items() if OURS in peers and len(peers) > 1]
    if not groups:
        return False
    dots = defaultdict(list)
    for y, (_, peers) in enumerate(groups):
        for peer, bench in peers.items():
            if peer != OURS:
                dots[peer].append((bench["stats"]["median"] / peers[OURS]["stats"]["median"], y))
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.22 * len(groups)), layout="constrained")
    axis.axvline(1, color="black", linewidth=1)
    for i, (peer, xy) in enumerate(sorted(dots.items())):
        style = {"marker": "|", "color": "black"} if peer == ROOF else {"marker": "osv^D<>P"[i // 10 % 8]}
        axis.scatter(*zip(*xy), label=peer, **style)
    axis.set(xscale="log", xlabel=f"time divided by that of {OURS}", ylim=(len(groups) - 0.5, -0.5))
    axis.set_yticks(range(len(groups)), [group for group, _ in groups], fontsize="x-small")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.grid(axis="y", linewidth=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
