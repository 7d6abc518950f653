"""Trains the demo's vision-language model from scratch on real scans of handwritten digits (scikit-learn's).

An image shows two scans side by side, and the questions need one, the other or both of them. In every second step the
visual tokens are withdrawn before ``--withdraw-layer``, which teaches the model to be done with its image by then;
``--no-withdrawal`` trains the same model as usual. Both runs evaluate withdrawal before every layer.

    python examples/train_demo_model.py --no-withdrawal   # only its curve is kept
    python examples/train_demo_model.py                   # writes the model, the questions and its curve
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import trange
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtw_kernels import withdraw
from vtw_kernels.demo import data
from vtw_kernels.demo.evaluate import withdrawal_curve

KL_THRESHOLD = 0.003  # the paper's, in nats
WORDS = "zero one two three four five six seven eight nine".split()

# kind: (ways to ask, answer from the left and the right digit)
QUESTIONS = {
    "left": (
        ["What is the left digit?", "Which digit is on the left?"],
        lambda left, right: WORDS[left],
    ),
    "right": (
        ["What is the right digit?", "Which digit is on the right?"],
        lambda left, right: WORDS[right],
    ),
    "both": (
        ["What are the two digits?", "Read both digits from left to right."],
        lambda left, right: f"{WORDS[left]} and {WORDS[right]}",
    ),
    "larger": (
        ["Which side is larger?", "On which side is the larger digit?"],
        lambda left, right: "neither" if left == right else "left" if left > right else "right",
    ),
    "equal": (
        ["Are the two digits equal?", "Is it the same digit on both sides?"],
        lambda left, right: "yes" if left == right else "no",
    ),
    "left even": (
        ["Is the left digit even?", "Is the digit on the left an even one?"],
        lambda left, right: "yes" if left % 2 == 0 else "no",
    ),
    "right even": (
        ["Is the right digit even?", "Is the digit on the right an even one?"],
        lambda left, right: "yes" if right % 2 == 0 else "no",
    ),
}


# ---------------------------------------------------------------------------------------------------------- images


class Scans:
    """Scans of one split; the splits share none."""

    def __init__(self, pixels: np.ndarray, digits: np.ndarray):
        self.pixels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.digits = digits
        self.rows_of = [np.flatnonzero(digits == digit) for digit in range(10)]

    def draw_pairs(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows [count, 2]; a third of the pairs shows one digit twice, so left, right and neither are as likely."""
        rows = rng.integers(len(self.digits), size=(count, 2))
        for pair in rows:
            while self.digits[pair[0]] == self.digits[pair[1]]:
                pair[1] = rng.integers(len(self.digits))
            if rng.random() < 1 / 3:
                pair[1] = rng.choice(self.rows_of[self.digits[pair[0]]])
        return rows

    def draw_images(self, pairs: np.ndarray, rng: np.random.Generator, augment: bool) -> Tensor:
        """uint8 [pairs, 24, 24]: each scan enlarged to 12 x 12, at a random height of its half of the image."""
        count = pairs.size
        height = rng.uniform(-1, 1, count)
        angle = rng.normal(0, 0.12, count) * augment
        zoom = np.exp(rng.normal(0, 0.07, count) * augment)
        shift = rng.uniform(-0.12, 0.12, count) * augment
        # From a half image, 12 wide and 24 high, to the scan: in units of half a scan, x = u - shift, y = 2v - height.
        c, s = np.cos(angle) / zoom, np.sin(angle) / zoom
        theta = np.stack([c, 2 * s, -c * shift - s * height, -s, 2 * c, s * shift - c * height], 1).reshape(-1, 2, 3)
        grid = F.affine_grid(torch.tensor(theta, dtype=torch.float32), (count, 1, 24, 12), align_corners=False)
        halves = F.grid_sample(self.pixels[pairs.ravel()], grid, align_corners=False).view(-1, 2, 24, 12)
        return (halves.transpose(1, 2).reshape(-1, 24, 24) * 255).round().to(torch.uint8)


def load_scans(seed: int) -> dict[str, Scans]:
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    rows = {"test": order[:350], "calibration": order[350:500], "train": order[500:]}
    return {split: Scans(digits.data[r], digits.target[r]) for split, r in rows.items()}


