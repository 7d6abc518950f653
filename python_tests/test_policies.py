"""Policies that let rows leave at one boundary or several, against the plain model that hides what has left."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import families_zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compiled import answer, compiled, prompts
from test_families import full_cache, logits
from test_withdraw import CountOps
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache
from vlm import (
    BEAMS,
    FAMILIES,
    IMAGE,
    LAYERS,
    LOOKUP,
    ONE,
    RAGGED,
    TRANSFORMERS_5,
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
from vtw_kernels.integration.cache import WithdrawnLayer
from vtw_kernels.integration.verify import hide_keys

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
LAYOUTS = [ONE, RAGGED, [[1, 8, 1], [5, 4, 2, 4, 1], [3]], [[3, 4, 5], [1, 4, 7]]]  # the last one without padding


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


class Table(vtw.Policy):
    """Says beforehand which tokens stay at which boundary, by their place in the sequence: bool ``[B, S]`` by layer."""

    def __init__(self, stays: dict[int, Tensor]):
        self.boundaries, self.stays = tuple(stays), stays
        self.asked: list[int] = []

    def keep(self, boundary: vtw.Boundary) -> Tensor:
        self.asked.append(boundary.layer)
        stays = self.stays[boundary.layer]
        stays = stays.repeat_interleave(len(boundary.token) // len(stays), dim=0)  # for beams
        return stays.gather(1, boundary.token.clamp(max=stays.shape[1] - 1))  # later tokens are text

    def gone(self, visual: Tensor, layers: int = LAYERS) -> list[Tensor | None]:
        """For each layer, which tokens have left before it, or None before the first boundary."""
        gone, left = [], None
        for layer in range(layers):
            if layer in self.stays:
                left = (visual & ~self.stays[layer]) | (False if left is None else left)
            gone.append(left)
        return gone


def random_table(visual: Tensor, boundaries: list[int], share: float, seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return Table({layer: torch.rand(visual.shape, generator=generator) < share for layer in boundaries})


@st.composite
def tables(draw, visual: Tensor, layers: range = range(1, LAYERS)) -> Table:
    """Any subset at any boundaries. In some sequences nothing leaves at some, or all."""
    boundaries = sorted(draw(st.sets(st.sampled_from(layers), min_size=1)))
    table = random_table(visual, boundaries, draw(st.sampled_from([0.2, 0.6, 0.9])), draw(st.integers(0, 2**16)))
    for layer in boundaries:
        for stays in table.stays[layer]:
            match draw(st.sampled_from(["some", "some", "all", "none"])):
                case "all":
                    stays[:] = True
                case "none":
                    stays[:] = False
    return table


def assert_equal_to_oracle(model, policy, gone: list[Tensor | None], batch, ends: list[int], cache: str) -> None:
    length = batch.ids.shape[1] + 3
    with hide_keys(model, gone):
        wanted = run(model, batch, ends, make_cache(model, cache, length))
    with vtw.withdraw(model, policy):
        given = run(model, batch, ends, make_cache(model, cache, length))
    rows = (batch.mask != 0) & ~gone[-1]
    assert given.shape == wanted.shape
    assert (given - wanted)[rows].abs().max() <= TOLERANCE
    assert (given[gone[-1]] == 0).all()


# ------------------------------------------------------------------------------------------------------- any policy


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_any_policy(family, data):
    """Prefill and eight steps of decoding."""
    batch, ends = with_decode_steps(make_batch(family, data.draw(st.sampled_from(LAYOUTS))))
    table = data.draw(tables(batch.visual))
    model = model_of(family, data.draw(st.sampled_from(["eager", "sdpa"])))
    cache = data.draw(st.sampled_from(["dynamic", "static", "lazy"]))
    assert_equal_to_oracle(model, table, table.gone(batch.visual), batch, ends, cache)


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_any_policy_in_turns(family, data):
    """Further images on the same cache, of which other subsets leave: where stages held the same until then, they
    part."""
    batch, ends = with_decode_steps(make_batch(family, data.draw(st.sampled_from(LAYOUTS))), steps=2)
    for seed in (2, 3):
        turn = data.draw(st.sampled_from([[[3, 4, 2]], [[1, 8, 3]], [[4]]])) * len(batch.ids)
        batch, more = with_decode_steps(append(batch, make_batch(family, turn, seed=seed)), steps=2)
        ends += more
    table = data.draw(tables(batch.visual))
    model = model_of(family, data.draw(st.sampled_from(["eager", "sdpa"])))
    cache = data.draw(st.sampled_from(["dynamic", "static"]))
    assert_equal_to_oracle(model, table, table.gone(batch.visual), batch, ends, cache)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "qwen3_vl", "gemma4", "aya_vision"])
def test_families(name, attention):
    """Windows on either side of a boundary, rows that later layers add to, images that look at themselves."""
    model = families_zoo.make_model(name)
    if name == "gemma4":  # of random weights, it makes much of rounding; and its eager softmax is one in fp32
        if attention == "eager":
            pytest.skip("rounding alone is more than is allowed")
        model = model.double()
    first = 2 if name == "qwen3_vl" else 1
    for i, rows in enumerate(([[3, 4, 5]], [[2, 4, 3, 4, 4], [5, 4, 1]])):
        inputs = families_zoo.make_prompts(name, rows)
        visual = inputs["input_ids"] == IMAGE
        table = random_table(visual, list(range(first, LAYERS)), 0.6, seed=i)
        model.config.get_text_config(decoder=True)._attn_implementation = attention
        with hide_keys(model, table.gone(visual)):
            wanted = logits(model, inputs, past_key_values=full_cache(model))
        assert (logits(model, inputs) - wanted).abs().max() >= 10 * TOLERANCE, "nothing to see"
        # In transformers 5.17, static caches of Gemma 4 are wrong without withdrawal as well.
        for cache in ("dynamic", "static") if name != "gemma4" or not older_than("5.18") else ("dynamic",):
            with vtw.withdraw(model, table):
                given = logits(model, inputs, cache_implementation=cache)
            error = (given - wanted).abs().max()
            assert error <= TOLERANCE, f"{rows}, {cache}: off by {error}"


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
def test_generate(family, options, cache):
    if family == "qwen2_vl" and options and TRANSFORMERS_5 and older_than("5.18"):
        pytest.skip("transformers 5.17 cannot repeat the images of Qwen2-VL")
    model, batch = model_of(family), make_batch(family, RAGGED)
    table = random_table(batch.visual, [1, 2, 3], 0.6, seed=1)
    options = options | ({"use_cache": False} if cache == "none" else {"cache_implementation": cache})
    with hide_keys(model, table.gone(batch.visual)):
        wanted, wanted_logits = generated(model, batch.inputs(), **options)
    with vtw.withdraw(model, table):
        given, given_logits = generated(model, batch.inputs(), **options)
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE
    assert (generated(model, batch.inputs(), **options)[1] - wanted_logits).abs().max() > 1000 * TOLERANCE


@pytest.mark.skipif(older_than("5.23"), reason="transformers 5.22 loses the images of a prompt in chunks")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [2, 5])
def test_chunks(family, size, cache):
    """Each is a forward of its own, and may hold but part of an image."""
    model, batch = model_of(family), make_batch(family, RAGGED)
    table = random_table(batch.visual, [1, 3], 0.5, seed=3)
    with hide_keys(model, table.gone(batch.visual)):
        wanted, wanted_logits = generated(model, batch.inputs(), cache_implementation=cache)
    with vtw.withdraw(model, table):
        given, given_logits = generated(model, batch.inputs(), cache_implementation=cache, prefill_chunk_size=size)
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE


def test_threads():
    """Each with prompts of its own; one looks at the attention of a layer that others run."""
    model, policy = make_model("llava"), [vtw.TopAttention(2, 1), vtw.TopAttention(3, 1)]
    batches = [make_batch("llava", [[2 + i, 4, 12 - i]], seed=i) for i in range(4)]
    with vtw.withdraw(model, policy):
        wanted = [run(model, batch, [batch.ids.shape[1]]) for batch in batches]
        with ThreadPoolExecutor(4) as threads:
            given = threads.map(lambda i: run(model, batches[i % 4], [batches[i % 4].ids.shape[1]]), range(40))
            assert all(torch.equal(x, wanted[i % 4]) for i, x in enumerate(given))


def test_assisted_decoding(family, monkeypatch):
    """Rejected tokens are cropped from caches of three lengths."""
    model, batch, cropped = model_of(family), make_batch(family, ONE), []
    table = random_table(batch.visual, [1, 3], 0.5, seed=0)
    crop = DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, n: cropped.append(n) or crop(cache, n))
    with vtw.withdraw(model, table):
        given, _ = generated(model, batch.inputs(), max_new_tokens=30, **LOOKUP)
        assert any(cropped)
        wanted, _ = generated(model, batch.inputs(), max_new_tokens=30)
    with hide_keys(model, table.gone(batch.visual)):
        hidden, _ = generated(model, batch.inputs(), max_new_tokens=30)
    assert torch.equal(given, wanted) and torch.equal(wanted, hidden)


def test_gradients(family):
    """Also when layers are computed again, whose boundary is then not asked again."""
    model, batch = make_model(family), make_batch(family, RAGGED)
    model.train()
    table = random_table(batch.visual, [1, 3], 0.5, seed=0)

    def gradients():
        model.zero_grad()
        output = model(**batch.inputs(), use_cache=False)
        output.logits[:, -1].log_softmax(-1)[:, 11].sum().backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    with hide_keys(model, table.gone(batch.visual)):
        wanted = gradients()
    with vtw.withdraw(model, table):
        given = gradients()
        model.gradient_checkpointing_enable()
        again = gradients()
    assert given.keys() == wanted.keys() and table.asked == [1, 3] * 2
    for name, grad in wanted.items():
        assert (given[name] - grad).abs().max() <= TOLERANCE * (1e-3 + grad.abs().max()), name
        torch.testing.assert_close(again[name], given[name])


# -------------------------------------------------------------------------------------------------- cost and outputs


SOME, ALL = [[0, 1, 0, 1]], [[1, 1, 1, 1]]


def table_for(batch, stays: dict[int, list[list[int]]]) -> Table:
    """``stays``: of the tokens of the only image."""
    tables = {layer: torch.ones_like(batch.visual) for layer in stays}
    for layer, rows in stays.items():
        tables[layer][batch.visual] = torch.tensor(rows).bool().flatten()
    return Table(tables)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_a_boundary_costs(family, attention, monkeypatch):
    """One launch where rows leave for the first time, then one for the hidden states and one for all else; none where
    nothing leaves; and one look at the device."""
    model, batch = model_of(family, attention), make_batch(family, ONE)
    reads = Counter()
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.update(["read"]) or tolist(x))

    def cost(stays):
        table = table_for(batch, stays)
        reads.clear()
        run(model, batch, [batch.ids.shape[1]])
        plain = reads["read"]
        reads.clear()
        with vtw.withdraw(model, table), CountOps() as count:
            run(model, batch, [batch.ids.shape[1]])
        launches = (count.calls[getattr(torch.ops.vtw_kernels, name).default] for name in ("compact", "expand"))
        return *launches, reads["read"] - plain, table.asked

    assert cost({1: SOME, 2: ALL, 3: [[0, 0, 0, 1]]}) == (3, 1, 4, [1, 2, 3])
    assert cost({1: ALL, 2: ALL, 3: ALL}) == (0, 0, 4, [1, 2, 3])
    assert cost({1: ALL, 2: [[0] * 4], 3: SOME}) == (1, 1, 3, [1, 2])  # where none are left, nobody is asked


@pytest.mark.parametrize("rows", [[[0, 4, 4], [3, 4, 1]], [[1, 4, 6], [2, 4, 1]]], ids=["equal", "padded"])
def test_what_is_there(family, rows):
    """At each boundary every token that is left, once; and no more room than the longest sequence needs."""
    model, batch, seen = model_of(family), make_batch(family, rows), []
    left = [[{0, 1, 2, 3}] * 2, [{1}, {0, 1, 2, 3}], [{1}, {2}]]  # of each image, when asked at each boundary
    stay = dict(zip((1, 2, 3), [*left[1:], left[-1]]))

    class Look(vtw.Policy):
        boundaries = (1, 2, 3)

        def keep(self, boundary):
            seen.append(boundary)
            keep = torch.zeros_like(boundary.visual)
            for i, stays in enumerate(stay[boundary.layer]):
                first = batch.visual[i].nonzero().min()
                keep[i] = torch.isin(boundary.token[i] - first, torch.tensor(sorted(stays)))
            return keep

    cache = DynamicCache(config=model.config)
    with vtw.withdraw(model, Look()):
        run(model, batch, [batch.ids.shape[1]], cache)
    for boundary, images in zip(seen, left, strict=True):
        for i, stays in enumerate(images):
            first = batch.visual[i].nonzero().min()
            text = (~batch.visual & batch.mask.bool())[i].nonzero().flatten()
            assert (boundary.token[i][boundary.visual[i]] - first).tolist() == sorted(stays)
            assert boundary.token[i][boundary.text[i]].tolist() == text.tolist()
            assert (boundary.image[i][boundary.visual[i]] == 0).all()
    text = (~batch.visual & batch.mask.bool()).sum(1)
    lengths = [x.keys.shape[-2] for x in cache.layers]
    longest = [int((text + torch.tensor([len(x) for x in stays])).max()) for stays in stay.values()]
    assert lengths == [batch.ids.shape[1], *longest]
    assert [x.hidden_states.shape[-2] for x in seen] == lengths[:3]


def test_what_is_cached(family):
    """Stages share books as long as nothing leaves between them."""
    model, batch = model_of(family), make_batch(family, [[3, 4, 5]])
    batch = append(batch, make_batch(family, [[2, 4, 3]], seed=1))
    stays = torch.ones_like(batch.visual)
    first, second = stays.clone(), stays.clone()
    first[:, [3, 4]], second[:, [14, 15, 16]] = False, False  # two tokens of one image, three of the other
    cache = DynamicCache(config=model.config)
    with vtw.withdraw(model, Table({1: first, 2: second, 3: stays})):
        run(model, batch, [12], cache)
        assert [x.keys.shape[-2] for x in cache.layers] == [12, 10, 10, 10]
        assert cache.layers[1].slots is cache.layers[2].slots is cache.layers[3].slots
        logits = run(model, batch, [21], cache, begin=12)
        assert cache.layers[1].slots is not cache.layers[2].slots is cache.layers[3].slots
        assert [x.keys.shape[-2] for x in cache.layers] == [21, 19, 16, 16]
        assert [cache.get_seq_length(i) for i in range(LAYERS)] == [21] * LAYERS
        assert all(isinstance(x, WithdrawnLayer) for x in cache.layers[1:])
    assert (logits[:, [2, 3, 4]] == 0).all() and (logits[:, [0, 1, 5]] != 0).any(-1).all()


def test_outputs_keep_their_length(family):
    model, batch = model_of(family), make_batch(family, RAGGED)
    table = random_table(batch.visual, [1, 3], 0.5, seed=0)
    with torch.no_grad(), vtw.withdraw(model, table):
        states = model(**batch.inputs(), output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1 and {x.shape for x in states} == {(*batch.ids.shape, 32)}
    for state, gone in zip(states[1:], table.gone(batch.visual)):
        rows = torch.zeros_like(batch.visual) if gone is None else gone
        assert torch.equal((state == 0).all(-1) & batch.mask.bool(), rows)


# -------------------------------------------------------------------------------------------- attention, and at random


def most_attended(model, batch, ends: list[int], policies: list, share: float) -> list[Tensor | None]:
    """What leaves by ``TopAttention`` with a share, written down: forward by forward, layer by layer, image by image,
    by the weights that eager attention returns at full length."""
    gone = {policy.boundaries[0]: torch.zeros_like(batch.visual) for policy in policies}
    by_layer = [next((gone[b] for b in sorted(gone, reverse=True) if b <= i), None) for i in range(LAYERS)]
    begin = 0
    for end in ends:
        before = torch.zeros_like(batch.visual)
        for layer in sorted(gone):
            gone[layer] |= before
            with torch.no_grad(), hide_keys(model, [x if x is None else x[:, :end] for x in by_layer]):
                inputs = batch.inputs(0, end) | {"position_ids": batch.positions(model)[..., :end]}
                inputs.pop("cache_position", None)
                weights = model(**inputs, use_cache=False, output_attentions=True).attentions[layer - 1]
            for i, is_visual in enumerate(batch.visual):
                row = weights[i, :, batch.mask[i, :end].nonzero().max()].mean(0)
                image: list[int] = []
                for token in range(begin, end):
                    image += [token] if is_visual[token] else []
                    if image and not is_visual[token + 1 if token + 1 < end else token]:
                        there = [x for x in image if not gone[layer][i, x]]
                        ranked = sorted(there, key=lambda x: -row[x])
                        gone[layer][i, ranked[int(share * len(there) + 0.5) :]] = True
                        image = []
            before = gone[layer].clone()
        begin = end
    return by_layer


@pytest.mark.parametrize("rows", LAYOUTS[:2], ids=["one", "ragged"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_top_attention(family, attention, cache, rows, on_the_cpu):
    """At three layers, in two turns with an image each."""
    if cache == "static" and attention not in ("eager", "sdpa"):
        pytest.skip("refused")
    batch, ends = with_decode_steps(make_batch(family, rows), steps=2)
    batch, more = with_decode_steps(append(batch, make_batch(family, [[3, 8, 2]] * len(rows), seed=2)), steps=2)
    policies = [vtw.TopAttention(layer, 0.5) for layer in (1, 2, 3)]
    gone = most_attended(model_of(family, "eager"), batch, ends + more, policies, 0.5)
    model = make_model(family)
    model.model.language_model.config._attn_implementation = attention
    with hide_keys(model_of(family, "eager"), gone):
        wanted = run(model_of(family, "eager"), batch, ends + more)
    with vtw.withdraw(model, policies[::-1]):
        given = run(model, batch, ends + more, make_cache(model, cache, batch.ids.shape[1] + 3))
    stays = batch.visual & ~gone[-1]
    assert 0 < stays.sum() < 0.3 * batch.visual.sum()
    assert (given - wanted)[(batch.mask != 0) & ~gone[-1]].abs().max() <= TOLERANCE
    assert (given[gone[-1]] == 0).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("types", [families_zoo.SLIDING, ["sliding_attention"] * LAYERS], ids=["some", "all"])
def test_attention_in_windows(types, cache):
    """Past keys, in windows that are full, or become so, in layers before the first boundary and behind it."""
    model, seen = families_zoo.make_model("aya_vision", layer_types=types), {}

    class Look(vtw.Policy):
        boundaries, attention = (1, 2, 3), True

        def keep(self, boundary):
            seen[boundary.layer, int(boundary.token.max())] = boundary
            return boundary.token % 2 == 0

    batch, ends = with_decode_steps(make_batch("llava", [[2, 4, 3]]), steps=2)
    batch, more = with_decode_steps(append(batch, make_batch("llava", [[1, 4, 1]], seed=2)), steps=2)
    past = make_cache(model, cache, 40)
    with torch.no_grad(), vtw.withdraw(model, Look(), visual_mask=batch.visual):
        for begin, end in zip([0, *ends, *more], [*ends, *more]):
            model(input_ids=batch.ids[:, begin:end], attention_mask=batch.mask[:, :end], past_key_values=past)
    gone = batch.visual & (torch.arange(batch.ids.shape[1]) % 2 == 1)
    assert {layer for layer, _ in seen} == {1, 2, 3} and len(seen) == 6
    for (layer, last), boundary in seen.items():
        end = last + 1
        model.set_attn_implementation("eager")
        with torch.no_grad(), hide_keys(model, [None, *[gone[:, :end]] * (LAYERS - 1)]):
            inputs = {"input_ids": batch.ids[:, :end], "attention_mask": batch.mask[:, :end]}
            output = model(**inputs, use_cache=False, output_attentions=True)
        wanted = output.attentions[layer - 1][:, :, -1].mean(1).gather(1, boundary.token)
        torch.testing.assert_close(boundary.attention, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "keep, stay", [(0.5, [4, 2, 4]), (0.0, [0, 0, 0]), (1.0, [8, 4, 8]), (3, [3, 3, 3]), (9, [8, 4, 8])]
)
def test_share_of_each_image(keep, stay):
    batch = make_batch("qwen2_vl", [[2, 8, 1, 4, 3], [9, 8, 1]])
    boundaries = []

    class Look(vtw.RandomVisual):
        def keep(self, boundary):
            boundaries.append((boundary, super().keep(boundary)))
            return boundaries[-1][1]

    with vtw.withdraw(model_of("qwen2_vl"), Look(2, keep)):
        run(model_of("qwen2_vl"), batch, [batch.ids.shape[1]])
    ((boundary, kept),) = boundaries
    images = [(row, image) for row in range(2) for image in boundary.image[row][boundary.visual[row]].unique().tolist()]
    assert images == [(0, 0), (0, 1), (1, 0)]
    assert [int(kept[row][boundary.visual[row] & (boundary.image[row] == i)].sum()) for row, i in images] == stay
    assert not kept[~boundary.visual].any()


def test_random_visual(family):
    """Others with another seed, the same ones in each sequence; and nothing but its rows makes the result."""
    model, batch, ends = model_of(family), *with_decode_steps(make_batch(family, [[3, 8, 2]] * 2), steps=2)
    choices = []
    for seed in range(4):
        token = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        images = (batch.visual & ~torch.nn.functional.pad(batch.visual, (1, -1))).cumsum(1) - 1
        policy = vtw.RandomVisual(2, 0.25, seed=seed)
        end = ends[0]
        parts = (x[:, :end] for x in (batch.visual, ~batch.visual, images, token))
        stays = torch.nn.functional.pad(policy.keep(vtw.Boundary(2, *parts)), (0, 2)) & batch.visual
        gone = batch.visual & ~stays
        assert_equal_to_oracle(model, policy, [None, None, gone, gone], batch, ends, "dynamic")
        assert torch.equal(stays[0], stays[1])
        choices.append(tuple(stays[0].nonzero().flatten().tolist()))
    assert len(set(choices)) > 1


# --------------------------------------------------------------------------------- policies as a user would write them


class Diverse(vtw.Policy):
    """DivPrune (arXiv 2503.02175): of all visual rows of a sequence a number stays, chosen one by one, each as far as
    may be from those chosen before, by the cosine of their hidden states."""

    def __init__(self, layer: int, number: int):
        self.boundaries, self.number = (layer,), number

    def keep(self, boundary):
        states = torch.nn.functional.normalize(boundary.hidden_states.float(), dim=-1)
        distance = 1 - states @ states.mT
        kept = torch.zeros_like(boundary.visual)
        nearest = distance.masked_fill(~boundary.visual[:, None], torch.inf).masked_fill(
            torch.eye(distance.shape[1]).bool(), torch.inf
        )
        chosen = nearest.amin(-1).masked_fill(~boundary.visual, -torch.inf).argmax(1)  # whose next one is furthest away
        nearest = torch.full_like(distance[:, 0], torch.inf)
        for _ in range(self.number):
            kept[torch.arange(len(kept)), chosen] = True
            further = distance[torch.arange(len(kept)), chosen]
            nearest = torch.minimum(nearest, further).masked_fill(kept | ~boundary.visual, -torch.inf)
            chosen = nearest.argmax(1)
        return kept


class Exit(vtw.Policy):
    """As DyVTE (arXiv 2411.19628): before each layer, a gate says for each prompt whether all of its visual rows leave,
    by the mean of the text rows after the image without the last, and by the last one."""

    def __init__(self, layers: tuple[int, ...], size: int):
        generator = torch.Generator().manual_seed(0)
        self.boundaries = layers
        self.gates = {layer: torch.randn(2 * size, generator=generator) for layer in layers}
        self.left: dict[int, list[bool]] = {}

    def keep(self, boundary):
        after = boundary.text & (boundary.visual.cumsum(1) > 0)
        last = boundary.text & (boundary.text.cumsum(1) == boundary.text.sum(1, keepdim=True))
        without = after & ~last
        states = boundary.hidden_states
        mean = (states * without[..., None]).sum(1) / without.sum(1, keepdim=True).clamp(min=1)
        leaves = torch.cat([mean, states[last]], dim=-1) @ self.gates[boundary.layer] > 0
        self.left[boundary.layer] = (leaves & boundary.visual.any(1)).tolist()
        return ~leaves[:, None].expand_as(boundary.visual)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_exit(family, cache):
    """Sequences of one batch leave at layers of their own, or never."""
    model = model_of(family)
    batch, ends = with_decode_steps(
        make_batch(family, [[2, 4, 3], [1, 8, 4], [3, 4, 2, 4, 3], [7], [4, 4, 6], [2, 4, 2]])
    )
    policy = Exit((1, 2, 3), 32)
    with vtw.withdraw(model, policy):
        run(model, batch, ends[:1])
    left = torch.zeros(len(batch.ids), dtype=torch.bool)
    gone: list[Tensor | None] = [None]
    for layer in (1, 2, 3):
        left = left | torch.tensor(policy.left.get(layer, [False] * len(left)))
        gone.append(batch.visual & left[:, None])
    assert len({tuple(x) for x in policy.left.values()}) > 1 and not left.all()
    assert_equal_to_oracle(model, policy, gone, batch, ends, cache)


def test_diverse(family):
    model = model_of(family)
    batch, ends = with_decode_steps(make_batch(family, [[2, 4, 3, 4, 1], [1, 8, 4]]))
    states = []
    hook = model.model.language_model.layers[2].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    run(model, batch, ends[:1])
    hook.remove()
    gone = batch.visual.clone()
    for i, state in enumerate(states[0]):
        visual = batch.visual[i].nonzero().flatten().tolist()
        cosine = lambda a, b: float(torch.cosine_similarity(state[a], state[b], dim=0))  # noqa: E731
        chosen = [min(visual, key=lambda a: max(cosine(a, b) for b in visual if b != a))]
        while len(chosen) < 3:
            chosen.append(min(set(visual) - set(chosen), key=lambda a: max(cosine(a, b) for b in chosen)))
        gone[i, chosen] = False
    assert_equal_to_oracle(model, Diverse(2, 3), [None, None, gone, gone], batch, ends, "dynamic")


# ----------------------------------------------------------------------------------------------- compiled, and errors


@pytest.mark.parametrize("how", ["model.compile", "torch.compile", "decoder", "layer.compile", "layers"])
def test_compiled(how):
    torch.compiler.reset()
    policies = [vtw.TopAttention(1, 0.5), vtw.RandomVisual(2, 1), vtw.Withdraw(3)]
    model, eager = compiled(make_model("llava"), how, "eager"), make_model("llava")
    with vtw.withdraw(model, policies), vtw.withdraw(eager, policies):
        for i, batch in enumerate(prompts("llava", 5, 12)):
            way = ("forward", "dynamic", "static")[i % 3]
            error = (answer(model, batch, way) - answer(eager, batch, way)).abs().max()
            assert error <= TOLERANCE, f"prompt {i}, {way}: off by {error}"
    torch.compiler.reset()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_decode_is_one_graph(family, attention):
    """With books of two kinds."""
    model = model_of(family, attention)
    batch, ends = with_decode_steps(make_batch(family, RAGGED), steps=4)
    table, positions = random_table(batch.visual, [1, 3], 0.5, seed=0), batch.positions(model)
    padding = torch.nn.functional.pad(batch.mask, (0, 3), value=1)  # of the cache's length, so that its shape stays

    @torch.no_grad()
    def decode(step):
        cache = make_cache(model, "static", ends[-1] + 3)
        run(model, batch, ends[:1], cache)
        logits = []
        for begin in ends[:-1]:
            inputs = batch.inputs(begin, begin + 1) | {"attention_mask": padding, "use_cache": True}
            logits.append(step(**inputs, position_ids=positions[..., begin : begin + 1], past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    with hide_keys(model, table.gone(batch.visual)):
        wanted = decode(model)
    torch.compiler.reset()
    graphs = CompileCounter()
    with vtw.withdraw(model, table):
        given = decode(torch.compile(model, backend=graphs, fullgraph=True))
    assert (given - wanted).abs().max() <= TOLERANCE
    assert graphs.frame_count == 1


def test_a_cache_that_an_interrupt_left(family):
    """Between two boundaries."""
    model, batch = make_model(family), make_batch(family, ONE)
    cache = DynamicCache()

    def interrupt(module, args):
        raise KeyboardInterrupt

    with torch.no_grad(), vtw.withdraw(model, table_for(batch, {1: SOME, 3: [[0] * 4]})):
        hook = model.model.language_model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch.inputs(), past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match=r"filled under withdraw\(layer=1, 3\) .* whose last forward did not end"):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache)


@pytest.mark.parametrize("rows", [[[12]], [[1, 4, 7]]], ids=["text", "image"])
def test_a_layer_that_calls_the_model(family, rows):
    """The attention of the call within is not taken for that of the layer."""
    model, batch, other = make_model(family), make_batch(family, ONE), make_batch(family, rows, seed=5)
    mlp, inner = model.model.language_model.layers[1].mlp, []

    def call(module, args):
        if not inner:
            inner.append(None)
            inner[0] = model(**other.inputs(), use_cache=False).logits

    with torch.no_grad(), vtw.withdraw(model, vtw.TopAttention(2, 1)):
        wanted, wanted_inner = (model(**x.inputs(), use_cache=False).logits for x in (batch, other))
        mlp.register_forward_pre_hook(call)
        given = model(**batch.inputs(), use_cache=False).logits
    assert torch.equal(given, wanted) and torch.equal(inner[0], wanted_inner)


def test_other_boundaries(family):
    model, batch, cache = model_of(family), make_batch(family, ONE), DynamicCache()
    table = table_for(batch, {1: SOME, 3: SOME})
    with vtw.withdraw(model, table):
        run(model, batch, [batch.ids.shape[1]], cache)
    longer, ends = with_decode_steps(batch, steps=1)
    for policy in (vtw.Withdraw(1), [vtw.Withdraw(1), vtw.Withdraw(2)]):
        with (
            vtw.withdraw(model, policy),
            pytest.raises(ValueError, match=r"got one filled under withdraw\(layer=1, 3\)"),
        ):
            run(model, longer, ends[1:], cache, begin=ends[0])
    with pytest.raises(
        ValueError, match=r"this cache was filled under withdraw\(layer=1, 3\) and can only be used there"
    ):
        run(model, longer, ends[1:], cache, begin=ends[0])


def test_withdraw_as_a_policy(family, tmp_path):
    """It is what its layer is."""
    model, batch = make_model(family), make_batch(family, RAGGED)
    with vtw.withdraw(model, 2):
        wanted = run(model, batch, [batch.ids.shape[1]])
    with vtw.withdraw(model, vtw.Withdraw(2)):
        assert model.config.vtw == {"layer": 2}
        assert torch.equal(run(model, batch, [batch.ids.shape[1]]), wanted)
    with vtw.withdraw(model, [vtw.Withdraw(2), vtw.TopAttention(3, 0.5)]):
        assert torch.equal(run(model, batch, [batch.ids.shape[1]]), wanted)
        model.save_pretrained(tmp_path)
    match = r"saved under \[Withdraw\(layer=2\), TopAttention\(layer=3, keep=0.5\)\], says its config"
    with pytest.raises(ValueError, match=match):
        vtw.apply(type(model).from_pretrained(tmp_path))


class Wrong(vtw.Policy):
    def __init__(self, boundaries, kept=None):
        self.boundaries, self.kept = boundaries, kept

    def keep(self, boundary):
        return self.kept


@pytest.mark.parametrize(
    "policy, error, match",
    [
        (Wrong((1, 5)), ValueError, r"layer: expected 1\.\.4 .* got 5"),
        (Wrong((2, 1)), TypeError, r"boundaries: expected a tuple of layers in ascending order, got \(2, 1\) of Wrong"),
        (Wrong([1]), TypeError, r"boundaries: expected a tuple .* got \[1\] of Wrong"),
        (Wrong(()), ValueError, "layer: expected at least one, got"),
        ([vtw.Withdraw(2), vtw.TopAttention(2, 0.5)], ValueError, "policies at different layers, got two at 2"),
        ([vtw.Withdraw(2), 3], TypeError, "layer: expected an int, or some, got Withdraw"),
        (
            Wrong((2,), torch.ones(1, 3)),
            TypeError,
            r"keep: expected bool \[1, 12\] from .*Wrong.*, got torch.float32 \[1, 3\]",
        ),
        (Wrong((2,)), TypeError, r"keep: expected bool \[1, 12\] from .*, got NoneType"),
    ],
)
def test_policies_that_are_wrong(policy, error, match):
    model, batch = model_of("llava"), make_batch("llava", ONE)
    with pytest.raises(error, match=match), vtw.withdraw(model, policy):
        run(model, batch, [batch.ids.shape[1]])


@pytest.mark.parametrize("keep", [1.5, -1, -0.1, True, "half", float("nan")])
def test_shares_that_are_wrong(keep):
    with pytest.raises(ValueError, match="keep: expected a share from 0.0 to 1.0 or a number of rows"):
        vtw.TopAttention(2, keep)


def test_attention_that_is_not_there():
    """A forward that ends in an image; layers that attend by themselves."""
    model, policy = make_model("llava"), vtw.TopAttention(2, 0.5)
    match = r"expected text after the last image .* as TopAttention\(layer=2, keep=0.5\) looks at .*, got .* of row 1"
    ends_visual = make_batch("llava", [[8, 4, 1], [3, 4]])
    with vtw.withdraw(model, policy), pytest.raises(ValueError, match=match):
        model(**ends_visual.inputs())
    batch = make_batch("llava", [[3, 4, 3]])
    layer = model.model.language_model.layers[1]

    class Own(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    layer.self_attn = Own()
    with (
        vtw.withdraw(model, policy),
        pytest.raises(ValueError, match="AttentionInterface hands out, .* got none in layer 1"),
    ):
        model(**batch.inputs())
    model._tp_size = 2
    with pytest.raises(
        ValueError, match=r"model: expected all heads on each rank, as TopAttention.* got a tensor-parallel"
    ):
        vtw.apply(model, policy)
    linear = families_zoo.make_model("qwen3_5")
    with pytest.raises(ValueError, match="layer: expected an attention layer before 2, .* got linear_attention"):
        vtw.apply(linear, policy)
