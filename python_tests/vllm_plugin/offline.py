"""Withdrawal in vLLM, in this process: what it answers against transformers under ``withdraw``, its memory, and what it
refuses. ``make test-vllm`` runs this in an environment of its own.

Starting an engine takes most of the time, so that each one is asked for many things."""

import functools
import inspect
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler is here to be looked at

import pytest
import torch
import vllm
import vllm_models
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    Qwen2AudioConfig,
)
from vllm import LLM, SamplingParams
from vllm.config import CUDAGraphMode
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llama import LlamaModel
from vllm.multimodal.inputs import PlaceholderRange
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

import vtw_kernels as vtw
from vtw_kernels.integration.vllm import attention, cache, decoder
from vtw_kernels.integration.vllm.attention import ranges_of, text_backend
from vtw_kernels.integration.vllm.cache import TextOnlyManager, TextOnlySpec
from vtw_kernels.integration.vllm.config import TESTED_VLLM, adjust_engine
from vtw_kernels.integration.vllm.model_state import TextModelState
from vtw_kernels.integration.vllm.ranges import visual_ranges

TOKENS = 16
LLAVAS, QWENS = ("llava", "llava_next", "llava_onevision"), ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = {"llava": 32, "llava_next": 24, "llava_onevision": 24, "internvl": 64} | dict.fromkeys(QWENS, 64)  # of images
PLACES = dict.fromkeys(LLAVAS, "<image>") | dict.fromkeys(QWENS, "<|vision_start|> <|image_pad|> <|vision_end|>")
PLACES["internvl"] = "<IMG_CONTEXT>"
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True)


def requests(family: str, number: int = 24) -> list[tuple[str, list[int]]]:
    """Prompts and the seeds of their images: none to three of them, at the start or next to each other as it comes."""
    rng = random.Random(0)
    made = []
    for i in range(number):
        images = [rng.randrange(50) for _ in range((1, 2, 0, 1, 3, 1)[i % 6])]
        parts = [PLACES[family]] * len(images)
        words = [" ".join(rng.choices(vllm_models.WORDS, k=rng.choice((0, 1, 5, 40)))) for _ in parts]
        last = " ".join(rng.choices(vllm_models.WORDS, k=rng.choice((1, 3, 9))))
        made.append(("<s> " * (i % 4 > 0) + " ".join(f"{a} {b}" for a, b in zip(words, parts)) + f" {last}", images))
    return made


def prompts(family: str, some) -> list[dict]:
    images = [[vllm_models.image(seed, SIZES[family]) for seed in seeds] for _, seeds in some]
    return [{"prompt": text} | ({"multi_modal_data": {"image": x}} if x else {}) for (text, _), x in zip(some, images)]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    class Made(dict):
        def __missing__(self, family: str) -> Path:
            self[family] = vllm_models.make(folder / family, family)
            return self[family]

    return Made()


@pytest.fixture(scope="session")
def oracle(checkpoints):
    """Of transformers: new tokens, and for each of them the log-probabilities of all; withdrawn before a layer."""
    torch.set_num_threads(1)

    @functools.cache
    def load(family: str):
        folder = checkpoints[family]
        return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)

    @functools.cache
    def answer(family: str, layer: int, text: str, seeds: tuple[int, ...]) -> tuple[list[int], list[int], torch.Tensor]:
        model, processor = load(family)
        images = [vllm_models.image(seed, SIZES[family]) for seed in seeds]
        inputs = dict(processor(text=text, images=images or None, return_tensors="pt"))
        with torch.inference_mode(), vtw.withdraw(model, layer):
            output = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        length = inputs["input_ids"].shape[1]
        logits = torch.cat(output.logits).log_softmax(-1)
        return inputs["input_ids"][0].tolist(), output.sequences[0, length:].tolist(), logits

    return lambda family, layer, some: [answer(family, layer, text, tuple(seeds)) for text, seeds in some]


