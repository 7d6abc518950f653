"""Dynamic exit: gates that read each prompt, against the plain model and gates written out."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vlm import (
    BEAMS,
    FAMILIES,
    LAYERS,
    LOOKUP,
    RAGGED,
    append,
    generated,
    make_batch,
    make_cache,
    make_model,
    model_of,
    older_than,
    run,
    with_decode_steps,
)

import vtw_kernels as vtw
from vtw_kernels.integration.exit_routers import FORMAT, exit_features
from vtw_kernels.integration.tensor_files import write_tensors
from vtw_kernels.integration.verify import hide_keys

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
HIDDEN = 32
GATES = (1, 2, 3)
# Two images, text alone, an image at the start, one with a single row behind it, and padding of many lengths.
PROMPTS = [[2, 4, 3], [1, 8, 4], [3, 4, 2, 4, 3], [7], [0 if not older_than("5") else 1, 4, 6], [2, 4, 1], [5, 4, 2]]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def make_routers(seed: int = 0, threshold: float = 0.5, layers=GATES) -> vtw.ExitRouters:
    return vtw.ExitRouters(layers, HIDDEN, LAYERS, width=8, seed=seed, threshold=threshold)


@torch.no_grad()
def written_features(states: Tensor, visual: list[bool], text: list[bool]) -> Tensor | None:
    """Of one sequence ``[rows, H]``."""
    rows = [row for row, is_text in enumerate(text) if is_text and any(visual[:row])]
    if not rows or any(visual[rows[-1] :]):
        return None
    mean = sum((states[row] for row in rows[:-1]), torch.zeros(HIDDEN)) / max(1, len(rows) - 1)
    return torch.cat([mean, states[rows[-1]]])


@torch.no_grad()
def written_exits(model, routers: vtw.ExitRouters, batch, end: int | None = None) -> list[int | None]:
    """The layer before which the visual rows of each sequence leave, by what the plain model computes."""
    inputs = batch.inputs(0, end) | {"position_ids": batch.positions(model)[..., :end]}
    states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    weights, exits = routers.state(), []
    for i in range(len(batch.ids)):
        visual = batch.visual[i, :end].tolist()
        text = ((batch.mask[i, :end] != 0) & ~batch.visual[i, :end]).tolist()
        exits.append(None)
        for layer in routers.boundaries:
            read = written_features(states[layer][i], visual, text)
            if read is None or exits[-1] is not None or not any(visual):
                continue
            logits = weights[f"{layer}.2.weight"] @ torch.nn.functional.gelu(weights[f"{layer}.0.weight"] @ read)
            odds = float(logits[1] - logits[0])
            cut = torch.logit(torch.tensor(routers.threshold)).item()
            assert abs(odds - cut) > 1e-3, "rounding would decide"
            if odds > cut:
                exits[-1] = layer
    return exits


def gone_after(exits: list[int | None], visual: Tensor) -> list[Tensor | None]:
    """By layer, as ``hide_keys`` takes it."""
    left = [torch.tensor([x is not None and x <= layer for x in exits]) for layer in range(LAYERS)]
    return [None, *(visual & x[:, None] for x in left[1:])]


# ----------------------------------------------------------------------------------------------------- as a policy


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_equals_the_oracle(family, attention, cache):
    """Each sequence of a batch leaves at a layer of its own, or never: prefill and eight steps."""
    model, seen = model_of(family, attention), set()
    batch, ends = with_decode_steps(make_batch(family, PROMPTS))
    for seed, threshold in ((0, 0.5), (1, 0.55), (2, 0.45), (3, 0.52), (4, 0.48)):
        routers = make_routers(seed, threshold)
        exits = written_exits(model, routers, batch, ends[0])
        seen |= set(exits)
        gone, length = gone_after(exits, batch.visual), batch.ids.shape[1] + 3
        with hide_keys(model, gone):
            wanted = run(model, batch, ends, make_cache(model, cache, length))
        with vtw.withdraw(model, routers):
            given = run(model, batch, ends, make_cache(model, cache, length))
        assert (given - wanted)[(batch.mask != 0) & ~gone[-1]].abs().max() <= TOLERANCE
        assert (given[gone[-1]] == 0).all()
    assert len(seen) >= 3


def test_decides_for_each_turn(family):
    """A decision that was made holds; the next turn's image is asked about with what that forward holds."""
    model, decided = model_of(family), []
    first, ends = with_decode_steps(make_batch(family, [[2, 4, 3], [3, 4, 2]]), steps=2)

    class Look(vtw.ExitRouters):
        def keep(self, boundary):
            stays = super().keep(boundary)
            decided.append((boundary, ~stays[:, 0]))
            return stays

    batch = append(first, make_batch(family, [[3, 4, 2], [1, 4, 4]], seed=2))
    routers = Look((2,), HIDDEN, LAYERS, width=8, seed=3)
    with vtw.withdraw(model, routers):
        given = run(model, batch, [*ends, batch.ids.shape[1]])
    assert [int(x.token.min()) for x, _ in decided] == [0, ends[-1]]  # no step of decoding asks
    left = [leaves for _, leaves in decided]
    assert older_than("5") or (torch.stack(left).any() and not torch.stack(left).all())  # of other random weights
    turn = torch.arange(batch.ids.shape[1]) >= ends[-1]
    gone = batch.visual & torch.where(turn, left[1][:, None], left[0][:, None])
    with hide_keys(model, [None, None, gone, gone]):
        wanted = run(model, batch, [*ends, batch.ids.shape[1]])
    assert (given - wanted)[~gone].abs().max() <= TOLERANCE


