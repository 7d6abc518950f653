"""The ops under torch.func (vmap, grad) and torch.autocast."""

from functools import partial

import pytest
import torch
from cases import bytes_of, logits
from torch.func import grad, jacrev, vmap

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
    weighted = partial(vtw.kl_divergence_loss, p, q, 2.0)
    expected = torch.stack([weighted(weight) for weight in weights])
    torch.testing.assert_close(vmap(weighted)(weights), expected, equal_nan=True)
    assert expected.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_vmap_in_a_graph(backend):
    p, q, in_dims = pair_of("different_ranks")
    torch._dynamo.reset()
    compiled = torch.compile(vmap(sharded, in_dims), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(p, q), vmap(sharded, in_dims)(p, q), rtol=1e-6, atol=1e-6)


# --- compaction under vmap ------------------------------------------------------------------------

EACH, SEQUENCES, TOKENS, KEPT = 4, 3, 9, 5


def withdraw(hidden, states, rotary, keep):
    plan = vtw.plan_compaction(keep, KEPT)
    short, *others = vtw.compact([hidden, states, rotary], plan, [1, -2, 1])
    return short, *others, vtw.expand([short.sin()], plan, TOKENS, 1)[0], *plan


def withdraw_in_place(hidden, states, rotary, keep):
    vtw.compact_([hidden, states], vtw.plan_compaction(keep), [1, 2])
    return hidden * 1, states * 1


SHAPES = ((SEQUENCES, TOKENS, 2), (SEQUENCES, 2, TOKENS, 3), (1, TOKENS, 4), (SEQUENCES, TOKENS))


def arguments(in_dims):
    """Made for each, and put together where vmap takes them apart."""
    for seed, (shape, dim) in enumerate(zip(SHAPES, in_dims)):
        x = logits(shape, seed=seed) if dim is None else logits((EACH, *shape), seed=seed).movedim(0, dim).contiguous()
        yield x > 0 if seed == 3 else x


def one_by_one(function, in_dims, args):
    runs = [function(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims))) for i in range(EACH)]
    return tuple(map(torch.stack, zip(*runs)))


@pytest.mark.parametrize("keep", [None, 0, 1, 2])
@pytest.mark.parametrize("rotary", [None, 1])
@pytest.mark.parametrize("states", [None, 0, 3])
@pytest.mark.parametrize("hidden", [None, 0, 1, -1])
def test_vmap_of_compaction(hidden, states, rotary, keep):
    in_dims = (hidden, states, rotary, keep)
    if set(in_dims) == {None}:
        pytest.skip("nothing to map over")
    args = [*arguments(in_dims)]
    assert list(map(torch.equal, vmap(withdraw, in_dims)(*args), one_by_one(withdraw, in_dims, args))) == [True] * 6
    if hidden is None or states is None:
        return
    expected = [x.clone() for x in args]
    want = one_by_one(withdraw_in_place, in_dims, expected)
    assert all(map(torch.equal, vmap(withdraw_in_place, in_dims)(*args), want))
    assert all(map(torch.equal, args, expected))  # the memory itself


def test_vmap_of_compaction_in_memory_of_any_strides():
    """Where no view has the sequences of all in one dimension, and where there are none at all."""
    keep, x = logits((EACH, SEQUENCES, TOKENS)) > 0, logits((TOKENS, EACH, 2, SEQUENCES), seed=1)
    moved = x.permute(1, 3, 0, 2)
    want = torch.stack([vtw.compact([a], vtw.plan_compaction(b), 1)[0] for a, b in zip(moved, keep)])
    before = moved.clone()
    vmap(lambda a, b: (vtw.compact_([a], vtw.plan_compaction(b), 1), a)[1])(moved, keep)
    kept = torch.arange(TOKENS) < keep.sum(-1, keepdim=True)
    assert torch.equal(moved, torch.where(kept[..., None], want, before))
    none = vmap(lambda a, b: vtw.compact([a], vtw.plan_compaction(b), 1)[0])(moved[:, :0], keep[:, :0])
    assert none.shape == (EACH, 0, TOKENS, 2)


