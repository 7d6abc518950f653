"""Tiny random models whose images come in by cross-attention, and prompts for them, with their pixels."""

import torch
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text, MllamaConfig, MllamaForConditionalGeneration
from vlm import IMAGE, PAD, VOCABULARY, rope_config

LAYERS = 6
LOOKING = {"mllama": [1, 3, 4], "idefics": [0, 2, 4]}  # the layers at which images come in
FAMILIES = tuple(LOOKING)
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)


def make_model(family: str, attention: str = "sdpa", seed: int = 0):
    torch.manual_seed(seed)
    if family == "mllama":
        vision = dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_global_layers=1,
            attention_heads=2,
            image_size=8,
            patch_size=4,
            max_num_tiles=2,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            intermediate_layers_indices=[0],
            vision_output_dim=32,
        )
        text = TEXT | rope_config() | dict(num_key_value_heads=2, cross_attention_layers=LOOKING["mllama"])
        config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        model = MllamaForConditionalGeneration._from_config(config, attn_implementation=attention)
    else:
        vision = dict(
            embed_dim=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
        config = IdeficsConfig(**TEXT, vision_config=vision, cross_layer_interval=2)
        model = IdeficsForVisionText2Text._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim > 1 or "gate" in name or "alpha" in name:  # whose defaults close the gates
                x.normal_(0, 1 if x.ndim == 1 else 0.25, generator=generator)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def make_prompts(family: str, rows: list[tuple[int, int]], pad: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """``rows``: per sequence, how many tokens it has, and from which on they see its images, 1 for the first sequence
    and 2 for others; none for one that is as long. The last image has one tile, where there are tiles."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, images = len(rows), max(length for length, _ in rows), min(2, len(rows))
    ids = torch.full((batch, tokens), PAD)
    sees = torch.zeros(batch, tokens, images, dtype=torch.long)
    for i, (length, first) in enumerate(rows):
        here = slice(tokens - length, tokens) if pad == "left" else slice(0, length)
        ids[i, here] = torch.randint(10, VOCABULARY, (length,), generator=generator)
        sees[i, here, : 1 if i == 0 else images][first:] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if family == "idefics":
        pixels = torch.randn(batch, images, 3, 8, 8, generator=generator)
        return inputs | {"pixel_values": pixels, "image_attention_mask": sees}
    tiles = torch.ones(batch, images, 2, dtype=torch.long)
    tiles[:, -1, 1] = 0
    return inputs | {
        "pixel_values": torch.randn(batch, images, 2, 3, 8, 8, generator=generator),
        "aspect_ratio_ids": torch.where(tiles.sum(-1) == 2, 2, 1),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": sees[..., None] * tiles[:, None],
    }
