"""One table of cases for every backend, and oracles that share no code with any of them.

Why this grid. A compaction kernel only moves bytes, so what can go wrong is *which* bytes: the width of an element, the
strides, the place of the two dimensions, the plan, a size of zero, an offset beyond 32 bits, and two rows that overlap
while they move. Each axis is walked in full against a few values of the others; hypothesis mixes all of them. Elements
are random bits, so NaN payloads and denormals are among them, and results are compared as bytes.

A KL kernel computes, so what can go wrong is the number: V around the width of a vector and beyond one chunk, N below
and above the number of threads, infinities (a chunk of nothing but -inf above all), magnitudes, and strides. The oracle
is fp64 on the same input bits, with the rules for infinities written out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# --- backends -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """``ops`` holds callables with the signatures of the schemas."""

    name: str
    ops: object
    device: str = "cpu"
    checks_values: bool = False  # of a plan or a block table; on a device that would be a synchronisation

    def __getattr__(self, op: str) -> Callable:
        return getattr(self.ops, op)


# --- plans ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    keep: np.ndarray  # bool [B, S]
    length: int = -1
    pad_left: bool = False

    @property
    def rows(self) -> list[list[int]]:
        """Source rows, -1 for padding, as Python lists: the oracle's plan."""
        rows = []
        for sequence in self.keep:
            kept = [s for s in range(len(sequence)) if sequence[s]]
            length = len(sequence) if self.length < 0 else self.length
            if self.pad_left:
                kept = kept[max(0, len(kept) - length) :]
                rows.append([-1] * (length - len(kept)) + kept)
            else:
                kept = kept[:length]
                rows.append(kept + [-1] * (length - len(kept)))
        return rows

    @property
    def source(self) -> Tensor:
        length = self.keep.shape[1] if self.length < 0 else self.length
        return torch.tensor(self.rows, dtype=torch.int32).reshape(self.keep.shape[0], length)

    @property
    def lengths(self) -> list[int]:
        return [sum(row >= 0 for row in rows) for rows in self.rows]


def image_spans(batch: int, tokens: int, *spans: tuple[float, float]) -> np.ndarray:
    """Drops the given spans (in parts of S), moved a little from one sequence to the next."""
    keep = np.ones((batch, tokens), bool)
    for b in range(batch):
        for begin, end in spans:
            keep[b, int(begin * tokens) + b : int(end * tokens) + b] = False
    return keep


def one_token(batch: int, tokens: int) -> np.ndarray:
    keep = np.zeros((batch, tokens), bool)
    for b in range(batch if tokens else 0):
        keep[b, (tokens - 1, 0, tokens // 2)[b % 3]] = True
    return keep


def random_keep(batch: int, tokens: int, part: float = 0.5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, tokens)) < part


def ragged(batch: int, tokens: int) -> np.ndarray:
    """From everything to nothing, so that the sequences of one batch end far apart."""
    return np.stack([random_keep(1, tokens, 1 - b / max(1, batch - 1), b)[0] for b in range(batch)])


KEEPS: dict[str, Callable[[int, int], np.ndarray]] = {
    "none_dropped": lambda b, s: np.ones((b, s), bool),
    "all_dropped": lambda b, s: np.zeros((b, s), bool),
    "one_kept": one_token,
    "alternating": lambda b, s: (np.arange(s) + np.arange(b)[:, None]) % 2 == 0,
    "prefix_suffix": lambda b, s: image_spans(b, s, (0.2, 0.7)),
    "images": lambda b, s: image_spans(b, s, (0.1, 0.3), (0.4, 0.5), (0.7, 0.9)),
    "random": random_keep,
    "ragged": ragged,
    "first_dropped": lambda b, s: np.arange(s) > np.zeros((b, 1)),  # every row moves, and by one only
    "last_dropped": lambda b, s: np.arange(s) < np.full((b, 1), s - 1),  # nothing moves
}
LENGTHS = {"S": -1, "zero": 0, "one": 1, "shorter": 4, "longer": 17}  # against at most 13 kept rows of 13


def plan_of(name: str, batch: int, tokens: int, length: str = "S", pad_left: bool = False) -> Plan:
    return Plan(KEEPS[name](batch, tokens), LENGTHS[length], pad_left)


PLANS = {
    f"{keep}-{length}-{'left' if pad_left else 'right'}": plan_of(keep, 3, 13, length, pad_left)
    for keep in KEEPS
    for length in LENGTHS
    for pad_left in (False, True)
}

# --- tensors --------------------------------------------------------------------------------------

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
]


