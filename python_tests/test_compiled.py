"""Compiled models under withdrawal, with torch's default settings, against the same model run eagerly."""

import random
import threading
from collections.abc import Callable

import pytest
import torch
from test_skip_attention import LIMIT, adapters_of, windows_model
from vlm import FAMILIES, LAYERS, VOCABULARY, Batch, make_batch, make_cache, make_model

import vtw_kernels as vtw

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = 2
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No test sees what another has compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prompts(family: str, seed: int, count: int) -> list[Batch]:
    """Of many shapes: an image within text, text alone, two sequences with one and two images."""
    r = random.Random(seed)
    shapes: list[Callable] = [
        lambda: [[r.randrange(1, 9), 4, r.randrange(1, 9)]],
        lambda: [[r.randrange(3, 20)]],
        lambda: [[1, 4, 2, 4, 3], [r.randrange(2, 8), 4, 3]],
    ]
    return [make_batch(family, r.choice(shapes)(), seed=i) for i in range(count)]


@torch.no_grad()
def answer(model, batch: Batch, way: str) -> torch.Tensor:
    """Logits of a forward without a cache ``[B, S, V]``, or of three generated tokens ``[3, B, V]``."""
    if way == "forward":
        logits = model(**batch.inputs(), use_cache=False).logits
        return logits * ((batch.mask != 0) & ~batch.visual)[..., None]  # what padding predicts is nobody's business
    output = model.generate(
        **batch.inputs(),
        max_new_tokens=3,
        do_sample=False,
        cache_implementation=way,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits)


def compiled(model, how: str, backend: str):
    """The model, and what to call."""
    if how == "model.compile":
        model.compile(backend=backend)
        return model
    if how == "torch.compile":
        return torch.compile(model, backend=backend)
    decoder = model.model.language_model
    if how == "decoder":
        decoder.compile(backend=backend)
    elif how == "layer.compile":
        for layer in decoder.layers:
            layer.compile(backend=backend)
    else:
        for i, layer in enumerate(decoder.layers):
            decoder.layers[i] = torch.compile(layer, backend=backend)
    return model


def assert_equal_to_eager(family: str, how: str, backend: str, batches: list[Batch], ways: list[str]) -> None:
    model = compiled(make_model(family), how, backend)
    eager = make_model(family)
    with vtw.withdraw(model, LAYER), vtw.withdraw(eager, LAYER):
        for i, batch in enumerate(batches):
            way = ways[i % len(ways)]
            error = (answer(model, batch, way) - answer(eager, batch, way)).abs().max()
            assert error <= TOLERANCE, f"prompt {i}, {way}: off by {error}"


@pytest.mark.parametrize("how", ["model.compile", "torch.compile"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward(family, how):
    assert_equal_to_eager(family, how, "eager", prompts(family, 1, 60), ["forward"])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    assert_equal_to_eager(family, "model.compile", "eager", prompts(family, 2, 60), ["dynamic", "static"])


@pytest.mark.parametrize("how", ["decoder", "layer.compile", "layers"])
def test_parts(how):
    """The decoder alone, or its layers, as is done where the rest does not compile."""
    assert_equal_to_eager("llava", how, "eager", prompts("llava", 3, 20), ["forward", "dynamic", "static"])


@pytest.mark.parametrize("how", ["model.compile", "layer.compile"])
def test_inductor(how):
    assert_equal_to_eager("llava", how, "inductor", prompts("llava", 4, 6), ["forward", "static"])


@torch.no_grad()
def greedy_answer(model, prompt: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt ``[B, S]`` and of the answer's first four tokens, which are returned, too, ``[B, 4]``."""
    cache, ids = make_cache(model, kind, 20), prompt
    logits = [model(input_ids=ids, past_key_values=cache).logits]
    for _ in range(4):
        ids = torch.cat([ids, logits[-1][:, -1:].argmax(-1)], dim=1)
        logits.append(model(input_ids=ids[:, -1:], past_key_values=cache).logits)
    return torch.cat(logits, dim=1), ids[:, prompt.shape[1] :]


# All of it is compiled: where torch gives up, after 8 variants of a function by default, plain code would be compared.
@pytest.mark.parametrize(("how", "kind"), [("model.compile", "dynamic"), ("layers", "static")])
def test_skipped_attention_with_adapters_compiled(how, kind):
    """In fp64, of prompts of two lengths in turn: of none stays what adapters knew of another."""
    model, eager = (windows_model(["full_attention"] * LAYERS) for _ in range(2))
    adapters = adapters_of(model, [1, 2])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, VOCABULARY, (1, length), generator=generator) for length in (5, 9, 5, 9)]
    if how == "model.compile":
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    limited = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limited), vtw.skip_attention(model, adapters=adapters):
        found = [greedy_answer(model, prompt, kind) for prompt in prompts]
    with vtw.skip_attention(eager, adapters=adapters):
        wanted = [greedy_answer(eager, prompt, kind) for prompt in prompts]
    for (logits, answer), (wanted_logits, wanted_answer) in zip(found, wanted):
        assert (logits - wanted_logits).abs().max() < LIMIT and torch.equal(answer, wanted_answer)
    plain = greedy_answer(eager, prompts[0], kind)[0]
    (first, _), (second, _), *_ = wanted
    assert (plain - first).abs().max() > 0.1 and (first[:, -4:] - second[:, -4:]).abs().max() > 1e-3


