"""What a call costs if there is next to nothing to move: pytest benchmarks/bench_overhead.py [--device cuda]

The roof is an op with the same signature that does nothing, called as ours is: what Python, the dispatcher and the
lists of arguments take. On CUDA, calls are timed outside of graphs, as the host issues them.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from bench_compaction import (
    Rows,
    Shape,
    cat,
    compaction_case,
    each,
    foreach_copy,
    hidden_spec,
    index_select,
    index_select_copy,
    kv_specs,
    slice_copies,
    vtw_compact,
    vtw_compact_,
)
from harness import OURS, Case, Choice, cases, traits
from torch import Tensor
from torch.utils import cpp_extension

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the op that does nothing needs a C++ compiler")
SIZES = dict(layers=32, heads=2, kv_heads=2, hidden=4, intermediate=8, vocabulary=8, head_dim=4)
TINY = Shape("tiny", **SIZES, before=2, visual=4, after=2)


@cache
def empty_ops():
    source = Path(__file__).with_name("empty_op.cpp")
    flags = ["-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    cpp_extension.load("vtw_kernels_empty", [str(source)], extra_cflags=flags, is_python_module=False)
    return torch.ops.vtw_kernels_empty


def direct(op: Callable) -> Callable:
    """The op itself, without its Python function."""

    def call(tensors: list[Tensor], dims: list[int], rows: Rows) -> list[Tensor] | None:
        return op(tensors, dims, [0] * len(tensors), rows.plan.source)

    return call


OUT_OF_PLACE = {
    OURS: vtw_compact,
    f"{OURS} by torch.ops": direct(torch.ops.vtw_kernels.compact.default),
    "cat": each(cat),
    "index_select": each(index_select),
}
IN_PLACE = {
    OURS: vtw_compact_,
    f"{OURS} by torch.ops": direct(torch.ops.vtw_kernels.compact_.default),
    "slice copies": slice_copies,
    "foreach copy": foreach_copy,
    "index_select + copy": index_select_copy,
}


def eager(function: Callable) -> Callable:
    """Timed outside of a CUDA graph, which would leave out the host."""

    @traits(syncs=True)
    def call(*args):
        return function(*args)

    return call


def overhead_case(title: str, specs: list, in_place: bool = False, grad: bool = False) -> Case:
    case = compaction_case(title, TINY, specs, in_place)
    empty = direct((empty_ops().compact_ if in_place else empty_ops().compact).default)
    peers = {name: eager(peer) for name, peer in (IN_PLACE if in_place else OUT_OF_PLACE).items()}

    def make(device: str) -> tuple:
        tensors, *rest = case.make(device)
        return [x.requires_grad_(grad) for x in tensors], *rest

    return replace(case, peers=peers, make=make, roof=eager(empty), grad=grad)


def calls(choice: Choice) -> Iterator[Case]:
    if COMPILER is None:
        return
    hidden, keys = [hidden_spec(TINY)], kv_specs(TINY, 64)
    yield overhead_case("1 tensor", hidden)
    yield overhead_case("64 tensors", keys)
    yield overhead_case("1 tensor that requires a gradient", hidden, grad=True)
    yield overhead_case("1 tensor in place", hidden, in_place=True)
    yield overhead_case("64 tensors in place", keys, in_place=True)


@cases(calls)
def test_overhead(measure, case, peer):
    measure(case, peer)
