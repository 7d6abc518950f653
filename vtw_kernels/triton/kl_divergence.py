"""KL divergence in Triton: one read of each pair of rows forward, and one read and one write backward.

Signatures are those of the schemas in ``csrc/ops.cpp``; what a state is, is told in ``ops/kl_divergence.py``.

Many rows: a program owns a row. Few rows and a long vocabulary: a row is cut into spans of whole tiles, a program owns
a span, and a second launch merges the spans of each row in ascending order. That launch takes the place of a counter by
which the last program would know that it is the last: a counter has to be zero before each launch and must not be
shared by two streams, while the merging kernel is needed for ``merge_kl_states`` anyway. How a row is cut depends on the
shapes alone, so equal inputs give equal bits on every device with the same arithmetic.
"""

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtw_kernels.ops.checks import check_backward, check_logits, check_state, check_states

# A tile: one lane per thread, and 16 entries of a row per lane. The lanes keep maxima of their own, so that nothing is
# exchanged between threads before the end of the row; two more exponentials rescale the sums of 16 pairs, where a
# maximum per entry would double the work of the unit for exponentials, which is the nearest limit after the memory.
WARPS = 4
LANES = 32 * WARPS
ENTRIES = 16
TILE = LANES * ENTRIES
# Tiles of the row that are on their way while one is worked on: 32 KiB of 16-bit pairs per program.
STAGES = 3
# About 16 programs for each multiprocessor of a large GPU: the last ones to run leave few of them idle.
PROGRAMS = 2048
# States that one warp merges at a time.
MERGED = 32

# Contracting a product and a sum is wanted (and is no danger to KL(p‖p) = 0: p and q go through the same
# instructions); the default differs between versions of Triton.
OPTIONS = {"enable_fp_fusion": True}

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def _row_offset(row, sizes, strides):
    """Where a row begins: its index in the leading dimensions, times their strides (0 where they broadcast). ``sizes``
    are those of all dimensions but the first, innermost first, as are the strides."""
    offset = row * 0
    for d in tl.static_range(len(sizes)):
        offset += row % sizes[d] * strides[d]
        row = row // sizes[d]
    return offset + row * strides[len(sizes)]


@triton.jit
def _entries(VECTOR: tl.constexpr, LANES: tl.constexpr, ENTRIES: tl.constexpr):
    """Which entries of a tile belong to a lane [ENTRIES, LANES]: vectors of 16 bytes, or single entries side by side."""
    entry = tl.arange(0, ENTRIES)[:, None]
    return entry % VECTOR + tl.arange(0, LANES)[None, :] * VECTOR + entry // VECTOR * (LANES * VECTOR)


@triton.jit
def _rescale(m, top, scale):
    """The weight of sums relative to ``m`` in sums relative to ``top``: 0 for an empty part, where m - top is NaN."""
    return tl.where(m == -INF, 0.0, tl.exp2((m - top) * scale))


@triton.jit
def _weigh(a, weight):
    """An infinite divergence stays infinite, however small the probability that carries it has become. A sum that has
    run to -inf is a row masked by the least finite number instead of -inf: it adds nothing once its weight is 0."""
    return tl.where(a == INF, a, tl.where((weight == 0) & (a == -INF), 0.0, a * weight))


@triton.jit
def _push(p, q, m_p, z_p, a, m_q, z_q, scale, CAREFUL: tl.constexpr):
    """Adds entries [ENTRIES, LANES] to the lanes' sums. The plain version is right while all logits are finite, and its
    ``a`` is never finite otherwise. The careful one knows that
      p = -inf            adds nothing, whatever q is;
      q = -inf < p        adds +inf, even where e^(p - m_p) has underflowed to 0;
      e^(p - m_p) = 0     adds nothing to any other q, even if p - q overflows;
      NaN, +inf           make z_p or z_q NaN by themselves."""
    top_p = tl.maximum(m_p, tl.max(p, 0))
    top_q = tl.maximum(m_q, tl.max(q, 0))
    if CAREFUL:
        # Where all is -inf any finite number will do as the maximum: every e^x is then 0.
        e_p = tl.exp2((p - tl.where(top_p == -INF, 0.0, top_p)) * scale)
        e_q = tl.exp2((q - tl.where(top_q == -INF, 0.0, top_q)) * scale)
        term = tl.where(e_p == 0, 0.0, e_p * (p - q))
        term = tl.where(p == -INF, 0.0, tl.where(q == -INF, INF, term))
        r_p = _rescale(m_p, top_p, scale)
        r_q = _rescale(m_q, top_q, scale)
        a = _weigh(a, r_p)
    else:
        e_p = tl.exp2((p - top_p) * scale)
        e_q = tl.exp2((q - top_q) * scale)
        term = e_p * (p - q)
        r_p = tl.exp2((m_p - top_p) * scale)
        r_q = tl.exp2((m_q - top_q) * scale)
        a = a * r_p
    return top_p, z_p * r_p + tl.sum(e_p, 0), a + tl.sum(term, 0), top_q, z_q * r_q + tl.sum(e_q, 0)


