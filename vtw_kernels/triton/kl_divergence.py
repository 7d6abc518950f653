"""KL divergence in Triton: the ops of ``ops/kl_divergence.py``, which explains states, for tensors on a GPU.

Many rows: a program owns a row. Few rows and a long vocabulary: a row is cut into spans of whole tiles, a program owns
a span, and a second launch merges the states of a row's spans in a fixed order. (The alternative to a second launch is
a counter that tells the last program of a row to merge. It would have to be zero before every launch and could not be
shared by two streams; and the merging kernel exists anyway, for ``merge_kl_states``.) How rows are cut depends only on
the shape, and the order of programs changes nothing: equal inputs give equal bits.
"""

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtw_kernels.ops.checks import (
    check_backward,
    check_logits,
    check_loss,
    check_scaled,
    check_state,
    check_states,
    real_dtype,
)
from vtw_kernels.ops.reference import weights_of
from vtw_kernels.triton.launch import launch

# A tile is divided among lanes, one per thread. A lane has its own maxima, so threads exchange nothing before the end
# of a row. It looks at all its entries of a tile and then rescales its sums once: next to memory, the unit for
# exponentials is the closest limit, and a rescale per entry would double its work.
LANES = 128
# Entries of a lane in a tile, by the entries of a 16-byte vector: 16 are 2 loads per row of fp16 and bf16 or 4 of fp32,
# in about 80 registers with those of the next tile on their way. fp64 (2) is for checks of gradients, and rows without
# vectors (1) need two registers for the address of each entry.
ENTRIES = {8: 16, 4: 16, 2: 4, 1: 4}
# Rows are cut until there are about this many programs: 16 per multiprocessor of a large GPU, where 6 run at a time, so
# that few of them are idle when the last programs run.
PROGRAMS = 2048
SCALED = 16 * LANES  # entries that a program scales at a time
MERGED = 32  # states that a program merges at a time, one each thread

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
# Sums a = Σ e^(p - m_p)·(p - q) are in units of 2^40, everywhere but in a state. Where q is masked by the least finite
# number, p - q is close to what a number can hold, and a sum of it beyond; yet it may weigh nothing in the end, where p
# is low as well. In these units it stays finite, and +inf always means that q is 0 somewhere where p is not.
UNIT = tl.constexpr(2.0**40)
PER_UNIT = tl.constexpr(2.0**-40)


# --- a pair of rows -------------------------------------------------------------------------------


@triton.jit
def row_offset(row, sizes, strides):
    """``sizes`` are those of the leading dimensions but the outermost, innermost first, as ``strides`` are."""
    offset = row * 0
    for d in tl.static_range(len(sizes)):
        offset += row % sizes[d] * strides[d]
        row = row // sizes[d]
    return offset + row * strides[len(sizes)]


