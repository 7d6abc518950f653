"""Withdrawal in transformers against the plain model that hides visual keys (oracle.py)."""

import copy
import inspect
import threading
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import dispatch_model
from oracle import visual_keys_hidden
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from vlm import (
    BEAMS,
    FAMILIES,
    IMAGE,
    LAYERS,
    LOOKUP,
    ONE,
    PAD,
    RAGGED,
    TRANSFORMERS_5,
    Batch,
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
from vtw_kernels.integration import compat
from vtw_kernels.integration.cache import WithdrawnLayer
from vtw_kernels.integration.compat import CROPS_TO_LENGTH, RECOMPUTES_HOOKS, tokens_removed
from vtw_kernels.integration.hooks import Forward
from vtw_kernels.integration.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
IMAGES = torch.tensor([IMAGE])


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return model_of(family)


@pytest.fixture
def llava():
    return model_of("llava")


def assert_equal_to_oracle(model, layer: int, batch: Batch, ends: list[int], cache: str = "dynamic") -> None:
    length = batch.ids.shape[1] + 3
    with visual_keys_hidden(model, layer, batch.visual):
        wanted = run(model, batch, ends, make_cache(model, cache, length))
    with vtw.withdraw(model, layer):
        given = run(model, batch, ends, make_cache(model, cache, length))
    plain = run(model, batch, ends, make_cache(model, cache, length))
    rows = (batch.mask != 0) & ~batch.visual
    assert given.shape == wanted.shape
    assert (given - wanted)[rows].abs().max() <= TOLERANCE
    if layer < LAYERS:
        assert (given[batch.visual] == 0).all()
        after_image = rows & (batch.visual.cumsum(1) > 0)
        assert (plain - wanted)[after_image].abs().max() > 1000 * TOLERANCE  # so the comparison can fail
    else:
        assert torch.equal(given, plain)


# ------------------------------------------------------------------------------------------------------ equivalence


@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [1, 3, LAYERS])
def test_prefill_and_decode(family, layer, attention, cache, rows):
    batch, ends = with_decode_steps(make_batch(family, rows))
    assert_equal_to_oracle(model_of(family, attention), layer, batch, ends, cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_text_token(family, model, cache):
    """Its row is alone in the later layers, where no mask would mean every slot of a static cache."""
    batch, ends = with_decode_steps(make_batch(family, [[0, 4, 1]]), steps=2)
    assert_equal_to_oracle(model, 1, batch, ends, cache)


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(family, seed):
    generator = torch.Generator().manual_seed(seed)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    rows = []
    for i in range(1 + below(4)):
        row = [below(4)]  # a sequence may begin with an image
        for _ in range(1 + below(3) if i == 0 else below(3)):
            # Images may touch, but Qwen2-VL's own positions take touching ones for one.
            row += [4 * (1 + below(2)), below(4) + (family == "qwen2_vl")]
        row[-1] += 1
        rows.append(row)
    batch, ends = with_decode_steps(make_batch(family, rows, seed=seed), steps=3)
    model = model_of(family, ("eager", "sdpa")[below(2)])
    assert_equal_to_oracle(model, 1 + below(LAYERS - 1), batch, ends, ("dynamic", "static", "lazy")[below(3)])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "turns",
    [
        [[[5]], [[4, 4, 2]], [[3]]],  # text, an image, text
        [ONE, [[2, 4, 3, 8, 2]], [[1, 4, 1]]],
        [RAGGED, [[3], [6, 4, 2], [2, 8, 1]], [[4]] * 3],  # images where there were none
    ],
    ids=["text first", "new images", "ragged"],
)
def test_turns_on_one_cache(family, attention, cache, turns):
    batch, ends = make_batch(family, turns[0]), []
    for i, rows in enumerate(turns[1:]):
        batch, steps = with_decode_steps(batch, steps=2)
        ends += steps
        batch = append(batch, make_batch(family, rows, seed=2 + i))
    assert_equal_to_oracle(model_of(family, attention), 2, batch, [*ends, batch.ids.shape[1]], cache)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [ONE, [[2, 8, 3, 4, 4], [9, 4, 8]]], ids=["one", "two"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_inside_an_image(family, attention, rows, chunk):
    """Merged embeddings in chunks, some without a single text token."""
    model = model_of(family, attention)
    batch, ends = with_decode_steps(make_batch(family, rows), steps=3)
    ends = sorted({*range(chunk, ends[0], chunk), *ends})
    with torch.no_grad():
        embeds = merged_embeddings(model, batch)
    kept = (batch.mask != 0) & ~batch.visual

    @torch.no_grad()
    def states():
        cache, begin, states = DynamicCache(), 0, []
        for end in ends:
            output = model.model(
                inputs_embeds=embeds[:, begin:end],
                attention_mask=batch.mask[:, :end],
                position_ids=batch.positions(model)[..., begin:end],
                past_key_values=cache,
            )
            states.append(output.last_hidden_state)
            begin = end
        return torch.cat(states, dim=1)

    with visual_keys_hidden(model, 2, batch.visual):
        wanted = states()
    with vtw.withdraw(model, 2, visual_mask=batch.visual):
        given = states()
    assert (given - wanted)[kept].abs().max() <= TOLERANCE
    assert (given[batch.visual] == 0).all()


def merged_embeddings(model, batch: Batch) -> torch.Tensor:
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**batch.inputs(), position_ids=batch.positions(model))
    hook.remove()
    return seen["inputs_embeds"]