class Engine:
    """One that runs while its block does."""

    def __init__(self, folder: Path, layer: int | None, **options):
        self.options = dict(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            block_size=32,
            max_num_seqs=16,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=64 << 20,
            limit_mm_per_prompt={"image": 4},
            disable_log_stats=False,
        )
        self.options |= options | ({} if layer is None else {"hf_overrides": {"vtw": {"layer": layer}}})

    def __enter__(self) -> "Engine":
        self.llm = LLM(**self.options)
        return self

    def __exit__(self, *error) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    @property
    def scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self):
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    def ask(self, family: str, some, params=GREEDY):
        return self.llm.generate(prompts(family, some), params, use_tqdm=False)

    def watched(self, family: str, some, params=GREEDY) -> int:
        """The most blocks that are in use after any step while these are answered."""
        engine, free, most = self.llm.llm_engine, self.free_blocks, 0
        for i, prompt in enumerate(prompts(family, some)):
            engine.add_request(f"watched-{i}", prompt, params)
        while engine.has_unfinished_requests():
            engine.step()
            most = max(most, free - self.free_blocks)
        return most

    def is_clean(self, free_blocks: int) -> None:
        assert self.free_blocks == free_blocks
        assert not self.scheduler.requests
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            assert not manager.req_to_blocks and not manager.num_cached_block
            assert not getattr(manager, "_ranges", None)


def same(outputs, wanted) -> list[bool]:
    """Which answers are the same; whose log-probabilities then are, too."""
    found = []
    for output, (prompt, tokens, logprobs) in zip(outputs, wanted, strict=True):
        assert list(output.prompt_token_ids) == prompt
        answer = output.outputs[0]
        found.append(list(answer.token_ids) == tokens)
        if found[-1]:
            for given, row in zip(answer.logprobs, logprobs, strict=True):
                for token, x in given.items():
                    assert abs(x.logprob - row[token].item()) < 1e-3
    return found


def images_matter(found: list[bool], some) -> None:
    """A negative control: text-only prompts are answered alike, and most others are not."""
    assert all(x for x, (_, seeds) in zip(found, some) if not seeds)
    others = [x for x, (_, seeds) in zip(found, some) if seeds]
    assert sum(others) < len(others) / 2


def test_batches_and_requests(checkpoints, oracle):
    """Continuous batching; and requests that ask for something else, or for too much."""
    some = requests("llava")
    with Engine(checkpoints["llava"], 2) as engine:
        assert type(engine.scheduler).__name__ == "TextScheduler"
        free = engine.free_blocks
        assert all(same(engine.ask("llava", some), oracle("llava", 2, some)))
        images_matter(same(engine.ask("llava", some), oracle("llava", 3, some)), some)  # K off by one
        images_matter(
            same(engine.ask("llava", some), oracle("llava", vllm_models.LAYERS, some)), some
        )  # none withdrawn

        # Several answers to one prompt, drawn from the most likely token alone.
        several = engine.ask("llava", some[:4], SamplingParams(top_k=1, n=3, max_tokens=TOKENS, ignore_eos=True))
        for output, (_, tokens, _) in zip(several, oracle("llava", 2, some[:4])):
            assert [list(x.token_ids) for x in output.outputs] == [tokens] * 3

        choices = ["w1w2", "w3w4w5"]  # the tokenizer knows no spaces
        choice = StructuredOutputsParams(choice=list(choices))
        shaped = engine.ask("llava", some[:6], SamplingParams(temperature=0, max_tokens=8, structured_outputs=choice))
        for output, (prompt, _, _) in zip(shaped, oracle("llava", 2, some[:6])):
            assert output.outputs[0].text.replace(" ", "") in choices

        # Refused alone, and the engine goes on.
        with pytest.raises(VLLMValidationError, match="vtw: prompt: expected text behind the last image"):
            engine.ask("llava", [("<s> w1 <image>", [1])])
        with pytest.raises(VLLMValidationError, match="vtw: prompt_logprobs: expected none"):
            engine.ask("llava", some[:1], SamplingParams(prompt_logprobs=1))
        assert all(same(engine.ask("llava", some[:3]), oracle("llava", 2, some[:3])))
        engine.is_clean(free)


