"""Loads the compiled extension, which registers ``torch.ops.vtw_kernels``, or says in one line why that can't be."""

import ctypes
import os
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
# A checksum of the names of all ops and of their arguments: an extension that was built from other sources has another
# one. After a change of a schema, the error at the end of this file says the new number.
INTERFACE = 0xFEE26A7F

# Checked before anything is loaded, so that an import that fails leaves nothing half done.
FORCED_BACKEND = os.environ.get("VTW_KERNELS_BACKEND") or None
if FORCED_BACKEND not in (None, *BACKENDS):
    raise ImportError(f"VTW_KERNELS_BACKEND: expected one of {', '.join(BACKENDS)}, got {FORCED_BACKEND!r}")


def op_names() -> list[str]:
    """``vtw_kernels::NAME`` of every op that is registered."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vtw_kernels::"))


def interface() -> int:
    """The checksum of the ops that are registered."""
    schemas = [schema for name in op_names() for schema in torch._C._jit_get_schemas_for_operator(name)]
    text = [f"{schema.name}({', '.join(x.name for x in schema.arguments)})" for schema in schemas]
    return zlib.crc32("\n".join(text).encode())


def _is_loaded(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _refuse_second_build() -> None:
    """Raises ImportError if another library has registered these ops: a second one would end the process."""
    folder = Path(__file__).parents[1]
    ours = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists()]
    if op_names() and not any(map(_is_loaded, ours)):
        loaded = ", ".join(torch.ops.loaded_libraries) or "unknown"
        raise ImportError(
            f"vtw_kernels: another build of its ops is loaded in this process (by torch.ops.load_library: {loaded}); "
            "load one of the two"
        )


_refuse_second_build()
try:
    import vtw_kernels._C as _C
    from vtw_kernels._build_info import build_info  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"vtw_kernels is not compiled for this Python and torch {torch.__version__} ({error}); "
        "run: pip install --no-build-isolation ."
    ) from None
if (found := interface()) != INTERFACE:
    raise ImportError(
        f"vtw_kernels: {_C.__file__} was built from other sources than its Python (interface {found:#x}, expected "
        f"{INTERFACE:#x}); run: pip install --no-build-isolation ."
    )
