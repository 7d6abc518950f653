"""linear_kl_divergence against fp64 of the same projections, in value, gradient and memory.

On a grid of small whole numbers every logit is exact in every dtype and order of summation, so the tolerance of
kl_divergence itself applies; elsewhere it would measure the rounding of the matrix product.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import assert_kl, bytes_of, kl_oracle, logits
from torch.profiler import ProfilerActivity, profile

import vtw_kernels as vtw

INF = float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
over_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda x: str(x)[6:])
NAMES = ("p_hidden", "p_weight", "q_hidden", "q_weight", "p_bias", "q_bias")


def whole(*shape, dtype=torch.float32, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(make, p_rows=(5,), q_rows=(5,), vocabulary=37, sizes=(8, 6), **options):
    """The six tensors by name, in the order of NAMES."""
    (p_size, q_size), v = sizes, vocabulary
    shapes = ((*p_rows, p_size), (v, p_size), (*q_rows, q_size), (v, q_size), (v,), (v,))
    return {name: make(*shape, seed=i, **options) for i, (name, shape) in enumerate(zip(NAMES, shapes))}


def projected(x):
    """The logits in fp64."""
    p, q = (
        F.linear(*(None if t is None else t.double() for t in (x[f"{s}_hidden"], x[f"{s}_weight"], x.get(f"{s}_bias"))))
        for s in "pq"
    )
    return p, q


def check(x, temperature=1.0, chunk=None):
    p, q = projected(x)
    dtype = x["p_hidden"].dtype
    kl = vtw.linear_kl_divergence(**x, temperature=temperature, chunk=chunk)
    assert_kl(kl, kl_oracle(p.to(dtype), q.to(dtype), temperature), dtype)
    assert kl.is_contiguous()


@over_dtypes
@pytest.mark.parametrize("chunk", [None, 1, 10, 36, 37, 1000])
@pytest.mark.parametrize("biases", ["", "p", "q", "pq"])
def test_chunks(dtype, chunk, biases):
    x = inputs(whole, dtype=dtype)
    for side in set("pq") - set(biases):
        del x[f"{side}_bias"]
    for temperature in (1.0, 2.0, 0.7):
        check(x, temperature, chunk)


BROADCASTS = [
    ((), ()),
    ((4,), ()),
    ((1,), (27,)),
    ((27,), (1,)),
    ((3, 1), (1, 5)),
    ((2, 3), (3,)),
    ((1, 1, 2), (4, 1, 1)),
    ((0,), (1,)),
    ((1,), (0, 3)),
]


@over_dtypes
@pytest.mark.parametrize("p_rows, q_rows", BROADCASTS)
def test_broadcast(dtype, p_rows, q_rows):
    check(inputs(whole, p_rows, q_rows, dtype=dtype), chunk=10)


@pytest.mark.parametrize("vocabulary, chunk", [(1, None), (1, 1), (2, 1), (5000, 1024), (32064, None), (32064, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_vocabularies(dtype, vocabulary, chunk):
    check(inputs(whole, (1,), (3,), vocabulary, dtype=dtype), 1.0, chunk)


def test_no_vocabulary():
    assert vtw.linear_kl_divergence(**inputs(whole, vocabulary=0)).isnan().all()


@over_dtypes
@pytest.mark.parametrize("chunk", [None, 7])
def test_tied_weights(dtype, chunk):
    x = inputs(whole, (1,), (27,), sizes=(8, 8), dtype=dtype)
    x["q_weight"], x["q_bias"] = x["p_weight"], x["p_bias"]
    check(x, chunk=chunk)
    x["q_hidden"] = x["p_hidden"].clone()
    assert (vtw.linear_kl_divergence(**x, chunk=chunk) == 0).all()


@pytest.mark.parametrize("chunk", [None, 1, 12])
def test_padded_vocabulary(chunk):
    """A bias of -inf: probabilities of 0, and whole chunks of them."""
    x = inputs(whole)
    x["p_bias"][20:], x["q_bias"][30:] = -INF, -INF
    check(x, chunk=chunk)
    x["q_bias"][3] = -INF
    assert (vtw.linear_kl_divergence(**x, chunk=chunk) == INF).all()
    x["p_bias"][:] = -INF
    assert vtw.linear_kl_divergence(**x, chunk=chunk).isnan().all()


def test_strides():
    x = inputs(whole)
    x["p_hidden"], x["q_hidden"] = whole(5, 3, 8)[:, -1], whole(6, 10).t()[::2]
    x["p_weight"], x["q_weight"], x["p_bias"] = whole(8, 37).t(), whole(74, 12)[::2, ::2], whole(74)[::2]
    check(x, chunk=10)


def normal(*shape, seed=0, dtype=torch.float32):
    return logits(shape, dtype, 1.0, seed)


@pytest.mark.parametrize("chunk", [None, 1, 100])
def test_equals_kl_divergence_of_the_projections(chunk):
    """Of any numbers. What differs is the rounding of a matrix product by its shape, and of a sum by its chunks."""
    x = inputs(normal, (4, 3), (3,), 1009, (64, 32))
    p, q = projected(x)
    kl = vtw.linear_kl_divergence(**x, chunk=chunk)
    torch.testing.assert_close(kl.double(), vtw.kl_divergence(p, q), rtol=5e-6, atol=5e-6)
    assert bytes_of(kl) == bytes_of(vtw.linear_kl_divergence(**x, chunk=chunk))
    assert bytes_of(kl) == bytes_of(torch.ops.vtw_kernels.linear_kl_divergence(**x, chunk=chunk))


# --- gradients ------------------------------------------------------------------------------------


def gradients(kl, x):
    """Of a sum with a weight of its own for each row."""
    leaves = {name: t for name, t in x.items() if t.requires_grad}
    weight = torch.linspace(-1, 2, kl.numel()).view_as(kl)
    return dict(zip(leaves, torch.autograd.grad((kl * weight).sum(), leaves.values())))


def plain_gradients(x, temperature):
    """In fp64, with the gradients' sizes: sums of absolute terms, which is what low precision rounds against."""
    wide = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    pair = projected(wide)
    log_p, log_q = ((t / temperature).log_softmax(-1) for t in pair)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    want = gradients(kl, wide)
    weight = torch.linspace(-1, 2, kl.numel()).view_as(kl).double()
    # The terms of the gradients of the logits, before they cancel.
    slopes = (
        weight.abs()[..., None] * log_p.exp() * (1 + (log_p - log_q).abs() + kl[..., None]) / temperature,
        weight.abs()[..., None] * (log_p.exp() + log_q.exp()) / temperature,
    )
    sizes = {}
    for side, logit, slope in zip("pq", pair, slopes):
        slope = slope.detach().sum_to_size(logit.shape).flatten(0, -2)
        hidden, weight_ = (wide[f"{side}_{name}"].detach().abs() for name in ("hidden", "weight"))
        sizes[f"{side}_hidden"] = (slope @ weight_).view_as(hidden)
        sizes[f"{side}_weight"] = slope.t() @ hidden.flatten(0, -2)
        sizes[f"{side}_bias"] = slope.sum(0)
    return want, sizes


