"""Compaction against what one would otherwise write: pytest benchmarks/bench_compaction.py [--device cuda]

All text tokens are kept, and of the visual ones none (as in VTW), or a random share that differs between the sequences
of a batch (as if tokens were ranked by attention).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from harness import OURS, Case, Choice, cases, memory_budget, name_of, traits
from torch import Tensor

import vtw_kernels as vtw
from vtw_kernels.bench import MODELS, Model


@dataclass(frozen=True)
class Shape(Model):
    """A model and its prompt: how many of them, in which dtype, and which tokens are kept."""

    batch: int = 1
    share: int = 0  # one in so many visual tokens is kept, at random; 0: none
    dtype: torch.dtype = torch.bfloat16

    @property
    def kept(self) -> int:
        return self.before + self.after + (self.visual // self.share if self.share else 0)

    def __str__(self) -> str:
        batch = f" x {self.batch}" if self.batch > 1 else ""
        dtype = "" if self.dtype == torch.bfloat16 else f", {name_of(self.dtype)}"
        return f"{self.name}{batch}, {self.tokens} to {self.kept}{' at random' if self.share else ''}{dtype}"


LLAVA = Shape(**vars(MODELS["llava-1.5-7b"]))
LLAVA_8 = replace(LLAVA, batch=8)
QWEN = Shape(**vars(MODELS["qwen2.5-vl-7b"]))
QWEN_8 = replace(QWEN, batch=8)
VIDEO = Shape(**vars(MODELS["long-video"]) | {"name": "long video"})


def halved(shape: Shape) -> Shape:
    return replace(shape, share=2)


def shapes_of(choice: Choice, *usual: Shape) -> list[Shape]:
    """Those of the models that were asked for, or the usual ones; in every dtype."""
    full = [Shape(**vars(model)) for model in choice.models]
    chosen = [*full, *map(halved, full)]
    return [replace(shape, dtype=dtype) for dtype in choice.dtypes or (torch.bfloat16,) for shape in chosen or usual]


class Rows(NamedTuple):
    """Which rows are kept, in the form that each peer wants. `segments` is empty where they are not two slices."""

    plan: vtw.CompactionPlan
    keep: Tensor
    index: Tensor
    segments: tuple[tuple[int, int], ...]
    unmoved: int  # rows in front of the first dropped one


def rows_of(shape: Shape, device: str) -> Rows:
    keep = torch.ones(shape.batch, shape.tokens, dtype=torch.bool, device=device)
    visual = keep[:, shape.before : shape.before + shape.visual]
    visual.zero_()
    if shape.share:
        visual.scatter_(1, torch.rand_like(visual, dtype=torch.float).topk(shape.visual // shape.share).indices, True)
    index = keep.nonzero()[:, 1].view(shape.batch, shape.kept)
    segments = ((0, shape.before), (shape.tokens - shape.after, shape.tokens))
    plan = vtw.plan_compaction(keep, length=shape.kept)
    return Rows(plan, keep, index, () if shape.share else segments, shape.before)


class Spec(NamedTuple):
    size: tuple[int, ...]
    token_dim: int
    dtype: torch.dtype

    def make(self, device: str) -> Tensor:
        x = torch.empty(self.size, dtype=self.dtype, device=device)
        return x.uniform_(-1, 1) if self.dtype.is_floating_point else x.random_(0, 2**15)

    def row_bytes(self, shape: Shape) -> int:
        return torch.Size(self.size).numel() * self.dtype.itemsize // (shape.batch * shape.tokens)


def hidden_spec(shape: Shape) -> Spec:
    return Spec((shape.batch, shape.tokens, shape.hidden), 1, shape.dtype)


def layer_specs(shape: Shape) -> list[Spec]:
    per_token = (shape.batch, shape.tokens)
    rotary, integers = Spec((*per_token, shape.head_dim), 1, shape.dtype), Spec(per_token, 1, torch.int64)
    return [hidden_spec(shape), integers, rotary, rotary, integers]


def kv_specs(shape: Shape, count: int) -> list[Spec]:
    return [Spec((shape.batch, shape.kv_heads, shape.tokens, shape.head_dim), 2, shape.dtype)] * count


# Out of place: every peer is written for one tensor, and applied to each of the list.


def cat(x: Tensor, dim: int, rows: Rows) -> Tensor:
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in rows.segments], dim=dim)


def index_select(x: Tensor, dim: int, rows: Rows) -> Tensor:
    return x.index_select(dim, rows.index[0])


def gather(x: Tensor, dim: int, rows: Rows) -> Tensor:
    return gather_rows(x, dim, rows.index)


def gather_rows(x: Tensor, dim: int, index: Tensor) -> Tensor:
    index = index.view(index.shape[0], *[1] * (dim - 1), -1, *[1] * (x.dim() - dim - 1))
    return x.gather(dim, index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def boolean_mask(x: Tensor, dim: int, rows: Rows) -> Tensor:
    if x.shape[0] == 1 or rows.segments:
        return x[(slice(None),) * dim + (rows.keep[0],)]
    return x.movedim(dim, 1)[rows.keep].unflatten(0, rows.index.shape).movedim(1, dim)


def each(function: Callable) -> Callable:
    def peer(tensors: list[Tensor], dims: list[int], rows: Rows) -> list[Tensor]:
        return [function(x, dim, rows) for x, dim in zip(tensors, dims)]

    return peer


def vtw_compact(tensors: list[Tensor], dims: list[int], rows: Rows) -> list[Tensor]:
    return vtw.compact(tensors, rows.plan, dims)


def compact_peers(shape: Shape) -> dict[str, Callable]:
    peers = {OURS: vtw_compact}
    if not shape.share:
        peers |= {"cat": each(cat), "compiled cat": torch.compile(each(cat), dynamic=False)}
    if not shape.share or shape.batch == 1:  # one index for all sequences
        compiled = torch.compile(each(index_select), dynamic=False)
        peers |= {"index_select": each(index_select), "compiled index_select": compiled}
    else:
        peers["compiled gather"] = torch.compile(each(gather), dynamic=False)
    return peers | {"gather": each(gather), "boolean mask": traits(syncs=True)(each(boolean_mask))}


# In place: rows in front of the first dropped one stay where they are.


def vtw_compact_(tensors: list[Tensor], dims: list[int], rows: Rows) -> None:
    vtw.compact_(tensors, rows.plan, dims)


def suffixes(tensors: list[Tensor], dims: list[int], rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Where the kept suffix goes, and where it is; they do not overlap."""
    start, stop = rows.segments[1]
    to = [x.narrow(dim, rows.unmoved, stop - start) for x, dim in zip(tensors, dims)]
    return to, [x.narrow(dim, start, stop - start) for x, dim in zip(tensors, dims)]


