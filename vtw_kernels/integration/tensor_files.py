"""Files of safetensors with JSON as metadata, in which gates and prunings are saved."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_tensors(path: str | Path, tensors: dict[str, Tensor], format: str, **metadata: Any) -> None:
    """Writes tensors, and JSON as metadata. Readers see the old file or the new one.

    Args:
        format: a name for what is in the file, by which ``open_tensors`` tells it.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    # Several entries of metadata would be written in another order each time; and files of save_file can be read by
    # their owner alone.
    part.write_bytes(save(tensors, {"vtw_kernels": json.dumps({"format": format} | metadata)}))
    os.replace(part, path)


@contextmanager
def open_tensors(path: str | Path, format: str, writer: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens a file that ``write_tensors`` wrote: an open file of safetensors, and the metadata.

    Args:
        writer: the function that writes such files, for errors.

    Raises:
        OSError: it can't be read.
        ValueError: it is something else, or what it holds is refused in this context by an error.
    """
    Path(path).open("rb").close()  # safetensors does not name a file that it can't read
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("vtw_kernels", "{}"))
            if (given := metadata.get("format")) != format:
                raise ValueError(f"the format {given!r}")
            yield file, metadata
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected what {writer} wrote, got {error}") from error
