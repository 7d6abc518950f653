"""Triton compiles every kernel for every architecture, without a GPU: no register spills, and the main paths move 16
bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sass import count

PROGRAM = Path(__file__).with_name("triton_kernels.py")
LOADS, STORES = r"LDG\.E\.(?:\w+\.)*128\S*", r"STG\.E\.(?:\w+\.)*128\S*"


@pytest.fixture(scope="session")
def sass(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", PROGRAM, tmp_path_factory.mktemp("cubins")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_spills(sass):
    assert len(sass) == 13 * 4
    for name, code in sass.items():
        assert count(code, r"LDL\S*") == count(code, r"STL\S*") == 0, name


@pytest.mark.parametrize("kernel", ["gather", "move", "move_paged"])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compaction_moves_16_bytes_at_a_time(sass, kernel, arch):
    code = sass[f"{kernel}-{arch}"]
    assert count(code, LOADS) >= 4 and count(code, STORES) >= 4


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_logits_are_loaded_16_bytes_at_a_time(sass, dtype, arch):
    assert count(sass[f"span_{dtype}-{arch}"], LOADS) >= 2
    assert count(sass[f"gradient_{dtype}-{arch}"], LOADS) >= 2
    assert count(sass[f"gradient_{dtype}-{arch}"], STORES) >= 2
