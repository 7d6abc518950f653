"""Tiny random vision-language models with tokenizers and processors, as checkpoints; what transformers says of prompts.

Heads are as small as the attention of vLLM on a CPU takes them. An image has more tokens than a step of 32 rows, so
that chunks of a prompt may lie within one."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

LAYERS, HIDDEN, IMAGE_TOKENS = 6, 128, 64
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL += ["<video>", "<IMG_CONTEXT>", "<img>", "</img>"]
WORDS = [f"w{i}" for i in range(88)]
TEXT = dict(
    hidden_size=HIDDEN,
    intermediate_size=192,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(SPECIAL) + len(WORDS),
    max_position_embeddings=2048,
    initializer_range=0.12,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, patch_size=4)
TILES = [[24, 48], [48, 24]]


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """named: tokens that a processor asks it for."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
        extra_special_tokens=named or SPECIAL[3:],
        chat_template=(
            "{%- for message in messages -%}{%- for part in message.content -%}"
            "{{ ' <image> ' if part.type == 'image' else ' ' + part.text }}{%- endfor -%}{%- endfor -%}"
        ),
    )


def make(folder: Path, family: str) -> Path:
    """A checkpoint of a family, which is named as its config's ``model_type`` is."""
    if family.startswith("qwen"):
        return make_qwen_vl(folder, family)
    makers = {"llava": make_llava, "llava_next": make_llava_next, "llava_onevision": make_llava_onevision}
    return (makers | {"internvl": make_internvl})[family](folder)


def make_llava(folder: Path, layers: int = LAYERS, image_size: int = 32, **text) -> Path:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=image_size, initializer_factor=3.0),
        text_config=LlamaConfig(**TEXT | {"num_hidden_layers": layers} | text),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(image_size // 4) ** 2,
        vision_feature_layer=-1,
    )
    model = _images_that_matter(LlavaForConditionalGeneration(config))
    processor = {
        "image_processor": _resizing("CLIPImageProcessor", image_size),
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 4,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    return rename_for_vllm(_save(model, folder, processor))


def make_llava_next(folder: Path) -> Path:
    """Two tiles and the whole of an image, its rows ended by a feature of their own and its margins cut off."""
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=24, initializer_factor=3.0),
        text_config=LlamaConfig(**TEXT),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=36,
        image_grid_pinpoints=TILES,
        vision_feature_layer=-1,
    )
    model = _images_that_matter(LlavaNextForConditionalGeneration(config))
    processor = {
        "image_processor": _resizing("LlavaNextImageProcessor", 24) | {"image_grid_pinpoints": TILES},
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 4,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    }
    return rename_for_vllm(_save(model, folder, processor))


def make_llava_onevision(folder: Path) -> Path:
    """The same with another tower and decoder."""
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=24, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=SPECIAL.index("<image>"),
        video_token_index=SPECIAL.index("<video>"),
        image_grid_pinpoints=TILES,
    )
    model = _images_that_matter(LlavaOnevisionForConditionalGeneration(config))
    processor = {
        "image_processor": _resizing("LlavaOnevisionImageProcessor", 24) | {"image_grid_pinpoints": TILES},
        "video_processor": _resizing("LlavaOnevisionVideoProcessor", 24, "video"),
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": 36,
        "processor_class": "LlavaOnevisionProcessor",
        "vision_feature_select_strategy": "full",
    }
    return rename_for_vllm(_save(model, folder, processor))


def make_internvl(folder: Path) -> Path:
    """Four tiles and the whole of an image, between two tokens that are text."""
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER, image_size=32, initializer_range=0.1),
        text_config=Qwen2Config(**TEXT),
        image_token_id=SPECIAL.index("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = _images_that_matter(InternVLForConditionalGeneration(config))
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    processor = {
        "image_processor": _resizing("GotOcr2ImageProcessor", 32) | tiles,
        "video_processor": _resizing("InternVLVideoProcessor", 32, "video"),
        "image_seq_length": 16,
        "processor_class": "InternVLProcessor",
    }
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    return _save(model, folder, processor, **named)


def _images_that_matter(model):
    """Projected to features as large as embeddings of words are."""
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def _resizing(kind: str, size: int, what: str = "image") -> dict:
    return {
        f"{what}_processor_type": kind,
        "size": {"height": size, "width": size},
        "crop_size": {"height": size, "width": size},
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def make_qwen_vl(folder: Path, family: str) -> Path:
    """Qwen2-VL, 2.5 or 3. The third adds features of two layers of its tower to the rows of its first two layers."""
    torch.manual_seed(0)
    config_class, model_class, processor_class = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, "Qwen2VLProcessor"),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor"),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, "Qwen3VLProcessor"),
    }[family]
    later = {"hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 96}
    tower = {
        "qwen2_vl": {"embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2},
        "qwen2_5_vl": later | {"window_size": 32, "fullatt_block_indexes": [1]},
        "qwen3_vl": later | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]},
    }[family]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    text = {"rope_parameters": rope}
    if family == "qwen3_vl":  # interleaved in transformers whatever its config says, and in vLLM as it says
        text = {"rope_parameters": rope | {"mrope_interleaved": True}, "head_dim": 32}
    config = config_class(
        text_config=TEXT | text,
        vision_config=dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2) | tower,
        image_token_id=SPECIAL.index("<|image_pad|>"),
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = model_class(config).eval()
    for name, parameter in model.model.visual.named_parameters():
        if "merger" in name:
            parameter.data.normal_(std=0.3)
    processor = {
        "image_processor": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
            "patch_size": 4,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        "processor_class": processor_class,
    }
    return _save(model, folder, processor)


def _save(model, folder: Path, processor: dict, **named: str) -> Path:
    model.generation_config.eos_token_id = None  # a random model would end anywhere
    model.save_pretrained(folder)
    tokenizer(**named).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    return folder


def rename_for_vllm(folder: Path) -> Path:
    """vLLM knows the names that weights of CLIP and SigLIP had in older releases of transformers, which still reads
    them."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for old in [name for name in weights if "vision_tower." in name and "vision_model." not in name]:
        weights[old.replace("vision_tower.", "vision_tower.vision_model.")] = weights.pop(old)
    save_file(weights, file, {"format": "pt"})
    return folder


def image(seed: int, size: int = 32) -> Image.Image:
    """Large patches, so that models see a difference."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.NEAREST)


def shown(imported: str, **instead: str) -> str:
    """The block of Python on the page about vLLM that imports this, with other values in it, each in the one place
    where the page has its own."""
    [block] = [x for x in re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL) if imported in x]
    own = {"model": "llava-hf/llava-1.5-7b-hf", "layer": '"layer": 16', "host": "localhost:8000"}
    for name, value in instead.items():
        assert block.count(own[name]) == 1
        block = block.replace(own[name], value)
    return block
