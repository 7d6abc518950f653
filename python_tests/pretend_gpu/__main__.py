"""Builds the pretend GPU and runs the tests on it: ``python -m pretend_gpu [PYTEST ARGUMENTS]``, from python_tests."""

import os
import subprocess
import sys
import time
from typing import NamedTuple

from . import HERE, sanitized
from .build import build

OPS = ("test_compaction.py", "test_compaction_paged.py", "test_packed.py", "test_bad_input.py")
OPS += ("test_kl_loss.py", "test_transforms.py")
PLACES = ("test_pretend_gpu.py", "test_gpu.py", "test_withdraw_gpu.py")
KL = "test_kl_divergence.py"
# Few long rows go another way with clusters than without, and all else goes the same (test_simt.py).
LONG_ROWS = "few_rows or aligned_rows or sizes or broadcast or special or temperature or backward"
# Memory is what the kernels' harness (test_simt.py) sanitizes in full; here it is what torch allocates for them.
SANITIZED = "not test_kl_divergence or sizes or broadcast or states"


# Python's handler of faults would hide what the runtime says, and long tracebacks show tensors whose memory is
# protected.
OPTIONS = ("-p", "no:faulthandler", "--tb=short", "--numprocesses=auto", "--dist=worksteal")


class Run(NamedTuple):
    what: str
    order: str
    device: str
    files: tuple[str, ...]
    chosen: str = ""
    environment: dict[str, str] = {}


# Both orders and both devices see everything once, and what is about streams, graphs and devices in every combination:
# the numbers of a kernel do not depend on where it runs.
RUNS = [
    Run("everything", "lazy", "cuda:0", (*PLACES, *OPS, KL)),
    Run("everything", "eager", "cuda:1", (*PLACES, *OPS, KL)),
    Run("devices and streams", "lazy", "cuda:1", PLACES),
    Run("devices and streams", "eager", "cuda:0", PLACES),
    Run("without clusters", "lazy", "cuda:1", ("test_pretend_gpu.py", KL), LONG_ROWS, {"VTW_KERNELS_CLUSTERS": "0"}),
    Run("sanitized", "eager", "cuda:0", (*OPS[:4], KL), SANITIZED, sanitized()),
]


def main(arguments: list[str]) -> int:
    build()
    for run in RUNS:
        began = time.monotonic()
        print(f"pretend GPU: {run.what}, {run.order}, {run.device}", flush=True)
        environment = {"PRETEND_ORDER": run.order, "PRETEND_DEVICE": run.device, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", *OPTIONS]
        done = subprocess.run(
            [*command, "-k", run.chosen, *run.files, *arguments],
            cwd=HERE.parent,
            env=os.environ | environment | run.environment,
        )
        print(f"pretend GPU: {run.what}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
