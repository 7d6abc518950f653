"""Windows on the grids of images, some rows of a grid at a time: the attention of visual rows without all the keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from vtw_kernels.integration.pruning.grids import Grid, near

QUERIES = 128  # of a block, about


class Blocks(NamedTuple):
    """``N`` blocks of rows of grids, with the keys that they may see: neighbouring rows, and text before the image.

    sequence: int64 ``[N]``. rows: int64 ``[N, q]``, of the forward, the first one again where a block is shorter, and
    real: bool ``[N, q]``, those that are not. keys: int64 ``[N, k]``, of the sequence. seen: bool ``[N, q, k]``. text:
    bool ``[N, k]``, which keys are of text; there the model's own mask counts as well.
    """

    sequence: Tensor
    rows: Tensor
    real: Tensor
    keys: Tensor
    seen: Tensor
    text: Tensor

    @property
    def pairs(self) -> int:
        return self.seen.numel()


def make_blocks(grids: list[Grid], places: Tensor, text: Tensor, past: int, radius: int) -> Blocks:
    """All on the CPU.

    Args:
        grids, places: of a forward.
        text: bool ``[B, past + S]``, which tokens of the sequence are text and not padding.
        past: tokens before the forward.
        radius: of the window.
    """
    found = []
    for grid in grids:
        before = text[grid.sequence, : past + grid.first].nonzero().flatten()
        step = max(1, round(QUERIES / grid.width))
        for top in range(0, grid.height, step):
            begin, end = max(0, top - radius), min(grid.height, top + step + radius)
            rows = torch.arange(top * grid.width, min(grid.height, top + step) * grid.width) + grid.first
            around = torch.arange(begin * grid.width, end * grid.width) + grid.first
            found.append((grid.sequence, rows, around, before))
    most = max(len(rows) for _, rows, _, _ in found), max(len(x) + len(y) for _, _, x, y in found)
    shape = (len(found), *most)
    blocks = Blocks(
        torch.tensor([sequence for sequence, *_ in found]),
        torch.zeros(shape[0], shape[1], dtype=torch.long),
        torch.zeros(shape[0], shape[1], dtype=torch.bool),
        torch.zeros(shape[0], shape[2], dtype=torch.long),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape[0], shape[2], dtype=torch.bool),
    )
    for i, (sequence, rows, around, before) in enumerate(found):
        blocks.rows[i] = rows[0]
        blocks.rows[i, : len(rows)], blocks.real[i, : len(rows)] = rows, True
        blocks.keys[i, : len(around)] = around + past
        blocks.keys[i, len(around) : len(around) + len(before)] = before
        blocks.text[i, len(around) : len(around) + len(before)] = True
        blocks.seen[i, :, : len(around)] = near(places[sequence, blocks.rows[i]], places[sequence, around], radius)
        blocks.seen[i, :, len(around) : len(around) + len(before)] = True
    return blocks


def of_blocks(x: Tensor, sequence: Tensor, at: Tensor) -> Tensor:
    """``[N, heads, n, D]`` of ``[B, heads, tokens, D]``, by ``[N, n]``."""
    return x.transpose(1, 2)[sequence[:, None], at].transpose(1, 2)
