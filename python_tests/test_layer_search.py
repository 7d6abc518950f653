"""The one-pass search against a naive loop that withdraws at every candidate."""

import json

import pytest
import torch
from vlm import FAMILIES, LAYERS, ONE, make_batch, make_model

import vtw_kernels as vtw

IMAGES = [[2, 4, 3, 8, 4], [1, 4, 2], [4, 4, 3]]  # of different lengths, each with an image


def naive_kl(model, inputs, layer):
    """KL(withdrawn‖full) of the next token in fp64, from two whole forwards."""
    position = torch.arange(inputs["input_ids"].shape[1])
    last = torch.where(inputs["attention_mask"] != 0, position, 0).amax(1)
    rows = torch.arange(len(last))
    with torch.no_grad():
        full = model(**inputs).logits[rows, last].double().log_softmax(-1)
        with vtw.withdraw(model, layer):
            withdrawn = model(**inputs).logits[rows, last].double().log_softmax(-1)
    return (withdrawn.exp() * (withdrawn - full)).sum(-1)


pytestmark = pytest.mark.filterwarnings("ignore:No layer of")  # random models need their images to the end


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("lengths", [ONE, IMAGES], ids=["one", "three"])
def test_equals_naive_loop(family, attention, pad, lengths):
    model = make_model(family, attention)
    batches = [make_batch(family, lengths, pad, seed).inputs() for seed in (0, 1)]
    search = vtw.find_layer(model, batches, progress=False)
    assert search.candidates == list(range(1, LAYERS))
    assert search.per_sample.shape == (2 * len(lengths), LAYERS - 1)
    naive = torch.stack([torch.cat([naive_kl(model, x, k) for x in batches]) for k in search.candidates], dim=1)
    assert naive.min() > 1e-3  # these models do need their images
    torch.testing.assert_close(search.per_sample.double(), naive, atol=1e-5, rtol=0)
    torch.testing.assert_close(search.kl.double(), naive.mean(0), atol=1e-5, rtol=0)


def test_layers_of_different_masks():
    """A layer where no candidate joins may still have another mask than the one before it."""
    model = make_model("qwen2_vl")
    text = model.model.language_model
    text.config.layer_types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    text.config.sliding_window, text.has_sliding_layers = 3, True
    inputs = make_batch("qwen2_vl", IMAGES).inputs() | {"use_cache": False}
    search = vtw.find_layer(model, [inputs], candidates=[1], progress=False)
    windowed = naive_kl(model, inputs, 1)
    text.config.layer_types = ["full_attention"] * LAYERS
    assert (naive_kl(model, inputs, 1) - windowed).abs().max() > 1e-3
    torch.testing.assert_close(search.per_sample[:, 0].double(), windowed, atol=1e-5, rtol=0)


def test_no_layer_runs_twice_on_shared_rows():
    """Each layer runs once at full length, and once more for all candidates that have joined, on the rows from the first
    visual token on."""
    model = make_model("llava")
    shapes = []
    for layer in model.model.language_model.layers:
        layer.forward = record_shape(layer.forward, shapes)
    inputs = make_batch("llava", ONE).inputs()
    vtw.find_layer(model, [inputs], progress=False)
    full, after = inputs["input_ids"].shape[1], ONE[0][2]
    assert shapes == [(1, full)] + [shape for k in range(1, LAYERS) for shape in ((1, full), (k, after))]


def record_shape(forward, shapes):
    def recorded(hidden_states, *args, **kwargs):
        shapes.append(tuple(hidden_states.shape[:2]))
        return forward(hidden_states, *args, **kwargs)

    return recorded


def test_candidates_and_threshold():
    model = make_model("llava")
    batches = [make_batch("llava", ONE).inputs()]
    every = vtw.find_layer(model, batches, progress=False)
    some = vtw.find_layer(model, batches, candidates=[3, 1], threshold=1e9, progress=False)
    assert some.candidates == [1, 3] and some.layer == 1
    torch.testing.assert_close(some.kl, every.kl[[0, 2]], atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="No layer of 1..3 qualifies"):
        nothing = vtw.find_layer(model, batches, threshold=0.0, progress=False)
    assert nothing.layer is None and "No layer" in nothing.verdict()
    exactly = vtw.find_layer(model, batches, threshold=every.kl[1].item(), progress=False)
    assert exactly.kl[1] <= exactly.threshold and exactly.layer in (1, 2)


def test_save_load_table_plot(tmp_path):
    search = vtw.find_layer(make_model("llava"), [make_batch("llava", IMAGES).inputs()], progress=False, threshold=1e9)
    search.save(tmp_path / "vtw.json")
    loaded = vtw.LayerSearch.load(tmp_path / "vtw.json")
    assert torch.equal(loaded.per_sample, search.per_sample)
    assert (loaded.candidates, loaded.layer, loaded.threshold) == (search.candidates, 1, 1e9)
    assert json.loads((tmp_path / "vtw.json").read_text())["layer"] == 1
    assert "| 1 |" in search.table() and "chosen" in search.table()
    search.plot(tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_leaves_the_model_as_it_was():
    model = make_model("llava").train()
    inputs = make_batch("llava", ONE).inputs()
    model(**inputs)  # transformers adds hooks of its own in the first forward
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    vtw.find_layer(model, [inputs], progress=False)
    assert model.training
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": [0]}, "candidates: expected layers in 1..3"),
        ({"candidates": [LAYERS]}, "candidates: expected layers in 1..3"),
        ({"candidates": []}, "candidates: expected layers in 1..3"),
        ({"threshold": -1.0}, "threshold: expected a number of at least 0"),
        ({"threshold": float("nan")}, "threshold: expected a number of at least 0"),
        ({"batches": []}, "batches: expected at least one batch"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"batches": [make_batch("llava", ONE).inputs()]} | arguments
    with pytest.raises(ValueError, match=message):
        vtw.find_layer(make_model("llava"), progress=False, **arguments)


def test_bad_samples():
    model = make_model("llava")
    text_only = make_batch("llava", [[2, 4, 3], [9]]).inputs()
    with pytest.raises(ValueError, match="at least one visual token in each sample, got none in row 1"):
        vtw.find_layer(model, [text_only], progress=False)
    image_last = make_batch("llava", [[2, 4, 3], [5, 4]]).inputs()
    with pytest.raises(ValueError, match="got a visual token at the end in row 1"):
        vtw.find_layer(model, [image_last], progress=False)
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="inside withdraw"):
        vtw.find_layer(model, [make_batch("llava", ONE).inputs()], progress=False)
