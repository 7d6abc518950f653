"""What each method costs on the demo's models: measures it, and writes the table of ``methods.md``, which the README
shows too. Some minutes on two CPU cores.

Accuracy: share of the test split's questions that are answered exactly, greedily. KL: mean of KL(method‖plain) at the
first token of the answer, in nats. Cache: share of the bytes of keys and values that is left after the prefill of 32
prompts, each by itself.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

import vtw_kernels as vtw
from vtw_kernels.demo import data, smollm2
from vtw_kernels.demo.data import Batch
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.demo.run import cache_bytes
from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.layer_search.settings import Setting

TABLE = Path(__file__).parent / "methods.md"
# How many questions of the test split there are, and before which layer the first gate is.
MODELS = {"digits": (data, 1400, 1), "SmolLM2": (smollm2, 192, 14)}
TRAINED = 320  # how many questions gates are trained with, a fifth of them held out
PAPERS = {"VTW": "2405.05803", "DyVTE": "2411.19628", "FastV": "2403.06764", "PyramidDrop": "2410.17247"}
PAPERS |= {"YOPO": "2410.06169", "EAS": "2403.15226"}
VTW, DYVTE, FASTV, PYRAMIDDROP, YOPO, EAS = (
    f"[{name}](https://arxiv.org/abs/{paper})" for name, paper in PAPERS.items()
)


Method = int | vtw.Policy | list[vtw.Policy] | vtw.SkipAttention | Callable


def methods(layer: int, layers: int, gates: vtw.ExitRouters, heads: Tensor, skipped: list[int]) -> dict[str, Method]:
    """By what is dropped, and the paper. ``layer``: what the search found, of so many ``layers``; ``heads``: those
    with work on visual tokens; ``skipped``: whose attention can be."""
    pruning = vtw.VisualPruning(heads=heads, window=3, ffn_ratio=2)
    return {
        "nothing | | ": layers,
        f"all visual tokens, at the layer that `find_layer` finds | {VTW} | `Withdraw(K)`": layer,
        f"all of them, where a gate says so of the prompt | {DYVTE} | `ExitRouters.load(path)`": gates,
        f"half of them before layer 2, the least attended | {FASTV} | `TopAttention(2, 0.5)`": [
            vtw.TopAttention(2, 0.5)
        ],
        f"half of what is there at each quarter of the layers | {PYRAMIDDROP} | `[TopAttention(k, 0.5), ...]`": [
            vtw.TopAttention(quarter * layers // 4, 0.5) for quarter in (1, 2, 3)
        ],
        "half before layer 2, drawn at random | (to compare with) | `RandomVisual(2, 0.5)`": [vtw.RandomVisual(2, 0.5)],
        "the least attended half before layer 2, the rest at the layer found | both | "
        "`[TopAttention(2, 0.5), Withdraw(K)]`": [vtw.TopAttention(2, 0.5), vtw.Withdraw(layer)],
        f"nothing; visual tokens go through half of the heads and of the MLP, and see only their neighbours | {YOPO} | "
        "`prune_visual(model, VisualPruning(heads, 3, 2))`": lambda model: vtw.prune_visual(model, pruning),
        f"nothing; an eighth of the layers skip attention | {EAS} | `SkipAttention(layers)`": vtw.SkipAttention(
            skipped
        ),
    }


@torch.inference_mode()
def kv_bytes(model, prompts: list[Batch], method: Method) -> int:
    """Of prompts each by itself."""
    caches = [DynamicCache(config=model.config.text_config) for _ in prompts]
    with Setting.of(model, method, None).under(model, None, None):
        for prompt, cache in zip(prompts, caches):
            model(**prompt.inputs, **{Arguments(model).cache: cache})
    return sum(map(cache_bytes, caches))


def measure(name: str) -> tuple[str, dict[str, str]]:
    """The model in words, and by method: accuracy, KL and what is left of the cache."""
    source, questions, first = MODELS[name]
    model, tokenizer = source.load_model(), source.load_tokenizer()
    test, single = source.load_batches("test", 32, questions), source.load_batches("test", 1, 32)
    layers = model.config.text_config.num_hidden_layers
    layer = vtw.find_layer(model, [batch.inputs for batch in source.load_batches("calibration", 32)]).layer
    calibration = [batch.inputs for batch in source.load_batches("calibration", 16, TRAINED)]
    gates = vtw.train_exit(model, calibration, positions="last", first=first).routers
    skipped = vtw.find_skippable(model, calibration[:2], layers // 8, bandit=None).layers
    plain, plain_bytes, cells = None, kv_bytes(model, single, layers), {}
    heads = vtw.find_visual_heads(model, calibration[:6], keep=0.5).heads
    for method, setting in methods(layer, layers, gates, heads, skipped).items():
        answers, first = answer(model, tokenizer, test, setting)
        plain = first if plain is None else plain
        kl = F.kl_div(plain, first, log_target=True, reduction="batchmean").item()
        left = kv_bytes(model, single, setting) / plain_bytes
        cells[method] = f"{accuracy(answers, test)['all']:.1%}<br>KL {abs(kl):.2g}<br>cache {left:.0%}"
        print(name, method, cells[method], sep=": ", flush=True)
    return f"{name}, K = {layer} of {layers}", cells


def main() -> None:
    columns = [measure(name) for name in MODELS]
    lines = [
        "| what is dropped, and where | by | policy | " + " | ".join(title for title, _ in columns) + " |",
        "|---|---|---|" + "--:|" * len(columns),
    ]
    for method in columns[0][1]:
        lines.append(f"| {method} | " + " | ".join(cells[method] for _, cells in columns) + " |")
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
