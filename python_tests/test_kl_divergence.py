"""kl_divergence, its states and its gradients against fp64 on the same input bits."""

import numpy as np
import pytest
import torch
from cases import KL, assert_kl, bytes_of, dense, kl_oracle, kl_tolerance, logits
from hypothesis import given, settings
from hypothesis import strategies as st

import vtw_kernels as vtw

INF, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABULARIES = [0, 1, 2, 15, 16, 17, 31, 1000, 32000, 32064, 151936]
over_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: str(x)[6:])


def check_forward(backend, p, q, temperature=1.0) -> KL:
    expected = kl_oracle(p, q, temperature)
    kl, state = backend.kl_divergence_with_state(p, q, temperature)
    assert_kl(kl, expected, p.dtype)
    assert kl.is_contiguous() and kl.device == p.device
    check_state(state, expected, p.dtype, temperature)
    assert_kl(backend.kl_from_state(state), expected, p.dtype)
    return expected


def check_state(state, expected, dtype, temperature=1.0):
    """The maxima are exact (but for the rounding of a division); z and a are sums, exact to their own size."""
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    actual, want = state.detach().cpu().double().numpy(), expected.state
    assert actual.shape == want.shape
    # A row with NaN, +inf or nothing at all has no state to speak of, other than that its divergence is NaN.
    sound = np.isfinite(expected.kl) | np.isposinf(expected.kl)
    actual, want, terms = actual[sound], want[sound], expected.terms[sound]
    round_off = 2.5e-16 if dtype == torch.float64 else 1.2e-7
    exact = np.log2(temperature).is_integer()
    np.testing.assert_allclose(actual[..., [0, 3]], want[..., [0, 3]], rtol=0 if exact else round_off, atol=0)
    # x/T rounds, and e^(x/T - m) feels it in proportion to |x/T|.
    scale = 1 + (0 if exact else np.abs(want[..., [0, 3]]).max(-1) * 2)
    tolerance = (1e-13 if dtype == torch.float64 else 2e-6) * scale
    assert (np.abs(actual[..., 1] - want[..., 1]) <= tolerance * want[..., 1]).all()
    assert (np.abs(actual[..., 4] - want[..., 4]) <= tolerance * want[..., 4]).all()
    same_inf = np.isposinf(want[..., 2]) & np.isposinf(actual[..., 2])
    with np.errstate(invalid="ignore"):
        # p - q rounds too: by half a unit of the larger of the two.
        error, magnitude = (
            np.abs(actual[..., 2] - want[..., 2]),
            terms + want[..., 1] * (1 + np.abs(want[..., [0, 3]]).max(-1)),
        )
        assert (same_inf | (error <= tolerance * magnitude)).all()


# --- sizes, dtypes, strides -----------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", [0, 1, 3, 27])
def test_sizes(backend, dtype, vocabulary, rows):
    if rows * vocabulary > 100_000 and dtype != torch.bfloat16:
        rows = 2
    if rows * vocabulary > 1_000_000:
        rows = 5
    p = logits((rows, vocabulary), dtype, seed=0, device=backend.device)
    q = logits((rows, vocabulary), dtype, seed=1, device=backend.device)
    check_forward(backend, p, q)


@pytest.mark.parametrize(
    "vocabulary", [*range(1, 70), 127, 129, 255, 257, 511, 513, 1023, 1025, 2047, 4095, 4097, 8193]
)
def test_every_tail(backend, vocabulary):
    """The maximum of p is the last element and that of q the first: neither may be lost at the end of a vector."""
    for dtype in FLOATS:
        p, q = logits((2, vocabulary), dtype, 1.0, 0), logits((2, vocabulary), dtype, 1.0, 1)
        p[..., -1], q[..., 0] = 9.0, 9.0
        check_forward(backend, p.to(backend.device), q.to(backend.device))


BROADCASTS = [
    ((), ()),
    ((4,), ()),
    ((1,), (27,)),
    ((27,), (1,)),
    ((3, 1), (1, 5)),
    ((2, 3), (3,)),
    ((1, 1, 2), (4, 1, 1)),
    ((0,), (1,)),
    ((1, 1), (1,)),
]


@pytest.mark.parametrize("p_rows, q_rows", BROADCASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda x: str(x)[6:])
def test_broadcast(backend, p_rows, q_rows, dtype):
    p = logits((*p_rows, 517), dtype, seed=0, device=backend.device)
    q = logits((*q_rows, 517), dtype, seed=1, device=backend.device)
    expected = check_forward(backend, p, q)
    assert expected.kl.shape == np.broadcast_shapes(p_rows, q_rows)
    check_forward(backend, *torch.broadcast_tensors(p, q))  # the same, as strides of 0


STRIDES = {
    "step_2": dict(steps={-1: 2}),
    "row_padded": dict(pads={-1: 3}),
    "vocabulary_first": dict(order=[2, 0, 1]),
    "rows_swapped": dict(order=[1, 0, 2]),
    "step_3_padded": dict(steps={-1: 3}, pads={-1: 1}),
}


