"""Gives SmolLM2-135M-Instruct eyes, on two CPU cores: a vision tower, a projector and low-rank adapters, trained on
easy-vqa. The decoder's own weights stay as they are.

    cd examples/smollm2_vqa
    python train.py tower                          # both models see through it
    python train.py adapters                       # as usual
    python train.py adapters --withdraw-from 1     # withdrawn before a random layer in half of the steps
    python train.py evaluate "as usual"            # accuracy and KL at every layer
    python train.py evaluate "with withdrawal"
"""

import argparse
import json
import platform
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from vtw_kernels import find_layer, kl_divergence_loss, withdraw
from vtw_kernels.demo import smollm2 as data
from vtw_kernels.demo.evaluate import withdrawal_curve

KL_THRESHOLD = 0.003  # the paper's, in nats
WEIGHTS = (0.2, 0.2, 0.3, 0.3)  # of the kinds of question in training; yes or no takes longest to learn
LORA = dict(r=12, lora_alpha=24, target_modules=r".*language_model.*\.[qkvo]_proj")


def train_tower(args: argparse.Namespace) -> None:
    """A vision tower comes pretrained, as CLIP does: this one to name the shape and its colour. The head is thrown
    away.

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


def image_labels(split: str) -> dict[int, list[int]]:
    """What the questions of a split say about their images: shape and colour of each, -100 where they do not say."""
    labels: dict[int, list[int]] = defaultdict(lambda: [-100, -100])
    for sample in data.load_samples(split):
        words = set(re.findall("[a-z]+", sample.question))
        present = sample.answer not in ("yes", "no") or (sample.answer == "yes") != bool(words & {"no", "not"})
        for i, names in enumerate((data.SHAPES, data.COLOURS)):
            for name in names:
                if name == sample.answer or (name in words and present):
                    labels[sample.image][i] = names.index(name)
    return labels


def label_images(split: str) -> tuple[Tensor, Tensor]:
    """Images of a split as pixel_values, and their labels, int64 [images, 2]."""
    labels = image_labels(split)
    return data.preprocess(data.load_images(split, list(labels))), torch.tensor(list(labels.values()))


def align(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Has the projector begin where the decoder understands it: every visual token is the sum of two words' embeddings,
    those of the shape and of the colour."""

    def ids_of(names: tuple[str, ...]) -> Iterator[Tensor]:
        return (tokenizer(f" {name}", return_tensors="pt")["input_ids"] for name in names)

    pixels, labels = label_images("train")
    known = (labels >= 0).all(1)
    with torch.no_grad():
        features = torch.cat([model.model.vision_tower(x).last_hidden_state for x in pixels[known].split(256)])
        embed = model.get_input_embeddings()
        words = [torch.stack([embed(x).mean(1)[0] for x in ids_of(names)]) for names in (data.SHAPES, data.COLOURS)]
        targets = sum(embeddings[labels[known, i]] for i, embeddings in enumerate(words))
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, cycle_momentum=False)
    for _ in trange(steps, desc="projector", mininterval=5):
        rows = torch.randint(len(features), (64,))
        F.mse_loss(projector(features[rows]), targets[rows, None].expand(-1, data.IMAGE_TOKENS, -1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def train_adapters(args: argparse.Namespace) -> None:
    """Trains projector and adapters in bfloat16, with float32 copies of what is trained for the optimizer.

    In the first steps a caption stands for the image: the questions are learned from words, which takes a tenth of the
    time that they take from images. With withdrawal, every second of the later steps is done without the image from a
    random layer on, and in the last ones both ways, with KL(withdrawn || full) in the loss.
    """
    training = "as usual" if args.withdraw_from is None else "with withdrawal"
    directory = args.output / training.replace(" ", "_")
    model, tokenizer = data.load_base(), data.load_tokenizer()
    model.model.vision_tower.load_state_dict(load_file(args.output / "vision_tower.safetensors"))
    align(model, tokenizer, args.align_steps)
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

    labels = {image: label for image, label in image_labels("train").items() if min(label) >= 0}
    captions = {image: f"A {data.COLOURS[colour]} {data.SHAPES[shape]}. " for image, (shape, colour) in labels.items()}
    samples = data.load_samples("train")
    draw = data.Draw(samples, WEIGHTS, args.seed)
    draw_captioned = data.Draw([sample for sample in samples if sample.image in captions], WEIGHTS, args.seed)
    images: dict[int, Tensor] = {}
    adapted.train()
    model.model.vision_tower.eval()  # frozen, statistics of its normalisation included
    log, began = [], time.perf_counter()
    progress = trange(args.steps, desc=training, mininterval=5)
    for step in progress:
        if step < args.caption_steps:
            batch = draw_batch(draw_captioned, args.batch_size)
            ids, targets = encode(tokenizer, batch, [captions[sample.image] for sample in batch])
            pixels = None
        else:
            batch = draw_batch(draw, args.batch_size)
            ids, targets = encode(tokenizer, batch, [data.IMAGE] * len(batch))
            for sample in batch:
                if sample.image not in images:
                    images[sample.image] = data.preprocess(data.load_images("train", [sample.image]))[0]
            pixels = torch.stack([images[sample.image] for sample in batch]).bfloat16()
        answers = targets != -100  # the rows that predict an answer; none of them is visual

        withdraws = pixels is not None and args.withdraw_from is not None
        together = withdraws and step >= args.steps - args.together_steps
        if together or not (withdraws and step % 2):
            full = answer_logits(model, ids, pixels, answers)
            loss = F.cross_entropy(full, targets[answers])
            loss.backward()
        if together or (withdraws and step % 2):
            with withdraw(adapted, layer=range(args.withdraw_from, layers)):
                withdrawn = answer_logits(model, ids, pixels, answers)
                loss = F.cross_entropy(withdrawn, targets[answers])
                if together:
                    loss = loss + kl_divergence_loss(withdrawn, full.detach())
                loss.backward()
        for copy, p in zip(copies, trained):
            if p.grad is not None:  # the projector's, where there was an image
                copy.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            for copy, p in zip(copies, trained):
                p.copy_(copy)
        log.append(round(loss.item(), 4))
        progress.set_postfix(loss=f"{sum(log[-40:]) / len(log[-40:]):.3f}")
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            save(adapted, trained, copies, directory)
            seconds = round(time.perf_counter() - began)
            settings = {name: value for name, value in vars(args).items() if name not in ("output", "run")}
            report = {"steps": step + 1, "training seconds": seconds, "settings": settings, "loss": log}
            (directory / "training.json").write_text(json.dumps(report) + "\n")


def answer_logits(model: LlavaForConditionalGeneration, ids: Tensor, pixels: Tensor | None, answers: Tensor) -> Tensor:
    """float32 [answers, vocabulary], of the rows that ``answers`` marks: those of all rows take a quarter of the
    time."""
    # Padded on the right and causal: no real token can see the padding, so no attention_mask is needed.
    hidden = model.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
    return model.lm_head(hidden[answers]).float()


def draw_batch(draw: data.Draw, size: int) -> list[data.Sample]:
    """A question for yes or no is asked about two images, one for either answer, so that it can't be learned alone."""
    batch: list[data.Sample] = []
    while len(batch) < size:
        sample = draw()
        answers = draw.by_kind[sample.kind][sample.question]
        others = [answer for answer in answers if answer != sample.answer] if "yes" in answers else []
        batch += [sample, *(draw.rng.choice(answers[other]) for other in others)]
    return batch[:size]


def encode(tokenizer: PreTrainedTokenizerBase, samples: list[data.Sample], images: list[str]) -> tuple[Tensor, Tensor]:
    """input_ids with what stands for the image of each question in front of it, and what each token is to predict:
    int64 [batch, tokens], padded on the right. Only answers count, the rest is -100."""
    rows, target_rows = [], []
    for sample, image in zip(samples, images, strict=True):
        question = tokenizer(image + data.PROMPT.format(sample.question))["input_ids"]
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
    adapters.add_argument("--steps", type=int, default=400)
    adapters.add_argument("--caption-steps", type=int, default=50, help="the first ones: captions instead of images")
    adapters.add_argument("--together-steps", type=int, default=130, help="the last ones: with the image and without")
    adapters.add_argument("--align-steps", type=int, default=400, help="of the projector alone, before")
    adapters.add_argument("--batch-size", type=int, default=32)
    adapters.add_argument("--lr", type=float, default=1e-3)
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
