"""Withdrawal in each family of models against the plain model that hides visual keys (oracle.py)."""

import pytest
import torch
from families_zoo import (
    IMAGE,
    LAYERS,
    RECIPES,
    SLIDING,
    TEXT,
    VOCABULARY,
    WINDOW,
    make_config,
    make_model,
    make_prompts,
)
from oracle import visual_keys_hidden
from test_layer_search import naive_kl
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from vlm import TRANSFORMERS_5, older_than

import vtw_kernels as vtw
from vtw_kernels.cli import main
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.layer_search import scorer

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
STEPS = 6  # the prompt's last row, and five tokens decoded
PROMPTS = {"one": [[3, 4, 5]], "ragged": [[2, 4, 3, 4, 4], [5, 4, 1]]}  # by turns text and images; padded on the left
ATTENTION, CACHES = ("eager", "sdpa"), ("dynamic", "static")
past_recording = pytest.mark.skipif(
    not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"),
    reason="this transformers cannot crop a sliding window that has moved",
)
SHARED = dict(num_hidden_layers=6, layer_types=SLIDING + SLIDING[:2], num_kv_shared_layers=2)


def logits(model, inputs: dict, **options) -> torch.Tensor:
    """[STEPS, B, V] of ``generate``, which is made to say the same tokens whatever the logits are."""
    generator = torch.Generator().manual_seed(1)
    answer = iter(torch.randint(10, VOCABULARY, (STEPS, len(inputs["input_ids"]), 1), generator=generator))

    def say_next(ids, scores):
        return torch.full_like(scores, -torch.inf).scatter_(1, next(answer), 0.0)

    output = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        logits_processor=[say_next],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(output.logits)


def caches_of(family: str) -> tuple[str, ...]:
    """With a static cache, 4.57 makes PaliGemma's prompts causal, and 5.22 gives Gemma 4 and Molmo 2 other logits."""
    wrong = {"paligemma": "5", "gemma4": "5.23", "molmo2": "5.23"}
    return ("dynamic",) if family in wrong and older_than(wrong[family]) else CACHES


def full_cache(model) -> DynamicCache:
    """Nothing is evicted from it: windows are the mask's alone."""
    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if getattr(x, "is_sliding", False) else x for x in cache.layers]
    return cache


def assert_equal_to_oracle(model, layer: int, family: str, masked: bool = False) -> None:
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, rows in PROMPTS.items():
        inputs = make_prompts(family, rows)
        visual = inputs["input_ids"] == IMAGE
        with visual_keys_hidden(model, num_layers, visual):
            unhidden = logits(model, inputs, past_key_values=full_cache(model))
        with visual_keys_hidden(model, layer, visual):
            wanted = logits(model, inputs, past_key_values=full_cache(model))
        for attention in ATTENTION:
            model.config.get_text_config(decoder=True)._attn_implementation = attention
            plain = logits(model, inputs)
            assert (plain - unhidden).abs().max() <= TOLERANCE, "the oracle is not this model"
            assert (plain - wanted).abs().amax((0, 2)).min() >= 10 * TOLERANCE, "nothing to see"
            for cache in caches_of(family):
                with vtw.withdraw(model, layer, visual_mask=visual if masked else None):
                    given = logits(model, inputs, cache_implementation=cache)
                error = (given - wanted).abs().max()
                assert error <= TOLERANCE, f"{name}, {attention}, {cache}: off by {error}"


@pytest.mark.parametrize("family", RECIPES)
def test_generate(family):
    model = make_model(family)
    if family == "lfm2_vl" and not TRANSFORMERS_5:
        with vtw.withdraw(model, 2), pytest.raises(TypeError, match="expected a Cache.*, got Lfm2HybridConvCache"):
            logits(model, make_prompts(family, PROMPTS["one"]))
        return
    assert_equal_to_oracle(model, 2, family, RECIPES[family].masked)


