"""``make hub``: the layout of a kernel on the Hub, in ``build/hub``, around the library that is compiled here.

kernel-builder makes the same by ``build.toml``, for every torch and CUDA that the Hub has; this is for one machine, and
to see that the package ``kernels`` loads it.
"""

import json
import platform
import shutil
from pathlib import Path

from vtw_kernels import _C
from vtw_kernels.ops import backend_info

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build/hub/build"
LOADER = '''"""Registers the ops."""

from pathlib import Path

import torch

torch.ops.load_library(Path(__file__).parent / "_vtw_kernels.abi3.so")
'''


def main() -> None:
    cuda = backend_info()["build"]["cuda"]
    backend = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    variant = TARGET / f"torch-stable-abi210-{backend}-{platform.machine()}-linux"
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(ROOT / "torch-ext/vtw_kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_C.__file__, variant / "_vtw_kernels.abi3.so")  # it needs no Python
    (variant / "_ops.py").write_text(LOADER)
    metadata = {
        "name": "vtw-kernels",
        "id": f"_vtw_kernels_{backend}",
        "version": 1,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda" if cuda else "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    print(variant)


if __name__ == "__main__":
    main()