@over_dtypes
@pytest.mark.parametrize("chunk", [None, 1, 10])
@pytest.mark.parametrize("p_rows, q_rows", [((5,), (5,)), ((1,), (4,)), ((2, 1), (3,))])
def test_gradients(dtype, chunk, p_rows, q_rows):
    x = {name: t.requires_grad_() for name, t in inputs(whole, p_rows, q_rows, dtype=dtype).items()}
    actual = gradients(vtw.linear_kl_divergence(**x, temperature=2.0, chunk=chunk), x)
    want, sizes = plain_gradients(x, 2.0)
    for name in NAMES:
        assert actual[name].dtype == dtype and actual[name].shape == x[name].shape
        step = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-14)
        error = (actual[name].double() - want[name]).abs()
        assert (error <= 2 * step * sizes[name]).all(), f"{name}: {(error / sizes[name]).max() / step}"


@pytest.mark.parametrize("wanted", [x for x in product((True, False), repeat=6) if any(x)])
def test_gradients_of_any_inputs(wanted):
    """Those that nobody wants change nothing about the others."""
    x = {name: t.requires_grad_() for name, t in inputs(normal).items()}
    every = gradients(vtw.linear_kl_divergence(**x, chunk=10), x)
    some = {name: t.detach().requires_grad_(need) for (name, t), need in zip(x.items(), wanted)}
    for name, grad in gradients(vtw.linear_kl_divergence(**some, chunk=10), some).items():
        assert torch.equal(grad, every[name])


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("p_rows, q_rows", [((3,), (3,)), ((1,), (4,)), ((2, 1), (1, 3)), ((), ()), ((2,), ())])
def test_gradcheck(chunk, p_rows, q_rows):
    x = inputs(normal, p_rows, q_rows, 9, (4, 3), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in x.values()]

    def kl(p_hidden, p_weight, q_hidden, q_weight, p_bias, q_bias):
        biases = dict(p_bias=p_bias, q_bias=q_bias)
        return vtw.linear_kl_divergence(p_hidden, p_weight, q_hidden, q_weight, 0.7, **biases, chunk=chunk)

    assert torch.autograd.gradcheck(kl, leaves)


