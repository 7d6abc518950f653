"""Where visual tokens are in their images, and which are neighbours there."""

from collections import deque
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sizes = Sequence[Sequence[tuple[int, int]]]  # by sequence, of its grids in their order: rows and columns


class Grid(NamedTuple):
    """An image, a tile of one or a frame of a video: ``height * width`` tokens of a forward from ``first`` on."""

    sequence: int
    first: int
    height: int
    width: int


def find_grids(
    visual: Tensor, sizes: Sizes | None, config: Any, inputs: Mapping[str, Any], ids: Tensor | None
) -> list[Grid]:
    """Those of a forward.

    Args:
        visual: bool ``[B, S]`` on the CPU.
        sizes: what the user says; rows are repeated for beams. By default those of ``image_grid_thw`` and
            ``video_grid_thw`` among the inputs, after merging; otherwise each image is taken to be square, or several
            squares of ``image_seq_length`` tokens if the config has that.
        config: of the model.
        inputs: of the model.
        ids: ``[B, S]``, which tell a video from an image; on the CPU.

    Raises:
        ValueError: grids that do not fit the visual tokens.
    """
    batch, grids = len(visual), []
    if sizes is not None and (not sizes or batch % len(sizes)):
        raise ValueError(f"grids: expected one list for each of {batch} sequences, or a divisor, got {len(sizes)}")
    if sizes is None and inputs.get("image_sizes") is not None:
        raise ValueError(
            "grids: expected the rows and columns of each image's tokens, as images of this model are not squares, got "
            "None"
        )
    named = {kind: _merged(config, inputs.get(f"{kind}_grid_thw")) for kind in ("image", "video")}
    video = getattr(config, "video_token_id", None)
    for sequence in range(batch):
        given = deque(sizes[sequence // (batch // len(sizes))]) if sizes is not None else None
        for first, length in _stretches(visual[sequence]):
            kind = "video" if ids is not None and int(ids[sequence, first]) == video else "image"
            queue = given if given is not None else named[kind]
            rest = length
            while rest:
                height, width = _next(queue, rest, config, length)
                if height * width > rest or height * width < 1:
                    raise ValueError(
                        f"grids: expected sizes that add up to the {length} visual tokens from {first} on in sequence "
                        f"{sequence}, got {height} x {width} for {rest} of them"
                    )
                grids.append(Grid(sequence, first + length - rest, height, width))
                rest -= height * width
        _check_used(given)
    for queue in named.values():
        _check_used(queue if sizes is None else None)
    return grids


def within(grids: list[Grid], sequences: int, visual: Tensor, past: int) -> list[Grid]:
    """Of the grids of a prompt of so many sequences, those of one forward, which may repeat each sequence for beams.

    Args:
        visual: bool ``[B, S]`` of the forward, on the CPU.
        past: tokens before it.

    Raises:
        ValueError: it has other visual tokens, as a part of an image.
    """
    batch, tokens = visual.shape
    repeats = batch // sequences
    found = [
        grid._replace(sequence=grid.sequence * repeats + i, first=grid.first - past)
        for grid in grids
        if 0 <= grid.first - past and grid.first - past + grid.height * grid.width <= tokens
        for i in range(repeats)
    ]
    if batch % sequences or not torch.equal(places(found, batch, tokens)[..., 0] >= 0, visual):
        raise ValueError("grids: expected whole images of the prompt in a forward of generate, got a part of one")
    return found


def _stretches(visual: Tensor) -> list[tuple[int, int]]:
    """First tokens and lengths of what no other token interrupts."""
    edges = torch.diff(visual.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    begins, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [(begin, end - begin) for begin, end in zip(begins, ends)]


def _merged(config: Any, grid_thw: Any) -> deque[tuple[int, int]] | None:
    """Of ``[images, 3]`` patches in time, rows and columns."""
    if grid_thw is None:
        return None
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    rows = torch.as_tensor(grid_thw).tolist()
    return deque((height // merge, width // merge) for time, height, width in rows for _ in range(time))


def _next(queue: deque[tuple[int, int]] | None, rest: int, config: Any, length: int) -> tuple[int, int]:
    if queue is not None:
        if not queue:
            raise ValueError(f"grids: expected one for each image, got none for {rest} of {length} visual tokens")
        return queue.popleft()
    tile = getattr(config, "image_seq_length", None)
    tile = tile if isinstance(tile, int) and tile > 0 and length % tile == 0 else length
    side = isqrt(tile)
    if side * side != tile:
        raise ValueError(f"grids: expected rows and columns of images, as {tile} visual tokens are no square, got None")
    return side, side


def _check_used(queue: deque | None) -> None:
    if queue:
        raise ValueError(f"grids: expected one for each image of the forward, got {len(queue)} more")


def places(grids: list[Grid], batch: int, tokens: int) -> Tensor:
    """int64 ``[B, S, 3]`` on the CPU: number of the grid, row and column; -1 for what is in none."""
    result = torch.full((batch, tokens, 3), -1)
    for i, grid in enumerate(grids):
        size = grid.height * grid.width
        at = torch.arange(size)
        place = torch.stack((torch.full((size,), i), at // grid.width, at % grid.width), dim=-1)
        result[grid.sequence, grid.first : grid.first + size] = place
    return result


def near(rows: Tensor, keys: Tensor, radius: int) -> Tensor:
    """bool ``[..., rows, keys]``: which keys are in the window of which row, by ``[..., n, 3]`` of ``places``."""
    rows, keys = rows[..., :, None, :], keys[..., None, :, :]
    same = (rows[..., 0] == keys[..., 0]) & (rows[..., 0] >= 0)
    return same & ((rows[..., 1:] - keys[..., 1:]).abs() <= radius).all(-1)
