"""The machine code of compiled kernels, read with the tools of the CUDA toolkit or of Triton's package."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


def cuda_tool(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    return str(bundled) if bundled and bundled.exists() else shutil.which(name)


def sass_of(cubin: Path) -> dict[str, str]:
    """Machine code by (mangled) name of the kernel."""
    text = subprocess.check_output([cuda_tool("nvdisasm"), "-c", cubin], text=True)
    # Sections in the order of the file: each begins with its kernel's label.
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def count(sass: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", sass))
