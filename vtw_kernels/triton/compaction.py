"""Compaction in Triton: the ops of ``ops/compaction.py``, for tensors on a GPU.

A tensor is seen as *lanes*: one for each index of all dimensions but the batch, the token and those whose elements are
contiguous; a row of a lane is a *block* of contiguous bytes. Tensors of one list that share their geometry, as the keys
and values of all layers do, go in one launch, at most ``GROUP`` of them; their addresses are plain arguments of the
kernel, so nothing is copied to the device first. Offsets are 64-bit, and any value of a plan or a block table keeps to
the tensors.

By default, Triton compiles a kernel again for each combination of integer arguments that are or are not multiples of
16: here lengths, strides, and every address of a list. That would gain nothing, as VECTOR already says what strides and
addresses are multiples of. So all these arguments are excluded from it (``do_not_specialize_on_alignment``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtw_kernels.ops.checks import check_disjoint, check_keep, check_paged, check_tensors, paged_sizes, require
from vtw_kernels.triton.launch import launch

GROUP = 16
DIMS = 3  # more than any layout of a decoder has; the rest is unrolled
THREADS = 256
ON_HIP = torch.version.hip is not None
PLAN_TILE = 1024
# A vector of 16 bytes is two elements, which Triton joins to one access, as it has no type of 16 bytes.
ELEMENTS = {16: tl.uint64, 8: tl.uint64, 4: tl.uint32, 2: tl.uint16, 1: tl.uint8}


# --- geometry -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lanes:
    """What tensors of one launch share. Strides are in vectors; a vector is the widest that all of them allow."""

    vector: int  # bytes
    columns: int  # vectors in the block of a row
    limit: int  # rows that may be read; paged: pages
    count: int  # lanes per sequence
    sizes: tuple[int, ...]  # of the dimensions that lanes are made of, innermost first; the last is not needed
    from_strides: tuple[int, ...]
    to_strides: tuple[int, ...]
    from_batch: int  # paged: a batch is a page
    to_batch: int
    from_row: int
    to_row: int


def describe(source: Tensor, target: Tensor, token_dim: int, batch_dim: int) -> Iterator[tuple[Lanes, int, int]]:
    """The geometry of a tensor and where it goes, and both addresses; more than one if it has too many dimensions."""
    item = source.element_size()

    def strides(dim: int) -> tuple[int, int]:
        # A dimension of size 1 takes no step; a source of batch size 1 serves every sequence.
        return tuple(0 if x.shape[dim] == 1 else x.stride(dim) * item for x in (source, target))

    others = [d for d in range(source.dim()) if d not in (token_dim, batch_dim) and source.shape[d] != 1]
    others.sort(key=lambda d: target.stride(d))
    block, dims = item, []
    for d in others:
        step, size = strides(d), source.shape[d]
        if not dims and step == (block, block):
            block *= size
        elif dims and step == tuple(stride * dims[-1][0] for stride in dims[-1][1]):  # goes on where the last one ends
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, step))
    from_batch, to_batch = strides(batch_dim)
    from_row, to_row = strides(token_dim)

    kept, unrolled = dims[:DIMS], dims[DIMS:]
    offsets = [(0, 0)]
    for size, (a, b) in unrolled:
        offsets = [(x + i * a, y + i * b) for x, y in offsets for i in range(size)]
    kept += [(1, (0, 0))] * (DIMS - len(kept))
    steps = [from_batch, to_batch, from_row, to_row, *(stride for _, pair in kept for stride in pair)]
    count = 1
    for size, _ in kept:
        count *= size
    first = source.data_ptr() or target.data_ptr()  # an empty tensor has no address, and nothing is read of it
    for from_offset, to_offset in offsets:
        addresses = first + from_offset, target.data_ptr() + to_offset
        vector = next(v for v in ELEMENTS if all(x % v == 0 for x in (*addresses, block, *steps)))
        lanes = Lanes(
            vector,
            block // vector,
            source.shape[token_dim],
            count,
            tuple(size for size, _ in kept[:-1]),
            tuple(pair[0] // vector for _, pair in kept),
            tuple(pair[1] // vector for _, pair in kept),
            *(step // vector for step in (from_batch, to_batch, from_row, to_row)),
        )
        yield lanes, *addresses


def launches(described: list[tuple[Lanes, int, int]]) -> Iterator[tuple[Lanes, int, tuple[int, ...], tuple[int, ...]]]:
    """Lanes, the number of tensors, and their addresses, filled up to ``GROUP`` and as ``pointer`` takes them."""
    groups: dict[Lanes, list[tuple[int, int]]] = {}
    for lanes, *addresses in described:
        groups.setdefault(lanes, []).append(addresses)
    for lanes, pairs in groups.items():
        for first in range(0, len(pairs), GROUP):
            some = pairs[first : first + GROUP]
            full = some + some[:1] * (GROUP - len(some))
            # Twice the address plus 1: for elements of a tuple, Triton looks at alignment in any case, and odd numbers
            # all look alike.
            yield lanes, len(some), tuple(2 * a + 1 for a, _ in full), tuple(2 * b + 1 for _, b in full)


def tile_vectors(lanes: Lanes) -> int:
    """Of a program: 64 bytes in flight per thread or, of narrow vectors, 16 of them."""
    return 1024 if lanes.vector == 16 else 4096


def power_of_2(size: int, most: int) -> int:
    return min(triton.next_power_of_2(max(1, size)), most)


@triton.jit
def pointer(addresses, index, ELEMENT: tl.constexpr, VECTOR: tl.constexpr):
    """The tensor of this program."""
    address = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        address = tl.where(index == i, addresses[i], address)
    return tl.multiple_of((address >> 1).to(tl.pointer_type(ELEMENT)), VECTOR)


@triton.jit
def lane_offset(lane, size_0, size_1, stride_0, stride_1, stride_2):
    return lane % size_0 * stride_0 + lane // size_0 % size_1 * stride_1 + lane // (size_0 * size_1) * stride_2


# --- plan -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=["keep_batch", "keep_token", "limit_stride", "tokens", "rows"])
def plan_kernel(
    keep, keep_batch, keep_token, limits, limit_stride, tokens, rows, source, lengths,
    PAD_LEFT: tl.constexpr, LIMITED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A stable scan of one sequence. Left padding scans from the end and fills from the end, so that a plan that is cut
    short loses its first kept rows."""
    sequence = tl.program_id(0).to(tl.int64)
    keep += sequence * keep_batch
    source += sequence * rows
    if LIMITED:
        tokens = tl.minimum(tokens, tl.maximum(tl.load(limits + sequence * limit_stride), 0))
    kept = tl.zeros((), tl.int64)
    for tile in range(0, tokens, TILE):
        scanned = tile + tl.arange(0, TILE).to(tl.int64)
        token = tokens - 1 - scanned if PAD_LEFT else scanned
        flag = tl.load(keep + token * keep_token, mask=scanned < tokens, other=0) != 0
        slot = kept + tl.cumsum(flag.to(tl.int32), 0) - 1
        row = rows - 1 - slot if PAD_LEFT else slot
        tl.store(source + row, token.to(tl.int32), mask=flag & (slot < rows))
        kept += tl.sum(flag.to(tl.int32), 0)
    kept = tl.minimum(kept, rows)
    for tile in range(kept, rows, TILE):
        slot = tile + tl.arange(0, TILE)
        row = rows - 1 - slot if PAD_LEFT else slot
        tl.store(source + row, -1, mask=slot < rows)
    tl.store(lengths + sequence, kept.to(tl.int32))


