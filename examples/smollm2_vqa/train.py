"""Gives SmolLM2-135M-Instruct eyes, on two CPU cores: a vision tower, a projector and low-rank adapters, trained on
easy-vqa. The decoder's own weights stay as they are.

    cd examples/smollm2_vqa
    python train.py tower                          # both models see through it
    python train.py adapters                       # as usual
    python train.py adapters --withdraw-from 1     # withdrawn before a random layer in half of the steps
    python train.py evaluate "as usual"            # accuracy and KL at every layer
    python train.py evaluate "with withdrawal"

The adapters that ship were trained with ``--stop-after 350``.
"""

import argparse
import json
import platform
import re
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedTokenizerBase

from vtw_kernels import find_layer, withdraw
from vtw_kernels.demo import smollm2 as data
from vtw_kernels.demo.evaluate import withdrawal_curve

KL_THRESHOLD = 0.003  # the paper's, in nats
WEIGHTS = (0.2, 0.2, 0.3, 0.3)  # of the kinds of question in training; yes or no takes longest to learn
LORA = dict(r=12, lora_alpha=24, target_modules=r".*language_model.*\.[qkvo]_proj")


def train_tower(args: argparse.Namespace) -> None:
    """A vision tower comes pretrained, as CLIP does: this one to name the shape and its colour. The head is thrown away.

    Labels are what the training questions say about their images.
    """
    pixels, targets = label_images("train")
    tower = data.VisionTower()
    head = torch.nn.Linear(data.FEATURES, len(data.SHAPES) + len(data.COLOURS))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=args.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, cycle_momentum=False)
    progress = trange(args.steps, desc="vision tower", mininterval=5)
    for step in progress:
        rows = torch.randint(len(pixels), (args.batch_size,))
        images = pixels[rows]
        flips = [dim for dim in (-1, -2) if torch.rand(()) < 0.5]
        images = images.flip(flips)
        logits = head(tower(images).last_hidden_state.mean(1)).split([len(data.SHAPES), len(data.COLOURS)], 1)
        loss = sum(F.cross_entropy(part, targets[rows, i]) for i, part in enumerate(logits))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    tower.eval()
    pixels, targets = label_images("calibration")
    with torch.no_grad():
        logits = head(tower(pixels).last_hidden_state.mean(1)).split([len(data.SHAPES), len(data.COLOURS)], 1)
    for i, name in enumerate(("shape", "colour")):
        known = targets[:, i] >= 0
        print(name, "on held-out images:", (logits[i].argmax(1) == targets[:, i])[known].float().mean().item())
    save_file(
        {name: x.half() if x.is_floating_point() else x for name, x in tower.state_dict().items()},
        args.output / "vision_tower.safetensors",
    )


def label_images(split: str) -> tuple[Tensor, Tensor]:
    """Images of a split as pixel_values, and what its questions say about them: int64 [images, 2], shape and colour, -100
    where they do not say."""
    labels: dict[int, list[int]] = defaultdict(lambda: [-100, -100])
    for sample in data.load_samples(split):
        words = set(re.findall("[a-z]+", sample.question))
        present = sample.answer not in ("yes", "no") or (sample.answer == "yes") != bool(words & {"no", "not"})
        for i, names in enumerate((data.SHAPES, data.COLOURS)):
            for name in names:
                if name == sample.answer or (name in words and present):
                    labels[sample.image][i] = names.index(name)
    return data.preprocess(data.load_images(split, list(labels))), torch.tensor(list(labels.values()))


