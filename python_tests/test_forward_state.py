"""The state of a forward under withdrawal is gone however the forward ends: errors, interrupts, models that call
themselves."""

import copy
import inspect
import os
import random
import signal
import threading
import time

import pytest
import torch
from oracle import visual_keys_hidden
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration, StoppingCriteria
from vlm import FAMILIES, LAYERS, ONE, Batch, make_batch, make_model

import vtw_kernels as vtw
from vtw_kernels.integration.families import find_parts

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = 2
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def prompts(family: str) -> list[Batch]:
    """All of one length, so that what is left of one might pass for another's: images here and there, and text
    alone."""
    return [make_batch(family, rows, seed=i) for i, rows in enumerate(([[3, 4, 5]], [[1, 4, 7]], [[12]]))]


@torch.no_grad()
def logits_of(model, batch: Batch) -> torch.Tensor:
    return model(**batch.inputs(), use_cache=False).logits


def generated(model, batch: Batch) -> torch.Tensor:
    return model.generate(**batch.inputs(), max_new_tokens=4, do_sample=False)


def place(model, where: str) -> nn.Module:
    parts = find_parts(model)
    if where == "tower":
        return getattr(model.model, "vision_tower", None) or model.model.visual
    return parts.layers[int(where)]


def assert_right_again(model, batches: list[Batch], wanted: list[torch.Tensor]) -> None:
    for batch, want in zip(batches, wanted):
        assert torch.equal(generated(model, batch), want)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["tower", "0", "1", "2", "3"])
def test_what_a_forward_ends_with(family, where, error):
    """It is raised in the vision tower, before and after the withdrawal; then come other prompts of the same length."""
    model, batches = make_model(family), prompts(family)
    handle = vtw.apply(model, LAYER)
    wanted = [generated(model, batch) for batch in batches]

    def fail(module, args):
        raise error

    for batch, want in list(zip(batches, wanted))[1:]:
        hook = place(model, where).register_forward_pre_hook(fail)
        with pytest.raises(error):
            generated(model, batches[0])
        hook.remove()
        assert torch.equal(generated(model, batch), want)
    handle.remove()


def test_bad_inputs_leave_nothing(family):
    model, batches = make_model(family), prompts(family)
    bad = batches[0].inputs()
    bad["pixel_values"] = bad["pixel_values"][:0]
    with vtw.withdraw(model, LAYER):
        wanted = [generated(model, batch) for batch in batches]
        for inputs in (bad, batches[0].inputs() | {"labels": batches[0].ids}):
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                model(**inputs)
            assert_right_again(model, batches, wanted)


