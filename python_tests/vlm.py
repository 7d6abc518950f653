"""Tiny random vision-language models and batches for them, with real images all the way through the vision towers."""

import functools
from dataclasses import dataclass, field

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)

from vtw_kernels.integration.compat import HAS_CACHE_POSITION

LAYERS, VOCABULARY, PAD, IMAGE, VISION_START = 4, 100, 0, 7, 5


def older_than(release: str) -> bool:
    """Whether this is a transformers from before a release: for what it can't do by itself."""
    return Version(transformers.__version__) < Version(release)


# Up to 4.57, Qwen-VL finds images by the token before them, and generate hands no pixels to a forward with a past.
TRANSFORMERS_5 = not older_than("5")
FAMILIES = ("llava", "qwen2_vl")
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    initializer_range=0.25,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)


def rope_config(**parameters) -> dict:
    """Settings of a text model whose rotary embeddings have these parameters."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | parameters
    if TRANSFORMERS_5:
        return {"rope_parameters": parameters}
    outside = {name: parameters.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    return outside | {"rope_scaling": parameters}


def make_model(family: str, attention: str = "sdpa"):
    torch.manual_seed(0 if TRANSFORMERS_5 else 4)  # of random models that need their images to the end
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, image_seq_length=4
        )
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    else:
        vision = dict(
            depth=2, embed_dim=16, num_heads=2, hidden_size=32, patch_size=4, spatial_merge_size=2, mlp_ratio=2
        )
        config = Qwen2VLConfig(
            text_config=TEXT | rope_config(mrope_section=[1, 1, 2]),
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=8,
            vision_start_token_id=VISION_START,
            vision_end_token_id=6,
        )
        model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.generation_config.suppress_tokens = [VISION_START, IMAGE, 8]  # a random model would say them
    model.generation_config.pad_token_id = PAD
    return model.eval()


@dataclass
class Batch:
    """Sequences of equal length. ``ids``, ``mask`` int64 [B, S]; ``images``: features of image i and the end of its
    tokens in ``ids``, for telling which belong to a chunk."""

    family: str
    ids: Tensor
    mask: Tensor
    images: list[dict] = field(default_factory=list)

    @property
    def visual(self) -> Tensor:
        return self.ids == IMAGE

    def inputs(self, begin: int = 0, end: int | None = None) -> dict[str, Tensor]:
        """Keyword arguments for the tokens [begin, end), whose images must be complete; the mask covers [0, end)."""
        end = self.ids.shape[1] if end is None else end
        images = [image for image in self.images if begin < image["end"] <= end]
        inputs = {"input_ids": self.ids[:, begin:end], "attention_mask": self.mask[:, :end]}
        if begin and HAS_CACHE_POSITION:  # static caches would count their keys that are not 0, which padding may be
            inputs["cache_position"] = torch.arange(begin, end)
        if images:
            inputs["pixel_values"] = torch.cat([image["pixels"] for image in images])
        if self.family == "qwen2_vl":
            if TRANSFORMERS_5:
                inputs["mm_token_type_ids"] = self.visual[:, begin:end].int()
            if images:
                inputs["image_grid_thw"] = torch.stack([image["grid"] for image in images])
        return inputs

    def positions(self, model) -> Tensor:
        """Of all tokens: [B, S] or, for M-RoPE, [3, B, S]."""
        if self.family == "llava":
            return (self.mask.cumsum(-1) - 1).clamp(min=0)
        grid = torch.stack([image["grid"] for image in self.images]) if self.images else None
        types = {"mm_token_type_ids": self.visual.int()} if TRANSFORMERS_5 else {}
        return model.model.get_rope_index(self.ids, **types, image_grid_thw=grid, attention_mask=self.mask)[0]


def make_batch(family: str, rows: list[list[int]], pad: str = "left", seed: int = 0) -> Batch:
    """``rows``: per sequence the lengths of its segments, in turn text and images; images have 4 tokens, those of
    Qwen2-VL as many as the number says (4 or 8), and up to transformers 4.57 at least one token of text before them."""
    generator = torch.Generator().manual_seed(seed)
    sequences, images = [], []
    for row in rows:
        ids = []
        for i, length in enumerate(row):
            if i % 2 == 0:
                starts_image = family == "qwen2_vl" and not TRANSFORMERS_5 and i + 1 < len(row)
                length = max(length, 1) if starts_image else length
                ids += torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()
                ids[-1:] = [VISION_START] if starts_image else ids[-1:]
                continue
            if family == "llava":
                length, image = 4, {"pixels": torch.randn(1, 3, 8, 8, generator=generator)}
            else:
                grid = torch.tensor([1, 4, length])
                image = {"pixels": torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=generator), "grid": grid}
            ids += [IMAGE] * length
            images.append(image | {"row": len(sequences), "end": len(ids)})
        sequences.append(ids)
    longest = max(map(len, sequences))
    for image in images:
        image["end"] += (longest - len(sequences[image["row"]])) * (pad == "left")
    fill = [[PAD] * (longest - len(ids)) for ids in sequences]
    ids = torch.tensor([f + s if pad == "left" else s + f for f, s in zip(fill, sequences)])
    return Batch(family, ids, (ids != PAD).long(), images)


ONE = [[3, 4, 5]]
RAGGED = [[2, 4, 3, 8, 4], [9], [4, 4, 3]]  # two images, text only, one image; left padding of different lengths


def append(first: Batch, second: Batch) -> Batch:
    """The second batch continues the first."""
    length = first.ids.shape[1]
    images = first.images + [image | {"end": image["end"] + length} for image in second.images]
    images.sort(key=lambda image: image["row"])  # the order of placeholders within a forward and within the sequence
    return Batch(first.family, torch.cat([first.ids, second.ids], 1), torch.cat([first.mask, second.mask], 1), images)


@functools.cache
def model_of(family: str, attention: str = "sdpa"):
    return make_model(family, attention)


def make_cache(model, kind: str, length: int):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@torch.no_grad()
def run(model, batch: Batch, ends: list[int], cache=None, begin: int = 0) -> torch.Tensor:
    """Logits [B, S, V] of the forwards that end at ``ends``, one after the other on one cache."""
    positions = batch.positions(model)
    cache = DynamicCache() if cache is None else cache
    logits = []
    for end in ends:
        inputs = batch.inputs(begin, end)
        logits.append(model(**inputs, position_ids=positions[..., begin:end], past_key_values=cache).logits)
        begin = end
    return torch.cat(logits, dim=1)


def with_decode_steps(batch: Batch, steps: int = 8) -> tuple[Batch, list[int]]:
    """The batch followed by tokens to feed one by one, and the ends of the forwards."""
    length = batch.ids.shape[1]
    longer = append(batch, make_batch(batch.family, [[steps]] * len(batch.ids), seed=1))
    return longer, list(range(length, length + steps + 1))


# Options of ``generated``.
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": IMAGE}  # it wants an end token; this one is suppressed


def generated(model, inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    output = model.generate(
        **inputs,
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 10, "do_sample": False} | options,
    )
    return output.sequences, torch.stack(output.logits)


def flash(q, k, v, softmax_scale=None, causal=False, **_):
    """What flash attention computes: ``[B, q, heads, D]``, causal from the last row up."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
        scores = scores.masked_fill(~ones.tril(k.shape[1] - q.shape[1]), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()).to(q.dtype)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, **options):
    sequences = zip(
        q.tensor_split(cu_seqlens_q[1:-1].long()),
        k.tensor_split(cu_seqlens_k[1:-1].long()),
        v.tensor_split(cu_seqlens_k[1:-1].long()),
    )
    return torch.cat([flash(*(x[None] for x in sequence), **options)[0] for sequence in sequences])
