"""The KL ops under torch.func.vmap and torch.autocast."""

import pytest
import torch
from cases import bytes_of, logits
from torch.func import vmap

import vtw_kernels as vtw
from vtw_kernels.ops import reference

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")  # of an op without a batching rule
OPS = torch.ops.vtw_kernels
VOCABULARY = 53


def sharded(p, q, temperature=1.0):
    states = [vtw.kl_state(p[..., part], q[..., part], temperature) for part in (slice(0, 20), slice(20, None))]
    return vtw.kl_from_state(vtw.merge_kl_states(states))


def half_batched(p, q, temperature=1.0):
    """Merges states of which only the first depends on p."""
    q = q.expand(p.shape)
    states = vtw.kl_state(p[..., :20], q[..., :20], temperature), vtw.kl_state(q[..., 20:], q[..., 20:], temperature)
    return vtw.kl_from_state(vtw.merge_kl_states(states))


def loop(function, in_dims, p, q):
    """vmap by definition."""
    batch = next(x.shape[dim] for x, dim in zip((p, q), in_dims) if dim is not None)
    pairs = ([x if dim is None else x.select(dim, i) for x, dim in zip((p, q), in_dims)] for i in range(batch))
    return torch.stack([function(*pair) for pair in pairs])


# shapes without the vocabulary, which is last; in_dims
BATCHES = {
    "both": ((4, 3), (4, 3), (0, 0)),
    "p": ((4, 3), (3,), (0, None)),
    "q": ((3,), (4, 3), (None, 0)),
    "rows": ((4,), (4,), (0, 0)),
    "inner": ((3, 4), (4, 3), (1, 0)),
    "last_of_leading": ((2, 3, 4), (3,), (2, None)),
    "reference_has_no_rows": ((4, 2, 3), (4,), (0, 0)),
    "p_has_no_rows": ((4,), (2, 3, 4), (0, 2)),
    "different_ranks": ((2, 1, 4), (4, 3), (-2, 0)),
    "unbatched_is_wider": ((4, 3), (2, 1), (0, None)),
    "one": ((1, 3), (1, 3), (0, 0)),
}


def pair_of(name, dtype=torch.float32):
    p_rows, q_rows, in_dims = BATCHES[name]
    p, q = (logits((*rows, VOCABULARY), dtype, seed=seed) for seed, rows in enumerate((p_rows, q_rows)))
    return p, q, in_dims


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("function", [vtw.kl_divergence, OPS.kl_divergence, vtw.kl_state, sharded])
def test_vmap(name, function):
    p, q, in_dims = pair_of(name)
    assert torch.equal(vmap(function, in_dims)(p, q), loop(function, in_dims, p, q))


def test_vmap_merges_batched_and_other_states():
    p, q, in_dims = pair_of("p")
    assert torch.equal(vmap(half_batched, in_dims)(p, q), loop(half_batched, in_dims, p, q))


def test_vmap_of_the_vocabulary_in_front():
    p, q = logits((VOCABULARY, 4)), logits((VOCABULARY,), seed=1)
    assert torch.equal(vmap(vtw.kl_divergence, (1, None))(p, q), vtw.kl_divergence(p.t(), q))


def test_nested_vmap():
    p, q = logits((5, 4, VOCABULARY)), logits((3, VOCABULARY), seed=1)
    for function in (vtw.kl_divergence, sharded):
        over_q = vmap(function, (None, 0))
        actual = vmap(vmap(over_q, (0, None)), (0, None))(p, q)
        assert torch.equal(actual, function(p[:, :, None], q))


def test_vmap_expands_nothing(monkeypatch):
    """A reference row that is not batched reaches the kernel as it is."""
    p, q = logits((27, VOCABULARY)), logits((VOCABULARY,), seed=1)
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is OPS.kl_divergence_with_state.default:
                shapes.append([(*x.shape,) for x in args[:2]])
            return op(*args, **kwargs or {})

    with Watch():
        vmap(vtw.kl_divergence, (0, None))(p, q)
    assert shapes == [[(27, VOCABULARY), (VOCABULARY,)]]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("wanted", ["p", "q", "pq"])