@triton.jit
def _span_state(
    p_ptr,
    q_ptr,
    p_step,
    q_step,
    length,
    scale,
    CAREFUL: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state of a pair of rows of this length, before the temperature is applied to m and a."""
    real = scale.dtype
    entries = _entries(VECTOR, LANES, ENTRIES)
    m_p = tl.full([LANES], -INF, real)
    z_p = tl.zeros([LANES], real)
    m_q, a, z_q = m_p, z_p, z_p
    for _ in tl.range(LANES * ENTRIES, length + 1, LANES * ENTRIES, num_stages=STAGES):
        p = tl.load(p_ptr + entries * p_step).to(real)
        q = tl.load(q_ptr + entries * q_step).to(real)
        m_p, z_p, a, m_q, z_q = _push(p, q, m_p, z_p, a, m_q, z_q, scale, CAREFUL)
        p_ptr += LANES * ENTRIES * p_step
        q_ptr += LANES * ENTRIES * q_step
    rest = length % (LANES * ENTRIES)
    if rest > 0:
        p = tl.load(p_ptr + entries * p_step, mask=entries < rest, other=-INF).to(real)
        q = tl.load(q_ptr + entries * q_step, mask=entries < rest, other=-INF).to(real)
        m_p, z_p, a, m_q, z_q = _push(p, q, m_p, z_p, a, m_q, z_q, scale, True)
    top_p = tl.max(m_p, 0)
    top_q = tl.max(m_q, 0)
    r_p = _rescale(m_p, top_p, scale)
    r_q = _rescale(m_q, top_q, scale)
    return top_p, tl.sum(z_p * r_p, 0), tl.sum(_weigh(a, r_p), 0), top_q, tl.sum(z_q * r_q, 0)


@triton.jit
def _store_state(state_ptr, m_p, z_p, a, m_q, z_q):
    tl.store(state_ptr, m_p)
    tl.store(state_ptr + 1, z_p)
    tl.store(state_ptr + 2, a)
    tl.store(state_ptr + 3, m_q)
    tl.store(state_ptr + 4, z_q)


@triton.jit
def _finish(state_ptr, kl_ptr, m_p, z_p, a, m_q, z_q, temperature):
    """Applies the temperature and stores the state of a row and its divergence; in fp64, so that the subtraction of the
    two log-sum-exps does not round again. Rounding may still leave a hair below 0, which no divergence is; the
    comparison lets NaN through."""
    m_p, a, m_q = m_p / temperature, a / temperature, m_q / temperature
    z_p, z_q = z_p.to(tl.float64), z_q.to(tl.float64)
    _store_state(state_ptr, m_p, z_p, a, m_q, z_q)
    kl = a / z_p - (m_p + tl.log(z_p)) + (m_q + tl.log(z_q))
    tl.store(kl_ptr, tl.where(kl < 0, 0.0, kl))


@triton.jit(do_not_specialize=["p_step", "q_step", "vocabulary", "spans", "span", "temperature_bits"])
def span_states_kernel(
    p_ptr,
    q_ptr,
    state_ptr,  # [rows, spans, 5], still without the temperature; or [rows, 5]
    kl_ptr,  # [rows], or None where a row has several spans
    sizes,  # of the leading dimensions
    p_strides,
    q_strides,
    p_step,
    q_step,
    vocabulary,
    spans,
    span,
    temperature_bits,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    real: tl.constexpr = state_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // spans
    begin = program % spans * span
    length = tl.minimum(vocabulary - begin, span).to(span.dtype)
    p_step = 1 if VECTOR > 1 else p_step.to(tl.int64)
    q_step = 1 if VECTOR > 1 else q_step.to(tl.int64)
    p_ptr += tl.multiple_of(_row_offset(row, sizes, p_strides) + begin * p_step, VECTOR)
    q_ptr += tl.multiple_of(_row_offset(row, sizes, q_strides) + begin * q_step, VECTOR)
    temperature = temperature_bits.to(tl.float64, bitcast=True)
    scale = (1 / temperature * LOG2E).to(real)
    m_p, z_p, a, m_q, z_q = _span_state(
        p_ptr, q_ptr, p_step, q_step, length, scale, False, VECTOR, LANES, ENTRIES, STAGES
    )
    if (a - a) != 0:  # an infinity or NaN
        m_p, z_p, a, m_q, z_q = _span_state(
            p_ptr, q_ptr, p_step, q_step, length, scale, True, VECTOR, LANES, ENTRIES, STAGES
        )
    if kl_ptr is None:
        _store_state(state_ptr + program * 5, m_p, z_p, a, m_q, z_q)
    else:
        _finish(state_ptr + program * 5, kl_ptr + program, m_p, z_p, a, m_q, z_q, temperature)


@triton.jit(do_not_specialize=["parts", "temperature_bits"])
def merge_kernel(states_ptr, state_ptr, kl_ptr, parts, temperature_bits, MERGED: tl.constexpr):
    """States [rows, parts, 5] without their temperature → state [rows, 5] and divergence [rows]; a warp per row, which
    adds the parts in a fixed order, in fp64."""
    row = tl.program_id(0).to(tl.int64)
    states_ptr += row * parts * 5
    temperature = temperature_bits.to(tl.float64, bitcast=True)
    scale = 1 / temperature * LOG2E
    m_p = tl.full([], -INF, tl.float64)
    z_p = tl.full([], 0.0, tl.float64)
    m_q, a, z_q = m_p, z_p, z_p
    for start in range(0, parts, MERGED):
        part = start + tl.arange(0, MERGED)
        inside = part < parts
        from_ptr = states_ptr + part * 5
        part_m_p = tl.load(from_ptr, mask=inside, other=-INF).to(tl.float64)
        part_z_p = tl.load(from_ptr + 1, mask=inside, other=0.0).to(tl.float64)
        part_a = tl.load(from_ptr + 2, mask=inside, other=0.0).to(tl.float64)
        part_m_q = tl.load(from_ptr + 3, mask=inside, other=-INF).to(tl.float64)
        part_z_q = tl.load(from_ptr + 4, mask=inside, other=0.0).to(tl.float64)
        top_p = tl.maximum(m_p, tl.max(part_m_p, 0))
        top_q = tl.maximum(m_q, tl.max(part_m_q, 0))
        r_p, part_r_p = _rescale(m_p, top_p, scale), _rescale(part_m_p, top_p, scale)
        r_q, part_r_q = _rescale(m_q, top_q, scale), _rescale(part_m_q, top_q, scale)
        z_p = z_p * r_p + tl.sum(part_z_p * part_r_p, 0)
        a = _weigh(a, r_p) + tl.sum(_weigh(part_a, part_r_p), 0)
        z_q = z_q * r_q + tl.sum(part_z_q * part_r_q, 0)
        m_p, m_q = top_p, top_q
    _finish(state_ptr + row * 5, kl_ptr + row, m_p, z_p, a, m_q, z_q, temperature)


@triton.jit(do_not_specialize=["p_step", "q_step", "vocabulary", "tiles", "temperature_bits"])
def gradients_kernel(
    p_ptr,
    q_ptr,
    grad_p_ptr,  # [rows, vocabulary], or None
    grad_q_ptr,
    state_ptr,  # [rows, 5]
    slope_ptr,  # [rows, 5]: the gradient of the state
    sizes,
    p_strides,
    q_strides,
    p_step,
    q_step,
    vocabulary,
    tiles,
    temperature_bits,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """dp = (g_zp + g_a (p - q + 1)) e^(p - m_p) / temperature,  dq = (g_zq e^(q - m_q) - g_a e^(p - m_p)) / temperature
    where p and q are already divided by the temperature."""
    real: tl.constexpr = state_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    begin = program % tiles * (LANES * ENTRIES)
    p_step = 1 if VECTOR > 1 else p_step.to(tl.int64)
    q_step = 1 if VECTOR > 1 else q_step.to(tl.int64)
    p_ptr += tl.multiple_of(_row_offset(row, sizes, p_strides) + begin * p_step, VECTOR)
    q_ptr += tl.multiple_of(_row_offset(row, sizes, q_strides) + begin * q_step, VECTOR)
    to = tl.multiple_of(row * vocabulary + begin, VECTOR)
    # Vectors are used where a row is a whole number of them, and so one bit of the mask holds for all of a vector.
    left = tl.multiple_of(tl.minimum(vocabulary - begin, LANES * ENTRIES).to(tl.int32), VECTOR)
    entry = _entries(VECTOR, LANES, ENTRIES)
    inside = entry < left
    p = tl.load(p_ptr + entry * p_step, mask=inside, other=-INF).to(real)
    q = tl.load(q_ptr + entry * q_step, mask=inside, other=-INF).to(real)
    temperature = temperature_bits.to(tl.float64, bitcast=True)
    inverse = (1 / temperature).to(real)
    scale = (1 / temperature * LOG2E).to(real)
    # The state's maxima are those of the scaled logits.
    m_p = (tl.load(state_ptr + row * 5) * temperature).to(real)
    m_q = (tl.load(state_ptr + row * 5 + 3) * temperature).to(real)
    g_zp = tl.load(slope_ptr + row * 5 + 1) * inverse
    g_a = tl.load(slope_ptr + row * 5 + 2) * inverse
    g_zq = tl.load(slope_ptr + row * 5 + 4) * inverse
    e_p = tl.where(p == -INF, 0.0, tl.exp2((p - m_p) * scale))
    if grad_p_ptr is not None:
        grad_p = e_p * (g_zp + g_a * ((p - q) * inverse + 1))
        # Nothing for an entry without probability, where p - q may be infinite.
        grad_p = tl.where(e_p == 0, 0.0, grad_p)
        tl.store(grad_p_ptr + to + entry, grad_p.to(p_ptr.dtype.element_ty), mask=inside)
    if grad_q_ptr is not None:
        e_q = tl.where(q == -INF, 0.0, tl.exp2((q - m_q) * scale))
        tl.store(grad_q_ptr + to + entry, (g_zq * e_q - g_a * e_p).to(q_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Pairs:
    """How pairs of rows lie in memory. Leading dimensions that can be walked as one are one; nothing is expanded."""

    shape: torch.Size  # of the leading dimensions
    sizes: tuple[int, ...]  # innermost first, all but the outermost
    p_strides: tuple[int, ...]
    q_strides: tuple[int, ...]
    vector: int  # entries in 16 bytes if all rows of both begin at such an address and are contiguous, else 1

    @staticmethod
    def of(p: Tensor, q: Tensor) -> "_Pairs":
        shape = torch.broadcast_shapes(p.shape[:-1], q.shape[:-1])
        p, q = p.expand(*shape, -1), q.expand(*shape, -1)  # views: dimensions that broadcast have a stride of 0
        dims = []
        for size, p_stride, q_stride in zip(shape, p.stride(), q.stride()):
            if dims and dims[-1][1:] == (size * p_stride, size * q_stride):
                dims[-1] = (dims[-1][0] * size, p_stride, q_stride)
            elif size > 1:
                dims.append((size, p_stride, q_stride))
        sizes, p_strides, q_strides = zip(*reversed(dims or [(1, 0, 0)]))
        vector = 16 // p.element_size()
        aligned = all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (p, q))
        if not aligned or any(stride % vector for stride in p_strides + q_strides):
            vector = 1
        return _Pairs(shape, sizes[:-1], p_strides, q_strides, vector)

    @property
    def rows(self) -> int:
        return self.shape.numel()


def kl_divergence_with_state(p_logits: Tensor, q_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_logits("kl_divergence", p_logits, q_logits, temperature)
    pairs, vocabulary = _Pairs.of(p_logits, q_logits), p_logits.shape[-1]
    real = torch.float64 if p_logits.dtype == torch.float64 else torch.float32
    kl = p_logits.new_empty(pairs.shape, dtype=real)
    state = p_logits.new_empty(*pairs.shape, 5, dtype=real)
    if kl.numel() == 0:
        return kl, state
    tiles = triton.cdiv(vocabulary, TILE) or 1
    span = triton.cdiv(tiles, triton.cdiv(PROGRAMS, pairs.rows)) * TILE
    spans = triton.cdiv(vocabulary, span) or 1
    parts = state if spans == 1 else p_logits.new_empty(pairs.rows, spans, 5, dtype=real)
    with torch.cuda.device_of(p_logits):
        span_states_kernel[(pairs.rows * spans,)](
            p_logits,
            q_logits,
            parts,
            kl if spans == 1 else None,
            pairs.sizes,
            pairs.p_strides,
            pairs.q_strides,
            p_logits.stride(-1),
            q_logits.stride(-1),
            vocabulary,
            spans,
            span,
            _bits(temperature),
            pairs.vector,
            LANES,
            ENTRIES,
            STAGES,
            num_warps=WARPS,
            **OPTIONS,
        )
        if spans > 1:
            _merge(parts, state, kl, temperature)
    return kl, state


def kl_divergence_backward(
    grad_state: Tensor,
    p_logits: Tensor,
    q_logits: Tensor,
    state: Tensor,
    temperature: float,
    need_p: bool,
    need_q: bool,
) -> tuple[Tensor, Tensor]:
    check_backward(grad_state, p_logits, q_logits, state, temperature)
    pairs, vocabulary = _Pairs.of(p_logits, q_logits), p_logits.shape[-1]
    shape = (*pairs.shape, vocabulary)
    grad_p, grad_q = p_logits.new_empty(shape if need_p else 0), q_logits.new_empty(shape if need_q else 0)
    tiles = triton.cdiv(vocabulary, TILE)
    if pairs.rows * tiles > 0 and (need_p or need_q):
        with torch.cuda.device_of(p_logits):
            gradients_kernel[(pairs.rows * tiles,)](
                p_logits,
                q_logits,
                grad_p if need_p else None,
                grad_q if need_q else None,
                state.contiguous(),
                grad_state.contiguous(),
                pairs.sizes,
                pairs.p_strides,
                pairs.q_strides,
                p_logits.stride(-1),
                q_logits.stride(-1),
                vocabulary,
                tiles,
                _bits(temperature),
                pairs.vector if vocabulary % pairs.vector == 0 else 1,
                LANES,
                ENTRIES,
                num_warps=WARPS,
                **OPTIONS,
            )
    return grad_p, grad_q


def merge_kl_states(states: list[Tensor]) -> Tensor:
    check_states(states)
    state = torch.empty_like(states[0], memory_format=torch.contiguous_format)
    with torch.cuda.device_of(state):
        _merge(torch.stack(states, -2), state, state.new_empty(state.shape[:-1]), 1.0)
    return state


def kl_from_state(state: Tensor) -> Tensor:
    check_state("kl_from_state", "state", state)
    kl = state.new_empty(state.shape[:-1])
    with torch.cuda.device_of(state):
        _merge(state.unsqueeze(-2).contiguous(), torch.empty_like(state), kl, 1.0)
    return kl


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    return kl_divergence_with_state(p_logits, q_logits, temperature)[0]


def kl_state(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    return kl_divergence_with_state(p_logits, q_logits, temperature)[1]


def _merge(parts: Tensor, state: Tensor, kl: Tensor, temperature: float) -> None:
    """``parts`` [..., parts, 5] → ``state`` [..., 5] and ``kl`` [...], all contiguous."""
    if kl.numel() > 0:
        merge_kernel[(kl.numel(),)](
            parts, state, kl, parts.shape[-2], _bits(temperature), MERGED, num_warps=1, **OPTIONS
        )


def _bits(temperature: float) -> int:
    """A double as an integer: Triton takes a Python float for fp32, which fp64 logits would feel."""
    return struct.unpack("q", struct.pack("d", temperature))[0]