@triton.jit(do_not_specialize_on_alignment=["plan_batch", "plan_row", "rows", "length", "tiles"])
def invert_kernel(plan, plan_batch, plan_row, rows, length, inverse, tiles, TILE: tl.constexpr):
    """inverse[row] = the slot that holds it: what turns expand into a gather."""
    sequence = tl.program_id(0).to(tl.int64) // tiles
    slot = tl.program_id(0).to(tl.int64) % tiles * TILE + tl.arange(0, TILE)
    row = tl.load(plan + sequence * plan_batch + slot * plan_row, mask=slot < rows, other=-1).to(tl.int64)
    tl.store(inverse + sequence * length + row, slot.to(tl.int32), mask=(row >= 0) & (row < length))


def make_plan(keep: Tensor, limits: Tensor | None, rows: int, pad_left: bool) -> tuple[Tensor, Tensor]:
    batch, tokens = keep.shape
    source = keep.new_empty(batch, rows, dtype=torch.int32)
    lengths = keep.new_empty(batch, dtype=torch.int32)
    limit = (lengths, 0) if limits is None else (limits, limits.stride(0))
    launch(
        plan_kernel, batch, keep, keep.view(torch.uint8), *keep.stride(), *limit, tokens, rows, source, lengths,
        PAD_LEFT=pad_left, LIMITED=limits is not None, TILE=PLAN_TILE,
    )  # fmt: skip
    return source, lengths


