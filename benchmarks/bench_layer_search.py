"""The one-pass layer search against the loop over withdraw(model, k) that it equals."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtw_kernels as vtw

LAYERS, BEFORE, VISUAL, AFTER, IMAGE = 32, 35, 576, 50, 7


@pytest.fixture(scope="module")
def model(device):
    """LLaVA-1.5's depth and tokens with a hidden size of 512 and random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=LAYERS, num_attention_heads=8, vocab_size=32000
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=VISUAL)
    return LlavaForConditionalGeneration(config).eval().to(device)


@pytest.fixture(scope="module")
def inputs(device):
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randint(10, 32000, (1, length), generator=generator) for length in (BEFORE, AFTER))
    ids = torch.cat((before, torch.full((1, VISUAL), IMAGE), after), dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336, generator=generator)}
    return {name: x.to(device) for name, x in inputs.items()}


def one_pass(model, inputs):
    return vtw.find_layer(model, [inputs], progress=False).kl


@torch.inference_mode()
def naive_loop(model, inputs):
    full = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    results = []
    for layer in range(1, LAYERS):
        with vtw.withdraw(model, layer):
            withdrawn = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        results.append(vtw.kl_divergence(withdrawn, full))
    return torch.cat(results).cpu()


PEERS = {"vtw_kernels": one_pass, "naive loop": naive_loop}


def test_equal(model, inputs):
    torch.testing.assert_close(one_pass(model, inputs), naive_loop(model, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("peer", PEERS)
def test_search(benchmark, model, inputs, peer):
    benchmark.group = f"search over {LAYERS - 1} layers, hidden 512, {VISUAL} visual and {BEFORE + AFTER} text tokens"
    benchmark.pedantic(PEERS[peer], (model, inputs), rounds=3)
