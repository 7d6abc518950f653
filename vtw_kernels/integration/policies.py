"""Who leaves when: the layer before which visual rows leave."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn


def chosen_layer(layer: Any, model: nn.Module, num_layers: int) -> int | Sequence[int]:
    """``layer`` as ``withdraw`` takes it, as one layer or as those to draw from.

    Raises:
        TypeError, ValueError: something else; a file or a config that names none, or was made for another model.
    """
    if layer is None:
        layer = _from_config(model.config)
    elif isinstance(layer, str | Path):
        layer = _from_search(Path(layer), model, num_layers)
    drawn = isinstance(layer, Sequence) and len(layer) > 0
    for candidate in layer if drawn else [layer]:
        if isinstance(candidate, bool) or not isinstance(candidate, int):
            raise TypeError(f"layer: expected an int, or some, got {type(candidate).__name__}")
    return layer


def _from_config(config: Any) -> int:
    saved = getattr(config, "vtw", None) or {}
    layer = saved.get("layer") if isinstance(saved, dict) else None
    if layer is None:
        raise ValueError(
            "layer: expected one, as the model's config has none under vtw (the files of an adapter hold no config), got "
            "None"
        )
    if not isinstance(layer, int):
        raise ValueError(
            f"layer: expected one, as the model was trained with one of {layer} drawn for each step, says its config, got "
            "None"
        )
    return layer


def _from_search(path: Path, model: nn.Module, num_layers: int) -> int:
    """What ``LayerSearch.save`` wrote."""
    try:
        search = json.loads(path.read_text())
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"layer: expected a file that LayerSearch.save wrote, got {path}, which is no JSON: {error}") from None
    if not isinstance(search, dict) or not {"layer", "num_layers", "model"} <= search.keys():
        raise ValueError(f"layer: expected a file that LayerSearch.save wrote, got {path}, which is something else")
    if search["num_layers"] != num_layers:
        raise ValueError(
            f"layer: expected a search on a model of {num_layers} decoder layers, got {path}, on {search['model']} of "
            f"{search['num_layers']}"
        )
    name = getattr(model, "name_or_path", "") or ""
    if name and search["model"] not in (name, type(model).__name__):
        warnings.warn(f"layer: {path} is of a search on {search['model']}, and this model is {name}", stacklevel=5)
    if not search.get("settings", {}).get("finished", True):
        warnings.warn(f"layer: {path} is of a search that was stopped before its end", stacklevel=5)
    if search["layer"] is None:
        raise ValueError(f"layer: expected a search that found one, got {path}, in which none is below its threshold")
    return search["layer"]
