"""The model that ships: good at its task, in need of its image, and honest about when it can let go of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtw_kernels as vtw
from vtw_kernels.demo import data
from vtw_kernels.demo.run import answer, correct_share

SAMPLES = 256
NEVER = 8


@pytest.fixture(scope="module")
def demo():
    return data.load_model(), data.load_tokenizer(), data.load_batches("test", 64, limit=SAMPLES)


def accuracy(demo, layer):
    model, tokenizer, batches = demo
    return correct_share(answer(model, tokenizer, batches, layer), batches)


def test_answers_and_needs_its_image(demo):
    model, tokenizer, batches = demo
    blind = [
        batch._replace(inputs=batch.inputs | {"pixel_values": -torch.ones_like(batch.inputs["pixel_values"])})
        for batch in batches
    ]
    prior = max(
        correct_share([text] * SAMPLES, batches) for text in {text for batch in batches for text in batch.answers}
    )
    assert accuracy(demo, NEVER) >= 0.9
    assert correct_share(answer(model, tokenizer, blind, NEVER), blind) <= prior + 0.1


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
