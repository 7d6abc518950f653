"""What skipped attention costs on the demo's models: measures it, and writes the table of ``skipping.md``. Some minutes
on two CPU cores.

Layers are found greedily on questions of the calibration split, and adapters are trained on others of it, to give
the first token that the model gives by itself. Accuracy: share of the test split's questions that are answered exactly,
greedily. Prefill: the time of one of 32 prompts together, relative to that of the model as it is; withdrawal is at the
layer whose prefill comes nearest to it. KL is KL(method‖plain) at the first token of the answer, in nats.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import vtw_kernels as vtw
from vtw_kernels.demo import data, smollm2
from vtw_kernels.demo.evaluate import accuracy, answer

TABLE = Path(__file__).parent / "skipping.md"
FOUND = Path(__file__).parent / "answers"
# Questions of the test split; how many layers are skipped; how many questions layers are found by, adapters trained by.
MODELS = {"digits": (data, 512, (1, 2, 3, 4), 128, 640), "SmolLM2": (smollm2, 192, (1, 2, 4, 8), 32, 320)}
TRAINING = vtw.AdapterTraining(epochs=4, accumulate=2, learning_rate=3e-3, held_out=0.0)


def measure(name: str) -> dict[str, dict[str, float]]:
    """By setting: accuracy, KL, and how long a prefill takes, relative to the model as it is."""
    source, questions, counts, searched, trained = MODELS[name]
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
        adapters = vtw.train_skip(model, calibration[searched // 16 :], chosen, TRAINING, positions="last").adapters
        policies[f"{text}, adapters"] = vtw.SkipAttention(adapters=adapters)
    policies |= {f"layer={k}": k for k in range(1, layers, 1 if layers < 10 else 3)}
    comparison = vtw.compare(model, [batch.inputs for batch in test], policies, costed=1)
    seconds, rows = comparison.costs.prefill_seconds, {}
    for i, (text, policy) in enumerate((*policies.items(), ("plain", layers))):
        skips = isinstance(policy, vtw.SkipAttention)
        with vtw.skip_attention(model, policy.layers, policy.adapters) if skips else nullcontext():
            answers, _ = answer(model, tokenizer, test, layers if skips else policy)
        rows[text] = {
            "accuracy": accuracy(answers, test)["all"],
            "kl": 0.0 if text == "plain" else comparison.kl[i].item(),
            "prefill": seconds[i] / seconds[-1],
            "flops": comparison.costs.flops[i] / comparison.costs.flops[-1],
            "kv": comparison.costs.kv_bytes[i] / comparison.costs.kv_bytes[-1],
        }
        print(name, text, rows[text], flush=True)
    (FOUND / f"skipping-{name.lower()}.json").write_text(
        json.dumps({"greedy": found.greedy, "alone": found.kl.tolist(), "settings": rows}, indent=1) + "\n"
    )
    return rows


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        measure(name)
    headings = ("model", "attention skipped in", "prefill", "cache", "without adapters", "with adapters")
    lines = [f"| {' | '.join(headings)} | withdrawal that takes as long |", "|---|---|--:|--:|--:|--:|--:|"]

    def cell(row: dict[str, float]) -> str:
        return f"{row['accuracy']:.1%}<br>KL {row['kl']:.2g}"

    for name in MODELS:
        rows = json.loads((FOUND / f"skipping-{name.lower()}.json").read_text())["settings"]
        lines.append(f"| {name} | nothing | 100 % | 100 % | {rows['plain']['accuracy']:.1%} | | |")
        for text in [x for x in rows if x.startswith("skip:") and not x.endswith("adapters")]:
            row, layers = rows[text], text.removeprefix("skip:").replace(",", ", ")
            times = {x: rows[x]["prefill"] for x in rows if x.startswith("layer=")}
            near = min(times, key=lambda x: abs(times[x] - row["prefill"]))
            lines.append(
                f"| {name} | {layers} | {row['prefill']:.0%} | {row['kv']:.0%} | {cell(row)} | "
                f"{cell(rows[text + ', adapters'])} | `{near}` ({times[near]:.0%}): {cell(rows[near])} |"
            )
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