def slice_copies(tensors: list[Tensor], dims: list[int], rows: Rows) -> None:
    for to, suffix in zip(*suffixes(tensors, dims, rows)):
        to.copy_(suffix)


def foreach_copy(tensors: list[Tensor], dims: list[int], rows: Rows) -> None:
    torch._foreach_copy_(*suffixes(tensors, dims, rows))


def index_select_copy(tensors: list[Tensor], dims: list[int], rows: Rows) -> None:
    index = rows.index[0, rows.unmoved :]
    for x, dim in zip(tensors, dims):
        x.narrow(dim, rows.unmoved, len(index)).copy_(x.index_select(dim, index))


def gather_copy(tensors: list[Tensor], dims: list[int], rows: Rows) -> None:
    index = rows.index[:, rows.unmoved :]
    for x, dim in zip(tensors, dims):
        x.narrow(dim, rows.unmoved, index.shape[1]).copy_(gather_rows(x, dim, index))


def compact_inplace_peers(shape: Shape) -> dict[str, Callable]:
    peers = {OURS: vtw_compact_}
    if not shape.share:
        peers |= {"slice copies": slice_copies, "foreach copy": foreach_copy, "cat (new tensors)": each(cat)}
    if not shape.share or shape.batch == 1:
        peers["index_select + copy"] = index_select_copy
    return peers | {"gather + copy": gather_copy}


def fronts(args: tuple, returned: list[Tensor] | None) -> list[Tensor]:
    """What is compared after a call in place, or after a peer that makes new tensors instead."""
    tensors, dims, rows = args
    return returned or [x.narrow(dim, 0, rows.index.shape[1]) for x, dim in zip(tensors, dims)]


def compaction_case(title: str, shape: Shape, specs: list[Spec], in_place: bool = False) -> Case:
    def make(device: str) -> tuple:
        return [spec.make(device) for spec in specs], [spec.token_dim for spec in specs], rows_of(shape, device)

    moving = shape.batch * (shape.kept - (shape.before if in_place else 0))
    moved = 2 * moving * sum(spec.row_bytes(shape) for spec in specs)
    peers = (compact_inplace_peers if in_place else compact_peers)(shape)
    return Case(f"{title}, {shape}", peers, make, moved, result=fronts if in_place else lambda args, returned: returned)


def hidden_states(choice: Choice) -> Iterator[Case]:
    for shape in shapes_of(choice, LLAVA, QWEN_8, VIDEO, halved(LLAVA), halved(QWEN_8), halved(VIDEO)):
        yield compaction_case("hidden", shape, [hidden_spec(shape)])


