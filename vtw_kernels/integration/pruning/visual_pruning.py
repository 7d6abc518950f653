"""The description of a pruning: which heads, which attention, which columns of the MLP and which layers visual tokens
go without."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtw_kernels.integration.projections import Projections
from vtw_kernels.integration.tensor_files import open_tensors, write_tensors

FORMAT = "visual pruning, 1"
NUMBERS = ("window", "ffn_ratio", "layer_cut", "renormalize")


@dataclass(frozen=True, eq=False)
class VisualPruning:
    """Cheaper visual tokens, all of which stay: *Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to
    See* (YOPO, arXiv 2410.06169). Each part may be left out, as it is by default; text is computed in full.

    Args:
        heads: bool ``[L, heads]``, which heads of which decoder layers have to do with visual tokens. In the others,
            no row attends to visual tokens, and what they put out for visual rows is zero. Heads of queries: some that
            share their keys with others may be among them. Layer 0, whose cache says how long a sequence is, has to
            keep at least one. See ``find_visual_heads``.
        window: an odd number. A visual token attends, among visual tokens, to those alone that are at most
            ``(window - 1) / 2`` rows and columns away from it in the grid of its own image, before and after it.
            Tiles of an image and frames of a video are grids of their own.
        ffn_ratio: visual rows go through the first ``int(columns / ffn_ratio)`` columns of each MLP alone.
        layer_cut: no row attends to visual tokens from this decoder layer on: 1..L.
        renormalize: True as in the authors' code for Qwen2-VL: what is left of a row's attention weights is a softmax,
            so that a layer cut is ``Withdraw``. False as in their checkpoints of LLaVA, which were trained with it:
            weights on visual tokens that a head or a layer does not see are computed and left out, so that those of a
            row sum up to less than 1. Then keys of visual tokens are needed everywhere, and caches are as large as the
            model's; what is saved are the other projections of visual rows.

    Raises:
        TypeError, ValueError: an argument is not of that kind.
    """

    heads: Tensor | None = None
    window: int | None = None
    ffn_ratio: float | None = None
    layer_cut: int | None = None
    renormalize: bool = True

    def __post_init__(self) -> None:
        heads = self.heads
        if heads is not None and not (isinstance(heads, Tensor) and heads.dtype == torch.bool and heads.ndim == 2):
            given = f"{heads.dtype} {list(heads.shape)}" if isinstance(heads, Tensor) else type(heads).__name__
            raise TypeError(f"heads: expected bool [L, heads] or None, got {given}")
        if heads is not None and not (heads.numel() and heads[0].any()):
            raise ValueError("heads: expected at least one in layer 0, whose cache says how long a sequence is, got 0")
        if not (self.window is None or (_is_int(self.window) and self.window >= 1 and self.window % 2)):
            raise ValueError(f"window: expected an odd number of at least 1, or None, got {self.window!r}")
        ratio = self.ffn_ratio
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not ratio >= 1):
            raise ValueError(f"ffn_ratio: expected a number of at least 1, or None, got {ratio!r}")
        if not (self.layer_cut is None or (_is_int(self.layer_cut) and self.layer_cut >= 1)):
            raise ValueError(f"layer_cut: expected a layer of at least 1, or None, got {self.layer_cut!r}")
        if not isinstance(self.renormalize, bool):
            raise TypeError(f"renormalize: expected a bool, got {self.renormalize!r}")

    def __repr__(self) -> str:
        heads = "None" if self.heads is None else f"{int(self.heads.sum())} of {self.heads.numel()}"
        return f"VisualPruning(heads={heads}, {', '.join(f'{x}={getattr(self, x)}' for x in NUMBERS)})"

    def check_model(self, layers: list[Projections]) -> None:
        """Raises ValueError for a model that this is not made for.

        Args:
            layers: of its decoder.
        """
        if self.heads is not None:
            wanted = (len(layers), layers[0].heads)
            if any(x.heads != wanted[1] for x in layers) or tuple(self.heads.shape) != wanted:
                sizes = ", ".join(dict.fromkeys(str(x.heads) for x in layers))
                raise ValueError(
                    f"heads: expected bool [{wanted[0]}, {sizes}], of the layers and heads of this model, got "
                    f"{list(self.heads.shape)}"
                )
        if self.layer_cut is not None and self.layer_cut > len(layers):
            raise ValueError(f"layer_cut: expected 1..{len(layers)}, got {self.layer_cut}")
        if self.ffn_ratio is not None:
            for layer in layers:
                if int(layer.gate.out_features / self.ffn_ratio) < 1:
                    raise ValueError(
                        f"ffn_ratio: expected at most {layer.gate.out_features}, the columns of the MLP, got "
                        f"{self.ffn_ratio}"
                    )

    def save(self, path: str | Path) -> None:
        """Writes safetensors: ``heads``, if there are any, and the numbers as JSON. Readers see the old file or the
        new."""
        tensors = {} if self.heads is None else {"heads": self.heads.cpu().contiguous()}
        write_tensors(path, tensors, FORMAT, pruning={name: getattr(self, name) for name in NUMBERS})

    @classmethod
    def load(cls, path: str | Path) -> "VisualPruning":
        """Reads what ``save`` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: something else.
        """
        with open_tensors(path, FORMAT, "VisualPruning.save") as (file, metadata):
            return cls(**{name: file.get_tensor(name) for name in file.keys()}, **metadata["pruning"])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