def labels_of(batch: Batch) -> torch.Tensor:
    """The text, but for what would be predicted from rows without meaning."""
    labels = batch.ids.masked_fill((batch.mask == 0) | batch.visual, -100)
    labels[:, 1:][batch.visual[:, :-1] | (batch.mask[:, :-1] == 0)] = -100
    return labels


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_gradients(family, attention, pad):
    model = model_of(family, attention)
    batch = make_batch(family, [[2, 4, 3, 4, 4], [9], [4, 4, 3]], pad)
    labels = labels_of(batch)

    def gradients():
        model.zero_grad()
        output = model(**batch.inputs(), labels=labels, use_cache=False)
        output.loss.backward()
        return output.loss.detach(), {
            name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None
        }

    with visual_keys_hidden(model, 2, batch.visual):
        wanted, wanted_grads = gradients()
    with vtw.withdraw(model, 2):
        given, given_grads = gradients()
    plain, plain_grads = gradients()
    model.zero_grad()
    torch.testing.assert_close(given, wanted)
    assert wanted_grads.keys() == given_grads.keys() == plain_grads.keys()
    for name, grad in wanted_grads.items():
        assert (given_grads[name] - grad).abs().max() <= TOLERANCE * (1e-3 + grad.abs().max()), name
    assert any((plain_grads[name] - grad).abs().max() > 0.1 * grad.abs().max() for name, grad in wanted_grads.items())


def test_trainer_and_lora(family, tmp_path):
    """One step: the adapters become what the oracle makes of them."""
    batch = make_batch(family, RAGGED)
    labels = labels_of(batch)

    def adapters_after_a_step(context):
        model = make_model(family)
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
        options = TrainingArguments(
            str(tmp_path), max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0, use_cpu=True, report_to=[]
        )
        options.remove_unused_columns, options.disable_tqdm = False, True
        collate = lambda _: batch.inputs() | {"labels": labels}  # noqa: E731
        with context(model, adapted):
            Trainer(adapted, options, train_dataset=[0], data_collator=collate).train()
        return {name: x.detach() for name, x in adapted.named_parameters() if x.requires_grad}

    wanted = adapters_after_a_step(lambda model, _: visual_keys_hidden(model, 2, batch.visual))
    given = adapters_after_a_step(lambda _, adapted: vtw.withdraw(adapted, 2))
    plain = adapters_after_a_step(lambda *_: nullcontext())
    for name, x in wanted.items():
        torch.testing.assert_close(given[name], x, atol=1e-4, rtol=1e-4)
    assert max((plain[name] - x).abs().max() for name, x in wanted.items()) > 1e-3


def test_label_of_a_withdrawn_row(family, model):
    batch = make_batch(family, RAGGED)
    labels = batch.ids.masked_fill(batch.visual, -100)  # leaves the first token after each image
    with (
        vtw.withdraw(model, 2),
        pytest.raises(ValueError, match="labels: expected -100 after each visual token.*row 0"),
    ):
        model(**batch.inputs(), labels=labels)
    with vtw.withdraw(model, 2):
        model(**batch.inputs())  # and the next forward is not held up by it


def test_gradient_checkpointing(family):
    """The backward pass may come after the context: what is recomputed keeps its compacted inputs. But not if hooks are
    recomputed with their layers: then two forwards, and the backward passes in either order."""
    model, batches = make_model(family), [make_batch(family, rows) for rows in (RAGGED, ONE)]
    model.train()

    def loss_of(batch):
        return model(**batch.inputs(), use_cache=False).logits[:, -1].log_softmax(-1)[:, 11].sum()

    def gradients():
        model.zero_grad()
        with vtw.withdraw(model, 2):
            losses = [loss_of(batch) for batch in batches]
            if RECOMPUTES_HOOKS:
                [loss.backward() for loss in losses]
        if not RECOMPUTES_HOOKS:
            [loss.backward() for loss in losses]
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    wanted = gradients()
    model.gradient_checkpointing_enable()
    for grad, want in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_a_layer_drawn_at_random(family):
    """Each forward of the training is one of those at a single layer, and all of them come."""
    model, batch = make_model(family), make_batch(family, RAGGED)
    model.train()

    def states():
        return model(**batch.inputs(), use_cache=False).logits.detach()

    candidates = {}
    for layer in (1, 3, LAYERS):
        with vtw.withdraw(model, layer):
            candidates[layer] = states()
    torch.manual_seed(0)
    with vtw.withdraw(model, [1, 3, LAYERS]):
        drawn = [next(k for k, x in candidates.items() if torch.equal(x, y)) for y in (states() for _ in range(20))]
        torch.manual_seed(0)
        assert torch.equal(states(), candidates[drawn[0]])
        model.eval()
        with pytest.raises(ValueError, match=r"expected an int where a model is not in training mode, got \[1, 3, 4\]"):
            states()
    assert set(drawn) == set(candidates)
    with pytest.raises(ValueError, match=r"layer: expected 1\.\.4 .* got 5"):
        vtw.apply(model, range(2, 6))


# --------------------------------------------------------------------------------------------------------- generate

GREEDY = {}
SAMPLING = {"do_sample": True, "num_return_sequences": 2}


@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
def test_generate(family, model, options, cache, rows):
    if family == "qwen2_vl" and options is not GREEDY and TRANSFORMERS_5 and older_than("5.18"):
        pytest.skip("transformers 5.17 cannot repeat the images of Qwen2-VL")
    batch = make_batch(family, rows)
    options = options | ({"use_cache": False} if cache == "none" else {"cache_implementation": cache})
    with visual_keys_hidden(model, 2, batch.visual):
        wanted, wanted_logits = generated(model, batch.inputs(), **options)
    with vtw.withdraw(model, 2):
        given, given_logits = generated(model, batch.inputs(), **options)
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE
    assert (generated(model, batch.inputs(), **options)[1] - wanted_logits).abs().max() > 1000 * TOLERANCE


