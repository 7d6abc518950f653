"""``verify``: right withdrawal passes, in each family and dtype, and wrong one does not; and ``vtw-kernels check``."""

import itertools
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from command_records import make_processor
from families_zoo import IMAGE, RECIPES, make_prompts
from families_zoo import make_model as make_family
from PIL import Image
from test_families import PROMPTS
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from vlm import FAMILIES, LAYERS, ONE, RAGGED, TRANSFORMERS_5, make_batch, make_model, run, with_decode_steps

import vtw_kernels as vtw
from vtw_kernels import check, cli
from vtw_kernels.ops._registration import KERNEL_OF

pytestmark = pytest.mark.usefixtures("one_thread")
module = import_module("vtw_kernels.integration.verify")
withdraw, hide_keys = module.withdraw, module.hide_keys
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------ hidden keys, and an attention written out

written_out = {}


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.double() @ key.double().transpose(-1, -2)) * scaling + attention_mask.double()[..., : key.shape[2]]
    hidden = written_out["hidden"][module.layer_idx]
    for row, repeated in itertools.product(range(len(hidden)), range(len(query) // len(hidden))):
        for token in hidden[row].nonzero()[:, 0].tolist():
            if token < key.shape[2]:
                scores[row * (len(query) // len(hidden)) + repeated, :, :, token] = -torch.inf
    probabilities = scores.softmax(-1)
    return (probabilities @ value.double()).to(query.dtype).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register("written_out", _attention)
AttentionMaskInterface.register("written_out", eager_mask)


@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_keys_of_any_layer_and_row_are_hidden(family, attention, rows):
    """In a prefill and steps of decoding, with either cache, and repeated for beams. What is hidden in one layer stays
    so, as rows that have left do not return."""
    model = make_model(family, attention)
    batch, ends = with_decode_steps(make_batch(family, rows), steps=3)
    generator = torch.Generator().manual_seed(0)
    gone = torch.zeros(len(batch.ids), ends[0] - 1, dtype=torch.bool)
    hidden = []
    for _ in range(LAYERS):
        hidden.append(gone)
        gone = gone | (torch.rand(gone.shape, generator=generator) < 0.2)
    left = (batch.mask != 0) & ~torch.nn.functional.pad(gone, (0, batch.ids.shape[1] - gone.shape[1]))

    def outputs():
        static = StaticCache(config=model.config, max_cache_len=ends[-1] + 3)
        beams = model.generate(
            **batch.inputs(0, ends[0]), num_beams=3, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        logits = run(model, batch, ends)
        return logits[left], run(model, batch, ends, static)[left], torch.stack(beams.logits)

    text = model.config.get_text_config(decoder=True)
    text._attn_implementation, written_out["hidden"] = "written_out", hidden
    wanted = outputs()
    text._attn_implementation = attention
    with hide_keys(model, hidden):
        given = outputs()
    for a, b, plain in zip(given, wanted, outputs(), strict=True):
        assert (a - b).abs().max() <= 1e-4
        assert (plain - b).abs().max() > 0.1


def test_hidden_keys_are_restored():
    """Whatever ends it, and layers without hidden keys compute what they ever did."""
    model, batch = make_model("llava"), make_batch("llava", ONE)
    text, ends = model.model.language_model, [batch.ids.shape[1]]
    plain = run(model, batch, ends)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), hide_keys(model, [batch.visual] * LAYERS):
            assert not torch.equal(run(model, batch, ends), plain)
            raise error
        assert text.config._attn_implementation == "sdpa"
        assert not text._forward_pre_hooks and not module._hidden
        assert torch.equal(run(model, batch, ends), plain)
    with hide_keys(model, [None] * LAYERS):
        torch.testing.assert_close(run(model, batch, ends), plain)


def test_errors_of_hidden_keys():
    model, batch = make_model("llava"), make_batch("llava", ONE)
    hidden, ends = [batch.visual] * LAYERS, [batch.ids.shape[1]]
    for bad, match in (
        (hidden[:3], "hidden: expected one for each of 4 layers, got 3"),
        (
            [*hidden[:3], batch.visual.int()],
            r"hidden: expected bool \[B, tokens\] or None, got torch.int32 \[1, 12\] for layer 3",
        ),
        ([[True], *hidden[:3]], "got list for layer 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=match), hide_keys(model, bad):
            pass
    with hide_keys(model, [None] * LAYERS), pytest.raises(ValueError, match="one whose keys are all visible"):
        with hide_keys(model, hidden):
            pass
    three = torch.ones(3, 4, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="hidden: expected 1 rows, or a divisor.* got 3"),
        hide_keys(model, [three] * LAYERS),
    ):
        run(model, batch, ends)
    with pytest.raises(ValueError, match="AttentionInterface hands out, got none in layer 0"), hide_keys(model, hidden):
        pass
    windows, prompts = make_family("gemma3"), make_prompts("gemma3", PROMPTS["one"])
    with pytest.raises(ValueError, match="cache: expected one that keeps all keys"), hide_keys(windows, hidden):
        windows.generate(**prompts, max_new_tokens=2)


# ---------------------------------------------------------------------------------------------- right, and wrong ones


@contextmanager
def layer_after(model, layer, **options):
    with withdraw(model, layer + 1, **options):
        yield SimpleNamespace(layer=layer)


@contextmanager
def one_key_kept(model, layer, *, visual_mask, **options):
    """Of each sequence with an image."""
    first = visual_mask & (visual_mask.cumsum(1) == 1)
    with withdraw(model, layer, visual_mask=visual_mask & ~first, **options) as handle:
        yield handle


@contextmanager
def positions_moved(model, layer, **options):
    """Rotary embeddings of a prompt are those of the token before, in the withdrawn layers."""

    def rolled(tables):
        if isinstance(tables, Tensor):  # complex
            return tables.roll(1, 1)
        return tuple(x.roll(1, -2) if x.shape[-2] > 1 else x for x in tables)

    def move(module, args, kwargs):
        tables = {name: rolled(x) for name, x in kwargs.items() if name.startswith("position_embeddings")}
        assert tables
        return args, kwargs | tables

    hooks = [x.register_forward_pre_hook(move, with_kwargs=True) for x in module.find_parts(model).layers[layer:]]
    try:
        with withdraw(model, layer, **options) as handle:
            yield handle
    finally:
        for hook in hooks:
            hook.remove()


MUTANTS = (layer_after, one_key_kept, positions_moved)


def check_model(model, inputs, layer, mutants, monkeypatch, **options):
    """The right one passes, and each of the mutants does not."""
    right = vtw.verify(model, inputs, layer, **options)
    assert right.rounding and right.conclusive, str(right)
    assert right.noise < right.effect
    for mutant in mutants:
        with monkeypatch.context() as patch:
            patch.setattr(module, "withdraw", mutant)
            wrong = vtw.verify(model, inputs, layer, **options)
        assert not wrong.rounding, f"{mutant.__name__}: {wrong}"
        assert "NOT the same" in str(wrong)


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", RECIPES)
def test_families(family, dtype, monkeypatch):
    """Padded prompts, with several images and with one. In bf16, rounding may hide the mutants."""
    if family == "lfm2_vl" and not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 gives it a cache of its own, which withdraw refuses")
    model = make_family(family).to(dtype)
    inputs = cast(make_prompts(family, PROMPTS["ragged"]), dtype)
    options = {"decode": 3, "visual_mask": inputs["input_ids"] == IMAGE}
    if dtype == torch.bfloat16:
        assert vtw.verify(model, inputs, 2, **options).rounding
        return
    has_tables = family not in ("blip-2", "instructblip")  # OPT's positions are added to its embeddings
    check_model(model, inputs, 2, MUTANTS if has_tables else MUTANTS[:2], monkeypatch, **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention(family, dtype, attention, monkeypatch, on_the_cpu):
    """In bf16 too, if the prompts need their images."""
    model = make_family_of(family, attention).to(dtype)
    inputs = cast(make_batch(family, RAGGED).inputs(), dtype)
    check_model(model, inputs, 1, MUTANTS[:1], monkeypatch)


def make_family_of(family: str, attention: str):
    model = make_model(family)
    model.model.language_model.config._attn_implementation = attention
    return model


TINY = dict(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=6,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.25,
    attn_implementation="eager",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("peculiarity", ["softcap", "sinks"])
def test_peculiar_attention(peculiarity, dtype, monkeypatch):
    """What the model's own attention does beside a softmax stays in the one with hidden keys."""
    torch.manual_seed(0)
    if peculiarity == "softcap":
        model = Gemma2ForCausalLM(Gemma2Config(**TINY, attn_logit_softcapping=0.5, query_pre_attn_scalar=8))
    else:
        model = GptOssForCausalLM(GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, 1.0)
    model = model.eval().to(dtype)
    ids = torch.randint(10, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2:8] = True
    check_model(model, {"input_ids": ids}, 1, MUTANTS[:2], monkeypatch, visual_mask=mask)


def test_what_is_reported():
    model, batch = make_model("llava"), make_batch("llava", RAGGED)
    model.generation_config.eos_token_id = list(range(10, 90))  # which would end the answer
    found = vtw.verify(model, batch.inputs(), layer=2, decode=5)
    tokens, visual = int(batch.mask.sum()), int(batch.visual.sum())
    assert (found.layer, found.num_layers, found.dtype) == (2, LAYERS, "float32")
    assert (found.tokens, found.visual_tokens) == (tokens, visual)
    assert (found.prefill_rows, found.decode_rows) == (tokens - visual, 5 * len(batch.ids))
    assert found.other_tokens == 0 and found.difference == max(found.prefill_difference, found.decode_difference) < 1e-4
    assert "before layer 2 of 4 against hidden keys, float32: the same but for rounding." in str(found)
    assert f"{tokens} tokens, {visual} of them visual" in str(found)
    assert vtw.verify(model, batch.inputs(), layer=2, decode=0).decode_rows == 0


@pytest.mark.parametrize("rows", [RAGGED, [[5], [9]]], ids=["nothing withdrawn", "no image"])
def test_what_shows_little(rows):
    """Both sides are the plain model."""
    model = make_model("llava")
    found = vtw.verify(model, make_batch("llava", rows).inputs(), LAYERS if rows is RAGGED else 2)
    assert found.rounding and not found.conclusive and "this shows little" in str(found)


def test_leaves_no_trace():
    """Training mode, attention, hooks and inputs are as before, whatever happens in between."""
    model, inputs = make_model("llava").train(), make_batch("llava", RAGGED).inputs() | {"labels": torch.zeros(3, 21)}
    model.model.vision_tower.eval()
    text = model.model.language_model
    model(**make_batch("llava", ONE).inputs())  # transformers has hooks of its own
    for layer in text.layers:
        layer.self_attn.attention_dropout = 0.5

    def state():
        hooks = [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules()]
        return (
            hooks,
            [x.training for x in model.modules()],
            text.config._attn_implementation,
            dict(model.config.to_dict()),
        )

    before, calls = state(), itertools.count()
    given = dict(inputs)
    assert vtw.verify(model, inputs, 2).rounding
    assert state() == before and all(inputs[name] is x for name, x in given.items()) and len(inputs) == len(given)
    forward = text.layers[3].forward
    for stop in (1, 12, 23, 34, 45, 59):

        def interrupted(*args, stop=stop, **kwargs):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        calls = itertools.count()
        text.layers[3].forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            vtw.verify(model, inputs, 2)
        del text.layers[3].forward
        assert state() == before and not module._hidden


def test_compiled_model():
    """Withdrawal runs compiled, hidden keys do not."""
    model, inputs, graphs = make_model("llava"), make_batch("llava", ONE).inputs(), CompileCounter()
    torch.compiler.reset()
    found = vtw.verify(torch.compile(model, backend=graphs), inputs, 2, decode=0)
    assert found.rounding and found.conclusive and graphs.frame_count > 0


def test_layers_elsewhere(tmp_path):
    """Some weights are on disk, and accelerate brings them when their layer runs."""
    model, inputs = make_model("qwen2_vl"), make_batch("qwen2_vl", RAGGED).inputs()
    names = {x: name for name, x in model.named_modules()}
    layers = model.model.language_model.layers
    places = {"": "cpu", names[layers[1]]: "disk", names[layers[2]]: "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert next(layers[2].parameters()).is_meta
    found = vtw.verify(model, inputs, 2)
    assert found.rounding and found.conclusive


def test_attention_unlike_the_eager_one():
    """No verdict on withdrawal where the two sides do not compute the same to begin with."""

    def twice(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=2 * scaling, **kwargs)

    AttentionInterface.register("twice", twice)
    AttentionMaskInterface.register("twice", sdpa_mask)
    model = make_family_of("llava", "twice")
    with pytest.raises(
        ValueError, match="^model: expected attention 'twice' that computes what LlamaModel does with eager"
    ):
        vtw.verify(model, make_batch("llava", RAGGED).inputs(), 2)


def test_errors():
    model, inputs = make_model("llava"), make_batch("llava", RAGGED).inputs()
    for layer, options, error, match in (
        (2, {"decode": -1}, ValueError, "decode: expected a number of steps, 0 or more, got -1"),
        (2, {"decode": True}, ValueError, "decode: expected .* got True"),
        (5, {}, ValueError, r"layer: expected 1\.\.4 .* got 5"),
        ([1, 2], {}, TypeError, r"layer: expected one, got \[1, 2\]"),
    ):
        with pytest.raises(error, match=match):
            vtw.verify(model, inputs, layer, **options)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected \[B, S\], 0 for padding, got shape \[3, 1, 21, 21\]"
    ):
        vtw.verify(model, inputs | {"attention_mask": torch.ones(3, 1, 21, 21)}, 2)
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match=r"got one with withdraw\(layer=2\) in effect"):
        vtw.verify(model, inputs, 2)


# ------------------------------------------------------------------------------------------------- vtw-kernels check


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_check(wide, capsys):
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr().out
    for op in vtw.backend_info()["ops"]:
        assert op in printed
    for text in (
        torch.__version__,
        "transformers",
        "The demo's model on cpu",
        "float32: the same",
        "bfloat16: the same",
    ):
        assert text in printed
    assert "FAILED" not in printed and printed.strip().endswith("All is as it should be.")
    if not torch.cuda.is_available():
        assert "no GPU: torch sees none" in printed


def test_check_has_a_case_for_every_op():
    assert {case.op for case in check.cases()} == set(vtw.backend_info()["ops"])


def wrong(function, how):
    """The op, but for one number of what it gives."""

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        tensors = [
            x for x in torch.utils._pytree.tree_flatten((result, args[0]))[0] if isinstance(x, Tensor) and x.numel()
        ]
        how(tensors)
        return result

    return call


@pytest.mark.parametrize("op", sorted(vtw.backend_info()["ops"]))
def test_check_finds_a_wrong_op(op, wide, capsys, monkeypatch):
    """One number that is off, NaN, or an exception, in the op as it is dispatched."""

    def off(tensors):
        x = tensors[0].view(-1) if tensors[0].is_contiguous() else tensors[0].reshape(-1)
        x[x.numel() // 2] = ~x[x.numel() // 2] if x.dtype == torch.bool else x[x.numel() // 2] * 1.1 + 1

    def nan(tensors):
        tensors[0].view(-1)[0] = torch.nan if tensors[0].is_floating_point() else 77

    def fails(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(check, "verify_demo", lambda gpus: [])
    monkeypatch.setattr(check, "cases", lambda cases=tuple(check.cases()): [case for case in cases if case.op == op])
    original = check.function_of
    assert cli.main(["check"]) == 0
    for how in (off, nan, fails):
        monkeypatch.setattr(
            check, "function_of", lambda name, backend, device: wrong(original(name, backend, device), how)
        )
        capsys.readouterr()
        assert cli.main(["check"]) == 1
        printed = capsys.readouterr().out
        assert "FAILED" in printed and "Not all is as it should be" in printed
        assert how is not fails or "RuntimeError: no kernel image" in printed


def test_check_finds_all_kernels_of_triton(monkeypatch):
    """Beside CUDA's: each op that has kernels of its own has one in Triton."""
    ops = vtw.backend_info()["ops"]
    monkeypatch.setattr(check, "backend_info", lambda: {"ops": {op: {"cuda": "cuda"} for op in ops}})
    own = [op for op in ops if op not in KERNEL_OF]
    assert [op for op in own if check.function_of(op, "triton", torch.device("cuda")) is None] == []


def test_check_finds_wrong_withdrawal(wide, capsys, monkeypatch):
    monkeypatch.setattr(check, "cases", lambda cases=tuple(check.cases()): cases[:1])
    monkeypatch.setattr(module, "withdraw", layer_after)
    assert cli.main(["check"]) == 1
    assert "NOT the same: more than rounding" in capsys.readouterr().out


def test_check_of_a_model(tmp_path, wide, capsys, monkeypatch):
    make_model("llava").save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    Image.effect_noise((16, 12), 90).save(tmp_path / "photo.png")
    monkeypatch.setattr(check, "cases", lambda cases=tuple(check.cases()): cases[:1])
    model, image = ["--model", str(tmp_path / "model")], ["--image", str(tmp_path / "photo.png")]
    assert cli.main(["check", *model, *image]) == 0
    assert "before layer 2 of 4 against hidden keys, float32: the same" in capsys.readouterr().out
    assert cli.main(["check", *model, *image, "--layer", "3", "--prompt", "w20 w21", "--dtype", "bfloat16"]) == 0
    assert "before layer 3 of 4 against hidden keys, bfloat16" in capsys.readouterr().out
    for arguments, match in (
        (model, "expected --model and --image together"),
        (image, "expected --model and --image together"),
        ([*model, *image, "--layer", "9"], "layer: expected 1..4"),
        ([*model, "--image", "nowhere.png"], "nowhere.png"),
    ):
        assert cli.main(["check", *arguments]) == 1
        assert match in capsys.readouterr().err
