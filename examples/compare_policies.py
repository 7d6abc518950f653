"""Which policy is best for a demo's model: fixed layers, FastV, PyramidDrop and a random choice on held-out questions.

    python examples/compare_policies.py --model digits --output compared

writes ``MODEL.json`` (a ``Comparison``), ``MODEL.html``, its report, ``MODEL-accuracy.json`` and ``.png``, and prints
for each policy how many rows of the prompt it saves, KL(withdrawn‖full) of the first token of the answer, and how many
answers are right, by kind of question. Accuracy is that of whole greedy answers.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import vtw_kernels as vtw
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.demo.run import BATCH, MODELS
from vtw_kernels.layer_search.scored import markdown


def policies_of(layers: int) -> dict[str, list[str]]:
    """By method, each policy as ``parse_policy`` takes it, for a decoder of so many layers."""
    places = sorted({max(1, layers * i // 8) for i in range(1, 8)})
    pyramid = [
        "+".join(f"top-attention:{max(1, layers * i // 8)}:0.5" for i in steps) for steps in ((1, 2, 3), (2, 4, 6))
    ]
    return {
        "fixed layer": [f"layer={k}" for k in places],
        "FastV": [f"top-attention:{k}:0.5" for k in places],
        "PyramidDrop": pyramid,
        "random": [f"random:{k}:0.5" for k in places],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="digits")
    parser.add_argument("--questions", type=int, help="only so many of the test split, the first")
    parser.add_argument("--output", type=Path, default=Path("compared"))
    options = parser.parse_args()

    source = MODELS[options.model]
    model, tokenizer = source.load_model(), source.load_tokenizer()
    limit = {} if options.questions is None else {"limit": options.questions}
    batches = source.load_batches("test", BATCH, **limit)
    kinds = [kind for batch in batches for kind in batch.kinds]
    layers = model.config.text_config.num_hidden_layers
    by_method = policies_of(layers)
    names = [name for policies in by_method.values() for name in policies]

    found = vtw.compare(model, [batch.inputs for batch in batches], names, groups=kinds, costed=0)
    options.output.mkdir(parents=True, exist_ok=True)
    found.save(options.output / f"{options.model}.json")
    found.report(options.output / f"{options.model}.html")
    right = {
        name: accuracy(answer(model, tokenizer, batches, vtw.parse_policy(name))[0], batches)
        for name in tqdm([f"layer={layers}", *names], "answers")
    }
    (options.output / f"{options.model}-accuracy.json").write_text(json.dumps(right, indent=1) + "\n")

    saved = dict(zip(names, found.saving().tolist())) | {f"layer={layers}": 0.0}
    values = dict(zip(names, found.kl.tolist())) | {f"layer={layers}": 0.0}
    front = found.pareto()
    columns = {
        "policy": list(right),
        "rows saved": [f"{saved[name]:.0%}" for name in right],
        "KL, nats": [f"{values[name]:.2g}" for name in right],
        **{kind: [f"{row[kind]:.1%}" for row in right.values()] for kind in right[names[0]]},
        "": ["the model as it is" if not saved[name] else "front" if name in front else "" for name in right],
    }
    print(markdown(columns) + "\n\n" + found.verdict())
    plot(options.output / f"{options.model}-accuracy.png", by_method, right, saved, right[f"layer={layers}"]["all"])


def plot(path: Path, by_method: dict[str, list[str]], right: dict, saved: dict[str, float], full: float) -> None:
    """Accuracy of all questions over the rows saved."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (method, names), marker in zip(by_method.items(), "os^D"):
        points = sorted((saved[name], right[name]["all"]) for name in names)
        axes.plot(*zip(*points), marker=marker, ms=5, lw=1, label=method)
    axes.axhline(full, color="grey", lw=1, linestyle="--", label="the model as it is")
    axes.set(xlabel="rows of all layers saved", ylabel="accuracy", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
