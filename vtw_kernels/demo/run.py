"""``vtw-kernels demo``: a small real model answers questions about images, with and without its visual tokens."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration

from vtw_kernels.demo import data, smollm2
from vtw_kernels.demo.data import Batch
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.integration import withdraw
from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.pruning.cache import stores_of
from vtw_kernels.layer_search import find_layer

MODELS = {"digits": data, "smollm2": smollm2}
BATCH = 32
SHOWN = 4
GENERATED = 32
SHADES = " .:-=+*#%@"


def run(output: Path, name: str = "digits") -> None:
    """Searches the withdrawal layer on the calibration split, then measures it on the test split.

    Prints KL and accuracy per layer, the chosen layer, accuracy, prefill time and KV bytes before and after, and writes
    ``kl.png`` and ``vtw.json`` to ``output``. For "smollm2" also accuracy by kind of question, the time of generation,
    and ``accuracy.png``.

    Raises:
        ImportError: a package that "smollm2" needs is missing; before anything is computed.
    """
    console, source = Console(), MODELS[name]
    model, tokenizer = source.load_model(), source.load_tokenizer()
    layers = model.config.text_config.num_hidden_layers
    calibration, test = source.load_batches("calibration", BATCH), source.load_batches("test", BATCH)

    search = find_layer(model, [batch.inputs for batch in calibration])
    shares: dict[int, dict[str, float]] = {layer: {} for layer in [*search.candidates, layers]}
    for layer in track(shares, "answering the test split at every layer", console=console):
        shares[layer] = accuracy(answer(model, tokenizer, test, layer)[0], test)

    other = source.load_training_curves()[source.OTHER]["test"]
    table = Table(
        "withdrawn before layer", "KL (nats)", "accuracy",
        f"KL, trained {source.OTHER}", f"accuracy, trained {source.OTHER}", "",
        title=f"{len(shares)} ways to withdraw the image of {sum(len(batch.answers) for batch in test)} questions",
        caption=source.CAPTION,
    )  # fmt: skip
    for layer, kl in zip(search.candidates, search.kl.tolist()):
        row = other["layers"][str(layer)]
        note = "chosen" if layer == search.layer else ""
        cells = f"{kl:.2g}", f"{shares[layer]['all']:.1%}", f"{row['kl']:.2g}", f"{row['accuracy']['all']:.1%}"
        table.add_row(str(layer), *cells, note)
    table.add_row(
        f"{layers} (never)", "0", f"{shares[layers]['all']:.1%}", "0", f"{other['full']['all']:.1%}", "plain model"
    )
    console.print(table)
    if source is smollm2:
        show_kinds(console, shares)
    console.print(search.verdict())

    output.mkdir(parents=True, exist_ok=True)
    search.plot(output / "kl.png")
    search.save(output / "vtw.json")
    written = [output / "kl.png", output / "vtw.json"]
    if source is smollm2:
        plot_accuracy(source.load_training_curves(), shares, output / "accuracy.png")
        written.append(output / "accuracy.png")
    console.print(f"written: {', '.join(map(str, written))}")
    if search.layer is None:
        return

    show_answers(console, model, tokenizer, test[0], [layers, search.layer, 1])
    compared = [layers, search.layer]
    (time_before, time_after), (bytes_before, bytes_after) = prefill(model, test[0], compared, source.TIMED_RUNS)
    costs = Table("", "before", "after", "", title=f"Withdrawing before layer {search.layer} of {layers}")
    costs.add_row("accuracy, test split", f"{shares[layers]['all']:.1%}", f"{shares[search.layer]['all']:.1%}", "")
    costs.add_row(
        f"prefill, {BATCH} questions",
        f"{time_before * 1e3:.1f} ms",
        f"{time_after * 1e3:.1f} ms",
        f"{time_before / time_after:.2f}x",
    )
    if source is smollm2:
        before, after = generation(model, test[0], compared, source.TIMED_RUNS)
        costs.add_row(
            f"generation, {GENERATED} tokens each", f"{before:.2f} s", f"{after:.2f} s", f"{before / after:.2f}x"
        )
    costs.add_row(
        "KV cache", f"{bytes_before / 1e6:.2f} MB", f"{bytes_after / 1e6:.2f} MB", f"{bytes_after / bytes_before:.0%}"
    )
    console.print(costs)


def show_kinds(console: Console, shares: dict[int, dict[str, float]]) -> None:
    """``shares``: accuracy by layer and kind of question."""
    kinds = list(next(iter(shares.values())))
    table = Table("withdrawn before layer", *kinds, title="Accuracy by kind of question")
    for layer, row in shares.items():
        table.add_row(str(layer), *(f"{row[kind]:.1%}" for kind in kinds))
    console.print(table)


def plot_accuracy(curves: dict, shares: dict[int, dict[str, float]], path: Path) -> None:
    """Accuracy over the layer: of both models as measured after training, and as just measured."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        rows = {int(layer): row["accuracy"]["all"] for layer, row in curve["test"]["layers"].items()}
        rows[len(rows) + 1] = curve["test"]["full"]["all"]
        axes.plot(list(rows), list(rows.values()), label=f"trained {name}, {curve['test']['questions']} questions")
    axes.plot(list(shares), [row["all"] for row in shares.values()], ".", label="this run")
    axes.set(xlabel="visual tokens withdrawn before layer", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def show_answers(console: Console, model, tokenizer, batch: Batch, layers: list[int]) -> None:
    """A few images with their questions, and the answers when withdrawn before each of ``layers``."""
    plain, chosen, first = (answer(model, tokenizer, [batch], layer)[0] for layer in layers)
    panels = []
    for i in range(SHOWN):
        lines = Text.assemble(
            f"{batch.questions[i]}\n",
            ("model: ", "dim"), f"{plain[i]}\n",
            (f"withdrawn before {layers[1]}: ", "dim"), f"{chosen[i]}\n",
            (f"withdrawn before {layers[2]}: ", "dim"), first[i],
        )  # fmt: skip
        panels.append(Panel(Group(draw(batch.images[i], console.color_system is not None), lines), width=38))
    console.print(Columns(panels))


def draw(image: np.ndarray, in_colour: bool) -> Text:
    """A grey or RGB image, uint8 [height, width] or [height, width, 3], in the terminal at most 32 columns wide, two
    rows of pixels per line: half blocks or, in plain text, shades of brightness."""
    text = Text()
    step = -(-image.shape[1] // 32)
    pixels = np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3))[::step, ::step]
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist()):
        for a, b in zip(upper, lower):
            if in_colour:
                text.append("▀", style="rgb({},{},{}) on rgb({},{},{})".format(*a, *b))
            else:
                text.append(SHADES[sum(a + b) * len(SHADES) // (6 * 256)])
        text.append("\n")
    return text


def take_turns(
    call: Callable[[], None], model: LlavaForConditionalGeneration, layers: list[int], runs: int
) -> list[float]:
    """Median seconds of ``call`` for each layer; the layers take turns, so drift hits all alike."""
    seconds: dict[int, list[float]] = {layer: [] for layer in layers}
    for _ in range(runs):
        for layer in layers:
            with withdraw(model, layer):
                begin = time.perf_counter()
                call()
                seconds[layer].append(time.perf_counter() - begin)
    return [statistics.median(seconds[layer]) for layer in layers]


@torch.inference_mode()
def prefill(
    model: LlavaForConditionalGeneration, batch: Batch, layers: list[int], runs: int
) -> tuple[list[float], list[int]]:
    """Median seconds and KV bytes of one prefill for each layer."""
    caches, cache_name = [], Arguments(model).cache

    def call() -> None:
        cache = DynamicCache(config=model.config.text_config)
        model(**batch.inputs, **{cache_name: cache})
        caches.append(cache)

    seconds = take_turns(call, model, layers, runs)
    return seconds, [cache_bytes(cache) for cache in caches[: len(layers)]]


@torch.inference_mode()
def generation(model: LlavaForConditionalGeneration, batch: Batch, layers: list[int], runs: int) -> list[float]:
    """Median seconds, with the prefill, of generating ``GENERATED`` tokens for each layer."""

    def call() -> None:
        model.generate(**batch.inputs, min_new_tokens=GENERATED, max_new_tokens=GENERATED, do_sample=False)

    return take_turns(call, model, layers, runs)


def cache_bytes(cache: Cache) -> int:
    layers = [layer for _, layer in stores_of(cache) if layer.is_initialized]
    return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
