"""What tests of the commands that read records share: a model with its processor, questions about photos, and ways to
stop a command in the middle or to run it as several ranks."""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from vlm import IMAGE, VOCABULARY, make_model

from vtw_kernels.layer_search import state

try:
    from transformers import CLIPImageProcessorPil  # needs no torchvision
except ImportError:  # transformers 4.57
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

RECORDS = 12
SECONDS = 300
TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' if loop.first }}{{ message.role }} : {% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}"
    "{{ '</s> ' if message.role == 'assistant' }}{% endfor %}{{ 'assistant : ' if add_generation_prompt }}"
)
WORDS = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", 4: "user", 5: "assistant", 6: ":", IMAGE: "<image>"}


def make_processor():
    vocabulary = {WORDS.get(token, f"w{token}"): token for token in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with its processor, photos, and questions about them, some about two."""
    folder = tmp_path_factory.mktemp("search")
    make_model("llava").save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    rng, words = np.random.default_rng(0), random.Random(0)
    lines = []
    for i in range(RECORDS):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"photos/{i}.png")
        images = {"image": f"photos/{i}.png"} if i % 3 else {"images": ["photos/0.png", f"photos/{i}.png"]}
        question = " ".join(f"w{words.randrange(10, VOCABULARY)}" for _ in range(3 + i % 4))
        lines.append(json.dumps(images | {"question": question, "answer": f"w{20 + i} w{40 + i}"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def place(source, tmp_path, monkeypatch, num_threads):
    """An empty folder to search in, with one thread, as every rank has."""
    num_threads(1)
    monkeypatch.chdir(tmp_path)
    for name in ("model", "photos"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "data.jsonl").write_bytes((source / "data.jsonl").read_bytes())
    return tmp_path


def after_lines(number: int, act):
    """``append_line`` that acts in place of writing the line after so many."""
    count = 0

    def append(file, line):
        nonlocal count
        if count == number:
            act(file, line)
        else:
            state.append_line(file, line)
        count += 1

    return append


def die(file, line) -> None:
    """In the middle of writing."""
    file.write(json.dumps(line)[:40].encode())
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


# Autograd refuses to run in a process that was forked from one in which it has run. The server has only imported.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vtw_kernels.layer_search.skip_command", "vtw_kernels.cli", "pytest", "vlm"])


def in_a_new_process(target: Callable[..., None], *arguments) -> int:
    """Runs a function of a test's module in the current folder, with none of what the test has patched; returns the
    exit code, or less than 0 for a signal."""
    process = SERVER.Process(target=_in_folder, args=(os.getcwd(), target, *arguments))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail("a process hangs")
    return process.exitcode


def _in_folder(folder: str, target: Callable[..., None], *arguments) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    target(*arguments)


def in_processes(
    ranks: int, command: Callable[[], int], prepare: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Runs a command in forked processes, which have imported everything, as ranks if they are several; returns their
    exit codes. Each calls ``prepare(rank)`` first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1)
        if ranks > 1:  # as torchrun says it
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        prepare(rank)
        code = command()
        sys.stderr.flush()
        os._exit(code)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            pytest.fail("a rank hangs")
    return [process.exitcode for process in processes]
