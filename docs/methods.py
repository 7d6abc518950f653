"""What each method costs on the demo's models: measures it, and writes the table of ``methods.md``, which the README
shows too. Some minutes on two CPU cores.

Accuracy: share of the test split's questions that are answered exactly, greedily. KL: mean of KL(method‖plain) at the
first token of the answer, in nats. Cache: share of the bytes of keys and values that is left after the prefill.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import DynamicCache

import vtw_kernels as vtw
from vtw_kernels.demo import data, smollm2
from vtw_kernels.demo.data import Batch
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.demo.run import cache_bytes
from vtw_kernels.integration.arguments import Arguments

TABLE = Path(__file__).parent / "methods.md"
MODELS = {"digits": (data, 1400), "SmolLM2": (smollm2, 192)}  # and how many questions of the test split
VTW, FASTV, PYRAMIDDROP = (
    f"[{name}](https://arxiv.org/abs/{paper})"
    for name, paper in (("VTW", "2405.05803"), ("FastV", "2403.06764"), ("PyramidDrop", "2410.17247"))
)


def methods(layer: int, layers: int) -> dict[str, int | list[vtw.Policy]]:
    """By what leaves and who says so. ``layer``: what the search found, of so many ``layers``."""
    return {
        "nothing | | ": layers,
        f"all visual tokens, at the layer that `find_layer` finds | {VTW} | `Withdraw(K)`": layer,
        f"half of them before layer 2, the least attended | {FASTV} | `TopAttention(2, 0.5)`": [
            vtw.TopAttention(2, 0.5)
        ],
        f"half of what is there at each quarter of the layers | {PYRAMIDDROP} | `[TopAttention(k, 0.5), ...]`": [
            vtw.TopAttention(quarter * layers // 4, 0.5) for quarter in (1, 2, 3)
        ],
        "half before layer 2, drawn at random | (to compare with) | `RandomVisual(2, 0.5)`": [vtw.RandomVisual(2, 0.5)],
        "the least attended half before layer 2, the rest at the layer found | both | "
        "`[TopAttention(2, 0.5), Withdraw(K)]`": [vtw.TopAttention(2, 0.5), vtw.Withdraw(layer)],
    }


@torch.inference_mode()
def kv_bytes(model, batch: Batch, policy: int | list[vtw.Policy]) -> int:
    cache = DynamicCache(config=model.config.text_config)
    with vtw.withdraw(model, policy):
        model(**batch.inputs, **{Arguments(model).cache: cache})
    return cache_bytes(cache)


def measure(name: str) -> tuple[str, dict[str, str]]:
    """The model in words, and by method: accuracy, KL and what is left of the cache."""
    source, questions = MODELS[name]
    model, tokenizer = source.load_model(), source.load_tokenizer()
    test = source.load_batches("test", 32, questions)
    layers = model.config.text_config.num_hidden_layers
    layer = vtw.find_layer(model, [batch.inputs for batch in source.load_batches("calibration", 32)]).layer
    plain, plain_bytes, cells = None, kv_bytes(model, test[0], layers), {}
    for method, policy in methods(layer, layers).items():
        answers, first = answer(model, tokenizer, test, policy)
        plain = first if plain is None else plain
        kl = F.kl_div(plain, first, log_target=True, reduction="batchmean").item()
        left = kv_bytes(model, test[0], policy) / plain_bytes
        cells[method] = f"{accuracy(answers, test)['all']:.1%}<br>KL {abs(kl):.2g}<br>cache {left:.0%}"
        print(name, method, cells[method], sep=": ", flush=True)
    return f"{name}, K = {layer} of {layers}", cells


def main() -> None:
    columns = [measure(name) for name in MODELS]
    lines = [
        "| what leaves, when | by | policy | " + " | ".join(title for title, _ in columns) + " |",
        "|---|---|---|" + "--:|" * len(columns),
    ]
    for method in columns[0][1]:
        lines.append(f"| {method} | " + " | ".join(cells[method] for _, cells in columns) + " |")
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
