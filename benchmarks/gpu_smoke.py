"""The first step of gpu_check.sh on a GPU: each op once, against the CPU, in a process of its own, so that a crash has
a name and stops nothing else. python gpu_smoke.py [NAME]"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))
import test_gpu
import torch


def run(name: str) -> None:
    call = test_gpu.CALLS[name]
    results = call.run(torch.ops.vtw_kernels, *(x.cuda() for x in test_gpu.inputs_of(call, 0)))
    torch.cuda.synchronize()
    test_gpu.assert_right(call, results, 0)


def run_alone(name: str) -> tuple[str, int, str]:
    command = [sys.executable, "-X", "faulthandler", __file__, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return name, done.returncode, done.stdout


def main() -> int:
    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, code, said in pool.map(run_alone, test_gpu.CALLS):
            print(f"{name}: {'right' if code == 0 else f'exit code {code}'}\n{said}", flush=True)
            failed += [name] * (code != 0)
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]) if len(sys.argv) > 1 else main())
