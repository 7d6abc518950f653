"""``lmms-eval --model vtw_hf`` on a task of our own, in an environment that has it: ``make test-lmms-eval``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [
        ("layer=8", 0.97, 1),  # nothing leaves
        ("layer=4", 0.97, 1),
        ("layer=1", 0, 0.6),
        ("layer=2,keep=0.5", 0.9, 1),
    ],
)
def test_digits(tmp_path, arguments, low, high):
    """The share of right answers to 100 questions is what ``vtw-kernels demo`` finds for all of them, or near it."""
    model = f"pretrained={ROOT}/vtw_kernels/demo/assets,device=cpu,{arguments}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "vtw_hf", "--model_args", model, "--tasks", "vtw_digits"]
    command += ["--include_path", "examples/lmms_eval", "--batch_size", "32", "--limit", "100"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command += ["--output_path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (results,) = tmp_path.rglob("*_results.json")
    assert done.returncode == 0, done.stderr
    assert low <= json.loads(results.read_text())["results"]["vtw_digits"]["accuracy,none"] <= high


def test_what_withdraw_refuses():
    from vtw_kernels.lmms_eval.model import VtwHf

    with pytest.raises(ValueError, match=r"layer: expected 1..8 \(8 withdraws nothing\), got 9"):
        VtwHf(str(ROOT / "vtw_kernels/demo/assets"), layer=9, device="cpu")
