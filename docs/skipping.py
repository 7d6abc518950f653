"""What skipped attention costs on the demo's models: measures it, and writes the table of ``skipping.md``. Some minutes
on two CPU cores.

Layers are found greedily on questions of the calibration split, and adapters are trained on others of it, to give
the first token that the model gives by itself. Accuracy: share of the test split's questions that are answered exactly,
greedily. KL is KL(method‖plain) at the first token of the answer, in nats. Operations: floating point operations of the
decoder layers in a prefill, relative to the model as it is; withdrawal is at the layer that comes nearest to it.
"""

import json
import sys
from pathlib import Path

import vtw_kernels as vtw
from vtw_kernels.demo import data, smollm2
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.layer_search.costs import measure_policies

TABLE = Path(__file__).parent / "skipping.md"
FOUND = Path(__file__).parent / "answers"
# Questions of the test split; how many layers are skipped; questions that layers are found by, and adapters are trained
# by, and how often; layers to withdraw before.
MODELS = {
    "digits": (data, 512, (1, 2, 3, 4), 128, 292, 4, range(1, 8)),
    "SmolLM2": (smollm2, 192, (2, 4), 16, 320, 2, (12, 20, 24, 26, 28)),
}
TRAINING = vtw.AdapterTraining(accumulate=2, learning_rate=3e-3, held_out=0.0)


def measure(name: str) -> dict[str, dict[str, float]]:
    """By setting: accuracy, KL, and what is left of operations and cache, relative to the model as it is."""
    source, questions, counts, searched, trained, epochs, withdrawn = MODELS[name]
    training = TRAINING._replace(epochs=epochs)
    model, tokenizer = source.load_model().eval(), source.load_tokenizer()
    test = source.load_batches("test", 32, questions)
    calibration = [batch.inputs for batch in source.load_batches("calibration", 16, searched + trained)]
    found = vtw.find_skippable(model, calibration[: searched // 16], max(counts), bandit=None)
    layers = model.config.text_config.num_hidden_layers
    settings: dict[str, object] = {f"skip:{','.join(map(str, sorted(found.greedy['layers'][:n])))}": n for n in counts}
    policies: dict[str, object] = dict.fromkeys(settings)
    for text, count in settings.items():
        chosen = sorted(found.greedy["layers"][:count])
        policies[text] = vtw.SkipAttention(chosen)
        adapters = vtw.train_skip(model, calibration[searched // 16 :], chosen, training, positions="last").adapters
        policies[f"{text}, adapters"] = vtw.SkipAttention(adapters=adapters)
    policies |= {f"layer={k}": k for k in withdrawn}
    comparison = vtw.compare(model, [batch.inputs for batch in test], policies, costed=0)
    costs = measure_policies(model, [source.load_batches("test", 4, 4)[0].inputs], policies, repeats=1)
    rows: dict[str, dict[str, float]] = {}
    for i, (text, policy) in enumerate((*policies.items(), ("plain", layers))):
        answers, _ = answer(model, tokenizer, test, policy)
        rows[text] = {
            "accuracy": accuracy(answers, test)["all"],
            "kl": 0.0 if text == "plain" else comparison.kl[i].item(),
            "operations": costs.flops[i] / costs.flops[-1],
            "kv": costs.kv_bytes[i] / costs.kv_bytes[-1],
        }
        print(name, text, rows[text], flush=True)
    (FOUND / f"skipping-{name.lower()}.json").write_text(
        json.dumps({"greedy": found.greedy, "alone": found.kl.tolist(), "settings": rows}, indent=1) + "\n"
    )
    return rows


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        measure(name)
    headings = ("model", "attention skipped in", "operations", "cache", "without adapters", "with adapters")
    lines = [f"| {' | '.join(headings)} | withdrawal that takes as many |", "|---|---|--:|--:|--:|--:|--:|"]

    def cell(row: dict[str, float]) -> str:
        return f"{row['accuracy']:.1%}<br>KL {row['kl']:.2g}"

    for name in MODELS:
        rows = json.loads((FOUND / f"skipping-{name.lower()}.json").read_text())["settings"]
        lines.append(f"| {name} | nothing | 100% | 100% | {rows['plain']['accuracy']:.1%} | | |")
        for text in [x for x in rows if x.startswith("skip:") and not x.endswith("adapters")]:
            row, layers = rows[text], text.removeprefix("skip:").replace(",", ", ")
            operations = {x: rows[x]["operations"] for x in rows if x.startswith("layer=")}
            near = min(operations, key=lambda x: abs(operations[x] - row["operations"]))
            lines.append(
                f"| {name} | {layers} | {row['operations']:.0%} | {row['kv']:.0%} | {cell(row)} | "
                f"{cell(rows[text + ', adapters'])} | `{near}` ({operations[near]:.0%}): {cell(rows[near])} |"
            )
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
