"""Triton's interpreter runs the programs of a grid in ascending order, which hides what one program does to another.
Here they run in random order."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from triton.runtime import interpreter


@contextmanager
def permuted_grid(seed: int) -> Iterator[None]:
    """While it lasts, the i-th program of a launch is the one at a random place of its grid; another order each launch.

    Raises:
        RuntimeError: this Triton's interpreter sets the place of a program in another way.
    """
    builder = interpreter.interpreter_builder
    if not hasattr(builder, "set_grid_idx") or not hasattr(builder, "set_grid_dim"):
        raise RuntimeError("permuted_grid: this Triton's interpreter has no set_grid_idx and set_grid_dim")
    set_index, set_size = builder.set_grid_idx, builder.set_grid_dim
    generator = random.Random(seed)
    orders: list[list[int]] = []

    def set_grid_dim(*sizes):
        orders[:] = [generator.sample(range(size), size) for size in sizes]
        set_size(*sizes)

    def set_grid_idx(*index):
        set_index(*(order[i] for order, i in zip(orders, index)))

    builder.set_grid_idx, builder.set_grid_dim = set_grid_idx, set_grid_dim
    try:
        yield
    finally:
        del builder.set_grid_idx, builder.set_grid_dim
