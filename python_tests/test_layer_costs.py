"""What withdrawal costs by layer, against forwards that are withdrawn at each."""

import pytest
import torch
import vlm
from families_zoo import IMAGE, LAYERS, make_model, make_prompts
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import vtw_kernels as vtw
from vtw_kernels.integration.families import find_parts
from vtw_kernels.layer_search import costs as module
from vtw_kernels.layer_search.costs import measure_costs

PROMPT = [[3, 4, 5]]
FAMILIES = ("llava", "gemma3", "gemma4", "llama4", "qwen3_vl_moe", "kimi_k25", "blip-2", "granite4_vision", "lfm2_vl")


def bytes_and_flops(model, inputs):
    """Of one prefill, as torch counts the whole model with eager attention."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(**inputs, past_key_values=cache, use_cache=True)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "conv_states")]
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)), counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_add_up(family):
    """The sums of two forwards are the costs of a forward for each layer: rows that stay, experts, windows, caches."""
    model, inputs = make_model(family).requires_grad_(False), make_prompts(family, PROMPT)
    visual = inputs["input_ids"] == IMAGE
    parts = find_parts(model)
    layers = range(parts.min_layer, LAYERS + 1)
    costs = measure_costs(model, inputs, layers, visual_mask=visual, repeats=1)
    assert costs.layers == [*layers] and (costs.tokens, costs.visual_tokens) == (12, 4)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter knows no grouped products
    full_bytes, full_flops = bytes_and_flops(model, inputs)
    assert (costs.kv_bytes[-1], costs.layers[-1]) == (full_bytes, LAYERS)
    for layer, kv_bytes, flops in list(zip(costs.layers, costs.kv_bytes, costs.flops))[:-1]:
        with vtw.withdraw(model, layer, visual_mask=visual):
            assert bytes_and_flops(model, inputs) == (kv_bytes, full_flops - costs.flops[-1] + flops), layer


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_attention_does_not_matter(attention, on_the_cpu):
    model, inputs = vlm.make_model("llava", "eager"), vlm.make_batch("llava", PROMPT).inputs()
    model.model.language_model.config._attn_implementation = attention
    costs = measure_costs(model, inputs, [2], repeats=1)
    hidden, heads, keys, size, wide = 32, 4, 2, 8, 64

    def flops(rows):
        return 2 * rows * (hidden * size * (2 * heads + 2 * keys) + 3 * hidden * wide) + 4 * rows * rows * heads * size

    assert costs.flops == [2 * flops(12) + 2 * flops(8), 4 * flops(12)]
    assert costs.kv_bytes == [2 * 2 * keys * size * 4 * 20, 2 * 2 * keys * size * 4 * 24]


def test_seconds_between_measured_layers(monkeypatch):
    """Five layers are measured in turns; the warm-up does not count, others lie between their neighbours."""
    text = dict(num_hidden_layers=12)
    model, inputs = make_model("llava", **text), make_prompts("llava", PROMPT)
    ran = []
    rows = model.base_model.language_model.layers

    def seconds(prefill, devices):
        lengths = []
        hooks = [layer.register_forward_hook(lambda m, args, x: lengths.append(x.shape[1])) for layer in rows]
        prefill()
        for hook in hooks:
            hook.remove()
        ran.append(lengths.count(12))  # layers with all rows
        round_ = (len(ran) - 1) // 5
        return 1000.0 if round_ == 0 else ran[-1] ** 2 + (0, 0, 5, -1, 9, -2)[round_]

    monkeypatch.setattr(module, "_seconds", seconds)
    costs = measure_costs(model, inputs, range(1, 12))
    assert costs.timed_layers == [1, 4, 8, 11, 12] and ran == costs.timed_layers * 6
    expected = {1: 1, 2: 6, 3: 11, 4: 16, 5: 28, 6: 40, 7: 52, 8: 64, 9: 83, 10: 102, 11: 121, 12: 144}
    assert dict(zip(costs.layers, costs.prefill_seconds)) == pytest.approx(expected)
    assert costs.prefill_iqr == pytest.approx([6.0] * 12)  # of -2, -1, 0, 5, 9 the quartiles are -1 and 5


def test_measured_seconds():
    model, inputs = vlm.make_model("llava"), vlm.make_batch("llava", PROMPT).inputs()
    costs = measure_costs(model.train(), inputs | {"labels": inputs["input_ids"]}, [1, 2])
    assert all(0 < x < 10 for x in costs.prefill_seconds) and costs.device.startswith("cpu")
    assert model.training and not hasattr(model.config, "vtw")


def test_what_can_not_be_counted(monkeypatch):
    model, inputs = vlm.make_model("llava"), vlm.make_batch("llava", PROMPT).inputs()
    layer = model.model.language_model.layers[1]
    for linear in (x for x in layer.modules() if isinstance(x, torch.nn.Linear)):
        monkeypatch.setattr(linear, "forward", lambda x, w=linear.weight: (x[..., None, :] * w).sum(-1))
    with pytest.warns(UserWarning, match="flops: expected matrix multiplications .* got none in layer 1"):
        measure_costs(model, inputs, [2], repeats=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(candidates=[]), "candidates: expected layers before which something is withdrawn, 1..4"),
        (dict(candidates=[4]), "candidates: expected layers before which something is withdrawn, 1..4"),
        (dict(candidates=[0]), "layer: expected 1..4"),
        (dict(candidates=[5]), "layer: expected 1..4"),
        (dict(candidates=[1], repeats=0), "repeats: expected at least 1, got 0"),
        (dict(candidates=[1], visual_mask=torch.ones(1, 3)), "visual_mask: expected bool of shape"),
        (dict(candidates=[1], prompts=[[3, 4, 5], [3, 4, 5]]), "inputs: expected one sample, got 2"),
        (dict(candidates=[1], prompts=[[3]]), "inputs: expected a sample with visual tokens, got none"),
    ],
)
def test_bad_arguments(arguments, message):
    prompts = arguments.pop("prompts", PROMPT)
    model, inputs = vlm.make_model("llava"), vlm.make_batch("llava", prompts).inputs()
    with pytest.raises(ValueError, match=message):
        measure_costs(model, inputs, **arguments)
