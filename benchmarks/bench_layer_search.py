"""The one-pass layer search against the loop over withdraw(model, k) that it equals."""

import pytest
import torch
from harness import observe, skip_if_too_long
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtw_kernels as vtw

pytestmark = pytest.mark.op("search")
IMAGE = 7


@pytest.fixture(scope="module")
def side(model_shape) -> int:
    """Patches along an image: the visual tokens are those of as many square images as it takes."""
    return max(n for n in range(1, 25) if model_shape.visual % n**2 == 0)


@pytest.fixture(scope="module")
def model(device, model_shape, dtype, side):
    """The depth, vocabulary and tokens of the model with a hidden size of 512 and random weights."""
    skip_if_too_long(model_shape, device)
    torch.manual_seed(0)
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(**vision, image_size=14 * side, patch_size=14)
    text = dict(hidden_size=512, intermediate_size=1376, num_attention_heads=8, vocab_size=model_shape.vocabulary)
    text = LlamaConfig(**text, num_hidden_layers=model_shape.layers)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=side**2)
    return LlavaForConditionalGeneration(config).eval().to(device, dtype)


@pytest.fixture(scope="module")
def inputs(device, model_shape, dtype, side):
    generator = torch.Generator().manual_seed(0)
    lengths = model_shape.before, model_shape.after
    before, after = (torch.randint(10, 32000, (1, length), generator=generator) for length in lengths)
    ids = torch.cat((before, torch.full((1, model_shape.visual), IMAGE), after), dim=1)
    pixels = torch.randn(model_shape.visual // side**2, 3, 14 * side, 14 * side, generator=generator)
    return {"input_ids": ids.to(device), "pixel_values": pixels.to(device, dtype)}


def one_pass(model, inputs):
    return vtw.find_layer(model, [inputs], progress=False).kl


@torch.inference_mode()
def naive_loop(model, inputs):
    full = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    results = []
    for layer in range(1, model.config.text_config.num_hidden_layers):
        with vtw.withdraw(model, layer):
            withdrawn = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        results.append(vtw.kl_divergence(withdrawn, full))
    return torch.cat(results).cpu()


PEERS = {"vtw_kernels": one_pass, "naive loop": naive_loop}


def test_equal(model, inputs, dtype):
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(one_pass(model, inputs), naive_loop(model, inputs), atol=atol, rtol=0)


@pytest.mark.parametrize("peer", PEERS)
def test_search(benchmark, model, inputs, peer, device, model_shape, title):
    tokens = f"{model_shape.visual} visual and {model_shape.text} text tokens{title}"
    benchmark.group = f"search over {model_shape.layers - 1} layers, hidden 512, {tokens}"
    benchmark.pedantic(PEERS[peer], (model, inputs), rounds=3)
    if benchmark.enabled:
        benchmark.extra_info |= observe(PEERS[peer], (model, inputs), device)