@triton.jit
def vector_entries(VECTOR: tl.constexpr, LANES: tl.constexpr):
    """The entries of the first vectors of all lanes, [LANES, VECTOR], in their order in memory. A tile is as many of
    them, one after another, as a lane has vectors. Each is a tensor of its own: of a tensor [vectors, LANES, VECTOR],
    Triton before 3.7 gives a lane to several threads. The same for p and q, so equal rows have equal sums."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_tile(ptr, step, entries, length, VECTORS: tl.constexpr, WHOLE: tl.constexpr):
    """A tuple of the vectors of a tile: -inf from ``length`` on, or if that is not positive, nothing of a whole one."""
    tile = ()
    for v in tl.static_range(VECTORS):
        entry = entries + v * entries.numel
        if WHOLE:
            tile = tile + (tl.load(ptr + entry * step, mask=entries * 0 < length),)
        else:
            tile = tile + (tl.load(ptr + entry * step, mask=entry < length, other=-INF),)
    return tile


@triton.jit
def lane_max(tile, m):
    for v in tl.static_range(len(tile)):
        m = tl.maximum(m, tl.max(tile[v].to(m.dtype), 1))
    return m


@triton.jit
def rescale(m, top, scale):
    """What sums relative to ``m`` weigh among those relative to ``top``: an empty part has m = -inf and weighs nothing,
    where -inf - -inf would make it NaN."""
    return tl.where(m == -INF, 0.0, tl.exp2((m - top) * scale))


@triton.jit
def weigh(a, weight):
    """An infinite divergence stays infinite, however small the probability that carries it has become."""
    return tl.where(a == INF, a, a * weight)


@triton.jit
def push(p, q, m_p, z_p, a, m_q, z_q, scale, CAREFUL: tl.constexpr):
    """Adds a tile to the sums of its lanes. The plain version is right as long as all logits are finite and no sum
    overflows; else its ``a`` isn't finite either. The careful one keeps the rules:
    p = -inf            adds nothing, whatever q is;
    q = -inf < p        adds +inf, even where e^(p - m_p) has underflowed to 0;
    e^(p - m_p) = 0     adds nothing to any other q;
    NaN, +inf           make z_p or z_q NaN."""
    top_p, top_q = lane_max(p, m_p), lane_max(q, m_q)
    base_p, base_q = top_p, top_q
    if CAREFUL:
        # Where all is -inf there is no maximum to subtract; any finite number will do, for every e^x is then 0.
        base_p, base_q = tl.where(top_p == -INF, 0.0, top_p), tl.where(top_q == -INF, 0.0, top_q)
    r_p, r_q = tl.exp2((m_p - base_p) * scale), tl.exp2((m_q - base_q) * scale)
    a = weigh(a, r_p) if CAREFUL else a * r_p
    z_p, z_q = z_p * r_p, z_q * r_q
    for v in tl.static_range(len(p)):
        x, y = p[v].to(scale.dtype), q[v].to(scale.dtype)
        e_p, e_q = tl.exp2((x - base_p[:, None]) * scale), tl.exp2((y - base_q[:, None]) * scale)
        if CAREFUL:
            term = tl.where(e_p == 0, 0.0, e_p * (x * PER_UNIT - y * PER_UNIT))
            a += tl.sum(tl.where(x == -INF, 0.0, tl.where(y == -INF, INF, term)), 1)
        else:
            a += tl.sum(e_p * (x - y), 1) * PER_UNIT
        z_p, z_q = z_p + tl.sum(e_p, 1), z_q + tl.sum(e_q, 1)
    return top_p, z_p, a, top_q, z_q


@triton.jit
def push_tiles(p_ptr, q_ptr, p_step, q_step, entries, length, scale, VECTORS: tl.constexpr, CAREFUL: tl.constexpr):
    """The lanes' sums over whole tiles, before the temperature is applied to m and a."""
    TILE: tl.constexpr = VECTORS * entries.numel
    m_p = tl.full([entries.shape[0]], -INF, scale.dtype)
    z_p = tl.zeros([entries.shape[0]], scale.dtype)
    m_q, a, z_q = m_p, z_p, z_p
    p = load_tile(p_ptr, p_step, entries, length, VECTORS, True)
    q = load_tile(q_ptr, q_step, entries, length, VECTORS, True)
    for end in range(TILE, length + 1, TILE):
        # The next tile is loaded while this one is worked on.
        p_ptr += p_step * TILE
        q_ptr += q_step * TILE
        next_p = load_tile(p_ptr, p_step, entries, length - end, VECTORS, True)
        next_q = load_tile(q_ptr, q_step, entries, length - end, VECTORS, True)
        m_p, z_p, a, m_q, z_q = push(p, q, m_p, z_p, a, m_q, z_q, scale, CAREFUL)
        p, q = next_p, next_q
    return m_p, z_p, a, m_q, z_q


# --- states ---------------------------------------------------------------------------------------


@triton.jit
def store_state(state_ptr, m_p, z_p, a, m_q, z_q):
    tl.store(state_ptr, m_p)
    tl.store(state_ptr + 1, z_p)
    tl.store(state_ptr + 2, a)
    tl.store(state_ptr + 3, m_q)
    tl.store(state_ptr + 4, z_q)


@triton.jit
def within(x, largest):
    """What is finite stays finite; the comparisons let NaN through."""
    x = tl.where((x > largest) & (x < INF), largest, x)
    return tl.where((x < -largest) & (x > -INF), -largest, x)


