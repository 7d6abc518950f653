"""What visual pruning (YOPO) costs a demo's model: each ingredient and all of them, on held-out questions.

    python examples/visual_pruning.py --model digits --steps 150    # half an hour; needs scikit-learn
    python examples/visual_pruning.py --model smollm2 --steps 40    # an hour; needs the extra 'demo'

Heads are chosen on the calibration split. Writes ``--output``: by pruning, what is left of the decoder's FLOPs and of
the bytes of the KV cache, mean KL(pruned‖full) of the first token of the answer in nats, and the share of right
answers, whole and greedy. With ``--steps``, the model is also trained further for so many steps from where it is, once
under each pruning and once without, and answers under it; the divergence is then from what that model says unpruned.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange
from training_batches import BATCHES, Draw

import vtw_kernels as vtw
from vtw_kernels.demo.data import Batch
from vtw_kernels.demo.evaluate import accuracy, answer
from vtw_kernels.demo.run import MODELS
from vtw_kernels.layer_search.scored import markdown

BATCH = 16


def prunings_of(model: nn.Module, calibration: list[dict], layers: int) -> dict[str, vtw.VisualPruning]:
    """By name, for a decoder of so many layers."""
    heads = {keep: vtw.find_visual_heads(model, calibration, keep, progress=False).heads for keep in (0.75, 0.5, 0.25)}
    ingredients = {
        **{f"{keep:.0%} of heads": dict(heads=x) for keep, x in heads.items()},
        "window of 3": dict(window=3),
        "1/2 of MLP": dict(ffn_ratio=2),
        "cut at 3/4": dict(layer_cut=layers * 3 // 4),
        "cut at 1/2": dict(layer_cut=layers // 2),
        "all: 75 %, 3, 1/2, 3/4": dict(heads=heads[0.75], window=3, ffn_ratio=2, layer_cut=layers * 3 // 4),
        "all: 50 %, 3, 1/2, 1/2": dict(heads=heads[0.5], window=3, ffn_ratio=2, layer_cut=layers // 2),
        "all, not renormalized": dict(
            heads=heads[0.5], window=3, ffn_ratio=2, layer_cut=layers // 2, renormalize=False
        ),
    }
    return {name: vtw.VisualPruning(**parts) for name, parts in ingredients.items()}


def under(pruning: vtw.VisualPruning) -> Callable[[nn.Module], Any]:
    return lambda model: vtw.prune_visual(model, pruning)


def measure(
    model: nn.Module, tokenizer: Any, batches: list[Batch], prunings: dict[str, vtw.VisualPruning]
) -> dict[str, dict[str, float]]:
    policies = {name: under(pruning) for name, pruning in prunings.items()}
    found = vtw.compare(model, [batch.inputs for batch in batches], policies, costed=1, progress=False)
    saved = {cost: found.saving(cost).tolist() for cost in ("flops", "kv_bytes")}
    rows = {}
    for i, (name, policy) in enumerate(policies.items()):
        rows[name] = {cost: round(1 - x[i], 4) for cost, x in saved.items()}
        rows[name] |= {"kl": float(f"{found.kl[i]:.3g}")}
        rows[name] |= {"right": accuracy(answer(model, tokenizer, batches, policy)[0], batches)["all"]}
    return rows


LEARNING_RATES = {"digits": 3e-4, "smollm2": 1e-4}  # at their highest


def trained(model: nn.Module, draw: Draw, rate: float, pruning: vtw.VisualPruning | None, steps: int) -> nn.Module:
    """A copy of the model after so many steps more."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    model.model.vision_tower.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    handle = None if pruning is None else vtw.prune_visual(model, pruning).apply()
    for _ in trange(steps, desc=str(pruning), mininterval=10):
        inputs = draw()
        targets = inputs.pop("labels")[:, 1:]
        answers = targets != -100  # logits of all rows would take a quarter of the time
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        F.cross_entropy(model.lm_head(hidden[answers]), targets[answers]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if handle is not None:
        handle.remove()
    return model.eval()


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Of what was written; Markdown."""
    first, *_ = results.values()
    shown = {"pruning": list(first)}
    for heading, cost in (("FLOPs", "flops"), ("KV cache", "kv_bytes")):
        shown[heading] = [f"{row[cost]:.0%}" for row in first.values()]
    for when, rows in results.items():
        shown[f"right, {when}"] = [f"{row['right']:.1%}" for row in rows.values()]
        shown[f"KL in nats, {when}"] = [f"{row['kl']:.2g}" for row in rows.values()]
    return markdown(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="digits")
    parser.add_argument("--questions", type=int, default=192, help="of the test split, the first")
    parser.add_argument("--steps", type=int, default=0, help="of training under each pruning")
    parser.add_argument("--output", type=Path, default=Path("pruned.json"))
    options = parser.parse_args()

    source = MODELS[options.model]
    model, tokenizer = source.load_model(), source.load_tokenizer()
    calibration = [batch.inputs for batch in source.load_batches("calibration", BATCH, limit=96)]
    batches = source.load_batches("test", BATCH, limit=options.questions)
    layers = model.config.text_config.num_hidden_layers
    prunings = prunings_of(model, calibration, layers)
    full = accuracy(answer(model, tokenizer, batches, layers)[0], batches)["all"]
    results = {"as it is": {"plain": {"flops": 1.0, "kv_bytes": 1.0, "kl": 0.0, "right": full}}}
    results["as it is"] |= measure(model, tokenizer, batches, prunings)
    if options.steps:

        def further(pruning: vtw.VisualPruning | None) -> nn.Module:
            draw = BATCHES[options.model](tokenizer, BATCH)
            return trained(model, draw, LEARNING_RATES[options.model], pruning, options.steps)

        right = accuracy(answer(further(None), tokenizer, batches, layers)[0], batches)["all"]
        results["after training"] = {"plain": {"flops": 1.0, "kv_bytes": 1.0, "kl": 0.0, "right": right}}
        for name, pruning in prunings.items():
            results["after training"] |= measure(further(pruning), tokenizer, batches, {name: pruning})
    print(f"\n{options.model}, {options.questions} questions:\n\n{table(results)}")
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