def test_vmap_of_pages():
    """Sequences that vmap maps over, in the pages of one cache."""
    keep, lens = logits((2, 2, 6)) > 0, torch.tensor([[6, 3], [5, 4]], dtype=torch.int32)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(2, 2, 3)
    cache = logits((12, 2, 1, 3), seed=1)
    want = cache.clone()
    lengths = vtw.compact_paged_([want], table.flatten(0, 1), lens.flatten(), keep.flatten(0, 1))
    actual = vmap(lambda *args: vtw.compact_paged_([cache], *args))(table, lens, keep)
    assert torch.equal(actual, lengths.view(2, 2)) and torch.equal(cache, want)
    with pytest.raises(RuntimeError, match="compact_paged_: caches: expected pages that are the same for all"):
        vmap(lambda cache, *args: vtw.compact_paged_([cache], *args))(
            cache[None].repeat(2, 1, 1, 1, 1), table, lens, keep
        )


def test_vmap_of_compaction_refuses():
    x, keep = torch.zeros(EACH, SEQUENCES, TOKENS, 2), torch.ones(EACH, SEQUENCES, TOKENS, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"compact_: tensors\[0\]: expected one that vmap maps over"):
        vmap(lambda keep: vtw.compact_([x[0]], vtw.plan_compaction(keep), 1))(keep)
    for op in (vtw.compact, vtw.compact_):
        with pytest.raises(RuntimeError, match=rf"{op.__name__}: token_dims\[0\]: expected .* \[-3, 2\], got 3"):
            vmap(lambda x, keep, op=op: op([x], vtw.plan_compaction(keep), 3))(x, keep)
        with pytest.raises(RuntimeError, match=rf"{op.__name__}: tensors\[0\]: expected the 9 rows .*, got 2"):
            vmap(lambda x, keep, op=op: op([x], vtw.plan_compaction(keep), 2))(x, keep)


# --- torch.func.grad ------------------------------------------------------------------------------


def projected(p, q):
    weight = torch.eye(VOCABULARY)
    return vtw.linear_kl_divergence(p, weight, q, weight, chunk=20).sum()


PLAN = vtw.plan_compaction(logits((3, VOCABULARY), seed=5) > 0, 30)


def compacted(p, q):
    short, other = vtw.compact([p, q], PLAN, 1)
    return (short * other).sum() + vtw.expand([other.sin()], PLAN, VOCABULARY, 1)[0].square().sum()


SCALARS = {
    "kl_divergence": lambda p, q: vtw.kl_divergence(p, q, 2.0).square().sum(),
    "kl_divergence_loss": vtw.kl_divergence_loss,
    "sharded": lambda p, q: sharded(p, q).sum(),
    "linear_kl_divergence": projected,
    "compact": compacted,
}


@pytest.mark.parametrize("name", SCALARS)
def test_func_grad(name):
    """By itself, within and around vmap, against autograd."""
    function, pairs = SCALARS[name], [logits((2, 3, VOCABULARY), seed=seed) for seed in (0, 1)]
    want = []
    for i in (0, 1):
        leaves = [x[i].clone().requires_grad_() for x in pairs]
        want.append(torch.autograd.grad(function(*leaves), leaves))
    both = tuple(map(torch.stack, zip(*want)))
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(grad(function, (0, 1))(*(x[0] for x in pairs)), want[0])
    close(jacrev(function, (0, 1))(*(x[0] for x in pairs)), want[0])
    close(vmap(grad(function, (0, 1)))(*pairs), both)
    close(grad(lambda *args: vmap(function)(*args).sum(), (0, 1))(*pairs), both)


def test_func_grad_twice():
    p, q = logits((3, VOCABULARY)), logits((3, VOCABULARY), seed=1)
    with pytest.raises(RuntimeError, match="kl_divergence: expected to be differentiated once"):
        jacrev(jacrev(SCALARS["kl_divergence"]))(p, q)


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
