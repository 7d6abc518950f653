"""Withdrawal where images come in by cross-attention, against the same model with closed gates: what passes through
them is multiplied by tanh(0) = 0."""

import dataclasses
import json
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import transformers
from command_records import make_processor
from cross_attention_zoo import FAMILIES, LOOKING, make_model, make_prompts
from PIL import Image
from tokenizers import Tokenizer
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, MllamaForCausalLM, MllamaProcessor, PreTrainedTokenizerFast, StaticCache
from transformers.cache_utils import StaticLayer
from vlm import TRANSFORMERS_5, VOCABULARY, older_than

import vtw_kernels as vtw
from vtw_kernels import check
from vtw_kernels.cli import main
from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.verify import without_effect
from vtw_kernels.layer_search import scorer
from vtw_kernels.layer_search.attention import attention_mass
from vtw_kernels.layer_search.costs import measure_costs

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE, STEPS = 1e-4, 9  # the prompt's last row, and eight tokens decoded
ROWS = [(6, 2), (9, 3), (7, 7)]  # the last one sees no image


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@contextmanager
def gates_closed(model, layer: int):
    """Of Mllama's layers, with their MLPs; in Idefics, whose MLPs run for text as well, those behind attention."""
    names = ("cross_attn_attn_gate", "cross_attn_mlp_gate", "alpha_cross_attn")
    looks = find_parts(model).cross_attention
    gates = [getattr(x.block, name) for i, x in looks.items() if i >= layer for name in names if hasattr(x.block, name)]
    before = [x.detach().clone() for x in gates]
    with torch.no_grad():
        for x in gates:
            x.zero_()
        yield
        for x, value in zip(gates, before):
            x.copy_(value)


@torch.no_grad()
def outputs(model, inputs, **options):
    """Logits of the prompt's tokens, and of decoding, always the same ones: ``[tokens + STEPS, rows, V]``."""
    answer = iter(
        torch.randint(10, VOCABULARY, (STEPS, len(inputs["input_ids"]), 1), generator=torch.Generator().manual_seed(1))
    )

    def say_next(ids, scores):
        return torch.full_like(scores, -torch.inf).scatter_(1, next(answer), 0.0)

    prompt = model(**inputs, use_cache=False).logits.transpose(0, 1)
    prompt = prompt * inputs["attention_mask"].T[..., None]  # what stands in padding means nothing
    generated = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        logits_processor=[say_next],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.cat([prompt, torch.stack(generated.logits)]), generated.past_key_values


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_equals_closed_gates(family, attention, layer):
    model, inputs = make_model(family, attention), make_prompts(family, ROWS)
    plain, _ = outputs(model, inputs)
    with gates_closed(model, layer):
        wanted, _ = outputs(model, inputs)
    assert (plain - wanted).abs().amax((0, 2))[:2].min() >= 1000 * TOLERANCE, "nothing to see"
    caches = [{}, {"use_cache": False}]
    if not older_than("5.24") or family == "idefics":
        caches.append({"cache_implementation": "static"})
    for options in caches:
        with vtw.withdraw(model, layer):
            given, _ = outputs(model, inputs, **options)
        assert (given - wanted).abs().max() <= TOLERANCE, options
    assert torch.equal(outputs(model, inputs)[0], plain)


def test_beams(family):
    model, inputs = make_model(family), make_prompts(family, ROWS)
    options = dict(num_beams=3, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    plain = model.generate(**inputs, **options)
    with gates_closed(model, 3):
        wanted = model.generate(**inputs, **options)
    with vtw.withdraw(model, 3):
        given = model.generate(**inputs, **options)
    assert torch.equal(given.sequences, wanted.sequences) and not torch.equal(plain.sequences, wanted.sequences)
    assert (torch.stack(given.logits) - torch.stack(wanted.logits)).abs().max() <= TOLERANCE


def test_nothing_is_projected_or_cached(family):
    """Nor does the rest of a layer of Mllama's run, but in Idefics the MLP does."""
    model, inputs, ran = make_model(family), make_prompts(family, ROWS), []
    looks = find_parts(model).cross_attention
    for i, x in looks.items():
        attention = x.block.cross_attn
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, x.block.mlp):
            module.register_forward_hook(lambda module, args, output, i=i: ran.append((i, module)))
    with vtw.withdraw(model, 3):
        _, cache = outputs(model, inputs)
    later = [i for i in LOOKING[family] if i >= 3]
    assert {i for i, _ in ran} == set(LOOKING[family] if family == "idefics" else LOOKING[family][:1])
    assert {module for i, module in ran if i in later} == {looks[i].block.mlp for i in later if family == "idefics"}
    if family == "mllama":
        assert [i for i, x in enumerate(cache.layers) if x.keys is None] == later
        assert cache.layers[1].keys.shape[2] == 2 * 2 * 5  # images, tiles, patches and a class