def test_m_rope_and_asynchronous_scheduling(checkpoints, oracle, monkeypatch):
    """vLLM turns the latter off on a CPU, where there is nothing to gain."""
    stock = current_platform.check_and_update_config

    def kept_on(vllm_config):
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(type(current_platform), "check_and_update_config", staticmethod(kept_on))
    some = requests("qwen2_vl")
    with Engine(checkpoints["qwen2_vl"], 3) as engine:
        assert type(engine.scheduler).__name__ == "AsyncTextScheduler"
        outputs = engine.ask("qwen2_vl", some)
        assert all(same(outputs, oracle("qwen2_vl", 3, some)))
        images_matter(same(outputs, oracle("qwen2_vl", 2, some)), some)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_another_family(checkpoints, oracle, family, monkeypatch):
    by_runner, by_scheduler = set(), set()

    def noting(noted: set, stock: Callable, some: Callable) -> Callable:
        def call(given):
            ranges = stock(given)
            noted.update(map(tuple, some(ranges)))
            return ranges

        return call

    monkeypatch.setattr(attention, "ranges_of", noting(by_runner, attention.ranges_of, lambda ranges: ranges))
    monkeypatch.setattr(cache, "visual_ranges", noting(by_scheduler, cache.visual_ranges, lambda ranges: [ranges]))
    some = requests(family, 12)
    with Engine(checkpoints[family], 3) as engine:
        outputs = engine.ask(family, some)
    assert all(same(outputs, oracle(family, 3, some)))
    images_matter(same(outputs, oracle(family, 4, some)), some)
    assert by_runner == by_scheduler and len(by_runner) > 1


def test_windows_that_no_layer_has(checkpoints, oracle):
    """A config may name one that is not used. vLLM looks at it where it says which ranges are images."""
    some = requests("qwen2_5_vl", 6)
    window = {"vtw": {"layer": 2}, "text_config": {"sliding_window": 32}}
    with Engine(checkpoints["qwen2_5_vl"], None, hf_overrides=window) as engine:
        assert engine.llm.model_config.hf_text_config.sliding_window == 32
        assert all(same(engine.ask("qwen2_5_vl", some), oracle("qwen2_5_vl", 2, some)))


def test_without_images(checkpoints, oracle):
    """An engine that is told to take none loads no vision tower, and has nothing to withdraw."""
    some = [(text, seeds) for text, seeds in requests("llava") if not seeds]
    with Engine(checkpoints["llava"], 2, limit_mm_per_prompt={"image": 0}) as engine:
        assert all(same(engine.ask("llava", some), oracle("llava", 2, some)))


def test_without_the_setting(checkpoints, oracle):
    """vLLM's own class, scheduler and blocks; and what it takes of these, for comparison."""
    some = requests("llava")
    with Engine(checkpoints["llava"], None) as engine:
        assert type(engine.scheduler).__module__.startswith("vllm.")
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert not any(isinstance(x, TextOnlyManager) for x in managers)
        assert all(same(engine.ask("llava", some), oracle("llava", vllm_models.LAYERS, some)))
        images_matter(same(engine.ask("llava", some), oracle("llava", 2, some)), some)


@pytest.mark.parametrize("caching", [False, True])
def test_chunks_and_preemption(checkpoints, oracle, caching):
    """Steps of 32 rows, so that some requests have visual rows alone in one; and fewer blocks than all need at once."""
    some = requests("llava")
    blocks = {"num_gpu_blocks_override": 25, "max_num_batched_tokens": 32, "max_num_seqs": 16, "max_model_len": 384}
    with Engine(checkpoints["llava"], 3, enable_prefix_caching=caching, **blocks) as engine:
        free = engine.free_blocks
        params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True)
        preempted, within_images = watch(engine)
        assert all(same(engine.ask("llava", some, params), oracle("llava", 3, some)))
        assert len(preempted) > 0
        assert len(within_images) > 0
        engine.is_clean(free)