def hidden_in_place(choice: Choice) -> Iterator[Case]:
    for shape in shapes_of(choice, LLAVA, QWEN_8, VIDEO, halved(LLAVA), halved(QWEN_8), halved(VIDEO)):
        yield compaction_case("hidden in place", shape, [hidden_spec(shape)], in_place=True)


def layer_inputs(choice: Choice) -> Iterator[Case]:
    for shape in shapes_of(choice, LLAVA, LLAVA_8, QWEN, VIDEO, halved(LLAVA_8)):
        yield compaction_case("hidden, positions, cos, sin, mask", shape, layer_specs(shape))


def kv_lists(choice: Choice) -> Iterator[tuple[Shape, int, str]]:
    """Shapes, and how many key and value tensors: of all layers, of some, or as many as this device has memory for."""
    lists = [(LLAVA, 28), (LLAVA, 56), (LLAVA, 64), (LLAVA_8, 64), (QWEN, 56), (VIDEO, 56)]
    lists += [(halved(LLAVA), 64), (halved(QWEN_8), 56), (halved(VIDEO), 56)]
    if choice.models or choice.dtypes:
        lists = [(shape, 2 * shape.layers) for shape in shapes_of(choice, *dict.fromkeys(shape for shape, _ in lists))]
    for shape, wanted in lists:
        [spec] = kv_specs(shape, 1)
        each_bytes = spec.row_bytes(shape) * shape.batch * shape.tokens
        count = min(
            wanted, int(memory_budget(choice.device) / (4 * each_bytes))
        )  # the check holds the list about four times
        yield shape, count, f"{count} KV tensors" if count == wanted else f"{count} (not {wanted}) KV tensors"


def kv_out_of_place(choice: Choice) -> Iterator[Case]:
    for shape, count, title in kv_lists(choice):
        yield compaction_case(title, shape, kv_specs(shape, count))


def kv_in_place(choice: Choice) -> Iterator[Case]:
    for shape, count, title in kv_lists(choice):
        yield compaction_case(f"{title} in place", shape, kv_specs(shape, count), in_place=True)


# Paged: vLLM's caches, one [2, blocks, block size, heads, dim] a layer, with the blocks of a sequence anywhere.

BLOCK = 16


class Slots(NamedTuple):
    """Rows of a cache seen as [blocks * block size, heads, dim]: what moves, whereto, and where the kept rows end."""

    source: Tensor
    target: Tensor
    kept: Tensor


def vtw_paged(caches: list[Tensor], block_table: Tensor, lengths: Tensor, keep: Tensor, slots: Slots) -> None:
    vtw.compact_paged_(caches, block_table, lengths, keep, layout="NHD")


def indexing(caches: list[Tensor], block_table: Tensor, lengths: Tensor, keep: Tensor, slots: Slots) -> None:
    for cache in caches:
        flat = cache.flatten(0, 1)
        flat[slots.target] = flat[slots.source]


def index_copy(caches: list[Tensor], block_table: Tensor, lengths: Tensor, keep: Tensor, slots: Slots) -> None:
    for cache in caches:
        flat = cache.flatten(0, 1)
        flat.index_copy_(0, slots.target, flat.index_select(0, slots.source))


def paged_result(args: tuple, returned: None) -> list[Tensor]:
    caches, *_, slots = args
    return [cache.flatten(0, 1)[slots.kept] for cache in caches]