@over_dtypes
@pytest.mark.parametrize("p_layout", STRIDES)
@pytest.mark.parametrize("q_layout", [None, "step_2", "row_padded", "vocabulary_first"])
def test_strides(backend, dtype, p_layout, q_layout):
    def strided(layout, seed):
        shape = (2, 3, 1031)
        x = logits(shape, dtype, seed=seed, device=backend.device)
        if layout is None:
            return x
        strides = dense(shape, **STRIDES[layout])
        memory = torch.full((7 + sum((n - 1) * s for n, s in zip(shape, strides)),), NAN, dtype=dtype, device=x.device)
        return memory.as_strided(shape, strides, 1).copy_(x)  # what lies between is NaN

    check_forward(backend, strided(p_layout, 0), strided(q_layout, 1))


@over_dtypes
@pytest.mark.parametrize("vocabulary", [7, 2048, 2051])
def test_rows_that_end_with_their_memory(backend, dtype, vocabulary):
    """Unlike in alignment, and nothing behind them may be read: the sanitizers watch."""
    p, q = logits((vocabulary,), dtype), logits((vocabulary + 1,), dtype, seed=1)
    expected = kl_oracle(p, q[1:])
    assert_kl(backend.kl_divergence(p.to(backend.device), q.to(backend.device)[1:], 1.0), expected, dtype)


def test_expanded_vocabulary(backend):
    p = torch.zeros(2, 1, device=backend.device).expand(2, 100)
    check_forward(backend, p, logits((2, 100), seed=1, device=backend.device))
    check_forward(backend, p, p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda x: str(x)[6:])
def test_offsets_beyond_32_bits(backend, dtype):
    memory = torch.empty(3 * 2**30 + 1024, dtype=dtype, device=backend.device)
    far_rows = memory.as_strided((4, 300), (2**30, 1)).copy_(logits((4, 300), dtype, seed=0))
    check_forward(backend, far_rows, logits((1, 300), dtype, seed=1, device=backend.device))
    far_entries = memory.as_strided((2, 4), (4, 2**30)).copy_(logits((2, 4), dtype, seed=2))
    check_forward(backend, logits((2, 4), dtype, seed=3, device=backend.device), far_entries)


# --- magnitudes, temperature ----------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vocabulary", [33, 5000, 32064])
def test_temperature(backend, dtype, temperature, vocabulary):
    p = logits((3, vocabulary), dtype, seed=0, device=backend.device)
    q = logits((1, vocabulary), dtype, seed=1, device=backend.device)
    check_forward(backend, p, q, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 1e4), (torch.float16, 6e4), (torch.bfloat16, 1e4), (torch.float64, 1e4)]
)
def test_large_logits(backend, dtype, size, temperature):
    p = logits((4, 3001), dtype, 0.5 * size, 0).clamp(-size, size)
    q = logits((4, 3001), dtype, 0.5 * size, 1).clamp(-size, size)
    p[0, 7], p[0, 2900], q[0, 8] = size, -size, -size
    check_forward(backend, p.to(backend.device), q.to(backend.device), temperature)


@pytest.mark.parametrize("rising", [True, False])
def test_sorted_logits(backend, rising):
    """A new maximum in every vector, so that the running sums are always rescaled, or only in the first."""
    p = torch.linspace(-80, 80, 4099, device=backend.device)
    p = p if rising else p.flip(0)
    check_forward(backend, p, p.flip(0))
    check_forward(backend, p, logits(4099, device=backend.device))


# --- equal and near -------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("vocabulary", VOCABULARIES[1:])
def test_equal_rows_give_exactly_zero(backend, dtype, vocabulary):
    p = logits((2, vocabulary), dtype, 5.0, device=backend.device)
    if vocabulary > 1:
        p[1, ::2] = -INF
    for temperature in (1.0, 0.7, 3.0) if vocabulary < 32000 else (0.7,):
        assert (backend.kl_divergence(p, p.clone(), temperature) == 0).all()
    assert backend.kl_divergence(p, p[:1])[0] == 0


@over_dtypes
def test_never_below_zero(backend, dtype):
    p = logits((64, 1000), dtype, 8.0, device=backend.device)
    noise = torch.logspace(-8, -2, 64, dtype=torch.float64, device=backend.device).unsqueeze(-1)
    q = (p.double() + noise * logits((64, 1000), torch.float64, 1.0, 1, backend.device)).to(dtype)
    check_forward(backend, p, q)


@pytest.mark.parametrize("shift_p, shift_q", [(0, 64), (-128, 0), (100, 7), (-512, 512)])
def test_shift_invariance(backend, shift_p, shift_q):
    """Logits on a grid of 1/64 and whole shifts, so that every sum is exact and only the kernel can be at fault."""
    p, q = ((logits((5, 2003), seed=seed) * 64).round() / 64 for seed in (0, 1))
    unshifted = kl_oracle(p, q)
    moved = backend.kl_divergence((p + shift_p).to(backend.device), (q + shift_q).to(backend.device))
    shifted = kl_oracle(p + shift_p, q + shift_q)
    np.testing.assert_allclose(shifted.kl, unshifted.kl, rtol=1e-11)
    assert_kl(moved, KL(**{**vars(shifted), "kl": unshifted.kl}), p.dtype)