@pytest.mark.skipif(older_than("5.23"), reason="transformers 5.22 loses the images of a prompt in chunks")
@pytest.mark.parametrize("rows", [ONE, RAGGED, [[2, 8, 3, 8, 1], [12, 4, 3]]], ids=["one", "ragged", "two"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
def test_generate_from_chunks(family, model, size, cache, rows):
    """They begin, end or lie within images, and may hold no text at all."""
    batch = make_batch(family, rows)
    options = {"cache_implementation": cache, "prefill_chunk_size": size}
    with visual_keys_hidden(model, 2, batch.visual):
        wanted, wanted_logits = generated(model, batch.inputs(), cache_implementation=cache)
    with vtw.withdraw(model, 2):
        given, given_logits = generated(model, batch.inputs(), **options)
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE
    ends_visual = make_batch(family, [[3, 4, 2], [2, 4]])
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="last token is text.* visual one in row 1"):
        generated(model, ends_visual.inputs(), **options)


def test_assisted_decoding(family, model):
    """Rejected tokens are cropped from caches of different lengths."""
    batch = make_batch(family, ONE)
    rejected = Counter()
    crop = DynamicCache.crop

    def removed(cache, n):
        return cache.get_seq_length() - n if CROPS_TO_LENGTH else -n

    with pytest.MonkeyPatch.context() as patch, vtw.withdraw(model, 2):
        patch.setattr(DynamicCache, "crop", lambda cache, n: rejected.update([removed(cache, n)]) or crop(cache, n))
        given, _ = generated(model, batch.inputs(), max_new_tokens=30, **LOOKUP)
    with vtw.withdraw(model, 2):
        wanted, _ = generated(model, batch.inputs(), max_new_tokens=30)
    assert torch.equal(given, wanted)
    assert max(rejected) > 0


def test_tokens_removed_by_crop():
    """Releases count in numbers or in tensors, and some take the length that is to be left."""
    assert [tokens_removed(argument, 10) for argument in (-3, -12, 4, 12)] == [3, 10, 6, 0]
    assert tokens_removed(0, 10) == (10 if CROPS_TO_LENGTH else 0)
    assert type(tokens_removed(torch.tensor(-3), 10)) is int


def test_generate_second_turn(family, model):
    """The answer and a second question with a new image, on the cache of the first."""
    if family == "qwen2_vl" and TRANSFORMERS_5 and older_than("5.18"):
        pytest.skip("transformers 5.17 takes no features of images that are encoded already")
    first = make_batch(family, ONE)
    question = make_batch(family, [[2, 8, 4]] if TRANSFORMERS_5 else [[6]], seed=3)

    def turns():
        options = {"return_dict_in_generate": True, "max_new_tokens": 5, "do_sample": False}
        output = model.generate(**first.inputs(), **options)
        answer = output.sequences[:, first.ids.shape[1] :]
        batch = append(append(first, Batch(family, answer, torch.ones_like(answer))), question)
        inputs = batch.inputs()  # Qwen2-VL wants all grids, for positions, but only the features that are new
        for image in question.images:
            inputs["pixel_values"] = image["pixels"]
        if family == "qwen2_vl" and question.images:
            features = model.get_image_features(inputs.pop("pixel_values"), image["grid"][None])
            inputs["mm_encoder_outputs"] = {"image": features}
        output = model.generate(**inputs, past_key_values=output.past_key_values, output_logits=True, **options)
        return output.sequences, torch.stack(output.logits), batch.visual

    with vtw.withdraw(model, 2):
        given, given_logits, visual = turns()
    with visual_keys_hidden(model, 2, visual):
        wanted, wanted_logits, _ = turns()
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE


def test_inputs_embeds_with_placeholders(llava):
    batch = make_batch("llava", RAGGED)
    inputs = batch.inputs()
    with torch.no_grad(), vtw.withdraw(llava, 2):
        wanted = llava(**inputs).logits
        embeds = llava.get_input_embeddings()(inputs.pop("input_ids"))
        given = llava(**inputs, inputs_embeds=embeds).logits
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_visual_mask_overrides(family, attention):
    """Any tokens may be withdrawn, here some text tokens, and their rows are repeated for beams."""
    model, batch = model_of(family, attention), make_batch(family, [[9], [12]])
    chosen = torch.zeros_like(batch.visual)
    chosen[:, 4:7] = True
    with visual_keys_hidden(model, 1, chosen):
        wanted = generated(model, batch.inputs(), **BEAMS)
    with vtw.withdraw(model, 1, visual_mask=chosen):
        given = generated(model, batch.inputs(), **BEAMS)
    assert torch.equal(given[0], wanted[0])
    assert (given[1] - wanted[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [[[9]], [[9], [5]]], ids=["one", "padded"])
def test_text_only_is_bit_identical(family, model, cache, rows):
    batch = make_batch(family, rows)
    wanted = generated(model, batch.inputs(), cache_implementation=cache)
    with vtw.withdraw(model, 1):
        given = generated(model, batch.inputs(), cache_implementation=cache)
    assert torch.equal(given[0], wanted[0])
    assert torch.equal(given[1], wanted[1])


def test_sampled_placeholder_is_text(family, model):
    """Without an image of its own, a token that looks like a placeholder is one more token of the answer."""
    batch = make_batch(family, ONE)
    tokens = torch.tensor([[20, IMAGE, 30, IMAGE]])
    longer = append(batch, Batch(family, tokens, torch.ones_like(tokens)))
    ends = list(range(batch.ids.shape[1], longer.ids.shape[1] + 1))
    positions = append(batch, make_batch(family, [[4]])).positions(model)
    longer.positions = lambda model: positions
    with visual_keys_hidden(model, 2, batch.visual):
        wanted = run(model, longer, ends)
    with vtw.withdraw(model, 2):
        given = run(model, longer, ends)
    assert (given - wanted)[:, batch.ids.shape[1] :].abs().max() <= TOLERANCE
    options = {
        "suppress_tokens": None,
        "logits_processor": [lambda ids, scores: scores.index_fill(1, IMAGES, torch.inf)],
    }
    with visual_keys_hidden(model, 2, batch.visual):
        wanted, wanted_logits = generated(model, batch.inputs(), **options)
    with vtw.withdraw(model, 2):
        given, given_logits = generated(model, batch.inputs(), **options)
    assert (given[:, batch.ids.shape[1] :] == IMAGE).all()
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE


# ------------------------------------------------------------------------------------------------ cost and outputs


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
def test_one_compact_per_forward(family, attention, rows):
    model, batch = model_of(family, attention), make_batch(family, rows)
    with vtw.withdraw(model, 1), CountOps() as prefill:
        run(model, batch, [batch.ids.shape[1]])
    assert prefill.calls[torch.ops.vtw_kernels.compact.default] == 1
    assert prefill.calls[torch.ops.vtw_kernels.expand.default] == 1
    longer, ends = with_decode_steps(batch)
    with vtw.withdraw(model, 1), CountOps() as decode:
        run(model, longer, ends)
    assert decode.calls[torch.ops.vtw_kernels.compact.default] == 1  # decoding moves no rows


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class HostReads(TorchDispatchMode):
    """What would be a synchronisation on a GPU, in order: reads of values, and shapes that depend on them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls: list[str] = []
        for name in READS:
            self._log(monkeypatch, torch.Tensor, name)
        self._log(monkeypatch, torch, "tensor")  # from pageable memory
        self._log(monkeypatch, Forward, "count")  # the device is told to copy
        self._log(monkeypatch, Forward, "decide")  # the host waits for the copy

    def _log(self, monkeypatch, owner, name):
        method = getattr(owner, name)

        def call(x, *args, **kwargs):
            self.calls.append(name)
            return method(x, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.calls.append("boolean index")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
def test_what_the_host_reads(family, model, cache, rows, monkeypatch):
    """No synchronisations beyond those of the plain model: in a prefill with images one thing more is read, but from
    the host's own memory, as the model itself has waited for the device since that was told to copy it; in decoding
    none."""
    reads = HostReads(monkeypatch)
    prefill = make_batch(family, rows)
    both, ends = with_decode_steps(prefill)

    def logged(batch, ends):
        past = make_cache(model, cache, both.ids.shape[1] + 3)
        reads.calls.clear()
        with reads:
            run(model, batch, ends, past)
        return list(reads.calls)

    for batch, stops in ((prefill, ends[:1]), (both, ends)):
        plain = logged(batch, stops)
        with vtw.withdraw(model, 2):
            withdrawn = logged(batch, stops)
        assert withdrawn.index("decide") > withdrawn.index("count") + 1
        assert Counter(x for x in withdrawn if x != "decide") - Counter(plain) == {"count": 1, "tolist": 1}


def test_cache_is_smaller(family, model):
    batch, ends = with_decode_steps(make_batch(family, RAGGED))
    cache = DynamicCache(config=model.config)
    with vtw.withdraw(model, 1):
        run(model, batch, ends, cache)
    tokens = batch.ids.shape[1]
    slots = (batch.mask.bool() & ~batch.visual).sum(1).max()  # padding has no slot either
    assert [layer.keys.shape[-2] for layer in cache.layers] == [tokens] + [slots] * (LAYERS - 1)
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [tokens] * LAYERS


def test_outputs_keep_their_length(family, model):
    batch = make_batch(family, RAGGED)
    with torch.no_grad(), vtw.withdraw(model, 2):
        output = model(**batch.inputs(), output_hidden_states=True)
        last = model(**batch.inputs(), logits_to_keep=1).logits
    assert {x.shape for x in output.hidden_states} == {(*batch.ids.shape, 32)}
    assert (output.hidden_states[3][batch.visual] == 0).all() and (output.hidden_states[2][batch.visual] != 0).any()
    assert (output.logits[batch.visual] == 0).all() and (output.logits[~batch.visual] != 0).any()
    torch.testing.assert_close(last[:, -1:], output.logits[:, -1:])  # Qwen2-VL of 4.57 makes all of them


# ------------------------------------------------------------------------------------------- flex and flash attention


@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_flex_and_flash(family, attention, rows, on_the_cpu):
    """Two turns with images, and decoding."""
    model = make_model(family)
    model.model.language_model.config._attn_implementation = attention
    batch, ends = with_decode_steps(make_batch(family, rows), steps=2)
    batch = append(batch, make_batch(family, [[3, 4, 2]] * len(rows), seed=2))
    batch, more = with_decode_steps(batch, steps=2)
    assert_equal_to_oracle(model, 2, batch, ends + more)
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match=f"expected a dynamic cache with '{attention}'"):
        run(model, batch, ends, make_cache(model, "static", 50))


# ----------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
def test_compiled_decode_is_one_graph(family, attention, rows):
    """The prefill as it is, then one graph for every token."""
    model = model_of(family, attention)
    batch, ends = with_decode_steps(make_batch(family, rows))
    positions = batch.positions(model)
    graphs = CompileCounter()

    @torch.no_grad()
    def decode(step):
        cache = StaticCache(config=model.config, max_cache_len=ends[-1] + 3)
        run(model, batch, ends[:1], cache)
        logits = []
        for begin in ends[:-1]:
            inputs = batch.inputs(begin, begin + 1) | {"attention_mask": padding, "use_cache": True}
            logits.append(step(**inputs, position_ids=positions[..., begin : begin + 1], past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    padding = F.pad(batch.mask, (0, 3), value=1)  # of the cache's length, so that its shape stays
    with visual_keys_hidden(model, 2, batch.visual):
        wanted = decode(model)
    torch.compiler.reset()
    with vtw.withdraw(model, 2):
        given = decode(torch.compile(model, backend=graphs, fullgraph=True))
    assert (given - wanted).abs().max() <= TOLERANCE
    assert graphs.frame_count == 1


def test_compiled_before(family):
    """Compiled code that knows nothing of the withdrawal is not used under it, nor the other way round."""
    model, batch = make_model(family), make_batch(family, RAGGED)
    ends = [batch.ids.shape[1]]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    wanted = run(model, batch, ends)
    assert torch.equal(run(compiled, batch, ends), wanted)
    with vtw.withdraw(compiled, 2):
        withdrawn = run(model, batch, ends)
        assert torch.equal(run(compiled, batch, ends), withdrawn)
    assert not torch.equal(withdrawn, wanted)
    assert torch.equal(run(compiled, batch, ends), wanted)


# ------------------------------------------------------------------------------------------------- life and errors


def test_leaves_no_trace(family):
    model, batch = make_model(family), make_batch(family, ONE)
    ends = [batch.ids.shape[1]]
    wanted = run(model, batch, ends)
    hooks = [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules()]  # transformers has its own
    handle = vtw.apply(model, 1)
    with_handle = run(model, batch, ends)
    handle.remove()
    handle.remove()
    with pytest.raises(ZeroDivisionError), vtw.withdraw(model, 2):
        1 / 0
    with vtw.withdraw(model, 1):
        with pytest.raises(RuntimeError, match="cannot reshape"):  # no image for the placeholders
            model(**batch.inputs() | {"pixel_values": batch.inputs()["pixel_values"][:0]})
        assert torch.equal(run(model, batch, ends), with_handle)
    assert not torch.equal(with_handle, wanted)
    assert torch.equal(run(model, batch, ends), wanted)
    assert hooks == [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules()]


def test_config_and_files(tmp_path):
    """The layer goes with the model, and comes back from it or from a search."""
    model, batch = make_model("llava"), make_batch("llava", ONE)
    ends = [batch.ids.shape[1]]
    with vtw.withdraw(model, 2):
        wanted = run(model, batch, ends)
        model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "vtw")
    with pytest.raises(ValueError, match="config has none under vtw"):
        vtw.apply(model)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.vtw == {"layer": 2}
    with vtw.withdraw(loaded):
        assert torch.equal(run(loaded, batch, ends), wanted)
    with vtw.withdraw(loaded, 3):
        assert loaded.config.vtw == {"layer": 3}
    assert loaded.config.vtw == {"layer": 2}
    for found, threshold in ((2, 0.5), (None, 0.1)):
        kl, one = torch.tensor([[0.9, 0.2, 0.15]]), torch.ones(1)
        search = vtw.LayerSearch("llava", LAYERS, [1, 2, 3], kl, kl, kl, one, one, threshold=threshold)
        assert search.layer == found
        search.save(tmp_path / "vtw.json")
        if found is None:
            with pytest.raises(ValueError, match="none is below its threshold"):
                vtw.apply(model, tmp_path / "vtw.json")
        else:
            with vtw.withdraw(model, str(tmp_path / "vtw.json")):
                assert torch.equal(run(model, batch, ends), wanted)
            replace(search, settings={"finished": False}).save(tmp_path / "vtw.json")
            with pytest.warns(UserWarning, match="search that was stopped before its end"):
                vtw.apply(model, tmp_path / "vtw.json").remove()


def test_copies_are_withdrawn(family):
    model, batch = make_model(family), make_batch(family, RAGGED)
    ends = [batch.ids.shape[1]]
    handle = vtw.apply(model, 2)
    wanted = run(model, batch, ends)
    copied = copy.deepcopy(model)
    handle.remove()
    plain = run(model, batch, ends)
    assert not torch.equal(plain, wanted)
    assert torch.equal(run(copied, batch, ends), wanted)
    with pytest.raises(ValueError, match=r"layer=2\) in effect"):
        vtw.apply(copied, 3)
    assert torch.equal(run(model, batch, ends), plain)


def test_threads_share_a_model(llava):
    """Different prompts at the same time, each on a cache of its own."""
    batches = [make_batch("llava", rows, seed=i) for i, rows in enumerate([ONE, RAGGED, [[2, 4, 9]], [[7]]])]
    with vtw.withdraw(llava, 2):
        wanted = [generated(llava, batch.inputs())[0] for batch in batches]
        given, errors = {}, []

        def work(i):
            try:
                given[i] = [llava.generate(**batches[i].inputs(), max_new_tokens=10, do_sample=False) for _ in range(5)]
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=[i]) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(torch.equal(x, wanted[i]) for i in given for x in given[i])


def test_caches_copy_select_and_crop(family, model):
    batch, ends = with_decode_steps(make_batch(family, RAGGED))
    rows = torch.tensor([2, 0])
    with vtw.withdraw(model, 2):
        wanted = run(model, batch, ends)
        cache = DynamicCache()
        run(model, batch, ends[:4], cache)
        cache = copy.deepcopy(cache)
        cache.crop(-2)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(2 * rows.flip(0))
        cache.reorder_cache(torch.tensor([1, 0]))
        images = [image for image in batch.images if image["row"] != 1]
        some = Batch(family, batch.ids[rows], batch.mask[rows], images)
        positions = batch.positions(model)[..., rows, :]
        some.positions = lambda model: positions
        given = run(model, some, ends[2:], cache, begin=ends[1])
        with pytest.raises(ValueError, match="crop: expected to remove as many text tokens"):
            cache.crop(-(batch.ids.shape[1] - ends[0] + 5))  # one row's text, the other's image
    assert (given - wanted[rows][:, ends[1] :]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_of_another_kind(llava, kind):
    batch, ends = with_decode_steps(make_batch("llava", ONE), steps=1)
    full, withdrawn = make_cache(llava, kind, 30), make_cache(llava, kind, 30)
    run(llava, batch, ends[:1], full)
    with vtw.withdraw(llava, 2):
        run(llava, batch, ends[:1], withdrawn)
        with pytest.raises(ValueError, match=r"withdraw\(layer=2\) or an empty one, got one filled without withdrawal"):
            run(llava, batch, ends[1:], full, begin=ends[0])
        with pytest.raises(TypeError, match="past_key_values: expected a Cache"):
            llava(input_ids=batch.ids, past_key_values=((1, 2),))
    with (
        vtw.withdraw(llava, 3),
        pytest.raises(ValueError, match=r"layer=3\).*got one filled under withdraw\(layer=2\)"),
    ):
        run(llava, batch, ends[1:], withdrawn, begin=ends[0])
    assert withdrawn.get_seq_length() == ends[0]  # raised before anything was cached
    with vtw.withdraw(llava, 2):
        run(llava, batch, ends[1:], copy.deepcopy(withdrawn), begin=ends[0])
    with pytest.raises(ValueError, match=r"filled under withdraw\(layer=2\).*a forward without withdrawal"):
        run(llava, batch, ends[1:], withdrawn, begin=ends[0])
    if kind == "dynamic" and older_than("5.18"):
        return  # its reset leaves a dynamic layer as long as it was
    withdrawn.reset()  # empty again, and free to be used in any way
    assert torch.equal(run(llava, batch, ends, withdrawn), run(llava, batch, ends, make_cache(llava, kind, 30)))
    with vtw.withdraw(llava, 2), pytest.raises(ValueError, match="got one filled without withdrawal"):
        run(llava, batch, ends[1:], withdrawn, begin=ends[0])


class OtherLayer(DynamicLayer):
    """A kind of cache layer that holds what it wants, as quantised ones do."""


@pytest.mark.parametrize("kind", ["other", "lazy", "fp8", "too short"])
def test_cache_layers_of_another_kind(llava, kind):
    """Refused before anything is cached."""
    if kind == "fp8":
        if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
            pytest.skip("this transformers has no quantised cache that needs no other package")
        cache = transformers.QuantizedCache("fp8", llava.config)
    elif kind == "lazy":
        cache = transformers.Cache(layer_class_to_replicate=OtherLayer)
    else:
        cache = transformers.Cache(
            layers=[OtherLayer() for _ in range(LAYERS)] if kind == "other" else [DynamicLayer()]
        )
    name = {"fp8": "Fp8QuantizedLayer at 2", "too short": "NoneType at 2"}.get(kind, "OtherLayer at 2")
    batch = make_batch("llava", ONE)
    with (
        vtw.withdraw(llava, 2),
        pytest.raises(ValueError, match=f"past_key_values: expected layers of type.*got {name}"),
    ):
        run(llava, batch, [batch.ids.shape[1]], cache)
    assert cache.get_seq_length() == 0


class FakeStream:
    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(family, model, cache, monkeypatch):
    """Their layers are away, here nowhere to be found, except around their update."""
    away = Counter()

    def offload(layer):
        away[type(layer)] += 1
        layer.elsewhere = layer.keys, layer.values
        layer.keys = layer.values = None

    def prefetch(layer):
        if layer.is_initialized and layer.keys is None:
            layer.keys, layer.values = layer.elsewhere

    monkeypatch.setattr(torch, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: FakeStream())
    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    batch = make_batch(family, RAGGED)
    with visual_keys_hidden(model, 2, batch.visual):
        wanted, wanted_logits = generated(model, batch.inputs())
    with vtw.withdraw(model, 2):
        given, given_logits = generated(model, batch.inputs(), cache_implementation=cache)
    assert torch.equal(given, wanted)
    assert (given_logits - wanted_logits).abs().max() <= TOLERANCE
    withdrawn = sum(count for kind, count in away.items() if issubclass(kind, WithdrawnLayer))
    assert withdrawn == away.total() / 2 > 0


@pytest.mark.parametrize("first", ["dispatched", "withdrawn"])
def test_layers_elsewhere(family, first, tmp_path):
    """Accelerate brings the weights of some layers from disk when they run, by hooks of its own."""
    model, batch = make_model(family), make_batch(family, RAGGED)
    ends = [batch.ids.shape[1]]
    plain = run(model, batch, ends)
    with vtw.withdraw(model, 2):
        wanted = run(model, batch, ends)
    layers = model.model.language_model.layers
    names = {x: name for name, x in model.named_modules()}
    places = {"": "cpu", names[layers[1]]: "disk", names[layers[2]]: "disk"}

    def dispatch():
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
        assert next(layers[2].parameters()).is_meta

    if first == "dispatched":
        dispatch()
    handle = vtw.apply(model, 2)
    if first == "withdrawn":
        dispatch()
    assert torch.equal(run(model, batch, ends), wanted)
    handle.remove()
    assert torch.equal(run(model, batch, ends), plain)
    assert hasattr(layers[2], "_hf_hook") and all(
        "forward" in vars(x) for x in model.modules() if hasattr(x, "_hf_hook")
    )


def bad_call(model, match, error=ValueError, layer=2, visual_mask=None, **inputs):
    return pytest.param(model, match, error, layer, visual_mask, inputs, id=match)


EMBEDS = torch.zeros(1, 5, 32)


@pytest.mark.parametrize(
    "family, match, error, layer, visual_mask, inputs",
    [
        bad_call("llava", r"layer: expected 1\.\.4 \(4 withdraws nothing\), got 0", layer=0),
        bad_call("llava", r"layer: expected 1\.\.4 .* got 5", layer=5),
        bad_call("llava", "layer: expected an int, or some, got bool", TypeError, layer=True),
        bad_call("llava", "layer: expected an int, or some, got float", TypeError, layer=2.0),
        bad_call("llava", "visual_mask: expected a tensor, got list", TypeError, visual_mask=[[True]]),
        bad_call("llava", "visual_mask: expected bool .* got torch.int64", visual_mask=torch.ones(1, 5).long()),
        bad_call(
            "llava",
            "visual_mask: expected 1 rows, or a divisor",
            visual_mask=torch.ones(2, 5).bool(),
            input_ids=[[1, 2]],
        ),
        bad_call("llava", "inputs_embeds without placeholder tokens", inputs_embeds=EMBEDS),
        bad_call("llava", "last token is text.*row 1", input_ids=[[IMAGE, 2, 3], [4, 5, IMAGE]]),
        bad_call("qwen2_vl", "last token is text.*row 0", input_ids=[[4, IMAGE, PAD]], attention_mask=[[1, 1, 0]]),
        bad_call("llama", "names no visual token"),
        bad_call("linear", "expected a model of transformers, got Linear", TypeError),
    ],
)
def test_errors(family, match, error, layer, visual_mask, inputs):
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=4, num_attention_heads=1))
    else:
        model = torch.nn.Linear(2, 2) if family == "linear" else model_of(family)
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    with pytest.raises(error, match=match), vtw.withdraw(model, layer, visual_mask=visual_mask):
        model(**inputs)


def test_context_errors(llava):
    with vtw.withdraw(llava, 2), pytest.raises(ValueError, match=r"got one with withdraw\(layer=2\) in effect"):
        vtw.apply(llava, 3)
    with vtw.withdraw(llava, 2), pytest.raises(RuntimeError, match="expected decoder layer 2 to run within a forward"):
        llava.model.language_model.layers[2](torch.zeros(1, 3, 32))
    config = llava.model.language_model.config
    with vtw.withdraw(llava, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_attn_implementation_internal", "paged|sdpa")
        with pytest.raises(ValueError, match="that transformers makes masks for.*got 'paged|sdpa'"):
            llava(input_ids=torch.tensor([[1, 2]]))
    with vtw.withdraw(llava, 2), pytest.raises(TypeError, match=r"attention_mask: expected \[B, heads, q, keys\]"):
        compaction = Stage(2, vtw.plan_compaction(torch.tensor([[True, False]]), 1))
        compaction({"attention_mask": torch.ones(1, 2, 3)})


def test_a_context_that_is_not_entered(llava):
    """A call without `with` withdraws nothing, and says so."""
    with pytest.warns(UserWarning, match="withdraw: nothing was withdrawn, as its context was not entered"):
        vtw.withdraw(llava, 2)

    @vtw.withdraw(llava, 2)
    def decorated():
        return [hasattr(llava.model.language_model, "_vtw_withdrawal") for _ in range(2)]

    assert decorated() == decorated() == [True, True]
    assert not hasattr(llava.model.language_model, "_vtw_withdrawal")


@pytest.mark.parametrize(
    "content, match",
    [
        ("{}", "which is something else"),
        ("[2]", "which is something else"),
        ("null", "which is something else"),
        ('{"layer": 2, "hidden_size": 4}', "which is something else"),
        ("{", "which is no JSON"),
        ('{"layer": 2, "num_layers": 32, "model": "LLaVA-1.5"}', "of 4 decoder layers, got .* on LLaVA-1.5 of 32"),
        ('{"layer": null, "num_layers": 4, "model": "llava"}', "none is below its threshold"),
    ],
)
def test_files_that_are_no_search(llava, tmp_path, content, match):
    (tmp_path / "vtw.json").write_text(content)
    with pytest.raises(ValueError, match=f"^layer: expected .*{match}"):
        vtw.withdraw(llava, tmp_path / "vtw.json")
    llava.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="which is something else"):
        vtw.withdraw(llava, tmp_path / "config.json")


def test_search_on_another_model(tmp_path):
    model = make_model("llava")
    model.config._name_or_path = model.name_or_path = "mine/llava"
    (tmp_path / "vtw.json").write_text('{"layer": 2, "num_layers": 4, "model": "another/llava"}')
    with pytest.warns(UserWarning, match="of a search on another/llava, and this model is mine/llava"):
        vtw.apply(model, tmp_path / "vtw.json").remove()


def test_drawn_layers_are_saved(tmp_path):
    """And do not pass for a layer."""
    model = make_model("llava")
    with vtw.withdraw(model, range(1, 4)):
        model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "vtw")
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained with one of \[1, 2, 3\] drawn for each step, says its config"):
        vtw.apply(loaded)


def test_adapters_hold_no_layer(tmp_path):
    adapted = get_peft_model(make_model("llava"), LoraConfig(target_modules=["q_proj"], r=2))
    with vtw.withdraw(adapted, 2):
        adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llava"), tmp_path)
    with pytest.raises(ValueError, match="files of an adapter hold no config"):
        vtw.apply(loaded)


def test_a_newer_transformers(llava, monkeypatch):
    """Warns once, with what to run."""
    monkeypatch.setattr(compat.transformers, "__version__", "9.0")
    compat.warn_if_newer.cache_clear()
    with pytest.warns(UserWarning, match="tested with transformers up to .* and this is 9.0; `vtw-kernels check`"):
        vtw.apply(llava, 2).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtw.apply(llava, 2).remove()
    compat.warn_if_newer.cache_clear()


def test_labels_by_position(family, model):
    batch = make_batch(family, ONE)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    inputs = batch.inputs() | {"labels": batch.ids}
    args = [inputs.pop(name, None) for name in names[: names.index("labels") + 1]]
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="labels: expected -100 after each visual token"):
        model(*args, **inputs)


def test_labels_of_classes():
    """One for each sequence, or several: nothing is predicted from the rows."""
    config = make_model("llava").config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config.text_config)
    model.config.pad_token_id = PAD
    batch = make_batch("llava", RAGGED)
    with torch.no_grad(), vtw.withdraw(model, 2, visual_mask=batch.visual):
        for labels in (torch.tensor([0, 1, 1]), None):
            assert model(batch.ids, batch.mask, labels=labels).logits.isfinite().all()
    visual = batch.visual.clone()
    visual[1, -1] = True
    with vtw.withdraw(model, 2, visual_mask=visual), pytest.raises(ValueError, match="last token is text.*row 1"):
        model(batch.ids, batch.mask, labels=torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_additive_masks(family, attention):
    """A bias is none of padding: what a row sees of itself may be any finite number but the least."""
    model, batch = model_of(family, attention), make_batch(family, [[3, 4, 5], [2, 4, 6]])
    tokens = batch.ids.shape[1]
    future = torch.ones(tokens, tokens).triu(1).bool()
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(min=0).float()
    for bias in (-0.1 * distance, -0.1 * (distance + 1), 0.1 * (distance + 1)):
        for hidden in (torch.finfo(torch.float32).min, -torch.inf):
            mask = bias.masked_fill(future, hidden).expand(2, 1, -1, -1)
            inputs = batch.inputs() | {"attention_mask": mask, "position_ids": batch.positions(model)}
            with torch.no_grad():
                with visual_keys_hidden(model, 2, batch.visual):
                    wanted = model(**inputs, use_cache=False).logits
                with vtw.withdraw(model, 2):
                    given = model(**inputs, use_cache=False).logits
            assert (given - wanted)[~batch.visual].abs().max() <= TOLERANCE


@pytest.mark.parametrize("hidden_states", [False, True])
@pytest.mark.parametrize("asked", ["body", "config", "decoder"])
def test_tuples_are_returned(family, asked, hidden_states):
    model, batch = make_model(family), make_batch(family, RAGGED)
    inputs = {"position_ids": batch.positions(model), "output_hidden_states": hidden_states, "use_cache": False}
    if asked == "decoder":
        called, inputs = model.get_decoder(), inputs | {"attention_mask": batch.mask}
        inputs["inputs_embeds"] = merged_embeddings(model, batch).detach()
    else:
        called, inputs = model.model, inputs | batch.inputs()
    tuples = {} if asked == "config" else {"return_dict": False}
    with torch.no_grad(), vtw.withdraw(model, 2, visual_mask=batch.visual):
        wanted = called(**inputs).to_tuple()
    model.config.return_dict = asked != "config"
    with torch.no_grad():
        try:
            called(**inputs, **tuples)
        except AttributeError as error:
            pytest.skip(f"transformers {transformers.__version__} can't by itself: {error}")
        with vtw.withdraw(model, 2, visual_mask=batch.visual):
            given = called(**inputs, **tuples)
    assert isinstance(given, tuple) and torch.equal(given[0], wanted[0])
    if hidden_states:
        states = next(x for x in given if isinstance(x, tuple))
        assert all(x.shape[:2] == batch.ids.shape for x in states) and len(states) == LAYERS + 1


def test_export_is_refused(llava):
    batch = make_batch("llava", ONE)
    with vtw.withdraw(llava, 2), pytest.raises(Exception, match="torch.export: expected a model without withdrawal"):
        torch.export.export(llava, (), batch.inputs() | {"use_cache": False})


def test_models_that_do_not_apply(llava):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(llava.config), "model_type", "colpali")
        with pytest.raises(ValueError, match="not supported: it compares the last states of all tokens"):
            vtw.apply(llava, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava.config.text_config, "layer_types", ["linear_attention"] * 4, raising=False)
        with pytest.raises(ValueError, match="layers of type linear_attention"):
            vtw.apply(llava, 2)


def test_text_model_with_visual_mask():
    """A model that the table does not know, given a mask."""
    config = LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=4, num_attention_heads=1, intermediate_size=8)
    model = LlamaForCausalLM(config).eval()
    ids, mask = torch.arange(10)[None], torch.zeros(1, 10, dtype=torch.bool)
    mask[:, 2:5] = True
    with torch.no_grad(), vtw.withdraw(model, 1, visual_mask=mask):
        output = model(ids)
        direct = model.model(ids).last_hidden_state
    assert (output.logits[mask] == 0).all() and (direct[mask] == 0).all()
    assert output.past_key_values.layers[1].keys.shape[-2] == 7