def test_threads():
    """Eight of them, each with prompts of its own.

    Not of LLaVA: its image features are hidden states, which transformers records in one variable for all threads while
    something compiles, with withdrawal or without (its ``CompileableContextVar`` says so).
    """
    model, eager = make_model("qwen2_vl"), make_model("qwen2_vl")
    model.compile(backend="eager")
    batches = [prompts("qwen2_vl", 10 + i, 5) for i in range(8)]
    errors: list = []

    def work(mine: list[Batch], wanted: list[torch.Tensor]) -> None:
        for batch, want in zip(mine, wanted):
            try:
                errors.append(float((answer(model, batch, "forward") - want).abs().max()))
            except Exception as error:
                errors.append(error)

    with vtw.withdraw(model, LAYER), vtw.withdraw(eager, LAYER):
        wanted = [[answer(eager, batch, "forward") for batch in mine] for mine in batches]
        threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, wanted)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 40
    assert not [x for x in errors if not isinstance(x, float)]
    assert all(x <= TOLERANCE for x in errors), errors


@pytest.mark.parametrize(
    "family, what",
    [("llava", "pixels"), ("qwen2_vl", "labels"), ("llava", "layer"), ("qwen2_vl", "ends in an image")],
)
def test_errors(family, what):
    """Of the inputs, of the model, and of a layer, and then prompts of the same length."""
    model, eager = make_model(family), make_model(family)
    batches = [make_batch(family, rows, seed=i) for i, rows in enumerate(([[3, 4, 5]], [[1, 4, 7]], [[12]]))]
    model.compile(backend="eager")
    inputs = batches[0].inputs()
    mlp = model.model.language_model.layers[3].mlp
    with vtw.withdraw(model, LAYER), vtw.withdraw(eager, LAYER):
        wanted = [answer(eager, batch, "forward") for batch in batches]
        if what == "labels":
            inputs["labels"] = batches[0].ids
        elif what == "ends in an image":
            inputs = make_batch(family, [[8, 4]]).inputs()
        elif what == "pixels":
            inputs["pixel_values"] = inputs["pixel_values"][:0]
        else:
            mlp.forward = fail
        match = {"labels": "labels: expected", "ends in an image": "last token is text", "layer": "this layer"}
        with pytest.raises(Exception, match=match.get(what)):
            model(**inputs)
        vars(mlp).pop("forward", None)
        for batch, want in zip(batches[::-1], wanted[::-1]):
            assert (answer(model, batch, "forward") - want).abs().max() <= TOLERANCE


def fail(x):
    torch._dynamo.graph_break()
    raise RuntimeError("this layer fails")


def test_whole_graphs_are_refused():
    """A forward that may have visual tokens is not one graph."""
    model, batch = make_model("llava"), make_batch("llava", [[3, 4, 5]])
    with vtw.withdraw(model, LAYER), pytest.raises(Exception, match="How many rows are left is read beforehand"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch.inputs(), use_cache=False)