# ------------------------------------------------------------------------------------ sliding windows, shared layers


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", ["gemma3", "llama4"])
@pytest.mark.parametrize("order", [1, -1])
def test_windows_on_either_side(family, layer, order):
    """The layer that masks are made for is one that keeps the visual tokens, or one that does not."""
    types = RECIPES[family].text["layer_types"][::order]
    assert_equal_to_oracle(make_model(family, layer_types=types), layer, family)


@pytest.mark.parametrize("layer", [1, 3])
def test_windows_alone(layer):
    model = make_model("aya_vision", layer_types=["sliding_attention"] * LAYERS)
    assert_equal_to_oracle(model, layer, "aya_vision")


@pytest.mark.parametrize("family", ["aya_vision", "llama4"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ATTENTION)
def test_turns_with_windows(family, cache, attention):
    """New images when windows have moved, in forwards that are shorter and longer than a window."""
    model = make_model(family)
    model.set_attn_implementation(attention)
    ids = make_prompts(family, [[2, 4, 3, 4, 1, 4, 9, 4, 5], [11, 4, 1, 4, 7, 4, 5]])["input_ids"]
    ends = [7, 8, 9, 21, 22, 23, 27, 32, 33, 34, 35, 36]

    @torch.no_grad()
    def turns(cache):
        outputs, begin = [], 0
        for end in ends:
            mask = (ids[:, :end] != 0).long()
            outputs.append(model(input_ids=ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits)
            begin = end
        return torch.cat(outputs, dim=1)

    def make_cache():
        if cache == "static":
            return StaticCache(config=model.config, max_cache_len=ids.shape[1] + 3)
        return DynamicCache(config=model.config)

    visual = ids == IMAGE
    with visual_keys_hidden(model, 2, visual):
        wanted = turns(full_cache(model))
    with vtw.withdraw(model, 2, visual_mask=visual):
        given = turns(make_cache())
    rows = ~visual & (ids != 0)
    assert (turns(make_cache()) - wanted)[rows].abs().max() >= 1000 * TOLERANCE
    assert (given - wanted)[rows].abs().max() <= TOLERANCE


def test_windows_hold_no_more_than_themselves():
    model, inputs = make_model("gemma3"), make_prompts("gemma3", PROMPTS["ragged"])
    with vtw.withdraw(model, 2):
        cache = model.generate(**inputs, max_new_tokens=STEPS, return_dict_in_generate=True).past_key_values
    tokens = inputs["input_ids"].shape[1] + STEPS - 1
    kept = (inputs["input_ids"].ne(IMAGE) & inputs["attention_mask"].bool()).sum(1).max() + STEPS - 1
    assert [x.keys.shape[-2] for x in cache.layers] == [WINDOW - 1, tokens, WINDOW - 1, kept]
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [tokens] * LAYERS


@past_recording
def test_assisted_decoding_with_windows():
    """Tokens are cropped from windows that have moved."""
    model, inputs = make_model("aya_vision"), make_prompts("aya_vision", PROMPTS["one"])
    options = dict(max_new_tokens=30, do_sample=False, suppress_tokens=[IMAGE])
    with vtw.withdraw(model, 2):
        wanted = model.generate(**inputs, **options)
        given = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(given, wanted)


@past_recording
def test_crop_of_an_image_with_windows():
    """A turn with an image is taken back, and another one follows."""
    model, kept = make_model("aya_vision", layer_types=SLIDING[::-1]), 12
    first = make_prompts("aya_vision", [[3, 4, 8, 4, 2]])["input_ids"]
    second = torch.where(torch.arange(first.shape[1]) < kept, first, first.flip(1).where(first.flip(1) != IMAGE, 50))

    @torch.no_grad()
    def run(ids, cache, begin):
        with vtw.withdraw(model, 1, visual_mask=ids == IMAGE):
            ends = [kept, 18, *range(19, ids.shape[1] + 1)] if begin == 0 else [18, *range(19, ids.shape[1] + 1)]
            for end in ends:
                logits = model(input_ids=ids[:, begin:end], past_key_values=cache).logits
                cache.crop(0)
                begin = end
        return logits

    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        cache.activate_past_recording()
    wanted = run(second, caches[0], 0)
    with vtw.withdraw(model, 1, visual_mask=first == IMAGE), torch.no_grad():
        model(input_ids=first[:, :kept], past_key_values=caches[1])
        caches[1].crop(0)
        model(input_ids=first[:, kept:], past_key_values=caches[1])
        caches[1].crop(kept - first.shape[1])
    assert (run(second, caches[1], kept) - wanted).abs().max() <= TOLERANCE
    for cache in caches:
        with pytest.raises(ValueError, match="^crop: expected at least slot .* in the window, got"):
            cache.crop(-6)


def test_padding_in_the_mask_of_a_window():
    """Token 4 of 7 is padding; with a window of 3, the first column is token 2."""
    query, key = torch.arange(4, 7)[:, None], torch.arange(2, 7)
    mask = (key <= query) & (key > query - 3) & (key > 4)
    visual = torch.zeros(1, 3, dtype=torch.bool)
    assert attended_tokens({"sliding_attention": mask[None, None]}, visual, past=4).tolist() == [[False, True, True]]


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_that_share_keys(layer):
    """The last two read what layers 2 and 3 have cached."""
    assert_equal_to_oracle(make_model("gemma4", **SHARED), layer, "gemma4")


@pytest.mark.parametrize("layer", [1, 2])
def test_gemma3n_text(layer):
    """Its hidden states come in several streams. Its vision tower needs a package of its own."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **TEXT | SHARED,
        sliding_window=WINDOW,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 6,
        initializer_range=0.25,
    )
    model = Gemma3nForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    assert_equal_to_oracle(model, layer, "llava", masked=True)


# ------------------------------------------------------------------------------------------------------ layer search


@pytest.mark.filterwarnings("ignore:No layer of")
@pytest.mark.parametrize("large", [False, True], ids=["logits", "no_logits"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama4", "qwen3_vl", "lfm2_vl", "idefics3"])
def test_layer_search(family, large, monkeypatch):
    if large:
        monkeypatch.setattr(scorer, "MEMORY_SHARE", 1e18)
    model, inputs = make_model(family), make_prompts(family, [[3, 4, 5], [2, 4, 3, 4, 4]]) | {"use_cache": False}
    search = vtw.find_layer(model, [inputs], progress=False)
    naive = torch.stack([naive_kl(model, inputs, layer) for layer in search.candidates], dim=1)
    assert naive.min() > 1e-3
    torch.testing.assert_close(search.per_sample.double(), naive, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "family, text, layer, match",
    [
        ("qwen3_vl", {}, 1, r"expected 2\.\.4 \(4 withdraws nothing\), got 1; visual features .* added up to layer 2"),
        ("granite4_vision", {}, 1, r"expected 2\.\.4 .* up to layer 2"),
        ("granite_docling", {}, 1, r"expected 2\.\.4 .* up to layer 2"),
        (
            "qwen3_5",
            {},
            1,
            r"expected 2\.\.4 .* layers of type linear_attention, here up to 1, are not attention alone",
        ),
        ("lfm2_vl", {"layer_types": ["full_attention", "conv"] * 2}, 3, r"expected 4 .* layers of type conv"),
        ("gemma4", SHARED, 3, r"expected 1\.\.2 or 6 .* layers 4\.\. read keys and values of layers 2\.\."),
    ],
)
def test_layers_that_do_not_apply(family, text, layer, match):
    model = make_model(family, **text)
    with pytest.raises(ValueError, match=f"^layer: {match}"):
        vtw.apply(model, layer)
    if "layer_types" not in text:
        with pytest.raises(ValueError, match="^candidates: expected layers in|^model: expected layers with keys of"):
            vtw.find_layer(model, [], candidates=[layer])
    vtw.apply(model, model.config.text_config.num_hidden_layers).remove()


def on_meta(name: str, **config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **config))


@pytest.mark.parametrize("name", ["florence2", "blip-2"])
def test_models_that_do_not_apply(name):
    model = on_meta(name, **({"text_config": {"model_type": "t5"}} if name == "blip-2" else {}))
    with pytest.raises(ValueError, match=f"^model: {type(model).__name__} is not supported: it is an encoder-decoder"):
        vtw.apply(model, 2)


def test_positions_that_layers_count():
    """Llama 4 scales attention by positions that a layer counts from the cache's length and its rows."""
    model = make_model("llama4", floor_scale=18, attn_scale=1.0)
    assert_equal_to_oracle(model, 2, "llama4")  # decoding goes on beyond them
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="input_ids: expected less than 18 tokens, .* got 18"):
        model(**make_prompts("llama4", [[8, 4, 6]]))


def test_windows_of_flash_attention():
    """It has them in its kernel, where the withdrawn rows would not count."""
    model = make_model("gemma3")
    with vtw.withdraw(model, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(ValueError, match="gets the window in its mask.*sliding_attention, got 'flash_attention_2'"):
            model(**make_prompts("gemma3", PROMPTS["one"]))


def test_visual_mask_is_asked_for():
    """BLIP-2's generate hands over embeddings; without a mask it must not pass for text."""
    model, inputs = make_model("blip-2"), make_prompts("blip-2", PROMPTS["one"])
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match=r"^visual_mask: expected bool \[B, S\]"):
        model.generate(**inputs)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with vtw.withdraw(model, 2), pytest.raises(ValueError, match="^labels: expected -100 after each visual token"):
        model(**inputs, labels=labels)


def test_placeholders_that_a_model_expands():
    model, inputs = make_model("llava"), make_prompts("llava", PROMPTS["one"])
    model.model.language_model.layers[0].register_forward_hook(lambda module, args, x: torch.cat([x, x], dim=1))
    with vtw.withdraw(model, 1), pytest.raises(ValueError, match="^input_ids: expected 24 tokens, one for .* got 12"):
        model(**inputs)


def test_decoder_of_another_name():
    model, inputs = make_model("llava"), make_prompts("llava", PROMPTS["one"])
    with vtw.withdraw(model, 2):
        wanted = logits(model, inputs)
    text = model.model.language_model
    with vtw.withdraw(model, 2, decoder=text):
        assert torch.equal(logits(model, inputs), wanted)
    with pytest.raises(ValueError, match=r"^decoder: expected .* in \.layers, got Linear; Llava.* pass that module"):
        vtw.apply(model, 2, decoder=model.lm_head)
    if model.base_model is not model:  # up to 4.57, only the decoder's own output has all rows
        holder = torch.nn.Module()  # which the model never calls
        holder.layers, holder.config = text.layers, text.config
        with vtw.withdraw(model, 2, decoder=holder):
            assert torch.equal(logits(model, inputs), wanted)
    text.blocks = text.layers
    del text.layers
    with pytest.raises(ValueError, match="^decoder: expected .* got LlamaModel; LlavaForConditionalGeneration is not"):
        vtw.apply(model, 2)


# ------------------------------------------------------------------------------------------ vtw-kernels info --model


def info(config, architecture: str, path) -> int:
    config.architectures = [architecture]
    config.save_pretrained(path)
    return main(["info", "--model", str(path)])


def test_info_of_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert info(make_config("qwen3_vl"), "Qwen3VLForConditionalGeneration", tmp_path) == 0
    printed = capsys.readouterr().out
    for text in (
        "qwen3_vl (Qwen3VLForConditionalGeneration)",
        "model.language_model (Qwen3VLTextModel)",
        "4: 4 full_attention",
        "7, 8",
        "2..4 (4 withdraws nothing); visual features go on being added up to layer 2",
    ):
        assert text in printed


@pytest.mark.parametrize(
    "architecture, match",
    [
        ("Florence2ForConditionalGeneration", "Florence2ForConditionalGeneration is not supported: it is an encoder"),
        ("Unheard", "expected a config with an architecture of transformers, got ['Unheard']"),
    ],
)
def test_info_of_a_model_that_does_not_apply(tmp_path, capsys, architecture, match):
    assert info(AutoConfig.for_model("florence2"), architecture, tmp_path) == 1
    assert match in capsys.readouterr().err


def test_info_of_no_model(tmp_path, capsys):
    assert main(["info", "--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