def paged_case(title: str, shape: Shape, count: int) -> Case:
    def make(device: str) -> tuple:
        per_sequence = -(-shape.tokens // BLOCK)
        blocks = shape.batch * per_sequence
        block_table = torch.randperm(blocks, device=device).view(shape.batch, per_sequence)
        token = torch.arange(shape.tokens, device=device)
        slot = block_table[:, token // BLOCK] * BLOCK + token % BLOCK
        rows = rows_of(shape, device)
        kept = slot[:, : shape.kept]
        moving = slot.gather(1, rows.index)[:, rows.unmoved :]
        slots = Slots(moving.flatten(), kept[:, rows.unmoved :].flatten(), kept)
        size = (2, blocks, BLOCK, shape.kv_heads, shape.head_dim)
        layers = [torch.empty(size, dtype=shape.dtype, device=device).uniform_(-1, 1) for _ in range(count // 2)]
        lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)
        caches = [cache for layer in layers for cache in layer.unbind()]
        return caches, block_table.int(), lengths, rows.keep, slots

    row = shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    moved = 2 * shape.batch * (shape.kept - shape.before) * row * (count // 2 * 2)
    peers = {OURS: vtw_paged, "indexing": indexing, "index_select + index_copy_": index_copy}
    return Case(f"{title} paged, {shape}", peers, make, moved, result=paged_result)


def paged(choice: Choice) -> Iterator[Case]:
    for shape, count, title in kv_lists(choice):
        yield paged_case(title, shape, count)


# Expansion, which is also the backward of compaction.


def vtw_expand(x: Tensor, rows: Rows, tokens: int) -> Tensor:
    return vtw.expand([x], rows.plan, tokens, 1)[0]


def scatter(x: Tensor, rows: Rows, tokens: int) -> Tensor:
    index = rows.index.unsqueeze(-1).expand_as(x)
    return x.new_zeros(x.shape[0], tokens, x.shape[2]).scatter_(1, index, x)


def zeros_and_index_copy(x: Tensor, rows: Rows, tokens: int) -> Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2]).index_copy_(1, rows.index[0], x)


def zeros_and_slices(x: Tensor, rows: Rows, tokens: int) -> Tensor:
    out, first = x.new_zeros(x.shape[0], tokens, x.shape[2]), 0
    for start, stop in rows.segments:
        out[:, start:stop] = x[:, first : (first := first + stop - start)]
    return out


def expansions(choice: Choice) -> Iterator[Case]:
    for shape in shapes_of(choice, LLAVA, QWEN_8, VIDEO, halved(LLAVA), halved(QWEN_8)):

        def make(device: str, shape=shape) -> tuple:
            kept = Spec((shape.batch, shape.kept, shape.hidden), 1, shape.dtype).make(device)
            return kept, rows_of(shape, device), shape.tokens

        peers = {OURS: vtw_expand, "zeros + scatter": scatter}
        if not shape.share:
            peers["zeros + slices"] = zeros_and_slices
        if not shape.share or shape.batch == 1:
            peers["zeros + index_copy_"] = zeros_and_index_copy
        moved = shape.batch * (shape.kept + shape.tokens) * shape.hidden * shape.dtype.itemsize
        yield Case(f"hidden expanded, {shape}", peers, make, moved)


# Plans: from the mask to the rows that are kept.


def vtw_plan(keep: Tensor, kept: int) -> Tensor:
    return vtw.plan_compaction(keep, length=kept).source


def argsort(keep: Tensor, kept: int) -> Tensor:
    return (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]


def cumsum_and_scatter(keep: Tensor, kept: int) -> Tensor:
    """Dropped tokens all go to a column behind the plan."""
    slot = torch.where(keep, keep.cumsum(dim=1) - 1, kept)
    tokens = torch.arange(keep.shape[1], device=keep.device).expand_as(slot)
    return slot.new_empty(keep.shape[0], kept + 1).scatter_(1, slot, tokens)[:, :kept]


@traits(syncs=True)
def nonzero(keep: Tensor, kept: int) -> Tensor:
    return keep.nonzero()[:, 1].view(-1, kept)


def plans(choice: Choice) -> Iterator[Case]:
    shapes = shapes_of(choice._replace(dtypes=()), LLAVA, LLAVA_8, VIDEO, halved(LLAVA_8), halved(VIDEO))
    peers = {OURS: vtw_plan, "argsort": argsort, "cumsum + scatter": cumsum_and_scatter, "nonzero": nonzero}
    for shape in shapes:

        def make(device: str, shape=shape) -> tuple:
            return rows_of(shape, device).keep, shape.kept

        moved = shape.batch * (shape.tokens + 4 * shape.kept + 4)
        yield Case(f"plan, {shape}", peers, make, moved, result=lambda args, returned: returned.int())


@pytest.mark.op("compact")
@cases(hidden_states)
def test_hidden_states(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("compact")
@cases(layer_inputs)
def test_layer_inputs(measure, case, peer):
    """What one forward compacts at the withdrawal layer."""
    measure(case, peer)


@pytest.mark.op("compact")
@cases(kv_out_of_place)
def test_kv_out_of_place(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("compact_")
@cases(hidden_in_place)
def test_hidden_in_place(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("compact_")
@cases(kv_in_place)
def test_kv_in_place(measure, case, peer):
    measure(case, peer)


@pytest.mark.skipif(not hasattr(vtw, "compact_paged_"), reason="this vtw_kernels has no compact_paged_")
@pytest.mark.op("compact_paged_")
@cases(paged)
def test_paged(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("expand")
@cases(expansions)
def test_expand(measure, case, peer):
    measure(case, peer)


@pytest.mark.op("plan_compaction")
@cases(plans)
def test_plan(measure, case, peer):
    measure(case, peer)