def watch(engine: Engine) -> tuple[list, list]:
    """Lists that requests are added to which are preempted, and which have visual rows alone in a step."""
    scheduler, preempted, within_images = engine.scheduler, [], []
    stock_preempt, stock_schedule = scheduler._preempt_request, scheduler.schedule

    def preempt(request, *args, **kwargs):
        preempted.append(request)
        return stock_preempt(request, *args, **kwargs)

    def schedule(*args, **kwargs):
        step = stock_schedule(*args, **kwargs)
        for name, rows in step.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            stop = request.num_computed_tokens  # of this step, which the scheduler counts as done
            if any(first <= stop - rows and stop <= behind for first, behind in visual_ranges(request.mm_features)):
                within_images.append(request)
        return step

    scheduler._preempt_request, scheduler.schedule = preempt, schedule
    return preempted, within_images


def test_prefix_caching(checkpoints, oracle):
    """Questions about one image, one after another and at once; blocks of the image are found again in the layers that
    see it, and what stands before it in the others, though both end within a block of text."""
    image, other = [3], [4]
    start = "<s> " + " ".join(vllm_models.WORDS[:20]) + " <image> "
    questions = [start + " ".join(vllm_models.WORDS[i : i + 12]) for i in range(0, 60, 12)]
    same_image = [(question, image) for question in questions]
    with Engine(checkpoints["llava"], 2, enable_prefix_caching=True) as engine:
        for one in (*same_image, *same_image[:2]):
            assert all(same(engine.ask("llava", [one]), oracle("llava", 2, [one])))
        outputs = engine.ask("llava", same_image)
        assert all(same(outputs, oracle("llava", 2, same_image)))
        # 21 tokens of text, 64 of the image: two whole blocks of 32 tokens are in front of any question.
        assert min(output.num_cached_tokens for output in outputs) >= 64
        changed = [(question, other) for question in questions]
        outputs = engine.ask("llava", changed[:1])
        assert all(same(outputs, oracle("llava", 2, changed[:1])))
        assert outputs[0].num_cached_tokens == 0
        longer = [(questions[0] + " " + " ".join(vllm_models.WORDS[i : i + 40]), image) for i in (0, 9)]
        for _ in range(2):
            for one in longer:
                outputs = engine.ask("llava", [one])
                assert all(same(outputs, oracle("llava", 2, [one])))
        assert outputs[0].num_cached_tokens >= 128


