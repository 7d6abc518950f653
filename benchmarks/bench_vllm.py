"""vLLM with and without withdrawal, on a small random model made on the spot: throughput, time to the first token, and
the most of the KV cache that is in use. And what share of a prompt's step the boundary takes.

    make bench-vllm

Skipped where there is no vLLM. Engines take turns, as a process can have but one, and are compared by CPU time, which
other processes lengthen less than the clock's; the vision tower is part of it.
"""

import functools
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests" / "vllm_plugin"))

import vllm_models
from offline import Engine
from vllm import SamplingParams

from vtw_kernels.integration.vllm import decoder

LAYERS, LAYER, REQUESTS, ANSWER, TURNS = 16, 4, 8, 33, 3
SIZES = {"576 visual tokens": (96, 24), "2304 visual tokens": (192, 24)}  # pixels, words of a question
TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8}


def prompts(pixels: int, words: int) -> list[dict]:
    rng = random.Random(0)
    return [
        {
            "prompt": f"<s> <image> {' '.join(rng.choices(vllm_models.WORDS, k=words))}",
            "multi_modal_data": {"image": vllm_models.image(i, pixels)},
        }
        for i in range(REQUESTS)
    ]


def measure(engine: Engine, asked: list[dict]) -> dict[str, float]:
    """CPU seconds to the first token of all requests, and to the last; and the most bytes of blocks in use after any
    step."""
    core, free, most, first = engine.llm.llm_engine, engine.free_blocks, 0, set()
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    begin = time.process_time()
    for i, prompt in enumerate(asked):
        core.add_request(f"{begin}-{i}", prompt, params)
    to_first = None
    while core.has_unfinished_requests():
        first |= {x.request_id for x in core.step() if x.outputs[0].token_ids}
        if to_first is None and len(first) == len(asked):
            to_first = time.process_time() - begin
        most = max(most, free - engine.free_blocks)
    of_block = engine.options["kv_cache_memory_bytes"] / engine.pool.num_gpu_blocks
    return {"first": to_first, "all": time.process_time() - begin, "kv_bytes": most * of_block}


@pytest.mark.op("withdraw")
@pytest.mark.parametrize("size", SIZES)
def test_serving(benchmark, tmp_path, size):
    pixels, words = SIZES[size]
    folder = vllm_models.make_llava(tmp_path / "model", LAYERS, pixels, **TEXT, max_position_embeddings=4096)
    asked = prompts(pixels, words)
    options = {"max_model_len": 4096, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 4 << 30}
    found: dict[int | None, list[dict[str, float]]] = {None: [], LAYER: []}

    def turn(layer: int | None) -> None:
        with Engine(folder, layer, **options) as engine:
            measure(engine, asked[:2])
            found[layer] += [measure(engine, asked) for _ in range(2)]

    def turns() -> None:
        for layer in (None, LAYER) * TURNS:
            turn(layer)

    benchmark.pedantic(turns, rounds=1)
    plain, withdrawn = found[None], found[LAYER]
    for what in ("first", "all"):
        ratios = [a[what] / b[what] for a, b in zip(plain, withdrawn, strict=True)]
        benchmark.extra_info[f"{what}_plain_over_withdrawn"] = median(ratios)
        benchmark.extra_info[f"{what}_worst"] = min(ratios)
        benchmark.extra_info[f"{what}_seconds"] = median(x[what] for x in withdrawn)
    for name, runs in (("plain", plain), ("withdrawn", withdrawn)):
        benchmark.extra_info[f"kv_bytes_{name}"] = max(x["kv_bytes"] for x in runs)
        benchmark.extra_info[f"tokens_a_second_{name}"] = ANSWER * REQUESTS / median(x["all"] for x in runs)
    print(f"\n{size}: {benchmark.extra_info}")


@pytest.mark.op("withdraw")
def test_boundary(benchmark, tmp_path, monkeypatch):
    """The decoder's step for a prompt of 576 visual tokens and 85 of text, withdrawn before layer 8 of 16 of 1024: what
    share of its CPU time the rows are moved in, and what share layer 8 adds and norms them in. One kernel for both
    would read and write half as much, and so save half of their sum at most."""
    text = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "num_key_value_heads": 16}
    folder = vllm_models.make_llava(tmp_path / "model", LAYERS, 96, **text, max_position_embeddings=4096)
    spent: dict[str, list[float]] = {"step": [], "compact": [], "add and norm": []}

    def timed(name: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            begin = time.thread_time()
            result = call(*args, **kwargs)
            spent[name].append(time.thread_time() - begin)
            return result

        return run

    monkeypatch.setattr(decoder, "compact", timed("compact", decoder.compact))
    with Engine(folder, 8, max_model_len=4096, max_num_batched_tokens=4096, kv_cache_memory_bytes=1 << 30) as engine:
        whole = decoder.find_decoder(engine.runner.model, LAYERS)
        norm = whole.layers[8].input_layernorm
        whole.__dict__["forward"], norm.forward = timed("step", whole.forward), timed("add and norm", norm.forward)
        prompt = prompts(96, 83)[:1]
        ask = functools.partial(engine.llm.generate, use_tqdm=False)

        def rounds() -> None:
            for _ in range(12):
                ask(prompt, SamplingParams(temperature=0, max_tokens=1))

        rounds()
        for some in spent.values():
            some.clear()
        benchmark.pedantic(rounds, rounds=1)
    steps = list(zip(*spent.values(), strict=True))
    for name in list(spent)[1:]:
        shares = [part / step for step, part in zip(spent["step"], spent[name], strict=True)]
        benchmark.extra_info[f"{name}: share"], benchmark.extra_info[f"{name}: most"] = median(shares), max(shares)
    benchmark.extra_info["seconds"] = [median(x) for x in spent.values()]
    print(f"\n{len(steps)} steps: {benchmark.extra_info}")
