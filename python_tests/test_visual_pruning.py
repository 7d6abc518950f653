"""Visual pruning in transformers against the simulation that masks (pruning_oracle.py)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from families_zoo import make_model as make_zoo_model
from families_zoo import make_prompts
from pruning_oracle import simulated
from torch import Tensor
from vlm import (
    IMAGE,
    LAYERS,
    ONE,
    RAGGED,
    TRANSFORMERS_5,
    Batch,
    append,
    generated,
    make_batch,
    make_cache,
    model_of,
    older_than,
    run,
    with_decode_steps,
)

import vtw_kernels as vtw
from vtw_kernels.integration.pruning import prune, windows
from vtw_kernels.integration.pruning.grids import find_grids
from vtw_kernels.integration.pruning.windows import make_blocks
from vtw_kernels.layer_search import visual_heads

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
HEADS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
PRUNINGS = {
    "heads": vtw.VisualPruning(heads=HEADS),
    "window": vtw.VisualPruning(window=3),
    "self": vtw.VisualPruning(window=1),
    "ffn": vtw.VisualPruning(ffn_ratio=3),
    "cut": vtw.VisualPruning(layer_cut=2),
    "all": vtw.VisualPruning(heads=HEADS, window=3, ffn_ratio=2, layer_cut=3),
    "heads, released": vtw.VisualPruning(heads=HEADS, renormalize=False),
    "cut, released": vtw.VisualPruning(layer_cut=2, renormalize=False),
    "all, released": vtw.VisualPruning(heads=HEADS, window=1, ffn_ratio=2, layer_cut=2, renormalize=False),
}


def places_of(batch: Batch) -> Tensor:
    """Of images of two rows, in their order."""
    places = torch.full((*batch.ids.shape, 3), -1)
    for number, image in enumerate(batch.images):
        length = 4 if batch.family == "llava" else int(image["grid"].prod()) // 4
        at = torch.arange(length)
        place = torch.stack((torch.full((length,), number), at // (length // 2), at % (length // 2)), dim=-1)
        places[image["row"], image["end"] - length : image["end"]] = place
    return places


def simulate(model, pruning, batch: Batch, ends: list[int]) -> Tensor:
    model = copy.deepcopy(model).double()
    with simulated(model, pruning, batch.visual, places_of(batch)):
        return run(model, batch, ends).float()


def assert_equal_to_simulation(model, pruning, batch: Batch, ends: list[int], cache: str = "dynamic", **kwargs) -> None:
    wanted = simulate(model, pruning, batch, ends)
    with vtw.prune_visual(model, pruning, **kwargs):
        given = run(model, batch, ends, make_cache(model, cache, batch.ids.shape[1] + 3))
    plain = run(model, batch, ends, make_cache(model, cache, batch.ids.shape[1] + 3))
    rows = (batch.mask != 0) & ~batch.visual
    assert (given - wanted)[rows].abs().max() <= TOLERANCE
    after_image = rows & (batch.visual.cumsum(1) > 0)
    assert (plain - wanted)[after_image].abs().max() > 100 * TOLERANCE  # so the comparison can fail
    if not (pruning.renormalize and pruning.layer_cut):
        assert (given - wanted)[batch.visual].abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", PRUNINGS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_prefill_and_decode(family, name):
    """Batches with padding, of none, one and two images of different grids."""
    if (family, name) == ("llava", "window"):
        family = "qwen2_vl"  # all tokens of images of 2 x 2 are neighbours
    batch, ends = with_decode_steps(make_batch(family, RAGGED))
    assert_equal_to_simulation(model_of(family), PRUNINGS[name], batch, ends)


@pytest.mark.parametrize("name", ["all", "all, released", "heads"])
@pytest.mark.parametrize(("attention", "cache"), [("eager", "dynamic"), ("sdpa", "static"), ("eager", "static")])
def test_attention_and_caches(attention, cache, name):
    batch, ends = with_decode_steps(make_batch("qwen2_vl", RAGGED))
    assert_equal_to_simulation(model_of("qwen2_vl", attention), PRUNINGS[name], batch, ends, cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_text_token(cache):
    batch, ends = with_decode_steps(make_batch("qwen2_vl", [[0, 4, 1]]), steps=2)
    assert_equal_to_simulation(model_of("qwen2_vl"), PRUNINGS["all"], batch, ends, cache)


@pytest.mark.parametrize("name", ["all", "all, released", "window"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_turns(cache, name):
    """Text alone, then an image, then another one that sees nothing of the first, then text."""
    turns = [[[6], [7]], [[2, 8, 3], [3, 4, 6]], [[1, 4, 4], [2, 8, 5]], [[3], [2]]]
    if cache == "static":  # transformers' own masks do not go with padding between turns
        turns = [[turn[0]] for turn in turns]
    batch, ends = make_batch("qwen2_vl", turns[0]), []
    for i, turn in enumerate(turns[1:], 1):
        ends.append(batch.ids.shape[1])
        batch = append(batch, make_batch("qwen2_vl", turn, seed=i))
    batch, steps = with_decode_steps(batch, 3)
    assert_equal_to_simulation(model_of("qwen2_vl"), PRUNINGS[name], batch, ends + steps, cache)


@pytest.mark.parametrize("name", ["window", "all", "all, released"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blocks(monkeypatch, attention, cache, name):
    """Windows by some rows of a grid at a time, which does not pay here: in one turn and after another."""
    made = []
    monkeypatch.setattr(prune, "DENSE", 100)
    monkeypatch.setattr(windows, "QUERIES", 4)
    monkeypatch.setattr(prune, "make_blocks", lambda *args: made.append(make_blocks(*args)) or made[-1])
    batch, ends = with_decode_steps(make_batch("qwen2_vl", RAGGED), 2)
    assert_equal_to_simulation(model_of("qwen2_vl", attention), PRUNINGS[name], batch, ends, cache)
    turns = make_batch("qwen2_vl", [[2, 8, 3]]), make_batch("qwen2_vl", [[1, 4, 4]], seed=1)
    batch, ends = with_decode_steps(append(*turns), 2)
    assert_equal_to_simulation(model_of("qwen2_vl", attention), PRUNINGS[name], batch, [13, *ends], cache)
    assert {len(blocks.sequence) for blocks in made} == {4, 2, 1} and all(x.rows.shape[1] == 4 for x in made)


@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_families(family):
    """Llama, Qwen2 with biases, Mistral, Qwen2.5 and Qwen3 with norms of queries and keys."""
    model = make_zoo_model(family, **{"sliding_window": None} if family == "mistral3" else {})
    inputs = make_prompts(family, RAGGED)
    visual = inputs["input_ids"] == IMAGE
    grid = inputs.get("image_grid_thw")
    grids = [[(2, 2), (2, 4)], [], [(2, 2)]] if grid is not None else [[(2, 2), (2, 2)], [], [(2, 2)]]
    places = torch.full((*visual.shape, 3), -1)
    for row, sizes in enumerate(grids):
        at = visual[row].nonzero().flatten()
        flat = [(i, y, x) for i, (height, width) in enumerate(sizes) for y in range(height) for x in range(width)]
        if flat:
            places[row, at] = torch.tensor(flat)
    pruning = vtw.VisualPruning(heads=HEADS, window=1, ffn_ratio=1.5, layer_cut=3)
    options = dict(max_new_tokens=6, do_sample=False)
    with vtw.prune_visual(model, pruning, grids=None if grid is not None else grids):
        given = generated(model, inputs, **options)[1]
    plain = generated(model, inputs, **options)[1]
    double = copy.deepcopy(model).double()
    with simulated(double, pruning, visual, places):
        wanted = generated(double, inputs, **options)[1]
    assert (given - wanted).abs().max() <= 10 * TOLERANCE
    assert (plain - wanted)[:, [0, 2]].abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
@pytest.mark.parametrize("name", ["all", "all, released"])
def test_generate(name, options):
    rows = ONE if "prompt_lookup_num_tokens" in options else RAGGED
    if "prompt_lookup_num_tokens" in options and not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 looks up prompts only for models that have an end of text")
    # Before, Qwen2-VL repeats its images by tokens that this one does not have.
    family = "llava" if "num_return_sequences" in options and older_than("5.23") else "qwen2_vl"
    batch, model = make_batch(family, rows), model_of(family)
    with vtw.prune_visual(model, PRUNINGS[name]):
        tokens, logits = generated(model, batch.inputs(), **options)
    double = copy.deepcopy(model).double()
    options = {x: y for x, y in options.items() if x not in ("cache_implementation", "prompt_lookup_num_tokens")}
    with simulated(double, PRUNINGS[name], batch.visual, places_of(batch)):
        wanted, wanted_logits = generated(double, batch.inputs(), **options)
    assert torch.equal(tokens, wanted)
    if logits.shape == wanted_logits.shape:
        assert (logits - wanted_logits).abs().max() <= 10 * TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_text_alone_is_the_plain_model(cache):
    batch, ends = with_decode_steps(make_batch("qwen2_vl", [[9], [5]]))
    model = model_of("qwen2_vl")
    plain = run(model, batch, ends, make_cache(model, cache, 30))
    with vtw.prune_visual(model, PRUNINGS["all"]):
        given = run(model, batch, ends, make_cache(model, cache, 30))
    assert torch.equal(given, plain)


def test_it_ends():
    batch, model = make_batch("qwen2_vl", ONE), model_of("qwen2_vl")
    plain = run(model, batch, [12])
    pruned = vtw.prune_visual(model, PRUNINGS["all"]).apply()
    assert not torch.equal(run(model, batch, [12]), plain)
    pruned.remove()
    pruned.remove()
    assert torch.equal(run(model, batch, [12]), plain)
    with pytest.raises(RuntimeError, match="boom"), vtw.prune_visual(model, PRUNINGS["all"]):
        raise RuntimeError("boom")
    assert torch.equal(run(model, batch, [12]), plain)


def test_a_static_cache_that_is_reset():
    model = model_of("qwen2_vl")
    batch, ends = with_decode_steps(make_batch("qwen2_vl", ONE), 2)
    text, text_ends = with_decode_steps(make_batch("qwen2_vl", [[7]]), 2)
    cache, plain = make_cache(model, "static", 20), run(model, text, text_ends, make_cache(model, "static", 20))
    with vtw.prune_visual(model, PRUNINGS["all"]):
        first = run(model, batch, ends, cache)
        cache.reset()
        assert torch.equal(run(model, text, text_ends, cache), plain)
        cache.reset()
        assert torch.equal(run(model, batch, ends, cache), first)


def test_caches_hold_no_visual_keys_for_heads_that_do_not_see_them():
    """Two heads of queries share each head of keys."""
    model, batch = model_of("qwen2_vl"), make_batch("qwen2_vl", [[3, 8, 5]])
    cache = make_cache(model, "dynamic", 0)
    pruning = vtw.VisualPruning(heads=HEADS)
    with vtw.prune_visual(model, pruning):
        run(model, batch, [16], cache)
    seen = [0 if not x.is_initialized else x.keys.shape[1] for x in cache.layers]
    assert seen == [2, 2, 1, 0] and {x.keys.shape[2] for x in cache.layers if x.is_initialized} == {16}
    assert {i: tuple(x.keys.shape[1:3]) for i, x in cache.blind.items()} == {1: (1, 8), 2: (2, 8), 3: (2, 8)}


def test_policies():
    """What FastV keeps is pruned, and the rest is gone: as with a mask of what it keeps, and all else hidden."""
    model, batch = model_of("qwen2_vl"), make_batch("qwen2_vl", [[2, 8, 4], [3, 8, 3]])
    batch, ends = with_decode_steps(batch)
    pruning = vtw.VisualPruning(heads=HEADS, window=3, ffn_ratio=2)
    policy = vtw.RandomVisual(2, 0.5, seed=3)
    with vtw.prune_visual(model, pruning, [policy, vtw.Withdraw(3)]):
        given = run(model, batch, ends)
    places = places_of(batch)
    kept = []

    class Watched(vtw.RandomVisual):
        def keep(self, boundary):
            kept.append(boundary.visual & super().keep(boundary))
            return kept[-1]

    with vtw.withdraw(model, Watched(2, 0.5, seed=3)):
        run(model, batch, ends[:1])
    gone = batch.visual.clone()
    gone[:, : ends[0]] &= ~kept[0]
    double = copy.deepcopy(model).double()
    hidden = [None, None, gone, batch.visual]
    with simulated(double, pruning, batch.visual, places, hidden):
        wanted = run(double, batch, ends).float()
    rows = (batch.mask != 0) & ~batch.visual
    assert (given - wanted)[rows].abs().max() <= TOLERANCE
    with vtw.prune_visual(model, pruning, vtw.TopAttention(2, 4)):  # looks at the attention of some heads
        run(model, batch, ends)


def test_gradients():
    model = copy.deepcopy(model_of("qwen2_vl"))
    batch = make_batch("qwen2_vl", [[3, 8, 5], [4, 4, 5]])
    labels = batch.ids.masked_fill(batch.visual | (batch.mask == 0), -100)
    labels[:, 1:][(batch.visual | (batch.mask == 0))[:, :-1]] = -100
    with vtw.prune_visual(model, PRUNINGS["all"]):
        model(**batch.inputs(), labels=labels).loss.backward()
    double = copy.deepcopy(model).double()
    double.zero_grad()
    with simulated(double, PRUNINGS["all"], batch.visual, places_of(batch)):
        double(**batch.inputs(), labels=labels).loss.backward()
    for given, wanted in zip(model.parameters(), double.parameters(), strict=True):
        if wanted.grad is not None and wanted.grad.abs().max() > 1e-6:
            assert (given.grad - wanted.grad).abs().max() <= 1e-4 * wanted.grad.abs().max()


def test_visual_mask_and_grids():
    """Embeddings without placeholders, one image of 3 x 4 in two tiles of 3 x 2."""
    model, embeds = model_of("llava").model.language_model, torch.randn(1, 20, 32, generator=torch.manual_seed(0))
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 4:16] = True
    places = torch.full((1, 20, 3), -1)
    places[0, 4:16] = torch.tensor([(tile, y, x) for tile in range(2) for y in range(3) for x in range(2)])
    pruning = vtw.VisualPruning(heads=HEADS, window=3, ffn_ratio=2)
    with vtw.prune_visual(model, pruning, visual_mask=visual, grids=[[(3, 2), (3, 2)]]):
        given = model(inputs_embeds=embeds).last_hidden_state
    with vtw.prune_visual(model, pruning, visual_mask=visual, grids=[[(3, 4)]]):
        other = model(inputs_embeds=embeds).last_hidden_state
    double = copy.deepcopy(model).double()
    with simulated(double, pruning, visual, places):
        wanted = double(inputs_embeds=embeds.double()).last_hidden_state
    assert (given - wanted).abs().max() <= TOLERANCE
    assert (other - wanted).abs().max() > 100 * TOLERANCE


def test_videos_and_tiles():
    grids = find_grids(
        torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool),
        None,
        SimpleNamespace(video_token_id=8, vision_config=SimpleNamespace(spatial_merge_size=2)),
        {"video_grid_thw": torch.tensor([[2, 4, 4]]), "image_grid_thw": torch.tensor([[1, 8, 2]])},
        torch.tensor([[1, 8, 8, 8, 8, 8, 8, 8, 8, 1, 7, 7, 7, 7, 1, 1]]),
    )
    assert grids == [(0, 1, 2, 2), (0, 5, 2, 2), (0, 10, 4, 1)]
    tiles = find_grids(torch.ones(1, 16, dtype=torch.bool), None, SimpleNamespace(image_seq_length=4), {}, None)
    assert tiles == [(0, 4 * i, 2, 2) for i in range(4)]


def test_saved(tmp_path):
    path = tmp_path / "pruning.safetensors"
    for pruning in PRUNINGS.values():
        pruning.save(path)
        loaded = vtw.VisualPruning.load(path)
        assert repr(loaded) == repr(pruning)
        assert (loaded.heads is None) == (pruning.heads is None)
        assert pruning.heads is None or torch.equal(loaded.heads, pruning.heads)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="expected what VisualPruning.save wrote"):
        vtw.VisualPruning.load(path)
    vtw.ExitRouters([2], 8, 4).save(path)
    with pytest.raises(ValueError, match="expected what VisualPruning.save wrote, got the format 'exit routers, 1'"):
        vtw.VisualPruning.load(path)


# ------------------------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_find_visual_heads(monkeypatch, tmp_path, attention):
    """Against the weights of eager attention, added up."""
    monkeypatch.setattr(visual_heads, "ROWS", 5)
    batches = [make_batch("qwen2_vl", RAGGED, seed=i) for i in range(3)] + [make_batch("qwen2_vl", [[4]])]
    found = vtw.find_visual_heads(model_of("qwen2_vl", attention), [x.inputs() for x in batches], 0.25, progress=False)
    wanted = []
    for batch in batches[:3]:
        weights = torch.stack(model_of("qwen2_vl", "eager")(**batch.inputs(), output_attentions=True).attentions, dim=1)
        real = batch.mask != 0
        for row in (0, 2):
            rows = weights[row][:, :, real[row]]
            visual, text = batch.visual[row], real[row] & ~batch.visual[row]
            wanted.append(rows[..., visual].sum((-1, -2)) / rows[..., text].sum((-1, -2)))
    wanted = torch.stack(wanted)
    assert found.ratios.shape == (6, LAYERS, 4) and (found.ratios - wanted).abs().max() <= 1e-5
    assert found.heads[:2].all() and int(found.heads[2:].sum()) == 2
    votes = (found.ratios > found.threshold).float().mean(0) > 0.4
    assert torch.equal(votes[2:], found.heads[2:])
    again = vtw.find_visual_heads(
        model_of("qwen2_vl", attention),
        [x.inputs() for x in batches],
        threshold=found.threshold,
        progress=False,
    )
    assert torch.equal(again.heads, found.heads)
    assert vtw.find_visual_heads(model_of("qwen2_vl"), [batches[0].inputs()], 1.0, progress=False).heads.all()
    found.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 1000
    vtw.prune_visual(model_of("qwen2_vl"), vtw.VisualPruning(heads=found.heads)).apply().remove()


def test_bad_search_of_heads():
    model, batch = model_of("qwen2_vl"), make_batch("qwen2_vl", ONE).inputs()
    with pytest.raises(ValueError, match="keep: expected it or threshold, got keep=None and threshold=None"):
        vtw.find_visual_heads(model, [batch])
    with pytest.raises(ValueError, match="keep: expected a share from 0 to 1, got 2"):
        vtw.find_visual_heads(model, [batch], 2)
    with pytest.raises(ValueError, match="threshold: expected a number of at least 0, got -1"):
        vtw.find_visual_heads(model, [batch], threshold=-1)
    with pytest.raises(TypeError, match="batches: expected an iterable of batches, got one, a dict"):
        vtw.find_visual_heads(model, batch, 0.5)
    with pytest.raises(ValueError, match="batches: expected at least one sample with visual tokens, got none"):
        vtw.find_visual_heads(model, [make_batch("qwen2_vl", [[4]]).inputs()], 0.5, progress=False)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"heads": [[True]]}, TypeError, r"heads: expected bool \[L, heads\] or None, got list"),
        ({"heads": torch.ones(4, 4)}, TypeError, r"got torch.float32 \[4, 4\]"),
        ({"heads": torch.zeros(4, 4, dtype=torch.bool)}, ValueError, "heads: expected at least one in layer 0"),
        ({"window": 4}, ValueError, "window: expected an odd number of at least 1, or None, got 4"),
        ({"window": -1}, ValueError, "window: expected"),
        ({"window": 3.0}, ValueError, "window: expected"),
        ({"ffn_ratio": 0.5}, ValueError, "ffn_ratio: expected a number of at least 1, or None, got 0.5"),
        ({"ffn_ratio": float("nan")}, ValueError, "ffn_ratio: expected"),
        ({"layer_cut": 0}, ValueError, "layer_cut: expected a layer of at least 1, or None, got 0"),
        ({"layer_cut": True}, ValueError, "layer_cut: expected"),
        ({"renormalize": None}, TypeError, "renormalize: expected a bool, got None"),
    ],
)
def test_bad_pruning(arguments, kind, says):
    with pytest.raises(kind, match=says):
        vtw.VisualPruning(**arguments)


@pytest.mark.parametrize(
    ("pruning", "arguments", "kind", "says"),
    [
        (vtw.VisualPruning(heads=HEADS[:3]), {}, ValueError, r"heads: expected bool \[4, 4\], of .* got \[3, 4\]"),
        (vtw.VisualPruning(layer_cut=5), {}, ValueError, r"layer_cut: expected 1..4, got 5"),
        (vtw.VisualPruning(ffn_ratio=100), {}, ValueError, "ffn_ratio: expected at most 64, .* got 100"),
        (None, {}, TypeError, "pruning: expected a VisualPruning, got NoneType"),
        (PRUNINGS["ffn"], {"policy": 3}, TypeError, "policy: expected a Policy, or some, got 3"),
        (PRUNINGS["cut"], {"policy": vtw.Withdraw(2)}, ValueError, "policy: expected layers before layer_cut=2, got 2"),
        (PRUNINGS["cut, released"], {"policy": vtw.Withdraw(1)}, ValueError, "policy: expected none without renorm"),
        (PRUNINGS["ffn"], {"visual_mask": torch.ones(3)}, ValueError, r"visual_mask: expected bool \[B, S\]"),
    ],
)
def test_bad_arguments(pruning, arguments, kind, says):
    with pytest.raises(kind, match=says):
        vtw.prune_visual(model_of("qwen2_vl"), pruning, **arguments)


def test_other_decoders_are_refused():
    with pytest.raises(NotImplementedError, match="of Llama's shape, got decoder layer 0 .* has no post_attention"):
        vtw.prune_visual(make_zoo_model("aya_vision"), PRUNINGS["ffn"])
    with pytest.raises(NotImplementedError, match="decoder layer 0 .* has no gate_proj, up_proj, down_proj"):
        vtw.prune_visual(make_zoo_model("qwen3_vl_moe"), PRUNINGS["ffn"])
    model = copy.deepcopy(model_of("llava"))
    model.model.language_model.layers[2].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match="decoder layer 2 .* whose up_proj is a .*Identity, not a Linear"):
        vtw.prune_visual(model, PRUNINGS["ffn"])
    with pytest.raises(ValueError, match="model: expected full attention in each layer, got a window of 6"):
        vtw.prune_visual(make_zoo_model("mistral3", sliding_window=6), PRUNINGS["ffn"])


@pytest.mark.parametrize(
    ("grids", "says"),
    [
        ([[(2, 3)]], "grids: expected one for each image, got none for 2 of 8 visual tokens"),
        ([[(3, 3)]], r"add up to the 8 visual tokens from 3 on in sequence 0, got 3 x 3 for 8 of them"),
        ([[(2, 4), (2, 2)]], "grids: expected one for each image of the forward, got 1 more"),
        ([[(2, 4)]] * 2, "grids: expected one list for each of 1 sequences, or a divisor, got 2"),
        ([[(0, 4)]], "got 0 x 4 for 8 of them"),
    ],
)
def test_grids_that_do_not_fit(grids, says):
    model, batch = model_of("qwen2_vl"), make_batch("qwen2_vl", [[3, 8, 5]])
    cache = make_cache(model, "dynamic", 0)
    with pytest.raises(ValueError, match=says), vtw.prune_visual(model, PRUNINGS["all"], grids=grids):
        run(model, batch, [16], cache)
    assert cache.get_seq_length() == 0  # nothing has been written


def test_images_that_are_no_squares():
    model = model_of("llava").model.language_model
    visual = torch.tensor([[False] + [True] * 6 + [False]])
    with vtw.prune_visual(model, PRUNINGS["self"], visual_mask=visual):
        with pytest.raises(ValueError, match="expected rows and columns of images, as 6 visual tokens are no square"):
            model(inputs_embeds=torch.randn(1, 8, 32))
        with pytest.raises(ValueError, match="visual_mask: expected 2 rows|grids"):
            model(inputs_embeds=torch.randn(2, 8, 32)[:, :3])


def test_caches_of_others():
    model, batch = model_of("qwen2_vl"), make_batch("qwen2_vl", ONE)
    longer, ends = with_decode_steps(batch, 1)
    cache = make_cache(model, "dynamic", 0)
    run(model, batch, ends[:1], cache)
    with vtw.prune_visual(model, PRUNINGS["heads"]):
        with pytest.raises(ValueError, match="filled under prune_visual or an empty one, got one filled without it"):
            run(model, longer, ends[1:], cache, begin=ends[0])
        run(model, batch, ends[:1], pruned := make_cache(model, "dynamic", 0))
    with pytest.raises(ValueError, match="filled under prune_visual and can only be used there"):
        run(model, longer, ends[1:], pruned, begin=ends[0])
    with vtw.prune_visual(model, PRUNINGS["ffn"]), pytest.raises(ValueError, match="expected a cache filled under"):
        run(model, longer, ends[1:], pruned, begin=ends[0])


def test_bad_use():
    model, batch = model_of("qwen2_vl"), make_batch("qwen2_vl", ONE)
    with vtw.prune_visual(model, PRUNINGS["ffn"]):
        with pytest.raises(ValueError, match="expected one without visual pruning"):
            vtw.prune_visual(model, PRUNINGS["all"]).apply()
        for other in (vtw.withdraw(model, 2), vtw.skip_attention(model, [2])):
            with pytest.raises(ValueError, match="expected one without visual pruning"), other:
                pass
        with pytest.raises(ValueError, match="output_attentions: expected False"):
            model(**batch.inputs(), output_attentions=True)
        with pytest.raises(RuntimeError, match="expected decoder layer 1 to run within a forward of its model"):
            model.model.language_model.layers[1](torch.randn(1, 3, 32))
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="expected one without withdrawal, whose policy is"):
        vtw.prune_visual(model, PRUNINGS["ffn"]).apply()
    with vtw.skip_attention(model, [2]), pytest.raises(ValueError, match="expected one whose attention is not skipped"):
        vtw.prune_visual(model, PRUNINGS["ffn"]).apply()
    with pytest.warns(UserWarning, match="nothing was pruned"):
        vtw.prune_visual(model, PRUNINGS["ffn"])
    flex = model_of("llava", "flex_attention")
    with vtw.prune_visual(flex, PRUNINGS["ffn"]), pytest.raises(ValueError, match="attention 'eager' or 'sdpa'"):
        flex(**make_batch("llava", ONE).inputs())
