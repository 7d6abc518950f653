"""What skipped attention (EAS) costs a demo's model: more and more layers, with adapters in their place and without,
beside withdrawal.

    python examples/skip_attention.py --model digits     # half an hour; needs scikit-learn
    python examples/skip_attention.py --model smollm2    # an hour; needs the extra 'demo'

Layers are found greedily on the calibration split, and adapters are trained to give the answers to training questions.
Writes ``--output``: by setting, what is left of the decoder's FLOPs, of the bytes of the KV
cache and of a prefill's time (of four prompts, medians of runs that take turns), mean KL(skipped‖full) of the first
token of the answer in nats, and the share of right answers, whole and greedy.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from training_batches import BATCHES

import vtw_kernels as vtw
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.demo.run import MODELS
from vtw_kernels.layer_search.costs import measure_policies
from vtw_kernels.layer_search.scored import markdown

BATCH = 16


class Plan(NamedTuple):
    """counts: how many layers are skipped. searched: questions that they are found by. steps: of training, each with a
    batch. withdrawn: layers to withdraw before."""

    counts: tuple[int, ...]
    searched: int
    steps: int
    withdrawn: tuple[int, ...]


PLANS = {
    "digits": Plan((1, 2, 3, 4), 128, 400, (2, 3, 4, 5, 6, 7)),
    "smollm2": Plan((2, 4), 16, 100, (16, 20, 22, 24, 26, 28)),
}


def settings_of(model: nn.Module, tokenizer: Any, plan: Plan, name: str, searched: list[dict]) -> dict[str, Any]:
    """What is compared, by name."""
    found = vtw.find_skippable(model, searched, max(plan.counts), bandit=None)
    draw = BATCHES[name](tokenizer, BATCH)
    training = vtw.AdapterTraining(epochs=1, accumulate=1, held_out=0.0)
    batches = [draw() for _ in range(plan.steps)]
    settings: dict[str, Any] = {}
    for count in plan.counts:
        layers = sorted(found.greedy["layers"][:count])
        adapters = vtw.train_skip(model, batches, layers, training, positions="answer").adapters
        text = ", ".join(map(str, layers))
        settings |= {text: vtw.SkipAttention(layers), f"{text}, adapters": vtw.SkipAttention(adapters=adapters)}
    return settings | {f"layer={k}": k for k in plan.withdrawn}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Each number of skipped layers, and the withdrawal that takes as long; Markdown."""
    withdrawn = [x for x in rows if x.startswith("layer=")]
    skipped = [x for x in rows if f"{x}, adapters" in rows]
    nearest = [min(withdrawn, key=lambda x: abs(rows[x]["time"] - rows[text]["time"])) for text in skipped]

    def cell(row: dict[str, float]) -> str:
        return f"{row['right']:.1%}<br>KL {row['kl']:.2g}<br>time {row['time']:.0%}"

    columns = {
        "attention skipped in": skipped,
        "FLOPs": [f"{rows[x]['flops']:.0%}" for x in skipped],
        "KV cache": [f"{rows[x]['kv_bytes']:.0%}" for x in skipped],
        "without adapters": [cell(rows[x]) for x in skipped],
        "with adapters": [cell(rows[f"{x}, adapters"]) for x in skipped],
        "withdrawal that takes as long": [f"`{x}`: {cell(rows[x])}" for x in nearest],
    }
    return f"{markdown(columns)}\n\nNothing skipped: {rows['plain']['right']:.1%}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="digits")
    parser.add_argument("--questions", type=int, default=192, help="of the test split, the first")
    parser.add_argument("--repeats", type=int, default=11, help="of what takes time")
    parser.add_argument("--output", type=Path, default=Path("skipped.json"))
    options = parser.parse_args()

    source, plan = MODELS[options.model], PLANS[options.model]
    model, tokenizer = source.load_model().eval(), source.load_tokenizer()
    searched = [batch.inputs for batch in source.load_batches("calibration", BATCH, plan.searched)]
    settings = settings_of(model, tokenizer, plan, options.model, searched)
    test = source.load_batches("test", BATCH, options.questions)
    comparison = vtw.compare(model, [batch.inputs for batch in test], settings, costed=0)
    four = source.load_batches("test", 4, 4)[0].inputs
    costs = measure_policies(model, [four], settings, repeats=options.repeats)
    rows: dict[str, dict[str, float]] = {}
    for i, (name, setting) in enumerate({**settings, "plain": model.config.text_config.num_hidden_layers}.items()):
        right = accuracy(answer(model, tokenizer, test, setting)[0], test)["all"]
        rows[name] = {"right": right, "kl": 0.0 if name == "plain" else comparison.kl[i].item()}
        for cost, values in (("flops", costs.flops), ("kv_bytes", costs.kv_bytes), ("time", costs.prefill_seconds)):
            rows[name][cost] = round(values[i] / values[-1], 4)
    print(f"\n{options.model}, {options.questions} questions:\n\n{table(rows)}")
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