@pytest.mark.parametrize("options", [{}, BEAMS, LOOKUP], ids=["greedy", "beams", "assisted"])
def test_generate(family, options):
    if options is BEAMS and family == "qwen2_vl" and older_than("5.23"):
        pytest.skip("transformers 5.17 cannot repeat the images of Qwen2-VL")
    model, routers = model_of(family), make_routers(seed=1)
    batch = make_batch(family, [[3, 4, 5]] if options is LOOKUP else RAGGED)
    exits = written_exits(model, routers, batch)
    assert any(exits)
    with hide_keys(model, gone_after(exits, batch.visual)):
        wanted, wanted_logits = generated(model, batch.inputs(), **options)
    with vtw.withdraw(model, routers):
        given, given_logits = generated(model, batch.inputs(), **options)
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("policy", [make_routers(seed=1), vtw.TopAttention(2, 0.5)], ids=["exit", "attention"])
def test_what_is_generated_decides_nothing(family, policy):
    """Neither what assisted decoding guesses in the prompt's forward, nor, without a cache, what was said before."""
    model, batch = model_of(family), make_batch(family, [[3, 4, 12]])
    batch.ids[0, -8:] = torch.tensor([20, 21, 22, 23] * 2)  # which prompt lookup guesses to go on
    with vtw.withdraw(model, policy):
        wanted, wanted_logits = generated(model, batch.inputs(), max_new_tokens=16)
        for options in (LOOKUP, {"use_cache": False}):
            given, given_logits = generated(model, batch.inputs(), max_new_tokens=16, **options)
            assert torch.equal(given, wanted)
            assert (given_logits - wanted_logits).abs().max() <= TOLERANCE


@pytest.mark.skipif(older_than("5.23"), reason="transformers 5.22 loses the images of a prompt in chunks")
def test_a_chunk_without_text_behind_its_image(family):
    """Nothing is asked there yet: its visual tokens stay."""
    model, batch = model_of(family), make_batch(family, [[2, 4, 6]])
    routers = make_routers(threshold=0)  # leaves wherever it is asked
    with hide_keys(model, gone_after([1], batch.visual & (torch.arange(batch.ids.shape[1]) >= 4))):
        wanted, _ = generated(model, batch.inputs())
    with vtw.withdraw(model, routers):
        given, _ = generated(model, batch.inputs(), prefill_chunk_size=4)  # text, half an image; the other half, text
    assert torch.equal(given, wanted)


