"""A real server with vLLM's OpenAI-compatible interface, asked by the ``openai`` client from several threads about
images; killed, and started again."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import openai
import pytest
import torch
import vllm_models
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtw_kernels as vtw

LAYER, TOKENS, ROUNDS = 2, 12, 3
QUESTIONS = [([seed], f"w{seed} w{seed + 7} w3") for seed in range(6)]
QUESTIONS += [([3, 4], "w9"), ([], "w1 w2 w3"), ([5], " ".join(vllm_models.WORDS[:40]))]


class Server:
    def __init__(self, folder: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log

    def __enter__(self) -> "Server":
        # What `vllm serve` runs; that command asks for the version of a package "vllm", which on a CPU is another.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder]
        command += ["--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--hf-overrides", f'{{"vtw": {{"layer": {LAYER}}}}}']
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"]
        command += ["--served-model-name", "tiny", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "8"]
        command += ["--limit-mm-per-prompt", '{"image": 4}']
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, images: list[int], text: str) -> list[str]:
        """The tokens of the answer."""
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)
        content = [{"type": "image_url", "image_url": {"url": data_uri(seed)}} for seed in images]
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [*content, *([{"type": "text", "text": text}] if text else [])]}],
            temperature=0,
            max_tokens=TOKENS,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
        return [x.token for x in answer.choices[0].logprobs.content]


def data_uri(seed: int) -> str:
    file = io.BytesIO()
    vllm_models.image(seed).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return vllm_models.make_llava(tmp_path_factory.mktemp("checkpoint") / "llava")


def wanted(folder: Path, layer: int) -> list[list[str]]:
    torch.set_num_threads(1)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    answers = []
    for images, text in QUESTIONS:
        prompt = " <image> " * len(images) + f" {text}"
        shown = [vllm_models.image(seed) for seed in images]
        inputs = dict(processor(text=prompt, images=shown or None, return_tensors="pt"))
        with torch.inference_mode(), vtw.withdraw(model, layer):
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers.append(processor.tokenizer.convert_ids_to_tokens(output[0, inputs["input_ids"].shape[1] :]))
    return answers


def test_server(folder, tmp_path, monkeypatch, capsys):
    right, others = wanted(folder, LAYER), wanted(folder, vllm_models.LAYERS)
    assert sum(a != b for a, b in zip(right, others)) > len(right) / 2, "nothing to see"

    def answers(server: Server) -> list[list[str]]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda question: server.ask(*question), QUESTIONS * ROUNDS))

    with Server(folder, tmp_path / "first.log") as server:
        assert answers(server) == right * ROUNDS
        with pytest.raises(openai.BadRequestError, match="expected text behind the last image"):
            server.ask([1], "")
        assert server.ask(*QUESTIONS[0]) == right[0]

        vllm_models.image(3).save(tmp_path / "photo.png")
        block = vllm_models.shown("from openai import", model="tiny", host=f"127.0.0.1:{server.port}")
        with monkeypatch.context() as within:
            within.chdir(tmp_path)
            exec(compile(block, vllm_models.PAGE.name, "exec"), {})
        assert any(word in capsys.readouterr().out for word in vllm_models.WORDS)

        with ThreadPoolExecutor(4) as threads:  # killed while it answers
            running = [threads.submit(server.ask, *question) for question in QUESTIONS * ROUNDS]
            next(as_completed(running))
            os.killpg(server.process.pid, signal.SIGKILL)
            assert any(isinstance(x.exception(), openai.APIError) for x in running)
    with Server(folder, tmp_path / "second.log") as server:
        assert answers(server) == right * ROUNDS
