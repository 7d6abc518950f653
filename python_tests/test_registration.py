"""The ops as torch sees them: schemas, fakes, autograd, compile, export; and the backend that the environment chooses.

opcheck runs every op on a few inputs that differ in kind (lists, broadcast, dtypes, gradients, sizes of zero), because
what it checks does not depend on values.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import plan_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vtw_kernels as vtw
from vtw_kernels import _C

OPS = torch.ops.vtw_kernels
NAMES = [
    *("plan_compaction", "compact", "compact_", "expand", "compact_paged_", "plan_packed_"),
    *(
        "kl_divergence",
        "kl_state",
        "merge_kl_states",
        "kl_from_state",
        "kl_divergence_with_state",
        "kl_divergence_backward",
        "kl_divergence_with_gradients",
        "kl_divergence_loss",
        "scale_",
    ),
    *("linear_kl_divergence", "linear_kl_divergence_with_state", "linear_kl_divergence_backward"),
]
PLAN = plan_of("images", 2, 9, "shorter")
SOURCE = PLAN.source
KEEP = torch.from_numpy(PLAN.keep)


def normal(*shape, grad=False, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


def decoder(grad=False, tokens=9):
    tensors = [
        normal(2, tokens, 3, grad=grad),
        normal(1, tokens, 4, grad=grad, dtype=torch.bfloat16),
        torch.arange(3 * 2 * tokens).reshape(3, 2, tokens),
        normal(2, 2, tokens, 4).transpose(0, 1).contiguous().transpose(0, 1),
    ]
    return tensors, [1, 1, 2, -2], [0, 0, 1, 0]


def in_place(tensors, token_dims, batch_dims):
    kept = [0, 2, 3]
    return [tensors[i] for i in kept], [token_dims[i] for i in kept], [batch_dims[i] for i in kept]


def paged():
    caches = [normal(5, 3, 3, 4), normal(5, 3, 3, 2).transpose(0, 3).contiguous().transpose(0, 3)]
    table, lens = torch.tensor([[4, 1, 0], [3, 2, -1]], dtype=torch.int32), torch.tensor([9, 5], dtype=torch.int32)
    return caches, table, lens, KEEP


def packed():
    plan = list(vtw.PackedPlan.empty(7, 2))
    lists = ([0, 2, 5], [6, 3], [[0, 2], [3, 5], [1, 2]], [0, 2, 3])
    return plan, *(torch.tensor(x, dtype=torch.int32) for x in lists), torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)


def state(*shape, grad=False):
    x = vtw.kl_state(normal(*shape, 7), normal(*shape, 7, seed=1))
    return x.detach().requires_grad_(grad)


def projections(p_rows, q_rows, grad="", dtype=torch.float32):
    """p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias; ``grad`` names those that require one, by letter."""
    shapes = ((*p_rows, 4), (7, 4), (7,), (*q_rows, 3), (7, 3), (7,))
    return [normal(*shape, grad=x in grad, dtype=dtype, seed=i) for i, (x, shape) in enumerate(zip("hwbHWB", shapes))]


def samples() -> dict[str, list[tuple]]:
    wide, narrow = decoder(), decoder(tokens=4)
    pairs = [
        (normal(3, 7), normal(3, 7, seed=1), 1.0),
        (normal(1, 7, grad=True), normal(3, 7, grad=True, seed=1), 0.5),
        (normal(2, 1, 7, grad=True), normal(3, 7, seed=1), 2.0),
        (normal(2, 7, dtype=torch.bfloat16), normal(2, 7, grad=True, dtype=torch.bfloat16, seed=1), 1.0),
        (normal(7, dtype=torch.float64, grad=True), normal(7, dtype=torch.float64), 1.0),
        (normal(0, 7), normal(1, 7), 1.0),
        (normal(4, 14)[:, ::2], normal(7, 4).t(), 1.0),
    ]
    linear = [
        projections((3,), (3,)),
        projections((1,), (3,), "hwbHWB"),
        [*projections((2, 1), (3,), "wH")[:5], None],
        projections((2,), (2,), "HWB", torch.bfloat16),
        projections((), (), "hw", torch.float64),
        projections((0,), (1,), "hw"),
    ]
    return {
        "plan_compaction": [
            (KEEP, -1, False),
            (KEEP, 4, True),
            (KEEP, 20, False),
            (KEEP[:0], 0, False),
            (KEEP.t(), 3, True),
        ],
        "compact": [(*wide, SOURCE), (*decoder(grad=True), SOURCE), ([], [], [], SOURCE), (*wide, SOURCE[:, :0])],
        "compact_": [(*in_place(*wide), SOURCE), ([], [], [], SOURCE)],
        "expand": [(*narrow, SOURCE, 9), (*decoder(grad=True, tokens=4), SOURCE, 12), ([], [], [], SOURCE, 9)],
        "compact_paged_": [(*paged(), "NHD"), (*paged(), "HND"), ([], *paged()[1:], "NHD")],
        "plan_packed_": [(*packed(), 2)],
        "kl_divergence": pairs,
        "kl_state": [*pairs, (normal(2, 0), normal(2, 0), 1.0)],
        "kl_divergence_with_state": pairs,
        "kl_divergence_backward": [
            (state(3), normal(3, 7), normal(3, 7, seed=1), state(3), 1.0, True, True),
            (state(3), normal(1, 7), normal(3, 7, seed=1), state(3), 0.5, True, False),
            (normal(3), normal(1, 7), normal(3, 7, seed=1), state(3), 0.5, True, False),
            (state(3), normal(3, 7).half(), normal(7).half(), state(3), 0.5, False, True),
        ],
        "kl_divergence_with_gradients": [
            (p.detach(), q.detach(), weight, t, *needs)
            for (p, q, t), weight, needs in zip(
                pairs,
                (None, normal(3), normal(2, 3), None, None, normal(0), normal(4)),
                ((True, True), (True, False), (False, True), (False, False)) * 2,
            )
        ],
        "kl_divergence_loss": [*pairs[:5], pairs[6], (*pairs[1], normal(3)), (*pairs[2], normal(2, 3))],
        "scale_": [
            ([normal(3, 7), normal(5).bfloat16()], normal()),
            ([normal(4, dtype=torch.float64)], torch.ones((), dtype=torch.float64)),
            ([], normal()),
        ],
        "merge_kl_states": [
            ([state(3)],),
            ([state(2, 3), state(2, 3)],),
            ([state(3, grad=True), state(3), state(3, grad=True)],),
        ],
        "kl_from_state": [(state(2, 3),), (state(2, 3, grad=True),), (state(0),), (state(2).double(),)],
        "linear_kl_divergence": [(p, w, q, u, 0.5) for p, w, _, q, u, _ in (linear[0], linear[2])],
        "linear_kl_divergence_with_state": [(*x, 0.5, chunk) for x, chunk in zip(linear, (None, 3, 1, 20, 7, 2))],
        "linear_kl_divergence_backward": [
            (state(3), *linear[0], state(3), 1.0, 4, [True] * 6),
            (state(2, 3), *projections((2, 1), (3,)), state(2, 3), 0.5, None, [False, True, False, True, False, False]),
        ],
    }


def test_every_op_is_sampled():
    prefix = "vtw_kernels::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert names == set(NAMES) == set(samples())


@pytest.mark.parametrize("name, index", [(name, i) for name, calls in samples().items() for i in range(len(calls))])
def test_opcheck(name, index):
    opcheck(getattr(OPS, name).default, samples()[name][index])


def test_schemas():
    """What users and other frameworks call; an int may be symbolic or not."""
    dims = "int[] token_dims, int[] batch_dims"
    pair = "(Tensor p_logits, Tensor q_logits, float temperature=1.) -> Tensor"
    schemas = {
        "plan_compaction": "(Tensor keep, int length=-1, bool pad_left=False) -> (Tensor source, Tensor lengths)",
        "compact": f"(Tensor[] tensors, {dims}, Tensor source) -> Tensor[]",
        "compact_": f"(Tensor(a!)[] tensors, {dims}, Tensor source) -> ()",
        "expand": f"(Tensor[] tensors, {dims}, Tensor source, int length) -> Tensor[]",
        "compact_paged_": "(Tensor(a!)[] caches, Tensor block_table, Tensor seq_lens, Tensor keep, "
        'str layout="NHD") -> Tensor',
        "kl_divergence": pair,
        "kl_state": pair,
        "kl_divergence_loss": pair.replace(")", ", Tensor? weight=None)", 1),
        "merge_kl_states": "(Tensor[] states) -> Tensor",
        "kl_from_state": "(Tensor state) -> Tensor",
        "linear_kl_divergence": "(Tensor p_hidden, Tensor p_weight, Tensor q_hidden, Tensor q_weight, "
        "float temperature=1., *, Tensor? p_bias=None, Tensor? q_bias=None, int? chunk=None) -> Tensor",
    }
    for name, schema in schemas.items():
        assert str(getattr(OPS, name).default._schema).replace("SymInt", "int") == f"vtw_kernels::{name}{schema}"


def test_docs_show_the_schemas():
    page = Path(__file__).parents[1] / "docs/ops.md"
    shown = [line for line in page.read_text().splitlines() if line.startswith("vtw_kernels::")]
    public = ("plan_compaction", "compact", "compact_", "expand", "compact_paged_", "plan_packed_")
    public += (
        "kl_divergence",
        "kl_state",
        "merge_kl_states",
        "kl_from_state",
        "kl_divergence_loss",
        "linear_kl_divergence",
    )
    assert shown == [str(getattr(OPS, name).default._schema) for name in public]


# --- compile and export ---------------------------------------------------------------------------


def withdraw_step(hidden, positions, keys, values, keep):
    plan = vtw.plan_compaction(keep, length=5)
    hidden, positions = vtw.compact([hidden * 2, positions], plan, [1, 2], [0, 1])
    keys, values = keys + 1, values + 1
    vtw.compact_([keys, values], plan, 2)
    (wide,) = vtw.expand([hidden.sin()], plan, keep.shape[1], 1)
    return wide, positions, keys, values, plan.lengths


def step_inputs(tokens=9):
    keep = torch.from_numpy(plan_of("prefix_suffix", 2, tokens).keep)
    hidden, positions = normal(2, tokens, 3), torch.arange(6 * tokens).reshape(3, 2, tokens)
    return hidden, positions, normal(2, 2, tokens, 4, seed=1), normal(2, 2, tokens, 4, seed=2), keep


def drop_in_cache(keys, values, keep):
    """Writes to the inputs of the graph."""
    vtw.compact_([keys, values], vtw.plan_compaction(keep), 2)
    return keys.sum() + values.sum()


def sharded_kl(p, q):
    states = [vtw.kl_state(a, b, 2.0) for a, b in zip(p.split(5, -1), q.split(5, -1))]
    return vtw.kl_from_state(vtw.merge_kl_states(states))


def weighted_loss(p, q):
    return vtw.kl_divergence_loss(p, q, 2.0, torch.tensor([1.0, 0.0, -2.0]))


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request):
    torch._dynamo.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, backend=request.param, **options)
    torch._dynamo.reset()


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_compaction(compiled, dynamic):
    function = compiled(withdraw_step, dynamic=dynamic)
    for tokens in (9, 12):
        inputs = step_inputs(tokens)
        assert_equal(function(*inputs), withdraw_step(*inputs))


def test_compile_in_place_on_inputs(compiled):
    (_, _, keys, values, keep), (_, _, *expected, _) = step_inputs(), step_inputs()
    function = compiled(drop_in_cache)
    assert_equal(function(keys, values, keep), drop_in_cache(*expected, keep))
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_compile_views_whose_offset_is_dynamic():
    """Inductor would write to the beginning of their memory."""

    def compact(states, keep):
        vtw.compact_([states[1]], vtw.plan_compaction(keep), 2)
        return states * 1

    def compact_clone(states, keep):
        values = states[1].clone()  # which it takes for needless
        vtw.compact_([values], vtw.plan_compaction(keep), 2)
        states[1].copy_(values)
        return states * 1

    def as_the_error_says(states, keep):
        plan = vtw.plan_compaction(keep)
        states[1].copy_(vtw.compact([states[1]], plan, 2)[0])
        vtw.compact_([states[0, :, :1]], plan, 2)
        return states * 1

    torch._dynamo.reset()
    run = torch.compile(as_the_error_says, dynamic=True, fullgraph=True)
    for tokens in (9, 12):
        states, keep = normal(2, 2, 2, tokens, 3), step_inputs(tokens)[-1]
        want = states.clone()
        assert torch.equal(run(states, keep), as_the_error_says(want, keep)) and torch.equal(states, want)
    expected = r"compact_: tensors\[{}\]: expected memory that begins .* torch.compile, got a view .* write x.copy_"
    for function in (compact, compact_clone):
        with pytest.raises(RuntimeError, match=expected.format(0)):
            torch.compile(function, dynamic=True, fullgraph=True)(states, keep)
    with pytest.raises(RuntimeError, match=expected.format(1)):  # views that come from outside
        torch.compile(drop_in_cache, dynamic=True, fullgraph=True)(*states, keep)


@pytest.mark.parametrize("function", [vtw.kl_divergence, sharded_kl, weighted_loss], ids=lambda x: x.__name__)
def test_compile_kl(compiled, function):
    grads = []
    for run in (compiled(function), function):
        p, q = normal(1, 13, grad=True), normal(3, 13, grad=True, seed=1)
        kl = run(p * 2, q)
        (kl * kl).sum().backward()
        grads.append((kl.detach(), p.grad, q.grad))
    assert_equal(*grads)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_linear_kl(compiled, autocast):
    def distil(p_hidden, p_weight, p_bias, q_hidden, q_weight):
        with torch.autocast("cpu", enabled=autocast):
            return vtw.linear_kl_divergence(p_hidden * 2, p_weight, q_hidden, q_weight, p_bias=p_bias, chunk=3)

    results = []
    for run in (compiled(distil), distil):
        *tensors, _ = projections((1,), (3,), "hbHW")
        kl = run(*tensors)
        assert kl.dtype == torch.float32
        (kl * kl).sum().backward()
        results.append((kl.detach(), *(x.grad for x in tensors if x.requires_grad)))
    assert_equal(*results)


def test_compile_compaction_backward(compiled):
    def loss(hidden, rotary, ids, keep):
        plan = vtw.plan_compaction(keep, length=6, pad="left")
        hidden, rotary, ids = vtw.compact([hidden, rotary, ids], plan, 1)
        (wide,) = vtw.expand([hidden * rotary + ids.unsqueeze(-1)], plan, keep.shape[1], 1)
        return wide.square().sum()

    results = []
    for run in (compiled(loss), loss):
        hidden, rotary = normal(2, 9, 3, grad=True), normal(1, 9, 3, grad=True, seed=1)
        value = run(hidden, rotary, torch.arange(18).reshape(2, 9), KEEP)
        value.backward()
        results.append((value.detach(), hidden.grad, rotary.grad))
    assert_equal(*results)


class Withdrawing(torch.nn.Module):
    def forward(self, hidden, positions, keys, values, keep):
        wide, *rest = withdraw_step(hidden, positions, keys, values, keep)
        linear = vtw.linear_kl_divergence(wide, keys[0, 0, :, :3], hidden[:1], values[0, 0, :, :3], chunk=5)
        loss = vtw.kl_divergence_loss(wide, hidden, 0.5)
        return vtw.kl_divergence(wide, hidden[:1], 0.5), sharded_kl(hidden, wide), linear, loss, *rest


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, tmp_path):
    tokens = torch.export.Dim("tokens", min=6, max=64)
    shapes = ({1: tokens}, {2: tokens}, {2: tokens}, {2: tokens}, {1: tokens})
    program = torch.export.export(Withdrawing(), step_inputs(), dynamic_shapes=shapes if dynamic else None)
    torch.export.save(program, tmp_path / "withdrawing.pt2")
    loaded = torch.export.load(tmp_path / "withdrawing.pt2").module()
    for count in (9, 20) if dynamic else (9,):
        assert_equal(loaded(*step_inputs(count)), Withdrawing()(*step_inputs(count)))


# A torch without CUDA can't run autograd on fake CUDA tensors, so gradients have fakes on the CPU here.
@pytest.mark.parametrize("device, grad", [("cuda", False), ("cuda", torch.cuda.is_available()), ("cpu", True)])
def test_fakes(device, grad):
    on = dict(device=device)
    with FakeTensorMode():
        plan = vtw.plan_compaction(torch.empty(3, 9, dtype=torch.bool, **on), 4, "left")
        assert [(*x.shape, x.dtype, x.device.type) for x in plan] == [
            (3, 4, torch.int32, device),
            (3, torch.int32, device),
        ]
        assert vtw.plan_compaction(torch.empty(3, 9, dtype=torch.bool, **on)).source.shape == (3, 9)
        tensors = [
            torch.empty(3, 9, 8, dtype=torch.bfloat16, requires_grad=grad, **on),
            torch.empty(2, 1, 9, dtype=torch.int64, **on),
            torch.empty(3, 2, 12, 4, dtype=torch.float8_e4m3fn, **on).transpose(1, 2),
        ]
        dims = dict(token_dims=[1, 2, -3], batch_dims=[0, 1, 0])
        out = vtw.compact(tensors, plan, **dims, longer=True)
        assert [x.shape for x in out] == [(3, 4, 8), (2, 3, 4), (3, 4, 2, 4)]
        assert [x.dtype for x in out] == [x.dtype for x in tensors]
        assert all(x.device.type == device and x.is_contiguous() for x in out)
        assert [x.shape for x in vtw.expand(out, plan, 20, **dims)] == [(3, 20, 8), (2, 3, 20), (3, 20, 2, 4)]
        assert vtw.compact_(tensors[2:], plan, 1, longer=True) is None
        pages = torch.empty(3, 4, dtype=torch.int32, **on)
        caches = [torch.empty(10, 16, 2, 8, dtype=torch.bfloat16, **on)] * 2
        lens = torch.empty(3, dtype=torch.int32, **on)
        lengths = vtw.compact_paged_(caches, pages, lens, torch.empty(3, 60, dtype=torch.bool, **on))
        assert (*lengths.shape, lengths.dtype, lengths.device.type) == (3, torch.int32, device)

        p = torch.empty(5, 1, 100, dtype=torch.float16, requires_grad=grad, **on)
        q = torch.empty(7, 100, dtype=torch.float16, requires_grad=grad, **on)
        kl = vtw.kl_divergence(p, q)
        assert (*kl.shape, kl.dtype, kl.device.type) == (5, 7, torch.float32, device)
        state = vtw.kl_state(p, q)
        merged = vtw.merge_kl_states([state, state])
        assert (*merged.shape, merged.dtype, merged.device.type) == (5, 7, 5, torch.float32, device)
        assert vtw.kl_from_state(merged).shape == (5, 7)
        assert vtw.kl_divergence(p.double(), q.double()).dtype == torch.float64
        slopes = OPS.kl_divergence_backward(state.detach(), p.detach(), q.detach(), state.detach(), 1.0, True, False)
        assert [(*x.shape, x.dtype, x.device.type) for x in slopes] == [
            (5, 7, 100, torch.float16, device),
            (0, torch.float16, device),
        ]
        loss = vtw.kl_divergence_loss(p, q, 2.0, torch.empty(5, 7, dtype=torch.bool, **on))
        assert (*loss.shape, loss.dtype, loss.device.type) == (torch.float32, device)
        hidden = torch.empty(7, 16, dtype=torch.bfloat16, requires_grad=grad, **on)
        weight = torch.empty(100, 16, dtype=torch.bfloat16, requires_grad=grad, **on)
        linear = vtw.linear_kl_divergence(hidden.unsqueeze(1), weight, hidden, weight)
        assert (*linear.shape, linear.dtype, linear.device.type) == (7, 7, torch.float32, device)
        if grad:
            (kl.sum() + out[0].sum() + linear.sum() + loss).backward()
            leaves = (p, q, tensors[0], hidden, weight)
            assert [(x.grad.shape, x.grad.dtype) for x in leaves] == [(x.shape, x.dtype) for x in leaves]


def test_fakes_check_as_the_kernels_do():
    with FakeTensorMode():
        source = torch.empty(2, 4, dtype=torch.int32, device="cuda")
        plan = vtw.CompactionPlan(source, None)
        with pytest.raises(RuntimeError, match=r"compact: token_dims\[0\]: expected a dimension in \[-3, 2\], got 3"):
            vtw.compact([torch.empty(2, 5, 3, device="cuda")], plan, 3)
        with pytest.raises(RuntimeError, match=r"compact: tensors\[0\]: expected .*device"):
            vtw.compact([torch.empty(2, 5, 3)], plan, 1)
        with pytest.raises(
            RuntimeError, match="kl_divergence: q_logits: expected vocabulary size 7 of p_logits, got 8"
        ):
            vtw.kl_divergence(torch.empty(2, 7, device="cuda"), torch.empty(2, 8, device="cuda"))


def test_inference_mode():
    """Tensors made there have no version to count."""
    with torch.inference_mode():
        plan = vtw.plan_compaction(KEEP, 4)
        x = normal(2, 9, 3)
        (out,) = vtw.compact([x], plan, 1)
        vtw.compact_([x], plan, 1)
        p, q = normal(3, 50), normal(3, 50, seed=1)
        inside = vtw.kl_divergence(p, q)
    for i, length in enumerate(plan.lengths.tolist()):
        assert torch.equal(x[i, :length], out[i, :length])
    assert torch.equal(inside, vtw.kl_divergence(normal(3, 50), normal(3, 50, seed=1)))


def test_in_place_counts_as_a_write():
    """Autograd must notice when a saved tensor is compacted under it."""
    weight = normal(2, 9, 3, grad=True)
    x = normal(2, 9, 3)
    version = x._version
    loss = (weight * x).sum()
    vtw.compact_([x], vtw.CompactionPlan(SOURCE, None), 1)
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grad", [False, True])
def test_in_place_counts_as_a_write_in_every_mode(grad):
    tensors, token_dims, batch_dims = in_place(*decoder())
    caches, *pages = paged()
    versions = [x._version for x in tensors + caches]
    with torch.set_grad_enabled(grad):
        vtw.compact_(tensors, vtw.CompactionPlan(SOURCE, None), token_dims, batch_dims)
        vtw.compact_paged_(caches, *pages)
    assert all(x._version > version for x, version in zip(tensors + caches, versions))


def test_in_place_on_a_leaf_that_requires_grad():
    with pytest.raises(RuntimeError):
        vtw.compact_([normal(2, 9, 3, grad=True)], vtw.CompactionPlan(SOURCE, None), 1)


# --- who else sees a call that needs no gradient ----------------------------------------------------


@pytest.mark.parametrize("mode", [TorchFunctionMode, TorchDispatchMode])
def test_modes_see_every_call(mode):
    seen = []

    class Recording(mode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

        __torch_dispatch__ = __torch_function__

    with Recording():
        tensors, token_dims, batch_dims = in_place(*decoder())
        plan = vtw.CompactionPlan(SOURCE, None)
        vtw.compact(tensors, plan, token_dims, batch_dims)
        vtw.compact_(tensors, plan, token_dims, batch_dims)
        vtw.expand([normal(2, 4, 3)], plan, 9, 1)
        vtw.compact_paged_(*paged())
    assert {OPS.compact.default, OPS.compact_.default, OPS.expand.default, OPS.compact_paged_.default} <= set(seen)


def test_tensor_that_stands_for_one_with_a_gradient():
    class Standin(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function(*tree_map_only(Standin, lambda x: x.meant, args), **(kwargs or {}))

    x = normal(2, 9, 3).as_subclass(Standin)
    x.meant = normal(2, 9, 3, grad=True)
    (out,) = vtw.compact([x], vtw.CompactionPlan(SOURCE, None), 1)
    assert out.requires_grad


def test_in_place_under_func_grad():
    with pytest.raises(RuntimeError, match="requires no gradient"):
        plan = vtw.CompactionPlan(SOURCE, None)
        torch.func.grad(lambda x: (vtw.compact_([x], plan, 1), x.sum())[1])(normal(2, 9, 3))


VECTOR, MATRIX, HIDDEN = normal(3), normal(7, 3), normal(2, 9, 3, seed=1)
FORWARD_MODE = {
    "compact": lambda x: vtw.compact([x], vtw.CompactionPlan(SOURCE, None), 1)[0],
    "compact_": lambda x: vtw.compact_([x], vtw.CompactionPlan(SOURCE, None), 1),
    "expand": lambda x: vtw.expand([x], vtw.CompactionPlan(SOURCE, None), 12, 1)[0],
    "kl_divergence": lambda x: vtw.kl_divergence(x, VECTOR),
    "kl_divergence_loss": lambda x: vtw.kl_divergence_loss(x, VECTOR),
    "kl_from_state": lambda x: vtw.kl_from_state(x.repeat(1, 1, 2)[..., :5]),
    "linear_kl_divergence": lambda x: vtw.linear_kl_divergence(x, MATRIX, HIDDEN, MATRIX),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_refuses(name):
    """A kernel that went on would give a tangent of 0."""
    call, x = FORWARD_MODE[name], normal(2, SOURCE.shape[1] if name == "expand" else 9, 3)
    with pytest.raises(RuntimeError, match="forward-mode tangent"):
        torch.func.jvp(lambda x: (call(x), x)[1], (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        call(x)  # which has no tangent
        with pytest.raises(RuntimeError, match="forward-mode tangent"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))


def test_only_what_depends_on_a_gradient_has_one():
    """Else rotary tables, compacted together with hidden states, would cost a gradient that nobody asked for."""
    plan = vtw.CompactionPlan(SOURCE, None)
    hidden, table = vtw.compact([normal(2, 9, 3, grad=True), normal(1, 9, 3)], plan, 1)
    assert hidden.requires_grad and not table.requires_grad


# --- the environment ------------------------------------------------------------------------------

USES_EVERY_OP = """
import torch, vtw_kernels as vtw
plan = vtw.plan_compaction(torch.tensor([[True, False, True, False]]), 2)
x = torch.arange(4.0).reshape(1, 4, 1).requires_grad_()
(y,) = vtw.compact([x], plan, 1)
(z,) = vtw.expand([y], plan, 4, 1)
vtw.compact_([x.detach()], plan, 1)
pages = torch.tensor([[1, 0]], dtype=torch.int32)
vtw.compact_paged_([torch.zeros(2, 2, 1, 1)], pages, pages[0, :1] + 3, torch.ones(1, 4, dtype=torch.bool))
p = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
q = p.detach().flip(-1)
kl = vtw.kl_from_state(vtw.merge_kl_states([vtw.kl_state(p, q)])) + vtw.kl_divergence(p, q)
kl = kl + vtw.linear_kl_divergence(p, torch.eye(3), q, torch.eye(3)) + vtw.kl_divergence_loss(p, q)
(kl.sum() + z.sum()).backward()
print(y.flatten().tolist(), round(kl.item(), 5), x.grad.flatten().tolist())
"""
EXPECTED = "[0.0, 2.0] 4.60168 [1.0, 0.0, 1.0, 0.0]"


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "VTW_KERNELS_BACKEND"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("forced", ["", "reference", "cpu"])
def test_forced_backend(forced):
    code = USES_EVERY_OP + 'info = vtw.backend_info(); print(info["forced"], *{x["cpu"] for x in info["ops"].values()})'
    done = run_python("-c", code, VTW_KERNELS_BACKEND=forced)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [EXPECTED, f"{forced or None} {forced or 'cpu'}"]


@pytest.mark.parametrize("forced", ["cuda", "triton"])
def test_forced_backend_that_does_not_serve_the_device(forced):
    done = run_python("-c", USES_EVERY_OP, VTW_KERNELS_BACKEND=forced)
    message = (
        f"RuntimeError: plan_compaction: VTW_KERNELS_BACKEND: expected a backend for tensors on cpu, got {forced}, "
        f"which serves cuda, and is {vtw.backend_info()['backends'][forced]}"
    )
    assert done.stderr.splitlines()[-1] == message
    code = 'import vtw_kernels as vtw; print(*{x["cpu"] for x in vtw.backend_info()["ops"].values()})'
    assert run_python("-c", code, VTW_KERNELS_BACKEND=forced).stdout.strip() == "None"


def test_backends_of_a_gpu_that_is_not_here(monkeypatch):
    for here, said in ((False, "idle: torch finds no GPU"), (True, "available")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        backends = vtw.backend_info()["backends"]
        assert backends["triton"] == said and backends["cpu"] == backends["reference"] == "available"
        assert backends["cuda"] == (said if vtw.backend_info()["build"]["cuda"] else backends["cuda"])


@pytest.mark.skipif(bool(vtw.backend_info()["build"]["cuda"]), reason="CUDA is built")
@pytest.mark.parametrize("forced, wanted", [("", "triton"), ("triton", "triton"), ("reference", "reference")])
def test_triton_serves_a_gpu_where_cuda_is_not_built(forced, wanted):
    """Registered, but not imported before it is called."""
    code = (
        "import sys, vtw_kernels as vtw; info = vtw.backend_info();"
        "print('vtw_kernels.triton.compaction' in sys.modules, *{x['cuda'] for x in info['ops'].values()})"
    )
    done = run_python("-c", code, VTW_KERNELS_BACKEND=forced)
    assert done.stdout.strip() == f"False {wanted}", done.stderr


COUNTS_THREADS = """
import os, torch, vtw_kernels as vtw
def work(n):
    p, q, x = (torch.empty(n, *shape) for shape in ((8000,), (8000,), (32, 500)))  # torch may share the filling
    vtw.kl_divergence(p.requires_grad_(), q).sum().backward()
    vtw.kl_divergence_loss(p, q).backward()
    vtw.merge_kl_states([vtw.kl_state(p[:, :9], q[:, :9])] * 2)
    plan = vtw.plan_compaction(torch.arange(32).expand(n, 32) % 3 > 0)
    vtw.compact([x], plan, 1), vtw.compact_([x], plan, 1)
    return len(os.listdir("/proc/self/task"))