def test_features():
    """Any layout of rows; what padding holds means nothing, be it NaN."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        kinds = torch.randint(3, (4, 9), generator=generator)  # padding, text, visual
        hidden = torch.randn(4, 9, HIDDEN, generator=generator)
        hidden[kinds == 0] = torch.nan
        given, asked = exit_features(hidden, kinds == 2, kinds == 1)
        for i in range(4):
            wanted = written_features(hidden[i], (kinds[i] == 2).tolist(), (kinds[i] == 1).tolist())
            assert bool(asked[i]) == (wanted is not None) or not (kinds[i] == 2).any()
            if wanted is not None:
                torch.testing.assert_close(given[i], wanted)
    streams = torch.stack([hidden, torch.zeros_like(hidden)])
    torch.testing.assert_close(exit_features(streams, kinds == 2, kinds == 1)[0], given, rtol=0, atol=0, equal_nan=True)
    half = exit_features(hidden.bfloat16(), kinds == 2, kinds == 1)[0]
    assert half.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------- files and models


def test_save_and_load(family, tmp_path):
    model, batch = make_model(family), make_batch(family, RAGGED)
    path = tmp_path / "exit.safetensors"
    routers = vtw.ExitRouters(
        GATES, HIDDEN, LAYERS, width=8, threshold=0.45, seed=5, model=type(model).__name__, settings={"records": 3}
    )
    routers.save(path)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    loaded = vtw.ExitRouters.load(path)
    for name in ("boundaries", "hidden_size", "num_layers", "width", "threshold", "model", "settings", "nbytes"):
        assert getattr(loaded, name) == getattr(routers, name), name
    assert all(x.equal(loaded.state()[name]) for name, x in routers.state().items())
    assert loaded.nbytes == sum(x.nbytes for x in load_file(path).values()) == 4 * 3 * 2 * (HIDDEN + 1) * 8
    assert vtw.ExitRouters.load(path, threshold=0.6).threshold == 0.6
    results = []
    for layer in (routers, loaded, path, str(path)):
        with vtw.withdraw(model, layer):
            results.append(run(model, batch, [batch.ids.shape[1]]))
            assert model.config.vtw == {"policy": "ExitRouters(layers=[1, 2, 3], width=8, threshold=0.45)"}
    assert all(x.equal(results[0]) for x in results)


def test_what_is_no_file_of_routers(tmp_path):
    path, model = tmp_path / "exit.safetensors", model_of("llava")
    routers = make_routers()
    routers.save(path)
    state = routers.state()
    made_for = routers.made_for()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=rf"exit.safetensors: expected what ExitRouters.save wrote, got .*{match}"):
            vtw.withdraw(model, path)

    path.write_bytes(b"nothing of the kind")
    refused("")
    save_file(state, path)
    refused("the format None")
    for changes, match in (
        ({"layers": [1, 2]}, "weights that are not those of its gates"),
        ({"width": 9}, "weights that are not those of its gates"),
        ({"layers": [1, 2, 5]}, r"layers: expected 1\.\.3, got \[1, 2, 5\]"),
        ({"threshold": 2}, "threshold: expected a probability from 0 to 1, got 2"),
        ({"more": 2}, "unexpected keyword argument 'more'"),
    ):
        write_tensors(path, state, FORMAT, routers=made_for | changes)
        refused(match)
    save_file(state, path, {"vtw_kernels": "["})
    refused("Expecting")
    save_file(state, path, {"vtw_kernels": "[]"})
    refused("attribute 'get'")
    write_tensors(path, state, FORMAT)
    refused("'routers'")
    write_tensors(path, {name: x.half() for name, x in state.items()}, FORMAT, routers=made_for)
    refused("weights that are not those of its gates")
    write_tensors(path, state, FORMAT, routers=made_for)
    vtw.apply(model, path).remove()
    with pytest.raises(FileNotFoundError):
        vtw.withdraw(model, tmp_path / "none.safetensors")


def test_other_models():
    model = make_model("llava")
    for routers, given in (
        (vtw.ExitRouters((1,), HIDDEN, 5, width=8), "5 decoder layers and hidden states of 32, .* with 4 and 32"),
        (vtw.ExitRouters((1,), 16, 4, width=8), "4 decoder layers and hidden states of 16, .* with 4 and 32"),
    ):
        with pytest.raises(ValueError, match=rf"model: expected {given}"):
            vtw.withdraw(model, [routers, vtw.Withdraw(3)])
    with pytest.warns(UserWarning, match="made for Another, and this model is LlavaForConditionalGeneration") as warned:
        vtw.apply(model, vtw.ExitRouters((1,), HIDDEN, 4, width=8, model="Another")).remove()
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtw.apply(model, vtw.ExitRouters((1,), HIDDEN, 4, width=8, model=type(model).__name__)).remove()


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"layers": ()}, r"layers: expected at least one, in ascending order, got \[\]"),
        ({"layers": (2, 1)}, r"layers: expected at least one, in ascending order, got \[2, 1\]"),
        ({"layers": (1, 4)}, r"layers: expected 1\.\.3, got \[1, 4\]"),
        ({"width": 0}, "width: expected a number of at least 1, got 0"),
        ({"hidden_size": 1.5}, "hidden_size: expected a number of at least 1, got 1.5"),
        ({"threshold": 1.5}, "threshold: expected a probability from 0 to 1, got 1.5"),
        ({"threshold": True}, "threshold: expected a probability from 0 to 1, got True"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        vtw.ExitRouters(**{"layers": (1,), "hidden_size": HIDDEN, "num_layers": LAYERS} | arguments)