@triton.jit
def finish(state_ptr, kl_ptr, m_p, z_p, a, m_q, z_q, inverse):
    """Applies the temperature, stores state and divergence: in fp64, so that the subtraction of two log-sum-exps does
    not round again. That may still leave a hair below 0, which no divergence is; the comparison lets NaN through."""
    m_p, a, m_q = m_p.to(tl.float64) * inverse, a.to(tl.float64) * inverse, m_q.to(tl.float64) * inverse
    z_p, z_q = z_p.to(tl.float64), z_q.to(tl.float64)
    kl = a / z_p * UNIT - (m_p + tl.log(z_p)) + (m_q + tl.log(z_q))
    tl.store(kl_ptr, tl.where(kl < 0, 0.0, kl))
    # Where a without its unit overflows the dtype of states, the sums of p are made relative to a number above the
    # maximum instead, which says the same. Beyond 2^27 or so, numbers are too coarse for that; but there a logit weighs
    # all or nothing, and a itself, which only has to be finite, stops at the largest number.
    real: tl.constexpr = state_ptr.dtype.element_ty
    LARGEST: tl.constexpr = 1.7976931348623157e308 if real == tl.float64 else 3.4028234663852886e38
    STEP: tl.constexpr = 27.7  # ln 2^40
    raised = (m_p + STEP).to(real).to(tl.float64)
    raise_it = (tl.abs(a) > LARGEST / UNIT) & (tl.abs(a) < INF) & (tl.abs(raised - m_p - STEP) < 8)
    weight = tl.where(raise_it, tl.exp(m_p - raised), 1.0)
    m_p, m_q = within(tl.where(raise_it, raised, m_p), LARGEST), within(m_q, LARGEST)
    unit = weight * UNIT
    store_state(state_ptr, m_p, z_p * weight, within(a, LARGEST / unit) * unit, m_q, z_q)


