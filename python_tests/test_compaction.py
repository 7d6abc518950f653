"""plan_compaction, compact, compact_ and expand against loops over sequences, byte for byte."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    IN_PLACE_CASES,
    KEEPS,
    LENGTHS,
    PLANS,
    Case,
    Plan,
    Spec,
    bytes_of,
    compact_inplace_oracle,
    compact_oracle,
    decoder_specs,
    dense,
    expand_oracle,
    plan_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import vtw_kernels as vtw


def over(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


def check_results(results, built, expected, plan, rows):
    assert len(results) == len(built)
    for out, x, want in zip(results, built, expected):
        assert out.shape == want.shape and out.dtype == x.spec.dtype and out.device == x.tensor.device
        assert out.is_contiguous()
        assert bytes_of(out) == want.tobytes(), x.spec
        assert out.numel() == 0 or out.untyped_storage().data_ptr() != x.memory.untyped_storage().data_ptr()


def check_compact(backend, case):
    built = [spec.build(backend.device, seed) for seed, spec in enumerate(case.specs)]
    before = [x.snapshot() for x in built]
    source = case.plan.source.to(backend.device)
    results = backend.compact([x.tensor for x in built], case.token_dims, case.batch_dims, source)
    rows, kept = case.plan.rows, source.shape[1]
    expected = [compact_oracle(x.numpy(), x.spec.token_dim, x.spec.batch_dim, rows, kept) for x in built]
    check_results(results, built, expected, case.plan, kept)
    assert all(np.array_equal(x.snapshot(), old) for x, old in zip(built, before))


def check_expand(backend, case):
    length = case.plan.keep.shape[1]
    built = [spec.build(backend.device, seed) for seed, spec in enumerate(case.compacted().specs)]
    source = case.plan.source.to(backend.device)
    results = backend.expand([x.tensor for x in built], case.token_dims, case.batch_dims, source, length)
    rows = case.plan.rows
    expected = [expand_oracle(x.numpy(), x.spec.token_dim, x.spec.batch_dim, rows, length) for x in built]
    check_results(results, built, expected, case.plan, length)


def check_compact_inplace(backend, case):
    built = [spec.build(backend.device, seed) for seed, spec in enumerate(case.specs)]
    expected = [compact_inplace_oracle(x, case.plan.rows) for x in built]
    source = case.plan.source.to(backend.device)
    assert backend.compact_([x.tensor for x in built], case.token_dims, case.batch_dims, source) is None
    for x, want in zip(built, expected):
        assert np.array_equal(x.snapshot(), want), x.spec


# --- plans ----------------------------------------------------------------------------------------


def check_plan(backend, plan, keep):
    source, lengths = backend.plan_compaction(keep, plan.length, plan.pad_left)
    assert source.dtype == lengths.dtype == torch.int32 and source.device == lengths.device == keep.device
    assert source.is_contiguous()
    assert source.shape == plan.source.shape
    assert source.tolist() == plan.rows and lengths.tolist() == plan.lengths


@pytest.mark.parametrize("plan", [pytest.param(plan, id=name) for name, plan in PLANS.items()])
def test_plan(backend, plan):
    check_plan(backend, plan, torch.from_numpy(plan.keep).to(backend.device))


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pad_left", [False, True])
def test_plan_of_small_sizes(backend, batch, tokens, length, pad_left):
    plan = plan_of("random", batch, tokens, length, pad_left)
    check_plan(backend, plan, torch.from_numpy(plan.keep).to(backend.device))


@pytest.mark.parametrize("layout", ["swapped", "step_2", "unaligned", "row_padded", "expanded_batch", "expanded_inner"])
def test_plan_of_strided_keep(backend, layout):
    keep = Spec((3, 13), 1, dtype=torch.bool, layout=layout).build(backend.device).tensor
    for pad_left in (False, True):
        check_plan(backend, Plan(keep.cpu().numpy(), 6, pad_left), keep)


def test_plan_of_many_tokens(backend):
    """Beyond any block or tile over which a kernel may scan."""
    for keep in KEEPS:
        plan = plan_of(keep, 2, 70_001)
        check_plan(backend, plan, torch.from_numpy(plan.keep).to(backend.device))


def test_plan_defaults():
    keep = torch.from_numpy(PLANS["random-S-right"].keep)
    assert vtw.plan_compaction(keep).source.tolist() == PLANS["random-S-right"].rows
    assert vtw.plan_compaction(keep, 4, "left").source.tolist() == PLANS["random-shorter-left"].rows
    assert vtw.plan_compaction(keep, length=0).source.shape == (3, 0)
    source, lengths = torch.ops.vtw_kernels.plan_compaction(keep)
    assert source.tolist() == PLANS["random-S-right"].rows and lengths.tolist() == PLANS["random-S-right"].lengths


# --- the table ------------------------------------------------------------------------------------


@over(CASES)
def test_compact(backend, case):
    check_compact(backend, case)


@over(CASES)
def test_expand(backend, case):
    check_expand(backend, case)


@over(IN_PLACE_CASES)
def test_compact_inplace(backend, case):
    check_compact_inplace(backend, case)


@over({name: CASES[name] for name in ("plan-images-longer-left", "plan-random-S-right", "layout-swapped-keys")})
def test_compact_of_expanded(backend, case):
    """expand is the inverse: compacting again gives the same bytes, but for padding rows, which are zero."""
    built = [spec.build(backend.device, seed) for seed, spec in enumerate(case.compacted().specs)]
    source, dims = case.plan.source.to(backend.device), (case.token_dims, case.batch_dims)
    wide = backend.expand([x.tensor for x in built], *dims, source, case.plan.keep.shape[1])
    for out, x in zip(backend.compact(wide, *dims, source), built):
        identity = [[t if s >= 0 else -1 for t, s in enumerate(rows)] for rows in case.plan.rows]
        want = compact_oracle(x.numpy(), x.spec.token_dim, x.spec.batch_dim, identity, source.shape[1])
        assert bytes_of(out) == want.tobytes()


@pytest.mark.parametrize("layout", ["swapped", "step_2", "row_padded"])
def test_strided_source(backend, layout):
    case = Case(plan_of("images", 3, 13), tuple(decoder_specs(3, 13).values()))
    source = Spec((3, 13), 1, dtype=torch.int32, layout=layout).build(backend.device).tensor
    source.copy_(case.plan.source)
    built = [spec.build(backend.device) for spec in case.specs]
    args = ([x.tensor for x in built], case.token_dims, case.batch_dims, source)
    for out, x in zip(backend.compact(*args), built):
        assert (
            bytes_of(out) == compact_oracle(x.numpy(), x.spec.token_dim, x.spec.batch_dim, case.plan.rows, 13).tobytes()
        )
    for out, x in zip(backend.expand(*args, 13), built):
        assert (
            bytes_of(out) == expand_oracle(x.numpy(), x.spec.token_dim, x.spec.batch_dim, case.plan.rows, 13).tobytes()
        )
    expected = [compact_inplace_oracle(x, case.plan.rows) for x in built]
    backend.compact_(*args)
    assert all(np.array_equal(x.snapshot(), want) for x, want in zip(built, expected))


@pytest.mark.parametrize("packed_dim", [-1, 1, 0])
def test_inplace_in_one_packed_buffer(backend, packed_dim):
    """Keys and values as the halves of one buffer, interleaved or not, share an extent but no byte."""
    plan = plan_of("images", 2, 13)
    packed = Spec((4, 4, 13, 6), 2, dtype=torch.float16, layout="unaligned").build(backend.device)
    halves = packed.tensor.chunk(2, packed_dim)
    if packed_dim == 0:
        rows = plan.rows + plan.rows
    else:
        plan = Plan(np.concatenate((plan.keep, KEEPS["random"](2, 13))))
        rows = plan.rows
    expected = compact_inplace_oracle(packed, rows)
    backend.compact_(list(halves), [2, 2], [0, 0], plan.source.to(backend.device))
    assert np.array_equal(packed.snapshot(), expected)


def test_inplace_on_heads_of_one_buffer(backend):
    """Fused QKV: three slices of [B, S, 3, H, D], each seen as [B, H, S, D]."""
    plan = plan_of("random", 2, 13)
    packed = Spec((2, 13, 3, 2, 4), 1, dtype=torch.bfloat16).build(backend.device)
    expected = compact_inplace_oracle(packed, plan.rows)
    parts = [packed.tensor[:, :, i].transpose(1, 2) for i in range(3)]
    backend.compact_(parts, [2] * 3, [0] * 3, plan.source.to(backend.device))
    assert np.array_equal(packed.snapshot(), expected)


def test_conjugate_and_negated_views(backend):
    """Lazy views whose bits in memory are not yet their values."""
    plan = plan_of("images", 2, 13)
    x = torch.randn(2, 13, 3, dtype=torch.complex64, device=backend.device)
    views = [x.conj(), x.conj().imag]
    results = backend.compact(views, [1, 1], [0, 0], plan.source.to(backend.device))
    for out, view in zip(results, views):
        want = compact_oracle(view.resolve_conj().resolve_neg().cpu().numpy(), 1, 0, plan.rows, 13)
        assert torch.equal(out.resolve_conj().resolve_neg().cpu(), torch.from_numpy(want))


# --- offsets beyond 32 bits -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16], ids=str)
@pytest.mark.parametrize("far", ["token", "batch", "head"])
def test_offsets_beyond_32_bits(backend, dtype, far):
    """Four slices 2^30 elements apart; memory is committed page by page, so that the test costs next to none."""
    shape = {"token": (1, 4, 5), "batch": (4, 3, 5), "head": (1, 4, 3, 5)}[far]
    token_dim = 2 if far == "head" else 1
    strides = dense(shape)
    far_dim = 0 if far == "batch" else 1
    strides[far_dim] = 2**30
    memory = torch.empty(3 * 2**30 + 64, dtype=dtype, device=backend.device)
    x = memory.as_strided(shape, strides)
    x.copy_(torch.arange(x.numel()).reshape(shape))
    values = x.cpu().numpy().copy()
    keep = np.ones((shape[0], shape[token_dim]), bool)
    keep[:, 1] = False
    plan = Plan(keep)
    source = plan.source.to(backend.device)
    want = compact_oracle(values, token_dim, 0, plan.rows, keep.shape[1])
    (out,) = backend.compact([x], [token_dim], [0], source)
    assert np.array_equal(out.cpu().numpy(), want)
    (wide,) = backend.expand([x], [token_dim], [0], source, keep.shape[1])
    assert np.array_equal(wide.cpu().numpy(), expand_oracle(values, token_dim, 0, plan.rows, keep.shape[1]))
    backend.compact_([x], [token_dim], [0], source)
    kept = keep.shape[1] - 1
    assert np.array_equal(x.cpu().numpy().take(range(kept), token_dim), want.take(range(kept), token_dim))
    assert np.array_equal(x.cpu().numpy().take([kept], token_dim), values.take([kept], token_dim))


# --- determinism ----------------------------------------------------------------------------------


@over({name: CASES[name] for name in ("large-kv_random", "large-hidden", "large-hidden_by_one", "large-row_padded")})
def test_equal_bits_for_any_number_of_threads(host_backend, case, num_threads):
    seen = set()
    for threads in (1, 2, 2, 3):
        num_threads(threads)
        built = [spec.build(seed=seed) for seed, spec in enumerate(case.specs)]
        args = ([x.tensor for x in built], case.token_dims, case.batch_dims, case.plan.source)
        result = [bytes_of(x) for x in host_backend.compact(*args)]
        result += [bytes_of(x) for x in host_backend.expand(*args, case.plan.keep.shape[1])]
        host_backend.compact_(*args)
        seen.add(tuple(result + [x.snapshot().tobytes() for x in built]))
    assert len(seen) == 1


# --- the public functions -------------------------------------------------------------------------


def test_one_dim_for_all_or_one_each():
    plan = plan_of("images", 2, 13)
    public = vtw.plan_compaction(torch.from_numpy(plan.keep))
    keys, values = (Spec((2, 3, 13, 4), 2).build(seed=seed).tensor for seed in (0, 1))
    positions = torch.arange(3 * 2 * 13).reshape(3, 2, 13)
    a = vtw.compact([keys, values], public, 2)
    b = vtw.compact((keys, values, positions), public, (2, -2, 2), [0, 0, 1])
    assert isinstance(a, list) and [bytes_of(x) for x in a] == [bytes_of(x) for x in b[:2]]
    assert b[2].shape == (3, 2, 13)
    assert [bytes_of(x) for x in vtw.expand(a, public, 13, 2)] == [
        bytes_of(x) for x in vtw.expand(b[:2], public, 13, [2, 2])
    ]
    vtw.compact_([keys, values], public, token_dims=2)
    for x, out in zip((keys, values), a):
        for i, length in enumerate(public.lengths.tolist()):
            assert bytes_of(x[i, :, :length]) == bytes_of(out[i, :, :length])


def test_gradients():
    plan = plan_of("images", 3, 7, "longer")
    source = vtw.CompactionPlan(plan.source, torch.tensor(plan.lengths))
    x = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    rotary = torch.randn(1, 7, 2, dtype=torch.float64, requires_grad=True)
    longer = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(21).reshape(3, 7)

    def compact(x, rotary, longer):
        out = vtw.compact([x.sin(), ids, rotary, longer], source, [1, 1, 1, -2], [0, 0, 0, 2])
        return out[0], out[2], out[3]

    def expand(*tensors):
        return tuple(vtw.expand(tensors, source, 8, [1, 1, -2], [0, 0, 2]))

    assert torch.autograd.gradcheck(compact, (x, rotary, longer))
    assert torch.autograd.gradgradcheck(compact, (x, rotary, longer))
    y = torch.randn(3, 17, 2, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(1, 17, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 17, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(expand, (y, shared, z))
    assert torch.autograd.gradgradcheck(expand, (y, shared, z))
    # Only some of the outputs take part.
    first, *_ = compact(x, rotary, longer)
    (grad,) = torch.autograd.grad(first.sum(), x)
    kept = torch.from_numpy(plan.keep).unsqueeze(-1)
    assert torch.equal(grad, torch.where(kept, x.cos(), 0.0).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_gradient_dtypes(dtype):
    plan = plan_of("random", 3, 13)
    x = torch.randn(3, 13, 4, dtype=dtype, requires_grad=True)
    (out,) = vtw.compact([x], vtw.CompactionPlan(plan.source, None), 1)
    out.sum().abs().backward() if dtype.is_complex else out.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad != 0, torch.from_numpy(plan.keep).unsqueeze(-1).expand_as(x))


def test_integer_results_need_no_gradient():
    plan = vtw.plan_compaction(torch.tensor([[True, False, True]]))
    hidden, ids = vtw.compact([torch.randn(1, 3, 2, requires_grad=True), torch.arange(3)[None]], plan, 1)
    assert hidden.requires_grad and not ids.requires_grad


# --- everything at random -------------------------------------------------------------------------


@st.composite
def specs(draw, batch, tokens):
    others = draw(st.lists(st.integers(0, 5), max_size=3))
    rank = len(others) + 2
    token_dim, batch_dim = draw(st.permutations(range(rank)))[:2]
    shape = list(others)
    for dim, size in sorted([(token_dim, tokens), (batch_dim, batch)]):
        shape.insert(dim, size)
    shape = tuple(shape)
    steps = dict(zip(range(-rank, 0), draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=rank, max_size=rank))))
    pads = dict(zip(range(-rank, 0), draw(st.lists(st.sampled_from([0, 0, 1, 5]), min_size=rank, max_size=rank))))
    strides = tuple(dense(shape, draw(st.permutations(range(rank))), steps, pads))
    sign = draw(st.booleans()) * rank
    dtype, offset = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3))
    return Spec(shape, token_dim - sign, batch_dim - sign, dtype, strides=strides, offset=offset)


@st.composite
def any_case(draw, in_place=False):
    batch, tokens = draw(st.integers(0, 4)), draw(st.integers(0, 24))
    keep = np.array(draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)), bool)
    length = draw(st.integers(-1, tokens + 3))
    plan = Plan(keep.reshape(batch, tokens), length, not in_place and draw(st.booleans()))
    chosen = draw(st.lists(specs(batch, tokens), min_size=1, max_size=4))
    if not in_place:  # some dimension may be read again and again
        for i, spec in enumerate(chosen):
            zero = draw(st.sampled_from([None, *range(len(spec.shape))]))
            strides = tuple(0 if d == zero else stride for d, stride in enumerate(spec.strides))
            chosen[i] = replace(spec, strides=strides)
    return Case(plan, tuple(chosen))


budget = settings(derandomize=True, max_examples=100, deadline=None, database=None)


@budget
@given(case=any_case())
def check_any_compact(backend, case):
    check_plan(backend, case.plan, torch.from_numpy(case.plan.keep).to(backend.device))
    check_compact(backend, case)


@budget
@given(case=any_case())
def check_any_expand(backend, case):
    check_expand(backend, case)


@budget
@given(case=any_case(in_place=True))
def check_any_compact_inplace(backend, case):
    check_compact_inplace(backend, case)


def test_any_compact(backend):
    check_any_compact(backend)


def test_any_expand(backend):
    check_any_expand(backend)


def test_any_compact_inplace(backend):
    check_any_compact_inplace(backend)