def test_memory_and_a_thousand_requests(checkpoints, oracle):
    """Blocks are freed when requests end, are aborted, or are preempted; and are as few as text needs."""
    some = [(text, seeds) for text, seeds in requests("llava") if seeds][:1]
    with Engine(checkpoints["llava"], 3, enable_prefix_caching=True, num_gpu_blocks_override=60) as engine:
        engine.llm.reset_prefix_cache()
        text = engine.watched("llava", some)
        prompt, _, _ = oracle("llava", 3, some)[0]
        images = 64 * len(some[0][1])
        blocks = [-(-(len(prompt) + TOKENS - 1 - left) // 32) for left in (0, images)]
        assert text == sum(blocks)  # of three layers each
        free, rng = engine.free_blocks, random.Random(0)
        core = engine.llm.llm_engine
        ready = prompts("llava", requests("llava"))
        wanted = oracle("llava", 3, requests("llava"))
        made, aborted, finished = 0, 0, 0
        while made < 1000 or core.has_unfinished_requests():
            while made < 1000 and core.get_num_unfinished_requests() < 12:
                params = SamplingParams(temperature=0, max_tokens=rng.choice((1, 3, TOKENS)), ignore_eos=True)
                core.add_request(f"{made}", ready[made % len(ready)], params)
                made += 1
                if rng.random() < 0.2:
                    core.abort_request([f"{rng.randrange(max(0, made - 12), made)}"])
                    aborted += 1
            for output in core.step():
                if output.finished and output.outputs[0].finish_reason == "length":
                    tokens = list(output.outputs[0].token_ids)
                    assert tokens == wanted[int(output.request_id) % len(ready)][1][: len(tokens)]
                    finished += 1
        assert finished > 700 and aborted > 100
        engine.is_clean(free)


def test_the_model_of_the_demo(tmp_path):
    """Served, it answers what it answers in transformers, as right as it is there."""
    from vtw_kernels.demo import data

    shutil.copytree(data.ASSETS, tmp_path, dirs_exist_ok=True)
    vllm_models.rename_for_vllm(tmp_path)
    batches = data.load_batches("test", 32, 128)
    model, words = data.load_model(), data.load_tokenizer()
    torch.set_num_threads(1)
    wanted = []
    with torch.inference_mode(), vtw.withdraw(model, 4):
        for batch in batches:
            tokens = model.generate(**batch.inputs, max_new_tokens=data.MAX_NEW_TOKENS, do_sample=False)
            new = tokens[:, batch.inputs["input_ids"].shape[1] :]
            wanted += [text.strip() for text in words.batch_decode(new, skip_special_tokens=True)]
    shown = [(question, image) for batch in batches for question, image in zip(batch.questions, batch.images)]
    asked = [
        {
            "prompt": data.PROMPT.format(question=question),
            "multi_modal_data": {"image": Image.fromarray(image).convert("RGB")},
        }
        for question, image in shown
    ]
    params = SamplingParams(temperature=0, max_tokens=data.MAX_NEW_TOKENS)
    with Engine(tmp_path, 4, max_model_len=128) as engine:
        given = [x.outputs[0].text.strip() for x in engine.llm.generate(asked, params, use_tqdm=False)]
    assert given == wanted
    right = [given == wanted for given, wanted in zip(given, (x for batch in batches for x in batch.answers))]
    assert sum(right) / len(right) > 0.95


def test_what_the_page_shows(checkpoints, oracle, tmp_path, monkeypatch):
    vllm_models.image(3).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    small = {"enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    monkeypatch.setattr(vllm, "LLM", functools.partial(LLM, **small))
    block = vllm_models.shown("from vllm import", model=str(checkpoints["llava"]), layer='"layer": 2')
    session: dict = {}
    exec(compile(block, vllm_models.PAGE.name, "exec"), session)
    session["llm"].llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    [(_, tokens, _)] = oracle("llava", 2, [(session["prompt"]["prompt"], [3])])
    assert list(session["answer"].outputs[0].token_ids)[:TOKENS] == tokens


def test_torch_compile(checkpoints, oracle):
    some = requests("llava", 8)
    with Engine(checkpoints["llava"], 2, enforce_eager=False) as engine:
        outputs = engine.ask("llava", some)
        assert all(same(outputs, oracle("llava", 2, some)))
        images_matter(same(outputs, oracle("llava", 3, some)), some)


def test_what_is_compiled_is_of_a_layer(checkpoints):
    """The key by which vLLM finds again what it has compiled, where it keeps that; on a CPU it does not."""
    args = [EngineArgs(model=str(checkpoints["llava"]), hf_overrides={"vtw": {"layer": layer}}) for layer in (2, 3)]
    configs = [x.create_engine_config() for x in args]
    assert len({config.compute_hash() for config in configs}) == 2
    for config in configs:
        config.model_config.hf_config.vtw = None
    assert len({config.compute_hash() for config in configs}) == 1  # nothing else is different


def test_tensor_parallel(checkpoints, oracle, monkeypatch):
    some = requests("qwen2_vl")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 64}
    with Engine(checkpoints["qwen2_vl"], 2, **options) as engine:
        assert all(same(engine.ask("qwen2_vl", some), oracle("qwen2_vl", 2, some)))


REFUSED = {
    "layer 0": ({"hf_overrides": {"vtw": {"layer": 0}}}, "layer: expected a number from 1 to 5"),
    "the last layer": ({"hf_overrides": {"vtw": {"layer": 6}}}, "layer: expected a number from 1 to 5"),
    "no number": ({"hf_overrides": {"vtw": {"layer": 2.5}}}, "layer: expected a number from 1 to 5"),
    "no file": ({"hf_overrides": {"vtw": {"layer": "nowhere.json"}}}, "layer: expected a number, or a file"),
    "another key": ({"hf_overrides": {"vtw": {"layers": 2}}}, 'expected {"layer": NUMBER or FILE}'),
    "no key": ({"hf_overrides": {"vtw": 2}}, 'expected {"layer": NUMBER or FILE}'),
    "routers": ({"hf_overrides": {"vtw": {"layer": "exit.safetensors"}}}, "layer: expected the same one for all"),
    "no answers": ({"runner": "pooling"}, "expected a model that generates, got the runner pooling"),
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "got one with speculative decoding",
    ),
    "pipeline": ({"pipeline_parallel_size": 2}, "got one with pipeline parallelism"),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "got one with a KV connector",
    ),
    "events": (
        {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
        "got one with KV cache events",
    ),
    "context, decoded": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "got one with context parallelism",
    ),
    "context, prefilled": ({"prefill_context_parallel_size": 2}, "got one with context parallelism"),
    "overlap": ({"enable_dbo": True}, "got one with dual batch overlap"),
    "LoRA": ({"enable_lora": True}, "got one with LoRA"),
    "embeddings": ({"enable_prompt_embeds": True}, "got one with prompt embeddings"),
    "fast prefill": ({"kv_sharing_fast_prefill": True}, "got one with --kv-sharing-fast-prefill"),
    "pruned video": ({"video_pruning_rate": 0.5}, "got one with pruned video"),
    "another implementation": ({"model_impl": "transformers"}, "expected vLLM's own implementation of"),
    "one group": ({"disable_hybrid_kv_cache_manager": True}, "got one with --disable-hybrid-kv-cache-manager"),
    "a scheduler": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "got one with a scheduler class"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_at_start(checkpoints, what):
    options, message = REFUSED[what]
    family = "qwen2_5_vl" if what == "pruned video" else "llava"
    args = EngineArgs(model=str(checkpoints[family]), **{"hf_overrides": {"vtw": {"layer": 2}}} | options)
    with pytest.raises(ValueError) as raised:
        args.create_engine_config()
    line = next(line for line in str(raised.value).splitlines() if "vtw: " in line)
    assert message in line


def test_refused_while_a_model_is_made(checkpoints, tmp_path, monkeypatch):
    def refused(folder: Path, layer: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            with Engine(folder, layer, load_format="dummy"):
                pass

    refused(checkpoints["qwen3_vl"], 1, "vtw: layer: expected at least 2, as the model adds image features to the rows")

    def with_text(config) -> Path:
        shutil.copytree(checkpoints["llava"], tmp_path, dirs_exist_ok=True)
        whole = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": config.to_dict()}))
        return tmp_path

    windows = with_text(Gemma2Config(**vllm_models.TEXT, head_dim=32, sliding_window=16))
    refused(windows, 2, "vtw: expected layers with one attention each, which looks at all tokens before .* Gemma2")
    other_layers = with_text(PhiConfig(**vllm_models.TEXT | {"num_key_value_heads": 4}))
    refused(other_layers, 2, "vtw: expected a model with one decoder of 6 layers that are called with positions")

    def forward(self, *args, **kwargs):
        return self.config.embedding_multiplier * super(LlamaModel, self).forward(*args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    refused(checkpoints["llava"], 2, "LlamaModel, whose forward looks at config")


def test_rows_that_stayed(checkpoints, monkeypatch):
    """Should the later layers be called with all rows, a step raises."""
    monkeypatch.setattr(decoder, "compact", lambda rows, *args: rows)
    with Engine(checkpoints["llava"], 2) as engine:
        with pytest.raises(
            RuntimeError, match=r"vtw: expected the \d+ text rows of a step in .*layers.2.*, got \d+ rows"
        ):
            engine.ask("llava", requests("llava", 1))


def test_on_a_gpu(checkpoints, monkeypatch):
    """What is asked of the config there, as far as it can be looked at without one."""
    args = EngineArgs(model=str(checkpoints["llava"]), hf_overrides={"vtw": {"layer": 2}})
    config = args.create_engine_config()
    assert config.compilation_config.cudagraph_mode != CUDAGraphMode.FULL_DECODE_ONLY
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="got one with the first model runner on a GPU"):
        adjust_engine(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    adjust_engine(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    check = build_custom_logits_processors_params_validator(config.model_config.logits_processors)
    check(SamplingParams(logprobs=1))
    with pytest.raises(VLLMValidationError, match="vtw: prompt_logprobs: expected none"):
        check(SamplingParams(prompt_logprobs=1))


def test_other_models_and_releases(checkpoints, tmp_path, monkeypatch):
    text = {key: value for key, value in vllm_models.TEXT.items()}
    LlamaForCausalLM(LlamaConfig(**text)).save_pretrained(tmp_path)
    vllm_models.tokenizer().save_pretrained(tmp_path)
    override = {"hf_overrides": {"vtw": {"layer": 2}}}
    with pytest.raises(ValueError, match="vtw: expected a model whose decoder is given images"):
        EngineArgs(model=str(tmp_path), **override).create_engine_config()
    audio = Qwen2AudioConfig(text_config=text, architectures=["Qwen2AudioForConditionalGeneration"])
    audio.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vtw: expected a model whose decoder is given images .* Qwen2Audio"):
        EngineArgs(model=str(tmp_path), **override).create_engine_config()
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(ValueError, match=f"vtw: expected vLLM {TESTED_VLLM}, got 0.31.2"):
        EngineArgs(model=str(checkpoints["llava"]), **override).create_engine_config()


def test_the_layer_of_a_search(checkpoints, tmp_path):
    found = tmp_path / "search.json"
    found.write_text('{"layer": 4, "num_layers": 6, "model": "any"}')
    config = EngineArgs(
        model=str(checkpoints["llava"]), hf_overrides={"vtw": {"layer": str(found)}}
    ).create_engine_config()
    assert config.model_config.hf_config.vtw == {"layer": 4}
    found.write_text('{"layer": 4, "num_layers": 32, "model": "any"}')
    with pytest.raises(ValueError, match="a search on a model of 6 decoder layers"):
        EngineArgs(model=str(checkpoints["llava"]), hf_overrides={"vtw": {"layer": str(found)}}).create_engine_config()


def test_what_the_other_runner_hands_on(monkeypatch):
    """That of a GPU, as far as it can be looked at without one."""
    given = {}

    def stock(self, batch, *args, model_specific_attn_metadata, **kwargs):
        given.update(kwargs, metadata=model_specific_attn_metadata)
        return {}

    assert "model_specific_attn_metadata" in inspect.signature(DefaultModelState.prepare_attn).parameters
    monkeypatch.setattr(DefaultModelState, "prepare_attn", stock)
    place = PlaceholderRange(offset=3, length=6, is_embed=torch.tensor([False, True, True, False, True, True]))
    state = object.__new__(TextModelState)
    image = SimpleNamespace(modality="image", mm_position=place)
    state.supports_mm_inputs, state.encoder_cache = True, SimpleNamespace(mm_features={"b": [image]})
    state.prepare_attn(SimpleNamespace(req_ids=["a", "b"]), for_capture=False)
    metadata = given["metadata"]
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    of_text = SimpleNamespace(kv_cache_spec=TextOnlySpec.of(spec))
    assert metadata.get_extra_attn_kwargs(of_text, 3) == {"ranges": [[], [(4, 6), (7, 9)], []]}
    assert metadata.get_extra_attn_kwargs(SimpleNamespace(kv_cache_spec=spec), 3) == {}
    takes_no_images = object.__new__(TextModelState)
    takes_no_images.supports_mm_inputs = False
    takes_no_images.prepare_attn(SimpleNamespace(req_ids=["a"]), for_capture=False)
    assert given["metadata"].get_extra_attn_kwargs(of_text, 2) == {"ranges": [[], []]}

    # What a graph is captured of has no images, though nobody says so.
    builder_cls = text_backend(CPUAttentionBackend).get_builder_cls()
    assert "ranges" in inspect.signature(builder_cls.build).parameters
    seen = []
    monkeypatch.setattr(builder_cls, "build", lambda self, *args, **kwargs: seen.append(kwargs["common_attn_metadata"]))
    nothing_said = SimpleNamespace(mm_req_doc_ranges=None, seq_lens_cpu_upper_bound=torch.ones(2))
    object.__new__(builder_cls).build_for_cudagraph_capture(nothing_said)
    assert ranges_of(seen[0]) == [[], []]
    with pytest.raises(RuntimeError, match="vtw: expected a model runner that says where images are"):
        ranges_of(nothing_said)