def test_as_text_alone():
    """Without any of its cross-attention, Mllama is as for a prompt without images. Idefics has some in front of layer
    0; there a row that sees no image is as it is in the plain model."""
    model, inputs = make_model("mllama"), make_prompts("mllama", ROWS)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    wanted, _ = outputs(model, text)
    with vtw.withdraw(model, 1):
        assert torch.equal(outputs(model, inputs)[0], wanted)
        assert torch.equal(outputs(model, text)[0], wanted)
    model, inputs = make_model("idefics"), make_prompts("idefics", ROWS)
    plain, _ = outputs(model, inputs)
    with vtw.withdraw(model, 1):
        assert torch.equal(outputs(model, inputs)[0][:, 2], plain[:, 2])


def test_text_model_alone():
    """It is given the states of images."""
    torch.manual_seed(0)
    model = MllamaForCausalLM(make_model("mllama").config.text_config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(0, 0.25)
        inputs = {"input_ids": torch.arange(10, 17)[None], "cross_attention_states": torch.randn(1, 5, 32)}
        with gates_closed(model, 3):
            wanted = model(**inputs).logits
        with vtw.withdraw(model, 3):
            given = model(**inputs).logits
        assert (given - wanted).abs().max() <= TOLERANCE < (model(**inputs).logits - wanted).abs().max()


def split(family: str, inputs: dict, begin: int, end: int, image: slice) -> dict:
    """What a turn, or a chunk, is called with, on a cache of what came before. ``image``: those that are new to Mllama,
    which has cached the others; Idefics is always given all."""
    name = "cross_attention_mask" if family == "mllama" else "image_attention_mask"
    turn = {name: inputs[name][:, begin:end], "attention_mask": inputs["attention_mask"][:, :end]}
    turn["input_ids"] = inputs["input_ids"][:, begin:end]
    pixels = {x: inputs[x] for x in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask") if x in inputs}
    if family == "mllama":
        seen = (
            slice(0, end) if TRANSFORMERS_5 else slice(begin, end)
        )  # of tokens before, the model leaves out the masks
        turn[name] = inputs[name][:, seen, : image.stop]  # of images cached and those new
        pixels = {x: y[:, image] for x, y in pixels.items()}
    return turn | (pixels if image.start < image.stop or family == "idefics" else {})


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_turns_and_chunks(family, static):
    """A chunk that ends within the text, a turn of text alone, and one with another image."""
    if static and family == "mllama":
        pytest.skip("its static caches have room for the image states of one forward")
    model, inputs = make_model(family), make_prompts(family, [(18, 2), (18, 9)])
    ends = [
        (5, slice(0, 1)),
        (8, slice(1, 1)),
        (12, slice(1, 2)),
        (16, slice(2, 2)),
        (17, slice(2, 2)),
        (18, slice(2, 2)),
    ]

    @torch.no_grad()
    def turns():
        cache = DynamicCache(config=model.config.get_text_config())
        if static:
            cache = StaticCache(config=model.config, max_cache_len=20)
        begin, logits = 0, []
        for end, image in ends:
            turn = split(family, inputs, begin, end, image)
            logits.append(model(**turn, past_key_values=cache).logits)
            begin = end
        return torch.cat(logits, dim=1)

    plain = turns()
    with gates_closed(model, 3):
        wanted = turns()
    with vtw.withdraw(model, 3):
        given = turns()
    assert (given - wanted).abs().max() <= TOLERANCE
    assert (plain - wanted).abs().max() >= 1000 * TOLERANCE


def test_caches_of_others(family):
    """A cache belongs to its layer; an empty one, and one that has been reset, to none."""
    model, inputs = make_model(family), make_prompts(family, ROWS)
    longer = make_prompts(family, [(length + 2, first) for length, first in ROWS])
    later, last = (split(family, longer, begin, begin + 1, slice(2, 2)) for begin in (9, 10))
    with torch.no_grad():
        plain = model(**inputs, use_cache=True).past_key_values
        with vtw.withdraw(model, 3):
            made = model(**inputs, use_cache=True).past_key_values
            wanted = model(**later, past_key_values=made).logits
            with pytest.raises(
                ValueError, match=r"filled under withdraw\(layer=3\) or an empty one, got one filled without"
            ):
                model(**later, past_key_values=plain)
        with (
            vtw.withdraw(model, 4),
            pytest.raises(ValueError, match=r"layer=4\) or an empty .* under withdraw\(layer=3\)$"),
        ):
            model(**last, past_key_values=made)
        with pytest.raises(ValueError, match=r"was filled under withdraw\(layer=3\) and can only be used there"):
            model(**last, past_key_values=made)
        if older_than("5.23"):
            return  # a dynamic cache that is reset keeps its length
        made.reset()
        for layer in (4, None, 3):
            with vtw.withdraw(model, layer) if layer else nullcontext():
                model(**inputs, past_key_values=made)
                if layer == 3:
                    assert torch.equal(model(**later, past_key_values=deepcopy(made)).logits, wanted)
            made.reset()


def test_arguments(family):
    model, inputs = make_model(family), make_prompts(family, ROWS)
    seen = torch.zeros_like(inputs["input_ids"]).bool()
    for policy in (vtw.TopAttention(3, 0.5), [vtw.RandomVisual(2, 3), vtw.RandomVisual(3, 1)]):
        with pytest.raises(
            ValueError, match="^layer: expected an int, .* by cross-attention, not as tokens.* got .*keep="
        ):
            vtw.apply(model, policy)
    with pytest.raises(
        ValueError, match="^visual_mask: expected None, as images come in by cross-attention in .*Model"
    ):
        vtw.apply(model, 3, visual_mask=seen)
    for function in (lambda x: vtw.verify(model, x, 3), lambda x: vtw.find_layer(model, [x], progress=False)):
        with pytest.raises(ValueError, match="^visual_mask: expected None"):
            function(inputs | {"visual_mask": seen})
    for layer in (0, 5, 7):
        with pytest.raises(
            ValueError, match=rf"^layer: expected 1\.\.4 or 6 \(6 .*got {layer}; .* the layers after 4$"
        ):
            vtw.apply(model, layer)
    vtw.apply(model, vtw.Withdraw(6)).remove()
    looks = find_parts(model).cross_attention[4]
    with (
        vtw.withdraw(model, vtw.Withdraw(3)),
        pytest.raises(RuntimeError, match="of decoder layer 4 to run within a forward"),
    ):
        looks.looking(torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="draw from in training|is not in training mode"), vtw.withdraw(model, [3, 4]):
        model(**inputs)


def test_info(family, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = make_model(family).config
    config.architectures = [type(make_model(family)).__name__]
    config.save_pretrained(tmp_path)
    assert main(["info", "--model", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in (
        f"none: images come in by cross-attention, in layers {', '.join(map(str, LOOKING[family]))}",
        "1..4 or 6 (6 withdraws nothing); images come in by cross-attention, in none of the layers after 4",
    ):
        assert text in printed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family, checkpointing):
    """Each forward draws its layer, and a layer that is computed anew in the backward pass has its own. What is left
    out has no gradient."""
    model, inputs = make_model(family), make_prompts(family, ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    looks = find_parts(model).cross_attention
    for x in model.parameters():  # of Idefics, some are frozen
        x.requires_grad_(True)
    model.train()

    def gradients():
        losses = [model(**inputs, labels=labels, use_cache=False).loss for _ in range(4)]
        grads = []
        for loss in losses:  # only when all have been drawn
            model.zero_grad()
            loss.backward()
            grads.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
        return losses, grads

    wanted = {}
    for layer in (2, 4):
        with vtw.withdraw(model, layer):
            losses, grads = gradients()
        wanted[losses[0].item()] = grads[0]
        with gates_closed(model, layer):
            assert (model(**inputs, labels=labels, use_cache=False).loss - losses[0]).abs() <= TOLERANCE
        moved = [i for i, x in looks.items() if any(x.block.cross_attn.k_proj.weight is p for n, p in
                 model.named_parameters() if n in grads[0])]  # fmt: skip
        assert moved == [i for i in LOOKING[family] if i < layer]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    with vtw.withdraw(model, [2, 4]):
        losses, grads = gradients()
    assert len({x.item() for x in losses}) == 2
    for loss, given in zip(losses, grads):
        value, expected = min(wanted.items(), key=lambda item: abs(item[0] - loss.item()))
        assert abs(value - loss.item()) <= TOLERANCE and given.keys() == expected.keys()
        assert max((given[name] - x).abs().max() for name, x in expected.items()) <= TOLERANCE


@pytest.mark.skipif(
    older_than("5.24"), reason="before, Mllama has no static cache, nor a step of decoding in one graph"
)
def test_compiled():
    """A model that is compiled before; steps of decoding with a static cache are one graph, compiled once."""
    torch.compiler.reset()
    model, inputs = make_model("mllama"), make_prompts("mllama", [(9, 2), (9, 3)])
    prompt = split("mllama", inputs, 0, 5, slice(0, 2))
    steps = [{name: inputs[name][:, [i]] for name in ("input_ids", "cross_attention_mask")} for i in range(5, 9)]

    def make_cache():
        cache = StaticCache(config=model.config, max_cache_len=12)
        for i in LOOKING["mllama"]:
            cache.layers[i] = StaticLayer(max_cache_len=2 * 2 * 5)  # images, tiles, patches and a class
        return cache

    def run(prefill, decode):
        cache = make_cache()
        logits = [prefill(**prompt, cache=cache).logits]
        return torch.cat(logits + [decode(**step, cache=cache).logits for step in steps], dim=1)

    counter = CompileCounter()
    with torch.no_grad():
        with gates_closed(model, 3):
            wanted = run(model, model)
        decode = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        plain = run(model, decode)
        with vtw.withdraw(model, 3):
            frames = counter.frame_count
            given = run(model, decode)
            assert counter.frame_count == frames + 1
    assert (given - wanted).abs().max() <= TOLERANCE < (plain - wanted).abs().max()


# ------------------------------------------------------------------------------------------------------------ verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify(family, dtype, monkeypatch):
    model, inputs = make_model(family).to(dtype), make_prompts(family, ROWS)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    right = vtw.verify(model, inputs, 3)
    if dtype == torch.bfloat16:  # where rounding may hide what images do
        assert right.rounding
        return
    assert right.rounding and right.conclusive and right.visual_tokens == 0 and right.tokens == 22, str(right)
    assert "22 tokens, images by cross-attention; compared" in str(right)

    @contextmanager
    def later(model, layer, **options):
        with vtw.withdraw(model, 6, **options):
            yield SimpleNamespace(layer=layer)

    monkeypatch.setattr(import_module("vtw_kernels.integration.verify"), "withdraw", later)
    assert not vtw.verify(model, inputs, 3).rounding


def test_without_effect_is_closed_gates(family):
    model, inputs = make_model(family), make_prompts(family, ROWS)
    plain, _ = outputs(model, inputs)
    with gates_closed(model, 3):
        wanted, _ = outputs(model, inputs)
    looks = find_parts(model).cross_attention
    with pytest.raises(KeyError), without_effect([x.looking for i, x in looks.items() if i >= 3]):
        given, cache = outputs(model, inputs)
        raise KeyError
    assert (given - wanted).abs().max() <= TOLERANCE
    assert all(x.keys is not None for x in cache.layers)  # it knows nothing of what withdrawal leaves out
    assert torch.equal(outputs(model, inputs)[0], plain)


# ------------------------------------------------------------------------------------------------------------ search


def brute_force(model, inputs, layer: int):
    """KL(withdrawn‖full) of the last tokens in fp64."""
    last = (inputs["attention_mask"] * torch.arange(inputs["input_ids"].shape[1])).argmax(1)
    with torch.no_grad(), gates_closed(model, layer):
        withdrawn = model(**inputs).logits[torch.arange(len(last)), last].double().log_softmax(-1)
    with torch.no_grad():
        full = model(**inputs).logits[torch.arange(len(last)), last].double().log_softmax(-1)
    return (withdrawn.exp() * (withdrawn - full)).sum(-1)


@pytest.mark.filterwarnings("ignore:No layer of")
@pytest.mark.parametrize("pad", ["left", "right"])
def test_search(family, pad, monkeypatch):
    """One pass with candidates side by side, and in groups, against gates closed for each; and without logits."""
    model, inputs = make_model(family), make_prompts(family, [(6, 2), (9, 3), (8, 0)], pad)
    for in_flight in (None, 2):
        search = vtw.find_layer(model, [inputs], progress=False, max_candidates_in_flight=in_flight)
        assert search.candidates == [1, 2, 3, 4]
        wanted = torch.stack([brute_force(model, inputs, layer) for layer in search.candidates], dim=1)
        assert wanted.min() > 1e-3
        torch.testing.assert_close(search.per_sample.double(), wanted, atol=1e-5, rtol=0)
    monkeypatch.setattr(scorer, "MEMORY_SHARE", 1e18)
    chosen = vtw.find_layer(model, [inputs], progress=False, candidates=[2, 4], threshold=1e3)
    torch.testing.assert_close(chosen.per_sample, search.per_sample[:, [1, 3]], atol=1e-5, rtol=0)
    assert chosen.layer == 2


@pytest.mark.filterwarnings("ignore:No layer of")
def test_search_over_answers(family):
    """The model's own ones, of which each token sees what the end of the question did; one run of the vision tower."""
    model, inputs = make_model(family), make_prompts(family, [(6, 2), (9, 3)], pad="right")
    ran = []
    search = vtw.find_layer(model, [inputs], positions=3, progress=False)
    hook = model.model.vision_model.register_forward_hook(lambda *_: ran.append(1))
    last = vtw.find_layer(model, [inputs], progress=False)
    hook.remove()
    assert len(ran) == 1
    for row, (length, _) in enumerate([(6, 2), (9, 3)]):
        alone = {name: x[row : row + 1] for name, x in inputs.items()}
        alone = {name: x[:, :length] if "mask" in name and "ratio" not in name or name == "input_ids" else x
                 for name, x in alone.items()}  # fmt: skip
        options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
        full = model.generate(**alone, **options)
        for column, layer in enumerate(search.candidates):
            answer = iter(full.sequences[:, length:, None].unbind(1))

            def say_next(ids, scores, answer=answer):
                return torch.full_like(scores, -torch.inf).scatter_(1, next(answer), 0.0)

            with gates_closed(model, layer):
                withdrawn = model.generate(**alone, **options, logits_processor=[say_next])
            q, p = (torch.stack(x.logits)[:, 0].double().log_softmax(-1) for x in (full, withdrawn))
            kl = (p.exp() * (p - q)).sum(-1)
            assert abs(kl.mean() - search.per_sample[row, column]) <= 1e-5
            assert abs(kl[0] - last.per_sample[row, column]) <= 1e-5


def test_search_of_what(family):
    model, inputs = make_model(family), make_prompts(family, ROWS)
    with pytest.raises(ValueError, match="^batches: expected an image in each sample, got none in row 2"):
        vtw.find_layer(model, [inputs], progress=False)
    with pytest.raises(ValueError, match=r"^candidates: expected layers in 1\.\.4, got \[5\]; images come in by"):
        vtw.find_layer(model, [inputs], candidates=[5], progress=False)
    with pytest.raises(
        ValueError, match="^model: expected images as tokens, .* whose images come in by cross-attention"
    ):
        attention_mass(model, inputs)
    with pytest.raises(ValueError, match="^model: expected images as tokens, of which policies .* find_layer compares"):
        vtw.compare(model, [inputs], [3], progress=False)


def test_what_is_saved(family, tmp_path):
    model, inputs = make_model(family), make_prompts(family, [(9, 3)])
    search = vtw.find_layer(model, [inputs], progress=False, threshold=1e3)
    assert search.image_layers == LOOKING[family]
    share = [sum(i >= layer for i in LOOKING[family]) / 3 for layer in (1, 2, 3, 4)]
    torch.testing.assert_close(search.saving, torch.tensor(share))
    costs = measure_costs(model, inputs, search.candidates, repeats=1)
    assert (costs.tokens, costs.visual_tokens, costs.layers) == (9, 0, [1, 2, 3, 4, 6])
    # Of each module that looks at images: query and output, keys and values, attention; of Mllama's layers, the MLP.
    images, queries, keys = {"mllama": (1 * 2 * 5, 32, 16), "idefics": (1 * 5, 32, 32)}[family]
    states = {"mllama": 32, "idefics": 16}[family]
    one = 2 * 9 * 32 * queries * 2 + 2 * images * states * keys * 2 + 2 * 2 * 9 * images * 32
    one += 2 * 9 * 32 * 64 * 3 if family == "mllama" else 0
    assert [costs.flops[-1] - x for x in costs.flops] == [round(x * 3) * one for x in share] + [0]
    cached = 2 * images * keys * 4 if family == "mllama" else 0
    assert [costs.kv_bytes[-1] - x for x in costs.kv_bytes] == [round(x * 3) * cached for x in share] + [0]
    search = dataclasses.replace(search, costs=costs)
    search.save(tmp_path / "search.json")
    assert vtw.LayerSearch.load(tmp_path / "search.json").image_layers == LOOKING[family]
    search.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "layers that look at images" in page and "Of one prefill of 9 tokens. Time" in page
    assert "image layers saved" in search.table()
    with vtw.withdraw(model, tmp_path / "search.json") as handle:
        assert handle.layer == 1


def test_records(tmp_path, capsys, monkeypatch):
    """What Mllama's processor makes of records goes through ``check`` and ``search``."""
    names = ("MllamaImageProcessorPil", "MllamaImageProcessor")
    make_images = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    images = make_images(size={"height": 8, "width": 8}, max_image_tiles=2)
    llava, mllama = make_processor(), tmp_path / "model"
    words = Tokenizer.from_str(llava.tokenizer.backend_tokenizer.to_str().replace("<image>", "<|image|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    template = llava.chat_template.replace("<image>", "<|image|>")
    MllamaProcessor(images, tokenizer, chat_template=template).save_pretrained(mllama)
    make_model("mllama").save_pretrained(mllama)
    Image.new("RGB", (12, 16), (200, 90, 10)).save(tmp_path / "photo.png")
    records = [json.dumps({"image": "photo.png", "question": f"w{20 + i} w31 w42"}) for i in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(records))

    monkeypatch.setattr(check, "print_ops", lambda *_: True)
    options = ["--image", str(tmp_path / "photo.png"), "--layer", "3", "--prompt", "w50 w60"]
    assert main(["check", "--model", str(mllama), *options]) == 0
    assert "the same but for rounding" in (printed := capsys.readouterr().out)
    assert "tokens, images by cross-attention; compared" in printed
    options = ["--threshold", "100", "--positions", "2", "--report", str(tmp_path / "report.html"), "--quiet"]
    files = ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out.json")]
    assert main(["search", "--model", str(mllama), *files, *options]) == 0
    search = vtw.LayerSearch.load(tmp_path / "out.json")
    assert search.layer == 1 and search.image_layers == LOOKING["mllama"] and search.attention is None
    assert "layers that look at images" in (tmp_path / "report.html").read_text()