def test_gradcheck_of_tied_weights_and_of_the_state():
    x = inputs(normal, vocabulary=9, sizes=(4, 4), dtype=torch.float64)
    leaves = [x[name].requires_grad_() for name in ("p_hidden", "q_hidden", "p_weight", "p_bias")]

    def kl_and_shards(p, q, weight, bias):
        whole = vtw.linear_kl_divergence(p, weight, q, weight, p_bias=bias, q_bias=bias, chunk=4)
        shards = [
            torch.ops.vtw_kernels.linear_kl_divergence_with_state(p, w, b, q, w, b, 1.0, 2)[1]
            for w, b in zip(weight.split([5, 4]), bias.split([5, 4]))
        ]
        return whole, vtw.kl_from_state(vtw.merge_kl_states(shards))

    torch.testing.assert_close(*kl_and_shards(*leaves))
    assert torch.autograd.gradcheck(kl_and_shards, leaves)


def test_gradients_of_padded_vocabulary():
    x = inputs(normal)
    x["p_bias"][20:], x["q_bias"][20:] = -INF, -INF
    cut = {name: t[:20].clone() if name not in ("p_hidden", "q_hidden") else t.clone() for name, t in x.items()}
    grads = []
    for case, chunk in ((x, 6), (cut, None)):
        case = {name: t.requires_grad_() for name, t in case.items()}
        grads.append(gradients(vtw.linear_kl_divergence(**case, chunk=chunk), case))
    for name in NAMES:
        padded, want = (g[name] for g in grads)
        torch.testing.assert_close(padded[: len(want)], want)
        assert (padded[len(want) :] == 0).all()


def test_no_rows():
    x = {name: t.requires_grad_() for name, t in inputs(whole, (0,), (1,)).items()}
    grads = gradients(vtw.linear_kl_divergence(**x), x)
    assert [g.shape for g in grads.values()] == [t.shape for t in x.values()]
    assert all((g == 0).all() for g in grads.values())