def train_adapters(args: argparse.Namespace) -> None:
    """Trains projector and adapters in bfloat16, with float32 copies of what is trained for the optimizer."""
    training = "as usual" if args.withdraw_from is None else "with withdrawal"
    directory = args.output / training.replace(" ", "_")
    model = data.load_base()
    model.model.vision_tower.load_state_dict(load_file(args.output / "vision_tower.safetensors"))
    layers = model.config.text_config.num_hidden_layers
    model.to(torch.bfloat16)
    settings = LoraConfig(modules_to_save=["multi_modal_projector"], **LORA)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    copies = [p.detach().float().requires_grad_() for p in trained]
    optimizer = torch.optim.AdamW(copies, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.05, cycle_momentum=False
    )

    tokenizer, draw = data.load_tokenizer(), data.Draw(data.load_samples("train"), WEIGHTS, args.seed)
    images: dict[int, Tensor] = {}
    adapted.train()
    model.model.vision_tower.eval()  # frozen, statistics of its normalisation included
    log, began = [], time.perf_counter()
    last = min(args.steps, args.stop_after or args.steps)
    progress = trange(last, desc=training, mininterval=5)
    for step in progress:
        samples = [draw() for _ in range(args.batch_size)]
        for sample in samples:
            if sample.image not in images:
                images[sample.image] = data.preprocess(data.load_images("train", [sample.image]))[0]
        pixels = torch.stack([images[sample.image] for sample in samples])
        ids, targets = encode(tokenizer, samples)
        answers = targets != -100  # the rows that predict an answer; none of them is visual
        withdrawn = args.withdraw_from is not None and step % 2 == 1
        with withdraw(adapted, layer=range(args.withdraw_from, layers)) if withdrawn else nullcontext():
            # Padded on the right and causal: no real token can see the padding, so no attention_mask is needed.
            hidden = model.model(input_ids=ids, pixel_values=pixels.bfloat16(), use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[answers])  # not of the whole sequences: that is a quarter of the time
            loss = F.cross_entropy(logits.float(), targets[answers])
            loss.backward()
        for copy, p in zip(copies, trained):
            copy.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for copy, p in zip(copies, trained):
                p.copy_(copy)
        log.append(round(loss.item(), 4))
        progress.set_postfix(loss=f"{sum(log[-40:]) / len(log[-40:]):.3f}")
        if (step + 1) % 50 == 0 or step + 1 == last:
            save(adapted, trained, copies, directory)
            seconds = round(time.perf_counter() - began)
            settings = {name: value for name, value in vars(args).items() if name not in ("output", "run")}
            report = {"steps": step + 1, "training seconds": seconds, "settings": settings, "loss": log}
            (directory / "training.json").write_text(json.dumps(report) + "\n")


def encode(tokenizer: PreTrainedTokenizerBase, samples: list[data.Sample]) -> tuple[Tensor, Tensor]:
    """input_ids, and what each of them is to predict: int64 [batch, tokens], padded on the right. Only answers count, the
    rest is -100."""
    rows, target_rows = [], []
    for sample in samples:
        question = tokenizer(data.prompt(sample.question))["input_ids"]
        answer = tokenizer(f" {sample.answer}")["input_ids"] + [tokenizer.eos_token_id]
        rows.append(torch.tensor(question + answer[:-1]))
        target_rows.append(torch.tensor([-100] * (len(question) - 1) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(target_rows, batch_first=True, padding_value=-100),
    )


def save(adapted: PeftModel, trained: list[Tensor], copies: list[Tensor], directory: Path) -> None:
    """The adapter as PEFT stores it, in float16 made from the float32 copies."""
    kept = [p.data for p in trained]
    for p, copy in zip(trained, copies):
        p.data = copy.detach().half()
    adapted.save_pretrained(directory)
    for p, x in zip(trained, kept):
        p.data = x
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card


def evaluate(args: argparse.Namespace) -> None:
    """Adds one model's curves to training_curves.json; what is measured is what was stored."""
    model, tokenizer = data.load_model(args.training, args.output), data.load_tokenizer()
    calibration = data.load_batches("calibration", args.batch_size, args.calibration)
    search = find_layer(model, [batch.inputs for batch in calibration], threshold=KL_THRESHOLD)
    print(search.table())
    result = {
        "calibration": {"questions": args.calibration, "kl": dict(zip(search.candidates, search.kl.tolist()))},
        "chosen layer": search.layer,
        "test": withdrawal_curve(model, tokenizer, data.load_batches("test", args.batch_size, args.questions)),
    }
    result |= json.loads((args.output / args.training.replace(" ", "_") / "training.json").read_text())
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = args.output / "training_curves.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(curves | {args.training: result}) + "\n")
    for layer, row in result["test"]["layers"].items():
        print(layer, row["kl"], row["accuracy"])
    for name in ("full", "image features zeroed", "most common answer of each kind"):
        print(name, result["test"][name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=data.ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    runs = parser.add_subparsers(dest="run", required=True)
    tower = runs.add_parser("tower")
    tower.add_argument("--steps", type=int, default=500)
    tower.add_argument("--batch-size", type=int, default=64)
    tower.add_argument("--lr", type=float, default=2e-3)
    adapters = runs.add_parser("adapters")
    adapters.add_argument("--withdraw-from", type=int, help="first of the layers that are drawn; by default, as usual")
    adapters.add_argument("--steps", type=int, default=500)
    adapters.add_argument("--stop-after", type=int, help="step of the schedule to stop at; by default, its end")
    adapters.add_argument("--batch-size", type=int, default=8)
    adapters.add_argument("--lr", type=float, default=1.5e-3)
    evaluation = runs.add_parser("evaluate")
    evaluation.add_argument("training", choices=["as usual", "with withdrawal"])
    evaluation.add_argument("--questions", type=int, default=96, help="of the test split")
    evaluation.add_argument("--calibration", type=int, default=96, help="questions of the calibration split")
    evaluation.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    {"tower": train_tower, "adapters": train_adapters, "evaluate": evaluate}[args.run](args)


if __name__ == "__main__":
    main()