@pytest.mark.parametrize("function", [vtw.kl_divergence, sharded])
def test_gradients_through_vmap(name, wanted, function):
    p, q, in_dims = pair_of(name)
    leaves = [x.requires_grad_() for letter, x in (("p", p), ("q", q)) if letter in wanted]
    actual, expected = vmap(function, in_dims)(p, q), loop(function, in_dims, p, q)
    weight = torch.linspace(-1, 2, actual.numel()).view_as(actual)
    grads = [torch.autograd.grad((kl * weight).sum(), leaves) for kl in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p_rows, q_rows", [((3,), (3,)), ((3,), (1,)), ((2, 1), (3,)), ((2,), ())])
@pytest.mark.parametrize("wanted", ["p", "q", "pq"])
@pytest.mark.parametrize("function", [vtw.kl_divergence, sharded])
def test_vmap_of_the_backward(p_rows, q_rows, wanted, function):
    """Many gradients of one result, as torch.autograd.functional.jacobian(vectorize=True) takes them."""
    p, q = logits((*p_rows, VOCABULARY)), logits((*q_rows, VOCABULARY), seed=1)
    leaves = [x.requires_grad_() for letter, x in (("p", p), ("q", q)) if letter in wanted]
    kl = function(p, q)
    weights = logits((4, *kl.shape), scale=1.0, seed=2)
    batched = torch.autograd.grad(kl, leaves, weights, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(kl, leaves, weight, retain_graph=True) for weight in weights]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one))), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", BATCHES)
def test_vmap_of_the_loss(name):
    p, q, in_dims = pair_of(name)
    p, q = p.requires_grad_(), q.requires_grad_()
    runs = [f(vtw.kl_divergence_loss, in_dims) for f in (lambda *a: vmap(*a)(p, q), lambda *a: loop(*a, p, q))]
    grads = [torch.autograd.grad((loss * torch.arange(len(loss))).sum(), (p, q)) for loss in runs]
    torch.testing.assert_close(*runs)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_vmap_of_a_weighted_loss():
    p, q, weights = logits((3, VOCABULARY)), logits((3, VOCABULARY), seed=1), logits((4, 3), scale=1.0, seed=2)
    weights[0, 0], p[0, 0] = 0.0, float("nan")
    weighted = lambda weight: vtw.kl_divergence_loss(p, q, 2.0, weight)
    expected = torch.stack([weighted(weight) for weight in weights])
    torch.testing.assert_close(vmap(weighted)(weights), expected, equal_nan=True)
    assert expected.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_vmap_in_a_graph(backend):
    p, q, in_dims = pair_of("different_ranks")
    torch._dynamo.reset()
    compiled = torch.compile(vmap(sharded, in_dims), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(p, q), vmap(sharded, in_dims)(p, q), rtol=1e-6, atol=1e-6)


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda x: str(x)[6:]
)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("function", [vtw.kl_divergence, sharded, reference.kl_divergence, vtw.kl_divergence_loss])
def test_autocast_changes_nothing(function, dtype, autocast):
    """Logits are taken as they come: fp32 ones are not rounded, low precision is computed in fp32 as ever."""
    p, q = (logits((3, VOCABULARY), dtype, seed=seed).requires_grad_() for seed in (0, 1))
    runs = []
    for enabled in (False, True):
        with torch.autocast(p.device.type, autocast, enabled=enabled):
            kl = function(p, q)
            runs.append((kl.detach(), *torch.autograd.grad(kl.sum(), (p, q))))
    assert [bytes_of(x) for x in runs[0]] == [bytes_of(x) for x in runs[1]]
    assert runs[1][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_around_a_projection():
    """The usual place: F.linear makes bf16 logits, and the divergence is that of their bits, in fp32."""
    hidden, weight = logits((3, 8), scale=1.0).requires_grad_(), logits((VOCABULARY, 8), scale=1.0, seed=1)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        p = torch.nn.functional.linear(hidden, weight)
        kl = vtw.kl_divergence(p, p.detach().roll(1, 0))
    assert p.dtype == torch.bfloat16 and kl.dtype == torch.float32
    assert torch.equal(kl, vtw.kl_divergence(p.detach(), p.detach().roll(1, 0)))
    kl.sum().backward()
    assert hidden.grad.dtype == torch.float32 and hidden.grad.abs().max() > 0