# --- gather ---------------------------------------------------------------------------------------


OF_PLAN = ["plan_batch", "plan_row", "rows", "batch"]
OF_LANES = ["columns", "limit", "count", "size_0", "size_1"]
STEPS = ["from_0", "from_1", "from_2", "to_0", "to_1", "to_2", "from_batch", "to_batch", "from_row", "to_row"]


@triton.jit(do_not_specialize_on_alignment=[*OF_PLAN, *OF_LANES, *STEPS])
def gather_kernel(
    sources, targets, plan, plan_batch, plan_row, rows, batch, columns, limit, count, size_0, size_1,
    from_0, from_1, from_2, to_0, to_1, to_2, from_batch, to_batch, from_row, to_row,
    ELEMENT: tl.constexpr, VECTOR: tl.constexpr, PER_VECTOR: tl.constexpr, POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of positions (the rows of all lanes of a sequence, one after another) by columns."""
    program = tl.program_id(0).to(tl.int64)
    column_tiles, position_tiles = tl.cdiv(columns, COLUMNS), tl.cdiv(count * rows, POSITIONS)
    column = program % column_tiles * COLUMNS * PER_VECTOR + tl.arange(0, COLUMNS * PER_VECTOR)
    program //= column_tiles
    position = program % position_tiles * POSITIONS + tl.arange(0, POSITIONS)
    program //= position_tiles
    sequence = program % batch
    tensor = program // batch

    lane, row = position // rows, position % rows
    exists = position < count * rows
    source = tl.load(plan + sequence * plan_batch + row * plan_row, mask=exists, other=-1).to(tl.int64)
    start = sequence * from_batch + source * from_row
    start += lane_offset(lane, size_0, size_1, from_0, from_1, from_2)
    end = sequence * to_batch + row * to_row
    end += lane_offset(lane, size_0, size_1, to_0, to_1, to_2)
    inside = column[None, :] < columns * PER_VECTOR
    read = ((source >= 0) & (source < limit) & exists)[:, None] & inside
    source_pointer, target_pointer = (
        pointer(sources, tensor, ELEMENT, VECTOR),
        pointer(targets, tensor, ELEMENT, VECTOR),
    )
    value = tl.load(source_pointer + start[:, None] * PER_VECTOR + column[None, :], mask=read, other=0)
    tl.store(target_pointer + end[:, None] * PER_VECTOR + column[None, :], value, mask=exists[:, None] & inside)


def gather(tensors: list[Tensor], dims: list[tuple[int, int]], plan: Tensor) -> list[Tensor]:
    batch, rows = plan.shape
    results, described = [], []
    for x, (token_dim, batch_dim) in zip(tensors, dims):
        shape = list(x.shape)
        shape[token_dim], shape[batch_dim] = rows, batch
        results.append(x.new_empty(shape))
        if results[-1].numel():
            described += describe(x, results[-1], token_dim, batch_dim)
    for lanes, number, sources, targets in launches(described):
        tile_columns = power_of_2(lanes.columns, 256)
        tile_positions = power_of_2(lanes.count * rows, tile_vectors(lanes) // tile_columns)
        tiles = triton.cdiv(lanes.columns, tile_columns) * triton.cdiv(lanes.count * rows, tile_positions)
        launch(
            gather_kernel, number * batch * tiles, plan, sources, targets, plan, *plan.stride(), rows, batch,
            lanes.columns, lanes.limit, lanes.count, *lanes.sizes, *lanes.from_strides, *lanes.to_strides,
            lanes.from_batch, lanes.to_batch, lanes.from_row, lanes.to_row,
            POSITIONS=tile_positions, COLUMNS=tile_columns, **kernel_options(lanes),
        )  # fmt: skip
    return results


def kernel_options(lanes: Lanes) -> dict:
    return {
        "ELEMENT": ELEMENTS[lanes.vector],
        "VECTOR": lanes.vector,
        "PER_VECTOR": 2 if lanes.vector == 16 else 1,
        "threads": THREADS,
    }


# --- move -----------------------------------------------------------------------------------------


@triton.jit
def row_offset(lanes_batch, lanes_row, limit, table, table_batch, table_column, columns, page_size, sequence, row,
               exists, PAGED: tl.constexpr):  # fmt: skip
    """Where logical rows lie, and whether they do."""
    if PAGED:
        page_column = row // page_size
        exists &= (row >= 0) & (page_column < columns)
        page = tl.load(table + sequence * table_batch + page_column * table_column, mask=exists, other=-1).to(tl.int64)
        return page * lanes_batch + row % page_size * lanes_row, exists & (page >= 0) & (page < limit)
    return sequence * lanes_batch + row * lanes_row, exists & (row >= 0) & (row < limit)


OF_TABLE = ["table_batch", "table_column", "table_columns", "page_size"]
STRIDES = ["stride_0", "stride_1", "stride_2", "lanes_batch", "lanes_row"]


@triton.jit(do_not_specialize_on_alignment=[*OF_PLAN, *OF_TABLE, *OF_LANES, *STRIDES])
def move_kernel(
    addresses, plan, plan_batch, plan_row, rows, batch, table, table_batch, table_column, table_columns, page_size,
    columns, limit, count, size_0, size_1, stride_0, stride_1, stride_2, lanes_batch, lanes_row,
    ELEMENT: tl.constexpr, VECTOR: tl.constexpr, PER_VECTOR: tl.constexpr, PAGED: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCAN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program owns a strip of columns of some lanes and walks its rows forward, so no two programs share a byte and
    their order doesn't matter. Within the program, in steps of many rows: kept rows ascend, so row j comes from j or
    further back, and what a step has yet to read lies at or beyond the end of what all steps before it have written.
    Only the rows of one step overlap one another, hence the barrier between its load and its store."""
    program = tl.program_id(0).to(tl.int64)
    column_tiles, lane_tiles = tl.cdiv(columns, COLUMNS), tl.cdiv(count, LANES)
    column = program % column_tiles * COLUMNS * PER_VECTOR + tl.arange(0, COLUMNS * PER_VECTOR)
    program //= column_tiles
    place = tl.arange(0, LANES * ROWS)
    lane = program % lane_tiles * LANES + place // ROWS
    program //= lane_tiles
    sequence = program % batch
    base = pointer(addresses, program // batch, ELEMENT, VECTOR)
    plan += sequence * plan_batch
    lane_start = lane_offset(lane, size_0, size_1, stride_0, stride_1, stride_2)
    inside = column[None, :] < columns * PER_VECTOR

    # What stands before the first dropped row stays as it is: only there does a row come from itself.
    begin = tl.zeros((), tl.int64)
    end = tl.zeros((), tl.int64)
    for tile in range(0, rows, SCAN):
        row = tile + tl.arange(0, SCAN)
        source = tl.load(plan + row.to(tl.int64) * plan_row, mask=row < rows, other=-1)
        begin += tl.sum((source == row).to(tl.int32), 0)
        end += tl.sum((source >= 0).to(tl.int32), 0)

    for step in range(begin, end, ROWS):
        row = (step + place % ROWS).to(tl.int64)
        exists = (row < end) & (lane < count)
        source = tl.load(plan + row * plan_row, mask=exists, other=-1).to(tl.int64)
        start, readable = row_offset(
            lanes_batch, lanes_row, limit, table, table_batch, table_column, table_columns, page_size,
            sequence, source, exists & (source >= 0), PAGED,
        )  # fmt: skip
        target, writable = row_offset(
            lanes_batch, lanes_row, limit, table, table_batch, table_column, table_columns, page_size,
            sequence, row, readable, PAGED,
        )  # fmt: skip
        mask = writable[:, None] & inside
        value = tl.load(base + (lane_start + start)[:, None] * PER_VECTOR + column[None, :], mask=mask)
        if WAIT:
            # On AMD, loads may still be on their way after a barrier, and the compiler does not wait for them there. It
            # waits where something reads the loaded registers; so an empty piece of assembly reads them here.
            wide = value.to(tl.uint32) if VECTOR < 4 else value
            value = tl.inline_asm_elementwise("", "=v,0", [wide], wide.dtype, is_pure=False, pack=1).to(ELEMENT)
        tl.debug_barrier()  # no row of this step is overwritten before all of them are read
        tl.store(base + (lane_start + target)[:, None] * PER_VECTOR + column[None, :], value, mask=mask)


def move(described: list[tuple[Lanes, int, int]], plan: Tensor, table: Tensor | None, page_size: int) -> None:
    batch, rows = plan.shape
    pages = (plan, 0, 0, 0) if table is None else (table, *table.stride(), table.shape[1])
    for lanes, number, addresses, _ in launches(described):
        # A strip is at most 256 bytes wide, which is a head of most models: many narrow strips keep a GPU busy.
        columns = power_of_2(lanes.columns, 256 // lanes.vector)
        step = power_of_2(rows, tile_vectors(lanes) // columns)
        across = power_of_2(lanes.count, tile_vectors(lanes) // columns // step)
        strips = triton.cdiv(lanes.columns, columns) * triton.cdiv(lanes.count, across)
        launch(
            move_kernel, number * batch * strips, plan, addresses, plan, *plan.stride(), rows, batch, *pages, page_size,
            lanes.columns, lanes.limit, lanes.count, *lanes.sizes, *lanes.from_strides, lanes.from_batch,
            lanes.from_row, PAGED=table is not None, LANES=across, ROWS=step, COLUMNS=columns, SCAN=PLAN_TILE,
            WAIT=ON_HIP, **kernel_options(lanes),
        )  # fmt: skip


# --- ops ------------------------------------------------------------------------------------------


def plan_compaction(keep: Tensor, length: int = -1, pad_left: bool = False) -> tuple[Tensor, Tensor]:
    check_keep(keep, length)
    return make_plan(keep, None, keep.shape[1] if length < 0 else length, pad_left)


def compact(tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor) -> list[Tensor]:
    return gather(tensors, check_tensors("compact", tensors, token_dims, batch_dims, source), source)


def compact_(tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor) -> None:
    dims = check_tensors("compact_", tensors, token_dims, batch_dims, source)
    check_disjoint("compact_", "tensors", tensors, source=source)
    move([lanes for x, dim in zip(tensors, dims) if x.numel() for lanes in describe(x, x, *dim)], source, None, 1)


def expand(
    tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor, length: int
) -> list[Tensor]:
    dims = check_tensors("expand", tensors, token_dims, batch_dims, source)
    require(length >= 0, "expand", "length", "a number of rows", length)
    batch, rows = source.shape
    inverse = source.new_full((batch, length), -1)
    tiles = triton.cdiv(rows, PLAN_TILE)
    launch(invert_kernel, batch * tiles, source, source, *source.stride(), rows, length, inverse, tiles, TILE=PLAN_TILE)
    return gather(tensors, dims, inverse)


def compact_paged_(
    caches: list[Tensor], block_table: Tensor, seq_lens: Tensor, keep: Tensor, layout: str = "NHD"
) -> Tensor:
    check_paged(caches, block_table, seq_lens, keep, layout)
    check_disjoint("compact_paged_", "caches", caches, block_table=block_table, seq_lens=seq_lens, keep=keep)
    source, lengths = make_plan(keep, seq_lens, keep.shape[1], False)
    slot_dim = 1 if layout == "NHD" else 2
    described = []
    for cache in caches:
        if cache.numel():
            pages, slots = paged_sizes(cache, layout)
            described += [(replace(lanes, limit=pages), *rest) for lanes, *rest in describe(cache, cache, slot_dim, 0)]
    if described:
        move(described, source, block_table, slots)
    return lengths
