"""Where attention goes, against the weights that eager attention returns."""

import families_zoo
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama
from vlm import FAMILIES, IMAGE, make_batch, make_model

from vtw_kernels.integration.attention import last_row
from vtw_kernels.layer_search.attention import attention_mass

PROMPTS = {"one": [[3, 4, 5]], "ragged": [[2, 4, 3, 4, 4], [5, 4, 1]]}
ZOO = ("gemma3", "gemma4", "llama4", "kimi_k25", "phi4_multimodal", "qwen3_vl_moe")


def mass_of_weights(attentions, inputs, visual):
    """The same from ``[B, heads, S, S]`` of each layer, sample by sample."""
    masses = []
    for weights in attentions:
        shares = []
        for sample, attended, is_visual in zip(weights, inputs["attention_mask"], visual):
            last = attended.nonzero().max()
            row = sample[:, last].mean(0)
            first = is_visual.nonzero().min()
            after = ~is_visual & (torch.arange(len(row)) > first)
            shares.append(torch.stack([row[:first].sum(), row[is_visual].sum(), row[after].sum()]))
        masses.append(torch.stack(shares).mean(0))
    return torch.stack(masses)


def weights_of(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_attentions=True, use_cache=False).attentions


ATTENTION = [(x, y) for x in ("eager", "sdpa", "flash_attention_2") for y in PROMPTS] + [("flex_attention", "ragged")]


@pytest.mark.parametrize("attention, prompts", ATTENTION)
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_weights(family, prompts, pad, attention, on_the_cpu):
    model, inputs = make_model(family, "eager"), make_batch(family, PROMPTS[prompts], pad).inputs()
    expected = mass_of_weights(weights_of(model, inputs), inputs, inputs["input_ids"] == IMAGE)
    model.model.language_model.config._attn_implementation = attention
    mass = attention_mass(model, inputs)
    assert mass.dtype == torch.float32 and mass.shape == expected.shape
    torch.testing.assert_close(mass, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mass.sum(1), torch.ones(len(mass)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("family", ZOO)
def test_families(family, prompts, attention):
    """Windows, chunks, keys and values of different sizes, experts."""
    model, inputs = families_zoo.make_model(family), families_zoo.make_prompts(family, PROMPTS[prompts])
    visual = inputs["input_ids"] == IMAGE
    model.set_attn_implementation("eager")
    expected = mass_of_weights(weights_of(model, inputs), inputs, visual)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(attention_mass(model, inputs, visual_mask=visual), expected, atol=1e-6, rtol=0)


def test_layers_that_are_not_attention():
    model, inputs = families_zoo.make_model("lfm2_vl"), families_zoo.make_prompts("lfm2_vl", PROMPTS["one"])
    mass = attention_mass(model, inputs)
    assert mass.isnan().all(1).tolist() == [True, False, False, False]
    torch.testing.assert_close(mass[1:].sum(1), torch.ones(3))


def test_what_changes_scores():
    """Soft caps, sinks, windows and biases per head, against the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2))
    bias, sinks = torch.randn(1, 4, 9, 9, generator=generator), torch.randn(4, generator=generator)
    last, rows = torch.tensor([8, 6]), torch.arange(9)
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.3
    scores = 5 * torch.tanh(scores / 5) + bias
    distance = rows[:, None] - rows
    scores = scores.masked_fill(~((distance >= 0) & (distance < 4)), -torch.inf)
    scores = torch.cat((scores, sinks.view(1, 4, 1, 1).expand(2, 4, 9, 1)), dim=-1)
    expected = scores.softmax(-1)[torch.arange(2), :, last, :-1]
    options = dict(scaling=0.3, softcap=5.0, s_aux=sinks, position_bias=bias, sliding_window=4, is_causal=True)
    torch.testing.assert_close(last_row(query, key, None, options, last), expected)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 7:] = 0  # behind the last row: hidden anyway
    torch.testing.assert_close(last_row(query, key, padding, options, last), expected)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("prompts", [[[300, 4, 300]], [[300, 4, 300], [7, 4, 7]]], ids=["one", "padded"])
def test_never_holds_all_weights(prompts):
    model, inputs = make_model("llava"), make_batch("llava", prompts).inputs()
    with torch.no_grad(), Largest() as plain:
        model(**inputs, use_cache=False, logits_to_keep=1)
    with Largest() as observed:
        attention_mass(model, inputs)
    tokens = inputs["input_ids"].shape[1]
    masks = len(prompts) * tokens**2 if len(prompts) > 1 else 0  # the model's own
    assert max(masks, 64 * tokens) <= observed.elements == plain.elements < 4 * tokens**2


def test_leaves_everything_as_it_was(monkeypatch):
    model, inputs = make_model("llava").train(), make_batch("llava", PROMPTS["one"]).inputs()

    def state():
        functions = dict(ALL_ATTENTION_FUNCTIONS), AttentionInterface.__getitem__, vars(AttentionInterface).keys()
        return *functions, modeling_llama.eager_attention_forward, model.config._attn_implementation

    before = state()
    attention_mass(model, inputs)
    assert state() == before
    monkeypatch.setattr(model.model.language_model.layers[2].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_mass(model, inputs)
    assert state() == before and all(module.training for module in model.modules())


def test_the_forward_is_what_it_was():
    model, inputs = make_model("qwen2_vl"), make_batch("qwen2_vl", PROMPTS["ragged"]).inputs()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    attention_mass(model, inputs)
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
    assert torch.equal(*seen)


def test_bad_inputs():
    model, inputs = make_model("llava"), make_batch("llava", PROMPTS["ragged"]).inputs()
    with pytest.raises(
        ValueError, match="inputs: expected at least one visual token in each sample, got none in row 1"
    ):
        attention_mass(model, inputs | {"attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0]])})
    with pytest.raises(ValueError, match=r"visual_mask: expected bool of shape \[2, 17\], got torch.int64"):
        attention_mass(model, inputs, visual_mask=inputs["input_ids"])
    for layer in model.model.language_model.layers:
        layer.self_attn = OwnAttention()
    with pytest.raises(ValueError, match="model: expected attention that transformers' AttentionInterface hands out"):
        attention_mass(model, inputs)


class OwnAttention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None