@over_dtypes
def test_order_of_the_vocabulary_does_not_matter(backend, dtype):
    p, q = logits((3, 5003), dtype, seed=0), logits((3, 5003), dtype, seed=1)
    expected = kl_oracle(p, q)
    for seed in range(4):
        order = torch.randperm(5003, generator=torch.Generator().manual_seed(seed))
        kl = backend.kl_divergence(p[:, order].to(backend.device), q[:, order].to(backend.device))
        assert_kl(kl, expected, dtype)


# --- infinities and NaN ---------------------------------------------------------------------------


def special_rows(vocabulary: int, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor, float | None]]:
    """(p, q, divergence where it is not an ordinary number). Special entries stand at both ends and in the middle."""
    places = sorted({0, vocabulary // 2, vocabulary - 1})
    p, q = logits(vocabulary, dtype, seed=0), logits(vocabulary, dtype, seed=1)
    leading = min(5000, vocabulary - 1)

    def put(x, where, value):
        x = x.clone()
        x[where] = value
        return x

    only = put(torch.full_like(p, -INF), vocabulary // 2, 1.5)
    none = torch.full_like(p, -INF)
    least = torch.finfo(dtype).min
    tiny = put(p, places[-1], least)
    return {
        "p_zero": (put(p, places[:-1], -INF), q, None),
        "q_zero": (p, put(q, places[:-1], -INF), INF),
        "both_zero": (put(p, places[:-1], -INF), put(q, places[:-1], -INF), None),
        "q_zero_where_p_underflows": (tiny, put(q, places[-1], -INF), INF),
        "leading_p": (put(p, slice(leading), -INF), q, None),
        "leading_q": (p, put(q, slice(leading), -INF), INF),
        "leading_both": (put(p, slice(leading), -INF), put(q, slice(leading), -INF), None),
        "leading_p_more": (put(p, slice(leading), -INF), put(q, slice(leading // 2), -INF), None),
        "trailing_both": (
            put(p, slice(vocabulary - leading, None), -INF),
            put(q, slice(vocabulary - leading, None), -INF),
            None,
        ),
        "one_hot_p": (only, q, None),
        "one_hot_both": (only, only, 0.0),
        "one_hot_apart": (only, put(none, places[0], 1.0), INF),
        "all_zero_p": (none, q, NAN),
        "all_zero_q": (p, none, NAN),
        "all_zero_both": (none, none, NAN),
        **{f"nan_p_{name}": (put(p, i, NAN), q, NAN) for name, i in zip(("first", "middle", "last"), places)},
        **{f"nan_q_{name}": (p, put(q, i, NAN), NAN) for name, i in zip(("first", "middle", "last"), places)},
        "nan_q_where_p_zero": (put(p, places[0], -INF), put(q, places[0], NAN), NAN),
        "nan_p_where_q_zero": (put(p, places[0], NAN), put(q, places[0], -INF), NAN),
        "nan_beside_infinite": (p, put(put(q, places[0], -INF), places[-1], NAN), NAN),
        "nan_before_infinite": (put(p, places[0], NAN), put(q, places[-1], -INF), NAN),
        # Masked by the least finite number, as many models do.
        "least_p": (put(p, places[:-1], least), q, None),
        "least_leading_p": (put(p, slice(leading), least), q, None),
        "least_q": (p, put(q, places[0], least / 2), None),
        "least_both": (put(p, slice(leading), least), put(q, slice(leading), least), None),
        # The same, and p by something else: where all of a block or a shard is, the sum of p - q overflows, though in
        # the end it weighs little or nothing.
        **{
            f"least_q_where_p_is_{low:g}": (
                put(p, slice(leading), max(low, least)),
                put(q, slice(leading), least),
                None,
            )
            for low in (-20.0, -1e4, -1e9, -1e30)
        },
        "inf_p": (put(p, places[1], INF), q, NAN),
        "inf_q": (p, put(q, places[1], INF), NAN),
        "inf_both": (put(p, places[1], INF), put(q, places[1], INF), NAN),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("vocabulary", [3, 17, 5001, 12007])
def test_special_values(backend, dtype, vocabulary):
    rows = special_rows(vocabulary, dtype)
    wrong = []
    for name, (p, q, value) in rows.items():  # one by one: nothing may come from a neighbour
        try:
            expected = check_forward(backend, p.to(backend.device), q.to(backend.device))
            assert value is None or np.array_equal(expected.kl, value, equal_nan=True)
        except AssertionError as error:
            wrong.append(f"{name}: {str(error).strip().splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
    p, q = (torch.stack([row[i] for row in rows.values()]).to(backend.device) for i in (0, 1))
    check_forward(backend, p, q)  # together: nothing may go to a neighbour
    # One row against all, but for those in whose least numbers the divergence would overflow.
    finite = [name for name in rows if not name.startswith("least")]
    p, q = (torch.stack([rows[name][i] for name in finite]).to(backend.device) for i in (0, 1))
    for name in ("p_zero", "q_zero", "one_hot_apart", "nan_p_middle", "inf_q"):
        check_forward(backend, p[finite.index(name)], q)
        check_forward(backend, p, q[finite.index(name)])


@over_dtypes
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_overflow_where_nothing_counts(backend, dtype, temperature):
    """p and q masked by numbers that are not the same, in a region that has blocks and tiles of its own."""
    least = torch.finfo(dtype).min
    for low in (-1e4, least / 2):
        p, q = logits((3, 9000), dtype, seed=0), logits((3, 9000), dtype, seed=1)
        p[:, 100:8500], q[:, 100:8500] = low, least
        expected = check_forward(backend, p.to(backend.device), q.to(backend.device), temperature)
        assert (expected.kl < 100).all()
        for grad, want in zip(
            gradients(backend, p.to(backend.device), q.to(backend.device), temperature), grad_oracle(p, q, temperature)
        ):
            assert_grad(grad, want, dtype)


def test_empty_vocabulary_is_the_neutral_state(backend):
    empty = torch.empty(2, 0, device=backend.device)
    state = backend.kl_state(empty, empty)
    assert state.tolist() == [[-INF, 0.0, 0.0, -INF, 0.0]] * 2
    assert backend.kl_from_state(state).isnan().all()
    assert torch.equal(backend.merge_kl_states([state, state]), state)
    other = backend.kl_state(logits((2, 50), device=backend.device), logits((2, 50), seed=1, device=backend.device))
    for states in ([state, other], [other, state], [state, other, state]):
        assert torch.equal(backend.merge_kl_states(states), other)


# --- states ---------------------------------------------------------------------------------------


def shard_states(backend, p, q, sizes, temperature=1.0):
    return [backend.kl_state(a, b, temperature) for a, b in zip(p.split(sizes, -1), q.split(sizes, -1))]


SHARDS = [
    [5003],
    [2501, 2502],
    [1, 5002],
    [0, 5003, 0],
    [1, 1, 1, 5000],
    [17, 0, 4000, 986],
    [500] * 10 + [3],
    [7] * 714 + [5],
]


@over_dtypes
@pytest.mark.parametrize("sizes", SHARDS, ids=lambda x: f"{len(x)}_shards_{x[0]}")
def test_merged_shards_equal_the_whole(backend, dtype, sizes):
    p = logits((2, 1, sum(sizes)), dtype, 4.0, 0, backend.device)
    q = logits((1, 3, sum(sizes)), dtype, 4.0, 1, backend.device)
    p[0, 0, ::3] = -INF
    q[..., ::3], q[..., 1::3] = -50, q[..., 1::3] * 3
    expected = kl_oracle(p, q)
    states = shard_states(backend, p, q, sizes)
    merged = backend.merge_kl_states(states)
    check_state(merged, expected, dtype)
    assert_kl(backend.kl_from_state(merged), expected, dtype)
    assert torch.equal(backend.merge_kl_states(list(torch.stack(states))), merged)
    # In pairs, from the left and from the right.
    left, right = states[0], states[-1]
    for state in states[1:]:
        left = backend.merge_kl_states([left, state])
    for state in states[-2::-1]:
        right = backend.merge_kl_states([state, right])
    for state in (left, right):
        check_state(state, expected, dtype)
        assert_kl(backend.kl_from_state(state), expected, dtype)


@pytest.mark.parametrize("name", sorted(special_rows(10, torch.float32)))
def test_merged_special_values(backend, name):
    p, q, _ = special_rows(5007, torch.float32)[name]
    expected = kl_oracle(p, q)
    for sizes in ([2503, 2504], [1] * 7 + [5000], [1000, 0, 2000, 2007], [5006, 1]):
        states = shard_states(backend, p.to(backend.device), q.to(backend.device), sizes)
        assert_kl(backend.kl_from_state(backend.merge_kl_states(states)), expected, p.dtype)


def test_strided_states(backend):
    p, q = logits((3, 4, 50), device=backend.device), logits((3, 4, 50), seed=1, device=backend.device)
    states = shard_states(backend, p, q, [10, 40])
    strided = [torch.stack((x, x), -1)[..., 0] for x in states]
    swapped = [x.transpose(0, 1) for x in states]
    merged = backend.merge_kl_states(states)
    assert torch.equal(backend.merge_kl_states(strided), merged)
    assert torch.equal(backend.merge_kl_states(swapped), merged.transpose(0, 1))
    kl = backend.kl_from_state(merged)
    assert torch.equal(backend.kl_from_state(merged.transpose(0, 1)), kl.transpose(0, 1))
    assert torch.equal(backend.kl_from_state(torch.stack((merged, merged), -1)[..., 0]), kl)


def test_public_functions_and_defaults():
    p, q = logits((4, 100)), logits((4, 100), seed=1)
    assert torch.equal(vtw.kl_divergence(p, q), torch.ops.vtw_kernels.kl_divergence(p, q))
    assert torch.equal(vtw.kl_divergence(p, q, 2.0), torch.ops.vtw_kernels.kl_divergence(p, q, temperature=2.0))
    state = vtw.kl_state(p, q, 2.0)
    assert_kl(vtw.kl_from_state(state), kl_oracle(p, q, 2.0), p.dtype)
    parts = torch.stack([vtw.kl_state(p[:, i::2], q[:, i::2], 2.0) for i in (0, 1)])
    assert torch.equal(vtw.merge_kl_states(parts), vtw.merge_kl_states([*parts]))
    assert_kl(vtw.kl_from_state(vtw.merge_kl_states(parts)), kl_oracle(p, q, 2.0), p.dtype)
    # The order of the arguments, against the torch function that takes them the other way round.
    kl_div = torch.nn.functional.kl_div
    swapped = kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(vtw.kl_divergence(p, q), swapped)


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("rows, vocabulary", [(1, 151936), (27, 32064), (3, 1000)])
def test_equal_bits_for_any_number_of_threads(host_backend, dtype, rows, vocabulary, num_threads):
    p, q = logits((1, vocabulary), dtype), logits((rows, vocabulary), dtype, seed=1)
    seen = set()
    # The reference adds with torch's own sum, which cuts one long row by the number of threads.
    for threads in (2, 2) if host_backend.name == "reference" else (1, 2, 2, 3):
        num_threads(threads)
        kl, state = host_backend.kl_divergence_with_state(p, q, 1.0)
        merged = host_backend.merge_kl_states([state, state])
        grads = host_backend.kl_divergence_backward(torch.ones_like(state), p, q, state, 1.0, True, True)
        at_once = host_backend.kl_divergence_with_gradients(p, q, None, 1.0, True, True)
        seen.add(tuple(bytes_of(x) for x in (kl, state, merged, *grads, *at_once)))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("vocabulary", [31, 2048, 5001, 20000])
@pytest.mark.parametrize("shared", ["p", "q"])
def test_equal_bits_in_any_company(dtype, vocabulary, shared):
    """On the CPU, pairs that share a row are computed together."""
    state_of = vtw.kl_state if shared == "p" else lambda x, y: vtw.kl_state(y, x)
    pairs = [(p, q) if shared == "p" else (q, p) for p, q, _ in special_rows(vocabulary, dtype).values()]
    others = torch.cat([torch.stack([x for _, x in pairs]), logits((7, vocabulary), dtype, seed=2)])
    for one, _ in pairs[:3]:
        alone = torch.stack([state_of(one, x) for x in others])
        for count in (1, 2, 8, 9, 27, len(others)):
            assert bytes_of(state_of(one, others[-count:])) == bytes_of(alone[-count:])
        assert bytes_of(state_of(one.repeat(len(others), 1), others)) == bytes_of(alone)
        two = state_of(torch.stack([one, others[-1]])[:, None], others)  # one group after the other
        assert bytes_of(two[0]) == bytes_of(alone)


def test_equal_bits_of_many_rows(num_threads):
    """Which threads share, of a merge too."""
    shards = [vtw.kl_state(logits((700, 9), torch.float32, seed=i), logits((700, 9), torch.float32)) for i in range(3)]
    num_threads(3)
    merged = vtw.merge_kl_states(shards)
    kl = vtw.kl_from_state(merged)
    num_threads(1)
    for rows in (slice(100), slice(100, 700)):
        alone = vtw.merge_kl_states([x[rows] for x in shards])
        assert bytes_of(alone) == bytes_of(merged[rows]) and bytes_of(vtw.kl_from_state(alone)) == bytes_of(kl[rows])


# --- gradients ------------------------------------------------------------------------------------


def grad_oracle(p, q, temperature):
    """d KL / d p and d KL / d q of each row, in fp64, with what they round against."""
    oracle = kl_oracle(p, q, temperature)
    ratio = np.where(oracle.p == 0, 0.0, oracle.log_ratio)
    grad_p = oracle.p * (ratio - oracle.kl[..., None]) / temperature
    grad_q = (oracle.q - oracle.p) / temperature
    size_p = oracle.p * (1 + np.abs(ratio) + oracle.kl[..., None] + oracle.lse[..., None]) / temperature
    size_q = (oracle.q + oracle.p) * (1 + oracle.lse[..., None]) / temperature
    return (grad_p, size_p), (grad_q, size_q)


def assert_grad(actual, expected, dtype):
    want, size = expected
    actual = actual.detach().cpu().double().numpy()
    step = torch.finfo(dtype).eps
    rounding = step * np.abs(want) + torch.finfo(dtype).tiny * step  # of the result to its dtype
    error = np.abs(actual - want)
    tolerance = (1e-13 if dtype == torch.float64 else 5e-6) * size + rounding
    assert (error <= tolerance).all(), f"error {error.max()}, at most {(error / tolerance).max():.2f} of the tolerance"


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_cpu_backward_around_the_caches(needs):
    """Gradients of more than 10 MiB, whose rows begin anywhere in a vector, have the bits of each row's alone."""
    p, q = logits((301, 10_007), torch.float32, seed=0), logits((301, 10_007), torch.float32, seed=1)
    p[3, :5000], q[4, 7::2], p[5] = -INF, -INF, 1e4
    ops = torch.ops.vtw_kernels
    kl, state = ops.kl_divergence_with_state(p, q, 0.7)
    weight = logits((301,), torch.float32, seed=2)
    for whole in (
        ops.kl_divergence_backward(weight, p, q, state, 0.7, *needs),
        ops.kl_divergence_with_gradients(p, q, weight, 0.7, *needs)[1:],
    ):
        for row in range(301):
            one = slice(row, row + 1)
            alone = ops.kl_divergence_backward(weight[one], p[one], q[one], state[one], 0.7, *needs)
            for all_rows, own, needed in zip(whole, alone, needs):
                assert not needed or bytes_of(all_rows[one]) == bytes_of(own), row


def gradients(backend, p, q, temperature=1.0, need_p=True, need_q=True, of_state=False):
    """What autograd does: by the gradient of KL, or by its slope in the state."""
    kl, state = backend.kl_divergence_with_state(p, q, temperature)
    if not of_state:
        return backend.kl_divergence_backward(torch.ones_like(kl), p, q, state, temperature, need_p, need_q)
    _, z_p, a, _, z_q = state.double().unbind(-1)
    zero = torch.zeros_like(z_p)
    slope = torch.stack((zero, -(a / z_p + 1) / z_p, 1 / z_p, zero, 1 / z_q), -1).to(state.dtype)
    return backend.kl_divergence_backward(slope, p, q, state, temperature, need_p, need_q)


@over_dtypes
@pytest.mark.parametrize(
    "rows, vocabulary, temperature",
    [(3, 17, 1.0), (3, 17, 0.5), (2, 1031, 1.0), (2, 1031, 3.0), (2, 32064, 1.0), (1, 151936, 3.0), (0, 5, 1.0)],
)
def test_backward(backend, dtype, rows, vocabulary, temperature):
    """The op itself: the gradients that autograd passes for KL, each wanted or not."""
    p = logits((rows, vocabulary), dtype, seed=0, device=backend.device)
    q = logits((rows, vocabulary), dtype, seed=1, device=backend.device)
    expected = grad_oracle(p, q, temperature)
    for need_p, need_q, of_state in (
        (True, True, False),
        (True, True, True),
        (True, False, True),
        (False, True, False),
    ):
        grad_p, grad_q = gradients(backend, p, q, temperature, need_p, need_q, of_state)
        for needed, actual, want in ((need_p, grad_p, expected[0]), (need_q, grad_q, expected[1])):
            assert actual.dtype == dtype
            if needed:
                assert actual.shape == p.shape
                assert_grad(actual, want, dtype)
            else:
                assert actual.numel() == 0


@over_dtypes
def test_backward_of_strided_and_broadcast_logits(backend, dtype):
    p = logits((1, 101, 3), dtype, device=backend.device).transpose(1, 2)
    q = logits((2, 1, 202), dtype, seed=1, device=backend.device)[..., ::2]
    _, state = backend.kl_divergence_with_state(p, q, 1.0)
    grad = logits((2, 1, 5), state.dtype, 1.0, 2, backend.device).expand_as(state)
    plain = [x.expand(2, 3, 101).contiguous() for x in (p, q)]
    for slope in (grad, grad[..., 1]):  # of the state, of the divergence
        actual = backend.kl_divergence_backward(slope, p, q, state, 1.0, True, True)
        expected = backend.kl_divergence_backward(slope.contiguous(), *plain, state, 1.0, True, True)
        for x, y in zip(actual, expected):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("wanted", ["p", "q", "pq"])
def test_autograd(dtype, wanted):
    p = logits((1, 3, 2003), dtype, seed=0).requires_grad_("p" in wanted)
    q = logits((2, 1, 2003), dtype, seed=1).requires_grad_("q" in wanted)
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    (vtw.kl_divergence(p, q, 2.0) * weight).sum().backward()
    for x, (want, size), dim in zip((p, q), grad_oracle(p, q, 2.0), (0, 1)):
        if not x.requires_grad:
            assert x.grad is None
            continue
        weights = weight.double().numpy()[..., None]
        assert x.grad.dtype == dtype and x.grad.shape == x.shape
        # A sum over rows of low precision rounds once per row.
        rounding = torch.finfo(dtype).eps * np.abs(want * weights).sum(dim, keepdims=True)
        size = (size * np.abs(weights)).sum(dim, keepdims=True) + 2e5 * rounding
        assert_grad(x.grad, ((want * weights).sum(dim, keepdims=True), size), dtype)


def fp64(*shape, seed):
    return logits(shape, torch.float64, 1.5, seed).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("p_rows, q_rows", [((3,), (3,)), ((1,), (4,)), ((2, 1), (1, 3)), ((), ()), ((2,), ())])
def test_gradcheck(p_rows, q_rows, temperature):
    p, q = fp64(*p_rows, 9, seed=0), fp64(*q_rows, 9, seed=1)
    for args in ((p, q), (p, q.detach()), (p.detach(), q)):
        assert torch.autograd.gradcheck(lambda p, q: vtw.kl_divergence(p, q, temperature), args)


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 0, 6, 2]])
def test_gradcheck_through_states(sizes):
    def sharded(p, q):
        states = [vtw.kl_state(a, b, 0.7) for a, b in zip(p.split(sizes, -1), q.split(sizes, -1))]
        return vtw.kl_from_state(vtw.merge_kl_states([vtw.merge_kl_states(states[:1]), *states[1:]]))

    p, q = fp64(2, 9, seed=0), fp64(1, 9, seed=1)
    for args in ((p, q), (p, q.detach()), (p.detach(), q)):
        assert torch.autograd.gradcheck(sharded, args)
    whole = torch.autograd.grad(vtw.kl_divergence(p, q, 0.7).sum(), (p, q))
    torch.testing.assert_close(torch.autograd.grad(sharded(p, q).sum(), (p, q)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("masked", ["infinite", "least"])
def test_gradients_of_zero_probabilities(backend, dtype, masked):
    """An entry that has no probability gets no gradient, and doesn't spoil the others."""
    value = -INF if masked == "infinite" else torch.finfo(dtype).min
    p, q = logits((3, 50), dtype, device=backend.device), logits((3, 50), dtype, seed=1, device=backend.device)
    p[0, :20] = value  # in p only
    p[1, 30:], q[1, 30:] = value, value  # in both
    grads = gradients(backend, p, q)
    for grad, (want, size) in zip(grads, grad_oracle(p, q, 1.0)):
        assert_grad(grad, (want, np.nan_to_num(size)), dtype)
        assert (grad[1, 30:] == 0).all()
    assert (grads[0][0, :20] == 0).all()


def test_gradients_through_states_without_probability():
    """Two shards of nothing but -inf, merged before there is anything else."""
    p, q = logits((2, 9), torch.float64), logits((2, 9), torch.float64, seed=1)
    p[0, :6], p[1, :6], q[1, :6] = -INF, -INF, -INF
    p.requires_grad_(), q.requires_grad_()
    first, second, third = (vtw.kl_state(a, b) for a, b in zip(p.split(3, -1), q.split(3, -1)))
    kl = vtw.kl_from_state(vtw.merge_kl_states([vtw.merge_kl_states([first, second]), third]))
    whole = torch.autograd.grad(vtw.kl_divergence(p, q).sum(), (p, q))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), (p, q)), whole)
    for grad, (want, size) in zip(whole, grad_oracle(p, q, 1.0)):
        assert_grad(grad, (want, np.nan_to_num(size)), torch.float64)


def test_equal_rows_have_no_gradient():
    p = logits((2, 1000)).requires_grad_()
    q = p.detach().clone().requires_grad_()
    vtw.kl_divergence(p, q).sum().backward()
    assert p.grad.abs().max() < 1e-8 and q.grad.abs().max() < 1e-8


# --- gradients with the divergence ----------------------------------------------------------------


WEIGHTS = [0.5, -2.0, 1.0, 3.0, 0.25]


def at_once(backend, p, q, weight, temperature=1.0, need_p=True, need_q=True):
    """Equal bits in every call."""
    runs = [backend.kl_divergence_with_gradients(p, q, weight, temperature, need_p, need_q) for _ in range(2)]
    assert [bytes_of(x) for x in runs[0]] == [bytes_of(x) for x in runs[1]]
    assert all(x.is_contiguous() for x in runs[0])
    return runs[0]


@over_dtypes
@pytest.mark.parametrize(
    "rows, vocabulary, temperature",
    [(5, 17, 0.5), (5, 16, 3.0), (4, 1032, 1.0), (4, 1031, 0.7), (2, 16384, 1.0), (0, 8, 1.0), (4, 0, 1.0)],
)
def test_with_gradients(backend, dtype, rows, vocabulary, temperature):
    """Rows of whole vectors, or not, in one block or in a cluster; against fp64, each gradient wanted or not."""
    p = logits((rows, vocabulary), dtype, seed=0, device=backend.device)
    q = logits((rows, vocabulary), dtype, seed=1, device=backend.device)
    expected, grads = kl_oracle(p, q, temperature), grad_oracle(p, q, temperature)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    calls = (True, True, None), (True, False, WEIGHTS[:rows]), (False, True, WEIGHTS[:rows])
    for need_p, need_q, weights in calls if vocabulary < 10_000 else calls[:1]:
        weight = None if weights is None else torch.tensor(weights, dtype=real, device=backend.device)
        kl, *actual = at_once(backend, p, q, weight, temperature, need_p, need_q)
        assert_kl(kl, expected, dtype)
        factors = np.array([1 / max(1, rows)] * rows if weights is None else weights)[:, None]
        for needed, grad, (want, size) in zip((need_p, need_q), actual, grads):
            assert grad.dtype == dtype
            if needed:
                assert grad.shape == p.shape
                assert_grad(grad, (want * factors, size * np.abs(factors)), dtype)
            else:
                assert grad.numel() == 0


def test_with_gradients_of_special_values(backend, dtype=torch.bfloat16, vocabulary=264):
    """The gradients are what two calls give; and where a row weighs nothing, it has none, whatever it holds."""
    rows = special_rows(vocabulary, dtype).values()
    p, q = (torch.stack([row[i] for row in rows]).to(backend.device) for i in (0, 1))
    expected = kl_oracle(p, q)
    ones = torch.ones(len(rows), device=backend.device)
    kl, *grads = backend.kl_divergence_with_gradients(p, q, ones, 1.0, True, True)
    assert_kl(kl, expected, dtype)
    for grad, want in zip(grads, gradients(backend, p, q)):
        torch.testing.assert_close(grad, want, equal_nan=True)
    finite = torch.from_numpy(np.isfinite(expected.kl)).to(backend.device)
    _, *masked = backend.kl_divergence_with_gradients(p, q, finite.float(), 1.0, True, True)
    for grad, want in zip(masked, grads):
        assert (grad[~finite] == 0).all() and torch.equal(grad[finite], want[finite])


@over_dtypes
def test_with_gradients_of_strided_and_broadcast_logits(backend, dtype):
    p = logits((1, 104, 3), dtype, device=backend.device).transpose(1, 2)
    q = logits((2, 1, 208), dtype, seed=1, device=backend.device)[..., ::2]
    weight = logits((2, 1), torch.float64 if dtype == torch.float64 else torch.float32, 1.0, 2, backend.device)
    actual = at_once(backend, p, q, weight.expand(2, 3))
    plain = [x.expand(2, 3, 104).contiguous() for x in (p, q)]
    for x, y in zip(actual, at_once(backend, *plain, weight.expand(2, 3).contiguous())):
        torch.testing.assert_close(x, y)


@over_dtypes
@pytest.mark.parametrize("size", [0, 1, 15, 16, 4099])
def test_scale(backend, dtype, size):
    """1 changes no bit; what lies around is not touched. Triton's interpreter cuts to bf16 where a GPU rounds."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    memory = logits(size + 2, dtype, device=backend.device)
    for begin in (0, 1):  # from a multiple of 16 bytes and not
        for by in (1.0, 0.3, 0.0):
            scaled, expected = memory.clone(), memory.clone()
            expected[begin : begin + size] = (memory[begin : begin + size].to(real) * by).to(dtype)
            backend.scale_([scaled[begin : begin + size]], torch.tensor(by, dtype=real, device=backend.device))
            rtol = torch.finfo(dtype).eps if by == 0.3 else 0
            torch.testing.assert_close(scaled, expected, rtol=rtol, atol=0)
            assert torch.equal(scaled[:begin], memory[:begin])
            assert torch.equal(scaled[begin + size :], memory[begin + size :])


# --- everything at random -------------------------------------------------------------------------


@st.composite
def any_pair(draw):
    vocabulary = draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 1000, 4097])))
    rows = draw(st.lists(st.integers(1, 3), max_size=2))
    dtype, scale = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([0.0, 0.01, 1.0, 10.0, 100.0]))
    pair = []
    for seed in (0, 1):
        own = [draw(st.sampled_from([1, n])) for n in rows]
        shape = (*own[draw(st.integers(0, len(own))) :], vocabulary)
        x = logits(shape, dtype, scale, seed + draw(st.integers(0, 100)))
        infinite = draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]))
        x[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < infinite] = -INF
        order = draw(st.permutations(range(len(shape))))
        steps = {-1: draw(st.sampled_from([1, 1, 2]))}
        strides = dense(shape, order, steps, {-1: draw(st.integers(0, 3))})
        memory = torch.full((2 + sum((n - 1) * s for n, s in zip(shape, strides)),), NAN, dtype=dtype)
        pair.append(memory.as_strided(shape, strides, draw(st.integers(0, 1))).copy_(x))
    return pair, draw(st.sampled_from([0.25, 1.0, 2.0]))


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(case=any_pair())
def check_any_pair(backend, case):
    (p, q), temperature = case
    check_forward(backend, p.to(backend.device), q.to(backend.device), temperature)


def test_any_pair(backend):
    check_any_pair(backend)


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(
    vocabulary=st.integers(1, 400),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    scale=st.sampled_from([1.0, 30.0]),
    infinite=st.sampled_from([0.0, 0.5, 0.95]),
)
def check_any_shards(backend, vocabulary, cuts, scale, infinite):
    edges = [0, *sorted(min(cut, vocabulary) for cut in cuts), vocabulary]
    sizes = [b - a for a, b in zip(edges, edges[1:])]
    p, q = logits((2, vocabulary), scale=scale), logits((2, vocabulary), scale=scale, seed=1)
    masked = torch.rand(2, vocabulary, generator=torch.Generator().manual_seed(2)) < infinite
    p, q = p.masked_fill(masked, -INF).to(backend.device), q.masked_fill(masked, -INF).to(backend.device)
    expected = kl_oracle(p, q)
    merged = backend.merge_kl_states(shard_states(backend, p, q, sizes))
    check_state(merged, expected, p.dtype)
    assert_kl(backend.kl_from_state(merged), expected, p.dtype)


def test_any_shards(backend):
    check_any_shards(backend)


def test_the_tolerance_is_tight():
    """The bound that these tests allow would not let one wrong entry of the vocabulary pass."""
    p, q = logits((1, 32064)), logits((1, 32064), seed=1)
    expected = kl_oracle(p, q)
    top = p.argmax().item()
    without = kl_oracle(*(torch.cat((x[:, :top], x[:, top + 1 :]), -1) for x in (p, q)))
    assert abs(without.kl - expected.kl) > 100 * kl_tolerance(expected, p.dtype)
