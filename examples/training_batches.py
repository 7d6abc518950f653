"""Batches that the demo's models can be trained further with, of questions that are in no test."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vtw_kernels.demo import smollm2

# Draws arguments of the model, ``labels`` among them, as transformers has them: int64 [batch, tokens], the tokens of
# the answers at their places, and -100 elsewhere.
Draw = Callable[[], dict[str, Tensor]]


def digits_batches(tokenizer: Any, batch_size: int) -> Draw:
    """One question about each pair of scans. Needs scikit-learn."""
    from train_demo_model import Conversations, load_scans

    drawn = Conversations(tokenizer, load_scans(0)["train"], seed=1, turns=1)

    def draw() -> dict[str, Tensor]:
        inputs, labels = drawn.draw(batch_size)
        return inputs | {"labels": labels}

    return draw


def smollm2_batches(tokenizer: Any, batch_size: int) -> Draw:
    """Of the images that its adapters were trained on."""
    from smollm2_vqa.train import WEIGHTS, draw_batch, encode

    drawn = smollm2.Draw(smollm2.load_samples("train"), WEIGHTS, seed=1)

    def draw() -> dict[str, Tensor]:
        samples = draw_batch(drawn, batch_size)
        ids, targets = encode(tokenizer, samples, [smollm2.IMAGE] * batch_size)
        # What a token is to predict is the label of the next one, so there is one token more.
        ids = F.pad(ids, (0, 1), value=tokenizer.pad_token_id)
        labels = F.pad(targets, (1, 0), value=-100)
        images = smollm2.load_images("train", [sample.image for sample in samples])
        return {
            "input_ids": ids.where(labels == -100, labels),
            "pixel_values": smollm2.preprocess(images),
            "labels": labels,
        }

    return draw


BATCHES = {"digits": digits_batches, "smollm2": smollm2_batches}