print(len(os.listdir("/proc/self/task")), work(4), work(64))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_small_work_stays_on_one_thread():
    """Another thread is woken only where it pays: OpenMP makes its threads when it first needs them."""
    done = run_python("-c", COUNTS_THREADS, OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    before, small, large = map(int, done.stdout.split())
    assert before == small < large


def test_unknown_backend():
    done = run_python("-c", "import vtw_kernels", VTW_KERNELS_BACKEND="fpga")
    assert done.returncode != 0
    assert (
        "VTW_KERNELS_BACKEND: expected one of cuda, triton, cpu, reference, got 'fpga'" in done.stderr.splitlines()[-1]
    )


def test_a_corrected_backend():
    """In one process, as in a notebook."""
    code = """
import os
try:
    import vtw_kernels
except ImportError:
    os.environ["VTW_KERNELS_BACKEND"] = "cpu"
"""
    done = run_python("-c", code + USES_EVERY_OP, VTW_KERNELS_BACKEND="fpga")
    assert done.stdout.strip() == EXPECTED, done.stderr


def test_another_build_in_the_process(tmp_path):
    copy = tmp_path / "other.so"
    shutil.copy(_C.__file__, copy)
    load = "import sys, torch; torch.ops.load_library(sys.argv[1])"
    done = run_python("-c", f"{load}; import vtw_kernels", str(copy))
    loaded = "another build of its ops is loaded in this process"
    expected = f"ImportError: vtw_kernels: {loaded} (by torch.ops.load_library: {copy})"
    assert done.stderr.splitlines()[-1].startswith(expected)
    done = run_python("-c", f"{load}\n{USES_EVERY_OP}", _C.__file__)  # the same one is no other
    assert done.stdout.strip() == EXPECTED, done.stderr


def test_a_stale_build():
    """As one without an op that its Python knows."""
    code = "import torch._C\nall_names = torch._C._dispatch_get_all_op_names\n"
    code += "torch._C._dispatch_get_all_op_names = lambda: [x for x in all_names() if not x.endswith('::expand')]\n"
    done = run_python("-c", code + "import vtw_kernels")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: vtw_kernels: ") and "was built from other sources than its Python" in last
    assert "pip install" in last


CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.parametrize("wanted", CAPABILITIES)
def test_cpu_capability(wanted):
    """One build holds every vector set; those below what this machine has are run by asking for them."""
    ask = "import vtw_kernels as vtw; print(vtw.backend_info()['build']['cpu_capability'])"
    has = run_python("-c", ask, ATEN_CPU_CAPABILITY="").stdout.strip()
    gets = run_python("-c", ask, ATEN_CPU_CAPABILITY=wanted).stdout.strip()
    assert gets == min(wanted, has, key=CAPABILITIES.index)
    if wanted == has:
        return  # what all other tests ran
    selection = "cpu and (every_tail or special_values or large_logits or backward) or autograd"
    tests = str(Path(__file__).with_name("test_kl_divergence.py"))
    done = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", selection, ATEN_CPU_CAPABILITY=wanted
    )
    assert done.returncode == 0, done.stdout[-3000:]
