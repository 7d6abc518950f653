"""A tiny random model of each family of vision-language models in transformers, and prompts for it.

The decoder, its positions, masks and caches are the family's own. Placeholders keep their embeddings: no pixels, except
where the vision tower decides about positions or goes on adding features in the decoder.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig
from vlm import TRANSFORMERS_5, make_batch, older_than, rope_config

LAYERS, VOCABULARY, PAD, IMAGE, VIDEO = 4, 100, 0, 7, 8
SLIDING = ["sliding_attention", "full_attention"] * 2
WINDOW = 6  # prompts are longer, so that windows move


@dataclass(frozen=True)
class Recipe:
    """What is special in a family's ``config``, and in its parts ``text`` and ``vision``.

    ``flat``: the text's settings stand in the config itself. ``masked``: visual tokens can only be told by
    ``visual_mask=``. ``pixels``: "" for none, "square", or "grid" for those of Qwen2-VL. ``types``: name of an input
    that says which tokens are visual, to models whose images look at themselves in both directions."""

    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    flat: bool = False
    masked: bool = False
    pixels: str = ""
    types: str = ""


TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
LLAMA, QWEN2, MISTRAL = {"model_type": "llama"}, {"model_type": "qwen2"}, {"model_type": "mistral"}
MROPE = rope_config(mrope_section=[1, 1, 2])
PARTIAL_MROPE = rope_config(mrope_section=[1, 1, 2], partial_rotary_factor=1.0)
QWEN_VISION = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_hidden_layers=2)
TIMM = {"model_type": "timm_wrapper", "model_args": dict(embed_dim=16, depth=1, num_heads=2, img_size=[16, 16])}
GLM_VISION = QWEN_VISION | dict(hidden_size=16, out_hidden_size=32, image_size=16)
DEEPSTACK = dict(hidden_size=16, out_hidden_size=32, deepstack_visual_indexes=[0, 1], num_position_embeddings=16)
QFORMER = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    encoder_hidden_size=16,
    vocab_size=VOCABULARY,
)
VQ = dict(
    embed_dim=4,
    num_embeddings=8,
    latent_channels=4,
    base_channels=32,
    channel_multiplier=[1, 1],
    num_res_blocks=1,
    attn_resolutions=[],
)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention"] * 2 + ["full_attention"] * 2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)

RECIPES = {
    "llava": Recipe(LLAMA, CLIP),
    "llava_next": Recipe(LLAMA, CLIP),
    "llava_next_video": Recipe(LLAMA, CLIP),
    "llava_onevision": Recipe(QWEN2, SIGLIP),
    "video_llava": Recipe(LLAMA, CLIP),
    "vipllava": Recipe(LLAMA, CLIP),
    "internvl": Recipe(QWEN2),
    "smolvlm": Recipe(LLAMA),
    "idefics2": Recipe(
        MISTRAL, config={"perceiver_config": dict(hidden_size=32, resampler_n_latents=2, resampler_depth=1)}
    ),
    "idefics3": Recipe(LLAMA),
    "paligemma": Recipe({"model_type": "gemma"}, SIGLIP | {"projection_dim": 32}, types="token_type_ids"),
    "gemma3": Recipe({"layer_types": SLIDING, "sliding_window": WINDOW}, SIGLIP, types="token_type_ids"),
    "gemma4": Recipe(
        dict(
            layer_types=SLIDING,
            sliding_window=WINDOW,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCABULARY,
            global_head_dim=8,
            use_bidirectional_attention="vision",
        ),
        dict(num_key_value_heads=2, head_dim=8, position_embedding_size=16),
        types="mm_token_type_ids",
    ),
    "mistral3": Recipe(MISTRAL, {"model_type": "pixtral", "head_dim": 8}),
    "aria": Recipe(
        dict(model_type="aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        config={"projector_patch_to_query_dict": {4: 4}},
    ),
    "janus": Recipe(
        LLAMA,
        dict(projection_dim=32),
        config={"vq_config": VQ | dict(num_patches=4, projection_dim=32, image_token_embed_dim=32)},
    ),
    "llama4": Recipe(
        dict(
            intermediate_size_mlp=64,
            num_local_experts=2,
            no_rope_layer_interval=2,
            layer_types=["chunked_attention", "full_attention"] * 2,
            attention_chunk_size=WINDOW,
        ),
        dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
    ),
    "lfm2_vl": Recipe(
        dict(model_type="lfm2", layer_types=["conv", "full_attention", "full_attention", "full_attention"]),
        dict(model_type="siglip2_vision_model", num_patches=4),
    ),
    "aya_vision": Recipe(dict(model_type="cohere2", layer_types=SLIDING, sliding_window=WINDOW), SIGLIP),
    "fast_vlm": Recipe(QWEN2, CLIP),
    "got_ocr2": Recipe(
        QWEN2, dict(output_channels=8, mlp_dim=16, window_size=2, global_attn_indexes=[0], num_hidden_layers=1)
    ),
    "chameleon": Recipe(config={"vocabulary_map": {"<image>": IMAGE}, "vq_config": VQ}, flat=True),
    "phi4_multimodal": Recipe(
        vision=dict(image_token_id=IMAGE),
        config={
            "audio_config": dict(
                hidden_size=16,
                intermediate_size=16,
                num_blocks=1,
                num_attention_heads=2,
                nemo_conv_channels=8,
                ext_pw_out_channel=16,
            )
        },
        flat=True,
    ),
    "qwen2_vl": Recipe(MROPE, QWEN_VISION | dict(embed_dim=16, hidden_size=32, mlp_ratio=2), pixels="grid"),
    "qwen2_5_vl": Recipe(
        MROPE,
        QWEN_VISION | dict(hidden_size=16, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]),
        pixels="grid",
    ),
    "qwen3_vl": Recipe(MROPE, QWEN_VISION | DEEPSTACK, pixels="grid"),
    "qwen3_vl_moe": Recipe(MROPE | MOE, QWEN_VISION | DEEPSTACK, pixels="grid"),
    "glm4v": Recipe(MROPE, GLM_VISION, pixels="grid"),
    "glm4v_moe": Recipe(
        dict(
            **PARTIAL_MROPE,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        GLM_VISION,
        pixels="grid",
    ),
    "blip-2": Recipe(
        dict(model_type="opt", ffn_dim=64, word_embed_proj_dim=32),
        config={"qformer_config": QFORMER, "num_query_tokens": 4},
        masked=True,
        pixels="square",
    ),
    "instructblip": Recipe(
        dict(model_type="opt", ffn_dim=64, word_embed_proj_dim=32),
        config={"qformer_config": QFORMER, "num_query_tokens": 4},
        masked=True,
        pixels="square",
    ),
    "ovis2": Recipe(
        QWEN2,
        dict(vocab_size=VOCABULARY),
        config=dict(visual_indicator_token_ids=[90, 91, 92, 93, 94], hidden_size=32, vocab_size=VOCABULARY),
    ),
    "deepseek_vl": Recipe(LLAMA, SIGLIP),
    "cohere2_vision": Recipe(dict(model_type="cohere2", layer_types=SLIDING, sliding_window=WINDOW), SIGLIP),
    "deepseek_vl_hybrid": Recipe(
        LLAMA, SIGLIP, config={"high_res_vision_config": VISION | dict(output_channels=8, mlp_dim=16)}
    ),
    "emu3": Recipe(config={"vocabulary_map": {"<image>": IMAGE}, "vq_config": VQ | dict(codebook_size=8)}),
    "ernie4_5_vl_moe": Recipe(
        dict(
            **MROPE,
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=[16, 8],
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
        dict(depth=1, num_heads=2, spatial_merge_size=2),
    ),
    "exaone4_5": Recipe(
        dict(model_type="exaone4", layer_types=SLIDING, sliding_window=WINDOW), QWEN_VISION | dict(out_hidden_size=32)
    ),
    "fuyu": Recipe({"model_type": "persimmon"}),
    "granite4_vision": Recipe(
        vision=dict(hidden_size=64),
        config=dict(downsample_rate="1/2", deepstack_layer_map=[[0, 0], [0, 1]], spatial_target_layers=[2, 2, 2, 2]),
    ),
    "granite_docling": Recipe(vision=dict(out_hidden_size=32, deepstack_visual_indexes=[0, 0])),
    "kimi_k25": Recipe(
        dict(
            head_dim=4,
            num_key_value_heads=4,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
        )
    ),
    "lighton_ocr": Recipe({"model_type": "qwen3"}, {"model_type": "pixtral", "head_dim": 8}),
    "molmo2": Recipe(
        types="mm_token_type_ids",
        vision=dict(image_size=[8, 8]),
        config=dict(
            video_token_id=IMAGE,
            adapter_config=dict(
                vision_feature_layer=[0],
                hidden_size=16,
                intermediate_size=16,
                text_hidden_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            ),
        ),
    ),
    "paddleocr_vl": Recipe(MROPE),
    "qianfan_ocr": Recipe({"model_type": "qwen3"}),
    "qwen3_5": Recipe(
        LINEAR | PARTIAL_MROPE,
        QWEN_VISION | dict(hidden_size=16, out_hidden_size=32, num_position_embeddings=16),
    ),
    "video_llama_3": Recipe(QWEN2),
    "gemma3n": Recipe(
        dict(
            num_kv_shared_layers=0,
            layer_types=SLIDING,
            sliding_window=WINDOW,
            hidden_size_per_layer_input=4,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * LAYERS,
        ),
        {"architecture": "test_vit"},
        dict(audio_config=dict(hidden_size=16, conf_num_hidden_layers=1, conf_num_attention_heads=2)),
    ),
    "glm46v": Recipe(MROPE, GLM_VISION, pixels="grid"),
    "glm_ocr": Recipe(MROPE, GLM_VISION, pixels="grid"),
    "minicpmv4_6": Recipe(LINEAR | {"model_type": "qwen3_5_text"}),
    "perception_lm": Recipe(LLAMA, TIMM | {"architecture": "vit_tiny_patch16_224"}),
}


def make_config(family: str, **text):
    """``text``: settings of the decoder that replace those of the recipe."""
    if family not in CONFIG_MAPPING and older_than("5.23"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family == "llama4" and TRANSFORMERS_5 and older_than("5.20"):
        pytest.skip("up to transformers 5.19, Llama 4 calls its masks with an argument that they do not take")
    if family == "llama4" and transformers.__version__.startswith("5.24."):
        pytest.skip("in transformers 5.24, Llama 4 looks for image outputs where its decoder has none")
    recipe = copy.deepcopy(RECIPES[family])
    defaults = AutoConfig.for_model(family)
    image_token = "image_token_index" if "image_token_index" in vars(defaults) else "image_token_id"
    named = {image_token: IMAGE, "video_token_id": VIDEO}
    config = {name: token for name, token in named.items() if hasattr(defaults, name)} | recipe.config
    config["vision_config"] = VISION | recipe.vision
    text = TEXT | recipe.text | text
    config |= text if recipe.flat else {"text_config": text}
    return AutoConfig.for_model(family, **config)


def make_model(family: str, **text):
    config = make_config(family, **text)
    names = (
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForVision2Seq",
        "AutoModelForCausalLM",
    )
    autos = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    torch.manual_seed(0)
    try:
        model = auto.from_config(config)
    except ImportError as error:  # it needs a package that is not installed
        pytest.skip(str(error).strip().splitlines()[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():  # the default of 0.02 leaves logits that hardly depend on anything
            if x.ndim > 1:
                x.normal_(0, 0.25, generator=generator)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def make_prompts(family: str, rows: list[list[int]]) -> dict[str, Tensor]:
    """Inputs of ``generate``. ``rows``: per sequence the lengths of its segments, in turn text and images of 4
    tokens."""
    recipe = RECIPES[family]
    batch = make_batch("qwen2_vl" if recipe.pixels == "grid" else "llava", rows)
    inputs = batch.inputs()
    if not recipe.pixels:
        del inputs["pixel_values"]
    if recipe.types:
        inputs[recipe.types] = batch.visual.long()
    if family == "instructblip":
        inputs["qformer_input_ids"] = torch.ones(len(batch.images), 3, dtype=torch.long)
    return inputs