def dense(shape: tuple[int, ...], order=None, steps=None, pads=None) -> list[int]:
    """Strides of a tensor whose dimensions lie in memory in this order, outermost first; ``steps`` leaves gaps between
    the elements of a dimension, ``pads`` behind its end; both count dimensions from the end."""
    strides, running = [0] * len(shape), 1
    for d in reversed(order or range(len(shape))):
        d %= len(shape)
        strides[d] = running * (steps or {}).get(d - len(shape), 1)
        running = strides[d] * max(1, shape[d]) + (pads or {}).get(d - len(shape), 0)
    return strides


def swapped(shape: tuple[int, ...]) -> list[int]:
    """[B, S, H, D] storage seen as [B, H, S, D]; of two dimensions, the second outermost."""
    order = list(range(len(shape)))
    first = 1 if len(shape) > 2 else 0
    order[first], order[first + 1] = order[first + 1], order[first]
    return dense(shape, order)


def expanded(shape: tuple[int, ...], dim: int) -> list[int]:
    strides = dense(tuple(1 if d == dim % len(shape) else size for d, size in enumerate(shape)))
    strides[dim] = 0
    return strides


# name -> (strides of a shape, storage offset in elements)
LAYOUTS: dict[str, tuple[Callable[[tuple[int, ...]], list[int]], int]] = {
    "contiguous": (dense, 0),
    "swapped": (swapped, 0),
    "reversed": (lambda shape: dense(shape, list(range(len(shape)))[::-1]), 0),
    "row_padded": (lambda shape: dense(shape, pads={-1: 3}), 0),
    "longer_cache": (lambda shape: dense(shape, pads={-2: 40}), 0),
    "step_2": (lambda shape: dense(shape, steps={-1: 2}), 0),
    "token_step_2": (lambda shape: dense(shape, steps={-2: 2}), 0),
    "offset_64": (dense, 64),
    "unaligned": (dense, 1),
    "unaligned_padded": (lambda shape: dense(shape, pads={-1: 1}), 3),
    "expanded_batch": (lambda shape: expanded(shape, 0), 0),
    "expanded_inner": (lambda shape: expanded(shape, -1), 0),
}
OVERLAPPING = ("expanded_batch", "expanded_inner")  # not for compact_