def test_no_second_derivative():
    x = {name: t.requires_grad_() for name, t in inputs(whole).items()}
    (grad,) = torch.autograd.grad(vtw.linear_kl_divergence(**x).sum(), x["p_hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grad.square().sum(), x["p_hidden"])


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(dtype, backward_inside):
    """As if the inputs had been cast by hand, which is what F.linear does; the backward too, wherever it is called."""
    x = {name: t.requires_grad_() for name, t in inputs(normal).items()}
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(x["p_hidden"], x["p_weight"]).dtype == dtype
        kl = vtw.linear_kl_divergence(**x, chunk=10)
        grads = gradients(kl, x) if backward_inside else None
    grads = grads or gradients(kl, x)
    by_hand = vtw.linear_kl_divergence(**{name: t.to(dtype) for name, t in x.items()}, chunk=10)
    assert kl.dtype == torch.float32 and torch.equal(kl, by_hand)
    for name, grad in gradients(by_hand, x).items():
        assert grads[name].dtype == torch.float32 and torch.equal(grads[name], grad)


def test_autocast_does_not_reach_into_the_backward():
    """A graph that was made outside: its logits are made again as they were."""
    x = {name: t.requires_grad_() for name, t in inputs(normal).items()}
    kl = vtw.linear_kl_divergence(**x)
    outside = torch.autograd.grad(kl.sum(), x.values(), retain_graph=True)
    with torch.autocast("cpu"):
        inside = torch.autograd.grad(kl.sum(), x.values())
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


def test_autocast_leaves_fp64():
    x = inputs(normal, dtype=torch.float64)
    with torch.autocast("cpu"):
        inside = vtw.linear_kl_divergence(**x)
    assert torch.equal(inside, vtw.linear_kl_divergence(**x))


# --- work and memory ------------------------------------------------------------------------------


def profiled(function):
    """The events of a call, and its peak of memory beyond what it starts with and what it leaves behind."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as prof:
        result = function()
    events = prof.profiler.kineto_results.events()
    held = [0]
    for event in sorted((x for x in events if x.name() == "[memory]"), key=lambda x: x.start_ns()):
        held.append(held[-1] + event.nbytes())
    return result, events, max(held) - held[-1]


ROWS, VOCABULARY, SIZE = 96, 20000, 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("chunk", [500, 1024, 4096])
def test_memory(dtype, chunk):
    """What the docstring promises, and never [N, V]."""
    x = inputs(normal, (ROWS,), (ROWS,), VOCABULARY, (SIZE, SIZE), dtype=dtype)
    x = {name: t.requires_grad_() for name, t in x.items()}
    promised = 2 * ROWS * chunk * dtype.itemsize
    kl, _, peak = profiled(lambda: vtw.linear_kl_divergence(**x, chunk=chunk))
    assert promised <= peak < 1.1 * promised + 1000 * ROWS
    promised = 2 * promised + (8 * ROWS * SIZE if dtype == torch.bfloat16 else 0)
    _, _, peak = profiled(lambda: torch.autograd.grad(kl.sum(), x.values()))
    assert 0.9 * promised <= peak < 1.1 * promised + 1000 * ROWS
    if chunk <= 1024:
        assert peak < ROWS * VOCABULARY * dtype.itemsize / 2


@pytest.mark.parametrize("rows, chunk", [(1024, 8192), (2048, 4096), (3000, 2048), (8192, 1024), (20000, 1024)])
def test_default_chunk(rows, chunk):
    """The largest multiple of 1024 of which two fp32 logits take at most 64 MiB, and at least 1024."""
    x = inputs(whole, (rows,), (1,), 2 * chunk, (1, 1))
    _, events, _ = profiled(lambda: vtw.linear_kl_divergence(**x))
    widths = [event.shapes()[1][0] for event in events if event.name() == "aten::linear"]
    assert widths == [chunk] * 4


def test_a_row_that_broadcasts_is_projected_once():
    x = inputs(whole, (1,), (27,), 100, (8, 6))
    kl, events, _ = profiled(lambda: vtw.linear_kl_divergence(**x, chunk=50))
    assert kl.shape == (27,)
    assert [event.shapes()[0] for event in events if event.name() == "aten::linear"] == [[1, 8], [27, 6]] * 2
