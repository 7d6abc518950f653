"""The demo's model, tokenizer, images and questions, read from ``assets/``; ``examples/train_demo_model.py`` made them.

An image is 24 x 24 and grey and shows two handwritten digits side by side; the model sees it as 36 visual tokens.
There are two splits, "calibration" and "test", and no scan is in both or was trained on.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
IMAGE_TOKENS = 36
PROMPT = "A person asks about two handwritten digits. USER: <image> {question} ASSISTANT:"
OTHER = "as usual"  # how the model was trained that the demo compares this one with
CAPTION = (
    "This model was trained with withdrawal before layer 4 in half of its steps; trained as usual, the same model "
    "needs its image to the end."
)
TIMED_RUNS = 15
MAX_NEW_TOKENS = 4  # the longest answer, "three and seven", and the end token


class Batch(NamedTuple):
    """Questions of one split with their images, ready for ``model(**batch.inputs)`` or ``model.generate``.

    inputs: input_ids and attention_mask int64 [batch, tokens], padded on the left, and
    pixel_values float32 [batch, 3, 24, 24].
    """

    inputs: dict[str, Tensor]
    images: np.ndarray
    questions: list[str]
    answers: list[str]
    kinds: list[str]


def load_model(directory: Path | str = ASSETS) -> LlavaForConditionalGeneration:
    """The trained model in float32 (stored in float16) and in eval mode."""
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def load_tokenizer(directory: Path | str = ASSETS) -> PreTrainedTokenizerBase:
    """A word-level tokenizer; its ``<image>`` is the visual placeholder and it pads on the left."""
    return AutoTokenizer.from_pretrained(directory)


def load_images(split: str, directory: Path | str = ASSETS) -> np.ndarray:
    """uint8 [images, 24, 24], ink bright on black."""
    return np.load(Path(directory) / f"{split}.npz")["images"]


def load_samples(split: str, directory: Path | str = ASSETS) -> list[dict]:
    """One dict per question: image (its row in ``load_images``), kind, question, answer."""
    return [json.loads(line) for line in (Path(directory) / f"{split}.jsonl").read_text().splitlines()]


def load_training_curves(directory: Path | str = ASSETS) -> dict:
    """Accuracy and KL at every layer as measured after training, for this model ("with withdrawal") and for the same
    one "as usual"; with the settings that reproduce them."""
    return json.loads((Path(directory) / "training_curves.json").read_text())


def preprocess(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [images, 24, 24] to pixel_values float32 [images, 3, 24, 24] in [-1, 1]. Needs no torchvision."""
    pixels = torch.as_tensor(images).float() / 127.5 - 1
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


def encode(tokenizer: PreTrainedTokenizerBase, questions: list[str], images: np.ndarray | Tensor) -> dict[str, Tensor]:
    """Model inputs of one question per image; see ``Batch.inputs``."""
    prompts = [PROMPT.format(question=question).replace("<image>", "<image>" * IMAGE_TOKENS) for question in questions]
    tokens = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "pixel_values": preprocess(images),
    }


def load_batches(split: str, batch_size: int, limit: int | None = None, directory: Path | str = ASSETS) -> list[Batch]:
    """The questions of a split ("calibration" or "test"), at most ``limit`` of them, in order and in batches."""
    tokenizer, images = load_tokenizer(directory), load_images(split, directory)
    samples = load_samples(split, directory)[:limit]
    batches = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        shown = images[[sample["image"] for sample in chunk]]
        questions = [sample["question"] for sample in chunk]
        batches.append(
            Batch(
                inputs=encode(tokenizer, questions, shown),
                images=shown,
                questions=questions,
                answers=[sample["answer"] for sample in chunk],
                kinds=[sample["kind"] for sample in chunk],
            )
        )
    return batches