@dataclass(frozen=True)
class Spec:
    """A tensor to be made: where its two dimensions are and how it lies in memory."""

    shape: tuple[int, ...]
    token_dim: int
    batch_dim: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    strides: tuple[int, ...] | None = None  # instead of the layout's
    offset: int = 0

    def build(self, device: str = "cpu", seed: int = 0) -> "Built":
        make, offset = LAYOUTS[self.layout]
        strides = make(self.shape) if self.strides is None else self.strides
        offset += self.offset
        last = sum((size - 1) * stride for size, stride in zip(self.shape, strides)) if 0 not in self.shape else 0
        count = offset + last + 1 + 5  # five more, to see a write beyond the end
        item = self.dtype.itemsize
        bits = torch.randint(0, 256, (count * item,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        memory = (bits & 1 if self.dtype == torch.bool else bits).to(device)
        view = memory.view(self.dtype).as_strided(self.shape, strides, offset)
        return Built(self, memory, view, tuple(stride * item for stride in strides), offset * item)


@dataclass(frozen=True)
class Built:
    """A tensor, and all memory around it: what an in-place op may not touch lies there too."""

    spec: Spec
    memory: Tensor  # uint8
    tensor: Tensor
    byte_strides: tuple[int, ...]
    byte_offset: int

    def numpy(self, memory: np.ndarray | None = None) -> np.ndarray:
        """The tensor as opaque elements, viewed in ``memory`` (by default a copy of its own)."""
        memory = self.snapshot() if memory is None else memory
        item = np.dtype(f"V{self.spec.dtype.itemsize}")
        return np.ndarray(self.spec.shape, item, memory, self.byte_offset, self.byte_strides)

    def snapshot(self) -> np.ndarray:
        return self.memory.cpu().numpy().copy()


def bytes_of(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# What a decoder keeps per token, in the shapes that models give it. KV is [B, H, S, D]; positions of M-RoPE are
# [3, B, S]; a 4-D mask has a token axis for queries and one for keys; rotary tables may have batch size 1.
def decoder_specs(batch: int, tokens: int) -> dict[str, Spec]:
    kv = (batch, 2, tokens, 6)
    return {
        "hidden": Spec((batch, tokens, 7), 1, dtype=torch.bfloat16),
        "ids": Spec((batch, tokens), 1, dtype=torch.int64),
        "keys": Spec(kv, 2, dtype=torch.float16),
        "values": Spec(kv, 2, dtype=torch.float16, layout="swapped"),
        "keys_fp8": Spec(kv, -2, dtype=torch.float8_e4m3fn),
        "mrope": Spec((3, batch, tokens), 2, 1, torch.int64),
        "mask_queries": Spec((batch, 1, tokens, 5), 2, dtype=torch.bool),
        "mask_keys": Spec((batch, 1, 5, tokens), -1, dtype=torch.float32),
        "token_first": Spec((tokens, batch, 4), 0, 1, torch.int32),
        "batch_last": Spec((4, tokens, batch), -2, -1, torch.float64),
        "complex": Spec((batch, tokens, 3), -2, -3, torch.complex64),
    }


def rotary_spec(tokens: int) -> Spec:
    """Batch size 1: broadcast over the plan's batch by compact and expand, refused by compact_."""
    return Spec((1, tokens, 6), 1, dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    plan: Plan
    specs: tuple[Spec, ...]

    @property
    def token_dims(self) -> list[int]:
        return [spec.token_dim for spec in self.specs]

    @property
    def batch_dims(self) -> list[int]:
        return [spec.batch_dim for spec in self.specs]

    def in_place(self) -> "Case | None":
        """The same for compact_: what it takes of the list, if it takes the plan."""
        batch = self.plan.keep.shape[0]
        specs = tuple(x for x in self.specs if x.shape[x.batch_dim] == batch and x.layout not in OVERLAPPING)
        return None if self.plan.pad_left or not specs else replace(self, specs=specs)

    def compacted(self) -> "Case":
        """The same for expand, whose tensors have T rows."""
        kept = self.plan.source.shape[1]

        def resized(spec: Spec) -> Spec:
            shape = list(spec.shape)
            shape[spec.token_dim] = kept
            return replace(spec, shape=tuple(shape))

        return replace(self, specs=tuple(resized(spec) for spec in self.specs))


def make_cases() -> dict[str, Case]:
    cases = {}
    # Every plan, on one list of everything.
    for name, plan in PLANS.items():
        cases[f"plan-{name}"] = Case(plan, (*decoder_specs(3, 13).values(), rotary_spec(13)))
    # Every tensor of the decoder in every layout.
    for layout in LAYOUTS:
        for name, spec in (decoder_specs(3, 13) | {"rotary": rotary_spec(13)}).items():
            plan = plan_of("images", 3, 13, "longer", pad_left=layout == "swapped")
            cases[f"layout-{layout}-{name}"] = Case(plan, (replace(spec, layout=layout),))
    # Every dtype in a few layouts.
    for dtype in DTYPES:
        for layout in ("contiguous", "swapped", "step_2", "unaligned_padded", "expanded_inner"):
            spec = Spec((3, 2, 13, 5), 2, dtype=dtype, layout=layout)
            cases[f"dtype-{str(dtype)[6:]}-{layout}"] = Case(plan_of("random", 3, 13), (spec,))
    # Widths around those of a vector and of a cache line.
    for width in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        specs = (
            Spec((2, 21, width), 1, dtype=torch.uint8),
            Spec((2, 21, width), 1, dtype=torch.uint8, layout="unaligned"),
        )
        cases[f"width-{width}"] = Case(plan_of("prefix_suffix", 2, 21), specs)
    # Zero and one, everywhere.
    for batch in (0, 1, 2):
        for tokens in (0, 1, 3):
            for length in ("S", "zero", "longer"):
                plan = plan_of("random", batch, tokens, length)
                case = Case(plan, tuple(decoder_specs(batch, tokens).values()) + (Spec((batch, tokens, 0), 1),))
                cases[f"size-B{batch}-S{tokens}-{length}"] = case
    cases["size-empty_list"] = Case(plan_of("random", 2, 3), ())
    cases["size-H0"] = Case(
        plan_of("random", 3, 13), (Spec((3, 0, 13, 4), 2), Spec((3, 13, 4), 1), Spec((3, 13, 0), 1))
    )
    # A static cache is longer than its prompt: lists may differ in S.
    longer = (Spec((2, 2, 20, 4), 2), Spec((2, 13, 4), 1), Spec((2, 2, 33, 4), 2, dtype=torch.float16))
    cases["different_S"] = Case(plan_of("images", 2, 13), longer)
    # More dimensions than any descriptor has, none of which go on in another; and more tensors than any table.
    deep = Spec((2, 2, 13, 2, 3, 2, 3), 2, layout="reversed")
    cases["rank_7"] = Case(plan_of("random", 2, 13), (deep, replace(deep, dtype=torch.bool, layout="step_2")))
    cases["many_tensors"] = Case(plan_of("images", 2, 5), (Spec((2, 5, 3), 1, dtype=torch.int16),) * 210)
    # Large enough that threads share the work, that a row is cut into tiles and that stores go around the caches.
    kv = tuple(Spec((4, 8, 700, 64), 2, dtype=torch.bfloat16) for _ in range(12))
    cases["large-kv"] = Case(plan_of("prefix_suffix", 4, 700), kv)
    cases["large-kv_random"] = Case(plan_of("random", 4, 700), kv[:2])
    cases["large-kv_ragged_left"] = Case(Plan(ragged(4, 700), 650, True), kv[:2])
    cases["large-hidden"] = Case(plan_of("prefix_suffix", 1, 661), (Spec((1, 661, 512), 1),))
    cases["large-hidden_wide"] = Case(plan_of("images", 1, 331), (Spec((1, 331, 8191), 1, layout="unaligned_padded"),))
    cases["large-hidden_by_one"] = Case(
        plan_of("first_dropped", 2, 900), (Spec((2, 900, 1031), 1, layout="unaligned"),)
    )
    for layout in ("swapped", "row_padded", "longer_cache", "unaligned_padded", "step_2"):
        specs = tuple(
            replace(kv[0], shape=(2, 3, 700, 129), dtype=dtype, layout=layout) for dtype in (torch.uint8, torch.float32)
        )
        cases[f"large-{layout}"] = Case(plan_of("images", 2, 700), specs)
    cases["large-ids"] = Case(plan_of("random", 3, 60000), (Spec((3, 60000), 1, dtype=torch.int64),))
    cases["large-mask_keys"] = Case(plan_of("images", 2, 900), (Spec((2, 1, 300, 900), 3, dtype=torch.bool),))
    return cases


CASES = make_cases()
IN_PLACE_CASES = {name: case.in_place() for name, case in CASES.items() if case.in_place()}

# --- compaction oracles ---------------------------------------------------------------------------


def compact_oracle(x: np.ndarray, token_dim: int, batch_dim: int, rows: list[list[int]], kept: int) -> np.ndarray:
    x = np.moveaxis(x, (batch_dim, token_dim), (0, 1))
    out = np.zeros((len(rows), kept, *x.shape[2:]), x.dtype)
    for b, sequence in enumerate(rows):
        for t, s in enumerate(sequence):
            if s >= 0:
                out[b, t] = x[b if x.shape[0] > 1 else 0, s]
    return np.moveaxis(out, (0, 1), (batch_dim, token_dim))


def expand_oracle(x: np.ndarray, token_dim: int, batch_dim: int, rows: list[list[int]], length: int) -> np.ndarray:
    x = np.moveaxis(x, (batch_dim, token_dim), (0, 1))
    out = np.zeros((len(rows), length, *x.shape[2:]), x.dtype)
    for b, sequence in enumerate(rows):
        for t, s in enumerate(sequence):
            if s >= 0:
                out[b, s] = x[b if x.shape[0] > 1 else 0, t]
    return np.moveaxis(out, (0, 1), (batch_dim, token_dim))


def compact_inplace_oracle(built: Built, rows: list[list[int]]) -> np.ndarray:
    """All memory of a tensor after compact_: only the elements of kept rows have changed."""
    memory = built.snapshot()
    before = np.moveaxis(built.numpy(), (built.spec.batch_dim, built.spec.token_dim), (0, 1))
    after = np.moveaxis(built.numpy(memory), (built.spec.batch_dim, built.spec.token_dim), (0, 1))
    for b, sequence in enumerate(rows):
        for t, s in enumerate(sequence):
            if s >= 0:
                after[b, t] = before[b, s]
    return memory


# --- KL oracle ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KL:
    """Everything in fp64: the divergence, its state, the probabilities, and the size of a log-sum-exp."""

    kl: np.ndarray
    state: np.ndarray  # [..., 5]
    terms: np.ndarray  # sum of |e^(p - m)·(p - q)|: what a rounds against
    p: np.ndarray
    q: np.ndarray
    log_ratio: np.ndarray
    lse: np.ndarray


def kl_oracle(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> KL:
    # Twice the precision of what is tested: fp64 logits are judged in extended precision, where the machine has it.
    wide = np.longdouble if p_logits.dtype == torch.float64 else np.float64
    p, q = (x.detach().cpu().double().numpy().astype(wide) / wide(temperature) for x in (p_logits, q_logits))
    p, q = np.broadcast_arrays(p, q)
    with np.errstate(all="ignore"):
        m_p, z_p, part_p, log_p = _softmax(p)
        m_q, z_q, part_q, log_q = _softmax(q)
        nan = np.isnan(p) | np.isnan(q)
        zero_p, zero_q = np.isneginf(p), np.isneginf(q)
        # 0·log(0/q) = 0; p·log(p/0) = inf; and NaN is NaN wherever it stands.
        ratio = np.where(zero_p, 0.0, np.where(zero_q, np.inf, log_p - log_q))
        terms = np.where(zero_p, 0.0, np.where(zero_q, np.inf, part_p * ratio))
        kl = np.where(nan, np.nan, terms).sum(-1)
        weighted = np.where(zero_p, 0.0, np.where(zero_q, np.inf, np.exp(p - m_p[..., None]) * (p - q)))
        weighted = np.where(nan, np.nan, weighted)
        state = np.stack((m_p, z_p, weighted.sum(-1), m_q, z_q), -1)
        # A row without any finite logit, or with +inf, is no distribution.
        broken = [~np.isfinite(x).any(-1) | np.isposinf(x).any(-1) for x in (p, q)]
        kl = np.where(broken[0] | broken[1], np.nan, kl)
        lse = np.maximum(np.abs(m_p + np.log(z_p)), np.abs(m_q + np.log(z_q)))
    results = (kl, state, np.abs(weighted).sum(-1), part_p, part_q, ratio, lse)
    with np.errstate(over="ignore"):
        return KL(*(np.asarray(x, np.float64) for x in results))


def _softmax(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maximum, sum of exponentials, probabilities and their logarithms."""
    m = x.max(-1, initial=-np.inf)
    e = np.where(np.isneginf(x), 0.0, np.exp(x - m[..., None]))
    z = e.sum(-1)
    return m, z, e / z[..., None], x - (m + np.log(z))[..., None]


def kl_tolerance(expected: KL, dtype: torch.dtype) -> np.ndarray:
    """Relative to the divergence, and to the log-sum-exps that cancel when it is small."""
    kl, lse = np.abs(expected.kl), np.nan_to_num(expected.lse, posinf=0.0)
    if dtype == torch.float64:
        return 1e-12 * kl + 1e-13 * (1 + lse)
    return 5e-6 * kl + 2e-6 * (1 + lse)


def assert_kl(actual: Tensor, expected: KL, dtype: torch.dtype) -> None:
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    actual = actual.detach().cpu().double().numpy()
    assert actual.shape == expected.kl.shape
    special = ~np.isfinite(expected.kl)
    np.testing.assert_array_equal(actual[special], expected.kl[special])
    error = np.abs(actual[~special] - expected.kl[~special])
    tolerance = kl_tolerance(expected, dtype)[~special]
    assert (error <= tolerance).all(), f"error {error.max()}, at most {(error / tolerance).max():.2f} of the tolerance"
    assert (actual[~special] >= 0).all()


def logits(shape, dtype=torch.float32, scale: float = 3.0, seed: int = 0, device: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return x.to(dtype).to(device or torch.get_default_device())