@pytest.fixture
def sigint():
    """Test workers may have chosen to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupts_at_random(family, sigint):
    """75 signals for each family, anywhere in a generation; then another prompt."""
    model, batches, r = make_model(family), prompts(family), random.Random(0)
    handle = vtw.apply(model, LAYER)
    wanted = [generated(model, batch) for batch in batches]
    begin = time.perf_counter()
    generated(model, batches[0])
    duration = time.perf_counter() - begin
    interrupted = 0
    for i in range(75):
        timer = threading.Timer(r.uniform(0, duration), os.kill, (os.getpid(), signal.SIGINT))
        finished = False
        try:
            timer.start()
            generated(model, batches[i % 3])
            finished = True
            timer.join()
            time.sleep(1)  # the signal comes here, if it has not come yet
        except KeyboardInterrupt:
            interrupted += not finished
        timer.join()
        other = (i + 1) % 3
        assert torch.equal(generated(model, batches[other]), wanted[other]), i
    handle.remove()
    assert interrupted > 10  # fewer where the machine is busy, and generation takes longer than it did


@pytest.mark.parametrize("where", ["1", "3"])
def test_a_cache_that_an_interrupt_left(family, where):
    """Some of its layers hold a forward that others do not: refused, not continued."""
    model, batch = make_model(family), make_batch(family, ONE)
    positions, length = batch.positions(model), batch.ids.shape[1]
    more = {"input_ids": torch.tensor([[20]]), "attention_mask": torch.ones(1, length + 1, dtype=torch.long)}
    more |= {"position_ids": positions[..., -1:] + 1}

    def interrupt(module, args):
        raise KeyboardInterrupt

    cache = DynamicCache()
    with torch.no_grad(), vtw.withdraw(model, LAYER):
        hook = place(model, where).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch.inputs(), position_ids=positions, past_key_values=cache)
        hook.remove()
        match = "one whose last forward did not end" if where == "3" else "one filled without withdrawal"
        with pytest.raises(ValueError, match=f"past_key_values: expected a cache filled under .* got {match}"):
            model(**more, past_key_values=cache)


@pytest.mark.parametrize("where", ["embeddings", "1", "2", "3"])
def test_a_hook_that_calls_the_model(family, where):
    model, (batch, other, _) = make_model(family), prompts(family)
    inner = []

    def call(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = logits_of(model, other)

    module = model.get_input_embeddings() if where == "embeddings" else place(model, where)
    with vtw.withdraw(model, LAYER):
        wanted, wanted_inner = logits_of(model, batch), logits_of(model, other)
        hook = module.register_forward_hook(call)
        given = logits_of(model, batch)
        hook.remove()
    assert torch.equal(given, wanted) and torch.equal(inner[0], wanted_inner)


def test_a_generation_within_another(family):
    model, (batch, other, _) = make_model(family), prompts(family)
    answers = []

    class Generate(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            answers.append(generated(model, other))
            return torch.zeros(len(ids), dtype=torch.bool)

    with vtw.withdraw(model, LAYER):
        wanted, wanted_inner = generated(model, batch), generated(model, other)
        given = model.generate(**batch.inputs(), max_new_tokens=4, do_sample=False, stopping_criteria=[Generate()])
    assert torch.equal(given, wanted)
    assert len(answers) == 4 and all(torch.equal(x, wanted_inner) for x in answers)


def test_a_copy_taken_within_a_forward(family):
    """It is withdrawn as the model is, holds nothing of that forward, and can be restored by itself."""
    model, (batch, other, _) = make_model(family), prompts(family)
    plain, copies = logits_of(model, other), []
    handle = vtw.apply(model, LAYER)
    wanted = logits_of(model, other)
    hook = place(model, "3").register_forward_pre_hook(lambda module, args: copies.append(copy.deepcopy(model)))
    logits_of(model, batch)
    hook.remove()
    (copied,) = copies
    place(copied, "3")._forward_pre_hooks.clear()
    assert torch.equal(logits_of(copied, other), wanted)
    vtw.remove(copied)
    assert torch.equal(logits_of(copied, other), plain)
    assert torch.equal(logits_of(model, other), wanted)  # which is not the copy's to restore
    with pytest.raises(ValueError, match="model: expected one under withdrawal, got one without"):
        vtw.remove(copied)
    handle.remove()


def test_forward_without_call(family):
    model, (batch, *_) = make_model(family), prompts(family)
    with torch.no_grad(), vtw.withdraw(model, LAYER):
        wanted = logits_of(model, batch)
        assert torch.equal(model.forward(**batch.inputs(), use_cache=False).logits, wanted)
        with pytest.raises(ValueError, match="labels: expected -100"):
            model.forward(**batch.inputs(), labels=batch.ids)


class NotPassing(LlavaForConditionalGeneration):
    """As many a model with code of its own: no keyword arguments that it does not know."""

    def forward(self, input_ids, pixel_values=None, attention_mask=None, use_cache=None, labels=None):
        return super().forward(
            input_ids, pixel_values, attention_mask=attention_mask, use_cache=use_cache, labels=labels
        )


def test_a_model_that_passes_nothing_on():
    """Right all the same: called within itself, after an interrupt, in threads, compiled as a whole and by layers."""
    reference, batches = make_model("llava"), prompts("llava")
    model = NotPassing._from_config(reference.config).eval()
    model.load_state_dict(reference.state_dict())
    inner, answers = [], {}

    def call(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = logits_of(model, batches[1])

    def interrupt(module, args):
        raise KeyboardInterrupt

    with vtw.withdraw(reference, LAYER), vtw.withdraw(model, LAYER):
        wanted = [logits_of(reference, batch) for batch in batches]
        for layer in place(model, "1"), place(model, "3"):
            hook = layer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                logits_of(model, batches[0])
            hook.remove()
            hook, inner[:] = layer.register_forward_hook(call), []
            assert torch.equal(logits_of(model, batches[0]), wanted[0]) and torch.equal(inner[0], wanted[1])
            hook.remove()
        with pytest.raises(ValueError, match="labels: expected -100"):
            model(**batches[0].inputs(), labels=batches[0].ids)
        work = lambda i: answers.update({i: [logits_of(model, batches[i]) for _ in range(5)]})  # noqa: E731
        threads = [threading.Thread(target=work, args=[i]) for i in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert all(torch.equal(x, wanted[i]) for i in range(3) for x in answers[i])
        torch.compiler.reset()
        for compiled in torch.compile(model, backend="eager"), model:
            for batch, want in zip(batches, wanted):
                assert (logits_of(compiled, batch) - want)[~batch.visual].abs().max() <= TOLERANCE
            for layer in model.model.language_model.layers:
                layer.compile(backend="eager")


# ------------------------------------------------------------------------------------------------- renamed arguments


class Renamed(nn.Module):
    """A decoder layer of another release: some of its parameters have other names, and perhaps none has a type."""

    def __init__(self, layer: nn.Module, names: dict[str, str], typed: bool):
        super().__init__()
        self.layer, self.names = layer, names
        old = {new: name for name, new in names.items()}

        def forward(*args, **kwargs):
            return layer(*args, **{old.get(name, name): value for name, value in kwargs.items()})

        parameters = inspect.signature(layer.forward).parameters.values()
        renamed = [x.replace(name=names.get(x.name, x.name)) for x in parameters]
        if not typed:
            renamed = [x.replace(annotation=inspect.Parameter.empty) for x in renamed]
        forward.__signature__ = inspect.Signature(renamed)
        self.forward = forward

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{self.names.get(name, name): value for name, value in kwargs.items()})


@pytest.mark.parametrize("seed", range(16))
def test_renamed_arguments(family, seed):
    """Right, or refused when the hooks are placed."""
    r, model, batch = random.Random(seed), make_model(family), make_batch(family, [[2, 4, 3, 4, 4], [5, 4, 1]])
    decoder = model.model.language_model
    names = [name for name in inspect.signature(decoder.layers[0].forward).parameters if name not in ("self", "kwargs")]
    names = {name: f"{r.choice(['new', 'some', 'their'])}_{name[::-1]}" for name in names if r.random() < 0.5}
    if "attention_mask" in names and r.random() < 0.5:
        names["attention_mask"] = "causal_mask"
    with visual_keys_hidden(model, LAYER, batch.visual):
        wanted = model.generate(**batch.inputs(), max_new_tokens=4, do_sample=False)
    typed = r.random() < 0.7
    for i in range(LAYERS):
        decoder.layers[i] = Renamed(decoder.layers[i], names, typed)
    try:
        handle = vtw.apply(model, LAYER)
    except ValueError as error:
        assert "decoder: expected layers that are called with" in str(error)
        assert "attention_mask" in names or not typed
        return
    assert torch.equal(model.generate(**batch.inputs(), max_new_tokens=4, do_sample=False), wanted)
    handle.remove()