# ----------------------------------------------------------------------------------------------- text and questions


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and punctuation mark; everything this model can read or say."""
    text = [data.PROMPT.replace("<image>", ""), *WORDS, "yes no left right neither and"]
    text += [question for questions, _ in QUESTIONS.values() for question in questions]
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {word for line in text for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line))}
    words -= {"{", "}"}
    specials = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(specials + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


class Conversations:
    """Training batches: per image three questions in a row, so the decoder reads the visual tokens only once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, scans: Scans, seed: int, turns: int = 3):
        self.tokenizer, self.scans, self.turns = tokenizer, scans, turns
        self.rng = np.random.default_rng(seed)
        start, follow_up = data.PROMPT.split("{question}")
        self.start = self._ids(start.replace("<image>", "<image>" * data.IMAGE_TOKENS), first=True)
        self.user, self.assistant = self._ids("USER:"), self._ids(follow_up)
        self.known: dict[str, list[int]] = {}

    def _ids(self, text: str, first: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=first)["input_ids"]

    def _cached(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self._ids(text)
        return self.known[text]

    def draw(self, batch_size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs, padded on the right, and labels int64 [batch, tokens], -100 everywhere but at the answers."""
        pairs = self.scans.draw_pairs(batch_size, self.rng)
        rows, label_rows = [], []
        for left, right in self.scans.digits[pairs]:
            ids, labels = list(self.start), [-100] * len(self.start)
            for turn, kind in enumerate(self.rng.permutation(list(QUESTIONS))[: self.turns]):
                questions, answer_of = QUESTIONS[kind]
                question = (self.user if turn else []) + self._cached(str(self.rng.choice(questions))) + self.assistant
                answer = self._cached(answer_of(left, right)) + [self.tokenizer.eos_token_id]
                ids += question + answer
                labels += [-100] * len(question) + answer
            rows.append(torch.tensor(ids))
            label_rows.append(torch.tensor(labels))
        pad = torch.nn.utils.rnn.pad_sequence
        # Causal and padded on the right: no real token can see the padding, so no attention_mask is needed.
        inputs = {
            "input_ids": pad(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "pixel_values": data.preprocess(self.scans.draw_images(pairs, self.rng, augment=True)),
        }
        return inputs, pad(label_rows, batch_first=True, padding_value=-100)


def write_split(split: str, scans: Scans, image_count: int, seed: int, directory: Path) -> None:
    """Every kind of question about every image, shuffled: {split}.npz and {split}.jsonl."""
    rng = np.random.default_rng(seed)
    pairs = scans.draw_pairs(image_count, rng)
    np.savez_compressed(directory / f"{split}.npz", images=scans.draw_images(pairs, rng, augment=False).numpy())
    samples = [
        {"image": image, "kind": kind, "question": str(rng.choice(questions)), "answer": answer_of(left, right)}
        for image, (left, right) in enumerate(scans.digits[pairs])
        for kind, (questions, answer_of) in QUESTIONS.items()
    ]
    rng.shuffle(samples)
    (directory / f"{split}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


# ------------------------------------------------------------------------------------------------------------ model


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=24,
        patch_size=4,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=data.IMAGE_TOKENS,
        vision_feature_layer=-1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaForConditionalGeneration(config)


def pretrain_tower(model: LlavaForConditionalGeneration, scans: Scans, args: argparse.Namespace) -> None:
    """A vision tower comes pretrained, as CLIP does: this one to tell the side and the digit of each half.

    Without this the decoder answers at chance for hundreds of steps. The head is thrown away.
    """
    rng = np.random.default_rng(args.seed + 4)
    tower, head = model.model.vision_tower, torch.nn.Linear(model.config.vision_config.hidden_size, 20)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.tower_steps, cycle_momentum=False)
    progress = trange(args.tower_steps, desc="vision tower", mininterval=5)
    for step in progress:
        pairs = scans.draw_pairs(args.batch_size, rng)
        pixels = data.preprocess(scans.draw_images(pairs, rng, augment=True))
        patches = tower(pixels).last_hidden_state[:, 1:].unflatten(1, (6, 2, 3))  # rows, halves, columns of a half
        logits = head(patches.mean((1, 3)))
        targets = torch.from_numpy(scans.digits[pairs] + [0, 10])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def train(model: LlavaForConditionalGeneration, conversations: Conversations, args: argparse.Namespace) -> None:
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, pct_start=0.08, cycle_momentum=False
    )
    model.train()
    progress = trange(args.steps, desc="training", mininterval=5)
    for step in progress:
        inputs, labels = conversations.draw(args.batch_size)
        answers = labels[:, 1:] != -100  # the rows that predict an answer; none of them is visual
        targets = labels[:, 1:][answers]

        # First the steps take turns; then every step runs both ways and pulls the withdrawn answers to the full ones.
        together = not args.no_withdrawal and step >= (1 - args.together) * args.steps
        withdrawn = not args.no_withdrawal and (together or step % 2 == 1)
        if together or not withdrawn:
            logits = model(**inputs, use_cache=False).logits[:, :-1][answers]
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            full = logits.detach().log_softmax(-1)
        if withdrawn:
            with withdraw(model, layer=args.withdraw_layer):
                logits = model(**inputs, use_cache=False).logits[:, :-1][answers]
                loss = F.cross_entropy(logits, targets)
                if together:
                    consistency = F.kl_div(full, logits.log_softmax(-1), log_target=True, reduction="batchmean")
                    loss = loss + args.consistency * consistency
                loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(model: LlavaForConditionalGeneration, directory: Path) -> dict:
    """What withdrawal before every layer does to the answers about the test and the calibration split."""
    tokenizer = data.load_tokenizer(directory)
    result: dict = {
        split: withdrawal_curve(model, tokenizer, data.load_batches(split, 50, directory=directory))
        for split in ("test", "calibration")
    }
    below = [layer for layer, row in result["calibration"]["layers"].items() if row["kl"] <= KL_THRESHOLD]
    result["chosen layer"] = min(below, default=model.config.text_config.num_hidden_layers)
    return result


def print_curve(result: dict) -> None:
    for split in ("test", "calibration"):
        curve = result[split]
        print(f"{split}: {curve['questions']} questions")
        print(f"{'K':>6} {'KL':>9}" + "".join(f"{kind:>12}" for kind in curve["full"]))
        rows = [(str(layer), f"{row['kl']:.5f}", row["accuracy"]) for layer, row in curve["layers"].items()]
        rows += [("full", "0", curve["full"])]
        rows += [(name[:6], "", curve[name]) for name in curve if name not in ("questions", "layers", "full")]
        for name, kl, row in rows:
            print(f"{name:>6} {kl:>9}" + "".join(f"{value:12.3f}" for value in row.values()))
    print("first layer with KL at or below", KL_THRESHOLD, "on calibration:", result["chosen layer"])


# ----------------------------------------------------------------------------------------------------------- output


def save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Tokenizer and image settings; ``AutoProcessor`` reads them and does the same as ``data.encode``."""
    image_processor = CLIPImageProcessor(
        size={"height": 24, "width": 24},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


def save_model(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Weights in half precision, and some test images enlarged for people to look at."""
    model.half().save_pretrained(directory)
    for row, pixels in enumerate(data.load_images("test", directory)[:6]):
        Image.fromarray(pixels).resize((192, 192), Image.Resampling.NEAREST).save(directory / f"test_{row}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--withdraw-layer", type=int, default=4, help="first layer without visual tokens (%(default)s)")
    parser.add_argument("--no-withdrawal", action="store_true", help="train as usual; writes only the curve")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--tower-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--together", type=float, default=0.25, help="last part of the steps that runs both ways")
    parser.add_argument("--consistency", type=float, default=1.0, help="weight of KL(withdrawn || full) in that part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=data.ASSETS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    scans = load_scans(args.seed)
    tokenizer = make_tokenizer()
    save_processor(tokenizer, args.output)
    write_split("test", scans["test"], 200, args.seed + 1, args.output)
    write_split("calibration", scans["calibration"], 60, args.seed + 2, args.output)

    model = make_model(tokenizer)
    start = time.perf_counter()
    pretrain_tower(model, scans["train"], args)
    train(model, Conversations(tokenizer, scans["train"], args.seed + 3), args)
    seconds = time.perf_counter() - start
    if not args.no_withdrawal:
        save_model(model, args.output)
        model = data.load_model(args.output)  # what is measured is what was stored
    result = evaluate(model, args.output)
    result["training seconds"] = round(seconds)
    result["settings"] = {name: value for name, value in vars(args).items() if name != "output"}
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print_curve(result)

    path = args.output / "training_curves.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    curves["as usual" if args.no_withdrawal else "with withdrawal"] = result
    path.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
