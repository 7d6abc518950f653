"""Withdrawal in each family of models against the plain model that hides visual keys (oracle.py)."""

import pytest
import torch
from families_zoo import IMAGE, LAYERS, RECIPES, VOCABULARY, make_model, make_prompts
from oracle import visual_keys_hidden
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import vtw_kernels as vtw

TOLERANCE = 1e-4
STEPS = 6  # the prompt's last row, and five tokens decoded
PROMPTS = {"one": [[3, 4, 5]], "ragged": [[2, 4, 3, 4, 4], [5, 4, 1]]}  # by turns text and images; padded on the left


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few numbers are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(model, inputs: dict, **options) -> torch.Tensor:
    """[STEPS, B, V] of ``generate``, which is made to say the same tokens whatever the logits are."""
    length = inputs["input_ids"].shape[1]
    answer = torch.randint(10, VOCABULARY, (STEPS, len(inputs["input_ids"])), generator=torch.Generator().manual_seed(1))
    calls = iter(answer)

    def say(ids, scores):
        return torch.full_like(scores, -torch.inf).scatter_(1, next(calls)[:, None], 0.0)

    output = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        logits_processor=[say],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(output.logits)


def full_cache(model) -> DynamicCache:
    """Nothing is evicted from it: windows are the mask's alone."""
    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if getattr(x, "is_sliding", False) else x for x in cache.layers]
    return cache


@pytest.mark.parametrize("family", RECIPES)
def test_equal_to_oracle(family):
    recipe = RECIPES[family]
    try:
        model = make_model(family)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    for name, rows in PROMPTS.items():
        inputs = make_prompts(family, rows)
        visual = inputs["input_ids"] == IMAGE
        with visual_keys_hidden(model, LAYERS, visual):
            unhidden = logits(model, inputs, past_key_values=full_cache(model))
        with visual_keys_hidden(model, recipe.layer, visual):
            wanted = logits(model, inputs, past_key_values=full_cache(model))
        plain = logits(model, inputs)
        assert (plain - unhidden).abs().max() <= TOLERANCE, "the oracle is not this model"
        assert (plain - wanted).abs().amax((1, 2)).min() >= 10 * TOLERANCE, "nothing to see"
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            for cache in ("dynamic", "static"):
                with vtw.withdraw(model, recipe.layer, visual_mask=visual if recipe.masked else None):
                    given = logits(model, inputs, cache_implementation=cache)
                error = (given - wanted).abs().max()
                assert error <= TOLERANCE, f"{name}, {attention}, {cache}: off by {error}"
