"""How dynamic exit compares with one layer for all, on the demo's models: gates are trained on the calibration split,
and both are measured on the test split.

    python examples/dynamic_exit.py digits      # a minute
    python examples/dynamic_exit.py smollm2     # ten minutes or more; needs the extra 'demo'
"""

import sys
from copy import copy

import vtw_kernels as vtw
from vtw_kernels.demo import data, smollm2

MODELS = {"digits": (data, 1, 420, 512), "smollm2": (smollm2, 14, 320, 96)}  # first gate, questions of each split
THRESHOLDS = (0.5, 0.9, 0.99)


def main(name: str) -> None:
    source, first, calibration, test = MODELS[name]
    model = source.load_model()
    layers = model.config.text_config.num_hidden_layers
    batches = [batch.inputs for batch in source.load_batches("calibration", 16, limit=calibration)]
    training = vtw.train_exit(model, batches, positions="last", first=first)
    print(training.verdict())

    batches = source.load_batches("test", 16, limit=test)
    kinds = [kind for batch in batches for kind in batch.kinds]
    fixed = {f"layer={layer}": layer for layer in range(first, layers)}
    gates = {f"gates, {threshold}": copy(training.routers) for threshold in THRESHOLDS}
    for threshold, routers in zip(THRESHOLDS, gates.values()):
        routers.threshold = threshold
    inputs = [batch.inputs for batch in batches]
    comparison = vtw.compare(model, inputs, fixed | gates, positions="last", groups=kinds, costed=0)
    for group, part in ({"all": comparison} | comparison.by_group()).items():
        print(f"\n{group}, {len(part.tokens)} questions: mean layer, mean KL in nats, same top token")
        visual = (part.visual_tokens / part.tokens).mean()
        values = (layers * (1 - part.saving() / visual), part.kl, 1 - part.values("disagreement", "mean"))
        for policy, layer, kl, same in zip(part.policies, *(x.tolist() for x in values)):
            print(f"{policy:12} {layer:5.2f} {kl:8.2g} {same:6.1%}")


if __name__ == "__main__":
    main(sys.argv[1])
