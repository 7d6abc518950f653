"""``vtw-kernels demo``: a small real model answers questions about images, with and without its visual tokens."""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration

from vtw_kernels.demo.data import MAX_NEW_TOKENS, Batch, load_batches, load_model, load_tokenizer, load_training_curves
from vtw_kernels.integration import withdraw
from vtw_kernels.layer_search import find_layer

BATCH = 32
SHOWN = 4
TIMED_RUNS = 15
SHADES = " .:-=+*#%@"


def run(output: Path) -> None:
    """Searches the withdrawal layer on the calibration split, then measures it on the test split.

    Prints KL and accuracy per layer, the chosen layer, accuracy, prefill time and KV bytes before and after, and writes
    ``kl.png`` and ``vtw.json`` to ``output``.
    """
    console = Console()
    model, tokenizer = load_model(), load_tokenizer()
    layers = model.config.text_config.num_hidden_layers
    calibration, test = load_batches("calibration", BATCH), load_batches("test", BATCH)

    search = find_layer(model, [batch.inputs for batch in calibration])
    accuracy = {layer: 0.0 for layer in [*search.candidates, layers]}
    for layer in track(accuracy, "answering the test split at every layer", console=console):
        accuracy[layer] = correct_share(answer(model, tokenizer, test, layer), test)

    usual = load_training_curves()["as usual"]["test"]
    table = Table(
        "withdrawn before layer", "KL (nats)", "accuracy", "KL, trained as usual", "accuracy, trained as usual", "",
        title=f"{len(accuracy)} ways to withdraw the image of {sum(len(batch.answers) for batch in test)} questions",
        caption="This model was trained with withdrawal before layer 4 in half of its steps; trained as usual, the "
        "same model needs its image to the end.",
    )  # fmt: skip
    for layer, kl in zip(search.candidates, search.kl.tolist()):
        other = usual["layers"][str(layer)]
        note = "chosen" if layer == search.layer else ""
        cells = f"{kl:.2g}", f"{accuracy[layer]:.1%}", f"{other['kl']:.2g}", f"{other['accuracy']['all']:.1%}", note
        table.add_row(str(layer), *cells)
    table.add_row(
        f"{layers} (never)", "0", f"{accuracy[layers]:.1%}", "0", f"{usual['full']['all']:.1%}", "plain model"
    )
    console.print(table)
    console.print(search.verdict())

    output.mkdir(parents=True, exist_ok=True)
    search.plot(output / "kl.png")
    search.save(output / "vtw.json")
    console.print(f"written: {output / 'kl.png'}, {output / 'vtw.json'}")
    if search.layer is None:
        return

    show_answers(console, model, tokenizer, test[0], [layers, search.layer, 1])
    (time_before, time_after), (bytes_before, bytes_after) = prefill(model, test[0], [layers, search.layer])
    costs = Table("", "before", "after", "", title=f"Withdrawing before layer {search.layer} of {layers}")
    costs.add_row("accuracy, test split", f"{accuracy[layers]:.1%}", f"{accuracy[search.layer]:.1%}", "")
    costs.add_row(
        f"prefill, {BATCH} questions",
        f"{time_before * 1e3:.1f} ms",
        f"{time_after * 1e3:.1f} ms",
        f"{time_before / time_after:.2f}x",
    )
    costs.add_row(
        "KV cache", f"{bytes_before / 1e6:.2f} MB", f"{bytes_after / 1e6:.2f} MB", f"{bytes_after / bytes_before:.0%}"
    )
    console.print(costs)


def answer(model: LlavaForConditionalGeneration, tokenizer, batches: list[Batch], layer: int) -> list[str]:
    """Greedy answers with the visual tokens withdrawn before ``layer``."""
    answers = []
    with withdraw(model, layer), torch.inference_mode():
        for batch in batches:
            tokens = model.generate(**batch.inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            new = tokens[:, batch.inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


def correct_share(answers: list[str], batches: list[Batch]) -> float:
    wanted = [text for batch in batches for text in batch.answers]
    return sum(given == right for given, right in zip(answers, wanted)) / len(wanted)


def show_answers(console: Console, model, tokenizer, batch: Batch, layers: list[int]) -> None:
    """A few images with their questions, and the answers when withdrawn before each of ``layers``."""
    plain, chosen, first = (answer(model, tokenizer, [batch], layer) for layer in layers)
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
    """A grey image in the terminal, two rows of pixels per line: half blocks or, in plain text, shades."""
    text = Text()
    for upper, lower in zip(image[::2].tolist(), image[1::2].tolist()):
        for a, b in zip(upper, lower):
            if in_colour:
                text.append("▀", style=f"rgb({a},{a},{a}) on rgb({b},{b},{b})")
            else:
                text.append(SHADES[(a + b) * len(SHADES) // 512])
        text.append("\n")
    return text


@torch.inference_mode()
def prefill(model: LlavaForConditionalGeneration, batch: Batch, layers: list[int]) -> tuple[list[float], list[int]]:
    """Median seconds and KV bytes of one prefill for each layer; the layers take turns, so drift hits all alike."""
    seconds: dict[int, list[float]] = {layer: [] for layer in layers}
    sizes: dict[int, int] = {}
    for _ in range(TIMED_RUNS):
        for layer in layers:
            with withdraw(model, layer):
                begin = time.perf_counter()
                cache = model(
                    **batch.inputs, past_key_values=DynamicCache(config=model.config.text_config)
                ).past_key_values
                seconds[layer].append(time.perf_counter() - begin)
                sizes[layer] = cache_bytes(cache)
    return [statistics.median(seconds[layer]) for layer in layers], [sizes[layer] for layer in layers]


def cache_bytes(cache: Cache) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