@triton.jit(do_not_specialize=["p_step", "q_step", "vocabulary", "spans", "span", "inverse_bits"])
def span_kernel(
    p_ptr, q_ptr, state_ptr, kl_ptr, sizes, p_strides, q_strides, p_step, q_step, vocabulary, spans, span, inverse_bits,
    VECTOR: tl.constexpr, LANES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The state and the divergence of a row; or, without ``kl_ptr``, the state of one of its spans, still in units and
    without the temperature, so that its maxima are exact."""
    TILE: tl.constexpr = LANES * ENTRIES
    real: tl.constexpr = state_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row, begin = program // spans, program % spans * span
    length = tl.minimum(vocabulary - begin, span).to(span.dtype)
    p_step = 1 if VECTOR > 1 else p_step.to(tl.int64)
    q_step = 1 if VECTOR > 1 else q_step.to(tl.int64)
    p_ptr += tl.multiple_of(row_offset(row, sizes, p_strides) + begin * p_step, VECTOR)
    q_ptr += tl.multiple_of(row_offset(row, sizes, q_strides) + begin * q_step, VECTOR)
    inverse = inverse_bits.to(tl.float64, bitcast=True)
    scale = (inverse * LOG2E).to(real)
    VECTORS: tl.constexpr = ENTRIES // VECTOR
    entries = vector_entries(VECTOR, LANES)

    whole = length // TILE * TILE
    m_p, z_p, a, m_q, z_q = push_tiles(p_ptr, q_ptr, p_step, q_step, entries, whole, scale, VECTORS, False)
    total = tl.sum(a, 0)
    if (total - total) != 0:  # an infinity or NaN: once more, with care
        m_p, z_p, a, m_q, z_q = push_tiles(p_ptr, q_ptr, p_step, q_step, entries, whole, scale, VECTORS, True)
    if whole < length:
        left = tl.multiple_of(length - whole, VECTOR)
        p = load_tile(p_ptr + whole * p_step, p_step, entries, left, VECTORS, False)
        q = load_tile(q_ptr + whole * q_step, q_step, entries, left, VECTORS, False)
        m_p, z_p, a, m_q, z_q = push(p, q, m_p, z_p, a, m_q, z_q, scale, True)

    top_p, top_q = tl.max(m_p, 0), tl.max(m_q, 0)
    r_p, r_q = rescale(m_p, top_p, scale), rescale(m_q, top_q, scale)
    z_p, a, z_q = tl.sum(z_p * r_p, 0), tl.sum(weigh(a, r_p), 0), tl.sum(z_q * r_q, 0)
    if kl_ptr is None:
        store_state(state_ptr + program * 5, top_p, z_p, a, top_q, z_q)
    else:
        finish(state_ptr + program * 5, kl_ptr + program, top_p, z_p, a, top_q, z_q, inverse)


@triton.jit(do_not_specialize=["parts", "inverse_bits"])
def merge_kernel(
    parts_ptr, state_ptr, kl_ptr, parts, inverse_bits, PART_UNIT: tl.constexpr, MERGED: tl.constexpr
):  # fmt: skip
    """States [rows, parts, 5] without their temperature → state [rows, 5] and divergence [rows]; a warp per row."""
    row = tl.program_id(0).to(tl.int64)
    inverse = inverse_bits.to(tl.float64, bitcast=True)
    scale = inverse * LOG2E
    z_p = inverse * 0
    m_p = z_p - INF
    m_q, a, z_q = m_p, z_p, z_p
    for start in range(0, parts, MERGED):
        part = start + tl.arange(0, MERGED)
        from_ptr, inside = parts_ptr + (row * parts + part) * 5, part < parts
        some_m_p = tl.load(from_ptr, mask=inside, other=-INF).to(tl.float64)
        some_z_p = tl.load(from_ptr + 1, mask=inside, other=0.0).to(tl.float64)
        some_a = tl.load(from_ptr + 2, mask=inside, other=0.0).to(tl.float64) * (PART_UNIT * PER_UNIT)
        some_m_q = tl.load(from_ptr + 3, mask=inside, other=-INF).to(tl.float64)
        some_z_q = tl.load(from_ptr + 4, mask=inside, other=0.0).to(tl.float64)
        top_p, top_q = tl.maximum(m_p, tl.max(some_m_p, 0)), tl.maximum(m_q, tl.max(some_m_q, 0))
        r_p, some_r_p = rescale(m_p, top_p, scale), rescale(some_m_p, top_p, scale)
        r_q, some_r_q = rescale(m_q, top_q, scale), rescale(some_m_q, top_q, scale)
        z_p = z_p * r_p + tl.sum(some_z_p * some_r_p, 0)
        a = weigh(a, r_p) + tl.sum(weigh(some_a, some_r_p), 0)
        z_q = z_q * r_q + tl.sum(some_z_q * some_r_q, 0)
        m_p, m_q = top_p, top_q
    finish(state_ptr + row * 5, kl_ptr + row, m_p, z_p, a, m_q, z_q, inverse)


# --- gradients ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["p_step", "q_step", "vocabulary", "tiles", "inverse_bits"])
def gradient_kernel(
    p_ptr, q_ptr, grad_p_ptr, grad_q_ptr, state_ptr, slope_ptr,
    sizes, p_strides, q_strides, p_step, q_step, vocabulary, tiles, inverse_bits,
    OF_DIVERGENCE: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Of one tile of a row, from the gradient of its divergence or else its state; with p and q divided by the
    temperature dp = (g_zp + g_a (p - q + 1)) e^(p - m_p) / temperature,  dq = (g_zq e^(q - m_q) - g_a e^(p - m_p)) /
    temperature."""
    TILE: tl.constexpr = LANES * ENTRIES
    real: tl.constexpr = state_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row, begin = program // tiles, program % tiles * TILE
    p_step = 1 if VECTOR > 1 else p_step.to(tl.int64)
    q_step = 1 if VECTOR > 1 else q_step.to(tl.int64)
    p_ptr += tl.multiple_of(row_offset(row, sizes, p_strides) + begin * p_step, VECTOR)
    q_ptr += tl.multiple_of(row_offset(row, sizes, q_strides) + begin * q_step, VECTOR)
    to = tl.multiple_of(row * vocabulary + begin, VECTOR)
    VECTORS: tl.constexpr = ENTRIES // VECTOR
    entries = vector_entries(VECTOR, LANES)
    left = tl.multiple_of(tl.minimum(vocabulary - begin, TILE).to(tl.int32), VECTOR)
    tile_p = load_tile(p_ptr, p_step, entries, left, VECTORS, False)
    tile_q = load_tile(q_ptr, q_step, entries, left, VECTORS, False)

    inverse = inverse_bits.to(tl.float64, bitcast=True)
    scale = (inverse * LOG2E).to(real)
    inverse = inverse.to(real)
    # The state's maxima are those of the scaled logits.
    m_p = tl.load(state_ptr + row * 5) / inverse
    m_q = tl.load(state_ptr + row * 5 + 3) / inverse
    if OF_DIVERGENCE:
        g = tl.load(slope_ptr + row)
        z_p, z_q = tl.load(state_ptr + row * 5 + 1), tl.load(state_ptr + row * 5 + 4)
        # The maxima get none: what the divergence gains through them it loses through the exponentials that they scale.
        g_a = tl.where(g == 0, 0.0, g / z_p)
        g_zp = tl.where(g == 0, 0.0, -g_a * (tl.load(state_ptr + row * 5 + 2) / z_p + 1))
        g_zq = tl.where(g == 0, 0.0, g / z_q)
    else:
        g_zp = tl.load(slope_ptr + row * 5 + 1)
        g_a = tl.load(slope_ptr + row * 5 + 2)
        g_zq = tl.load(slope_ptr + row * 5 + 4)
    g_zp, g_a, g_zq = g_zp * inverse, g_a * inverse, g_zq * inverse
    # A row that counts for nothing has no gradient, not even that of a NaN.
    counts = entries * 0 != tl.abs(g_zp) + tl.abs(g_a) + tl.abs(g_zq)
    for v in tl.static_range(VECTORS):
        entry = entries + v * entries.numel
        p, q = tl.where(counts, tile_p[v].to(real), -INF), tl.where(counts, tile_q[v].to(real), -INF)
        e_p = tl.where(p == -INF, 0.0, tl.exp2((p - m_p) * scale))
        if grad_p_ptr is not None:
            grad_p = e_p * (g_zp + g_a * ((p - q) * inverse + 1))
            # Nothing for an entry without probability, where p - q may be infinite.
            tl.store(grad_p_ptr + to + entry, tl.where(e_p == 0, 0.0, grad_p), mask=entry < left)
        if grad_q_ptr is not None:
            e_q = tl.where(q == -INF, 0.0, tl.exp2((q - m_q) * scale))
            tl.store(grad_q_ptr + to + entry, g_zq * e_q - g_a * e_p, mask=entry < left)


@triton.jit
def scale_kernel(ptr, count, tiles, factor_ptr, TILE: tl.constexpr):
    """Most often the factor is 1, and nothing has to be done: only the device knows."""
    factor = tl.load(factor_ptr)
    if factor != 1:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            at = tl.full([TILE], tile, tl.int64) * TILE + tl.arange(0, TILE)
            x = tl.load(ptr + at, mask=at < count)
            tl.store(ptr + at, (x * factor).to(x.dtype), mask=at < count)


# --- launches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows in memory. Leading dimensions that can be walked as one are one; nothing is expanded."""

    shape: torch.Size  # of the leading dimensions
    sizes: tuple[int, ...]  # innermost first; that of the outermost is not needed
    p_strides: tuple[int, ...]
    q_strides: tuple[int, ...]
    steps: tuple[int, int]  # from entry to entry
    vector: int  # entries in 16 bytes, if all rows are made of whole vectors; else 1

    @staticmethod
    def of(p: Tensor, q: Tensor) -> "Pairs":
        shape = torch.broadcast_shapes(p.shape[:-1], q.shape[:-1])
        p, q = p.expand(*shape, -1), q.expand(*shape, -1)  # views, in which a dimension that broadcasts has stride 0
        dims = [(1, 0, 0)]
        for size, *strides in zip(shape, p.stride(), q.stride()):
            if dims[-1][1:] == tuple(size * stride for stride in strides) or dims[-1][0] == 1:
                dims[-1] = (dims[-1][0] * size, *strides)
            elif size != 1:
                dims.append((size, *strides))
        sizes, p_strides, q_strides = zip(*reversed(dims))
        steps, vector = (p.stride(-1), q.stride(-1)), 16 // p.element_size()
        whole = all(size % vector == 0 for size in (p.shape[-1], *p_strides, *q_strides))
        if steps != (1, 1) or not whole or p.data_ptr() % 16 or q.data_ptr() % 16:
            vector = 1
        return Pairs(shape, sizes[:-1], p_strides, q_strides, steps, vector)

    @property
    def geometry(self) -> tuple:
        return self.sizes, self.p_strides, self.q_strides, *self.steps

    @property
    def options(self) -> tuple[int, int, int]:
        return self.vector, LANES, ENTRIES[self.vector]

    @property
    def tile(self) -> int:
        return LANES * ENTRIES[self.vector]


def inverse_bits(temperature: float) -> int:
    """1 / temperature in fp64, as an integer: Triton would pass it as fp32, which is not enough for fp64 logits."""
    return struct.unpack("q", struct.pack("d", 1 / temperature))[0]


def merge(parts: Tensor, part_unit: float, temperature: float, state: Tensor, kl: Tensor) -> None:
    launch(
        merge_kernel, kl.numel(), kl, parts, state, kl, parts.shape[-2], inverse_bits(temperature), part_unit, MERGED,
        threads=MERGED,
    )  # fmt: skip


# --- ops ------------------------------------------------------------------------------------------


def kl_divergence_with_state(p_logits: Tensor, q_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_logits("kl_divergence", p_logits, q_logits, temperature)
    pairs, vocabulary = Pairs.of(p_logits, q_logits), p_logits.shape[-1]
    rows = pairs.shape.numel()
    dtype = real_dtype(p_logits)
    kl, state = p_logits.new_empty(pairs.shape, dtype=dtype), p_logits.new_empty(*pairs.shape, 5, dtype=dtype)
    wanted = triton.cdiv(PROGRAMS, max(rows, 1))
    span = max(1, triton.cdiv(triton.cdiv(vocabulary, pairs.tile), wanted)) * pairs.tile
    spans = max(1, triton.cdiv(vocabulary, span))
    parts = state if spans == 1 else state.new_empty(rows, spans, 5)
    launch(
        span_kernel, rows * spans, p_logits, p_logits, q_logits, parts, kl if spans == 1 else None, *pairs.geometry,
        vocabulary, spans, span, inverse_bits(temperature), *pairs.options, threads=LANES,
    )  # fmt: skip
    if spans > 1:
        merge(parts, UNIT.value, temperature, state, kl)
    return kl, state


def kl_divergence_backward(
    grad: Tensor,
    p_logits: Tensor,
    q_logits: Tensor,
    state: Tensor,
    temperature: float,
    need_p: bool,
    need_q: bool,
) -> tuple[Tensor, Tensor]:
    of_divergence = check_backward(grad, p_logits, q_logits, state, temperature)
    pairs, vocabulary = Pairs.of(p_logits, q_logits), p_logits.shape[-1]
    shape = (*pairs.shape, vocabulary)
    grad_p, grad_q = p_logits.new_empty(shape if need_p else 0), q_logits.new_empty(shape if need_q else 0)
    tiles = triton.cdiv(vocabulary, pairs.tile) if need_p or need_q else 0
    launch(
        gradient_kernel, pairs.shape.numel() * tiles, p_logits, p_logits, q_logits, grad_p if need_p else None,
        grad_q if need_q else None, state.contiguous(), grad.contiguous(), *pairs.geometry,
        vocabulary, tiles, inverse_bits(temperature), of_divergence, *pairs.options, threads=LANES,
    )  # fmt: skip
    return grad_p, grad_q


def kl_divergence_with_gradients(
    p_logits: Tensor, q_logits: Tensor, weight: Tensor | None, temperature: float, need_p: bool, need_q: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_loss("kl_divergence_with_gradients", p_logits, q_logits, weight, temperature)
    kl, state = kl_divergence_with_state(p_logits, q_logits, temperature)
    grad = weights_of(kl, weight)
    return kl, *kl_divergence_backward(grad, p_logits, q_logits, state, temperature, need_p, need_q)


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    check_scaled(tensors, factor)
    for x in tensors:
        tiles = triton.cdiv(x.numel(), SCALED)
        launch(scale_kernel, min(tiles, PROGRAMS), x, x, x.numel(), tiles, factor, SCALED, threads=LANES)


def merge_kl_states(states: list[Tensor]) -> Tensor:
    check_states(states)
    parts = torch.stack(states, -2)
    state = parts.new_empty(states[0].shape)
    merge(parts, 1.0, 1.0, state, state.new_empty(state.shape[:-1]))
    return state


def kl_from_state(state: Tensor) -> Tensor:
    check_state("kl_from_state", "state", state)
    parts = state.unsqueeze(-2).contiguous()
    kl = state.new_empty(state.shape[:-1])
    merge(parts, 1.0, 1.0, torch.empty_like(parts), kl)
    return kl
