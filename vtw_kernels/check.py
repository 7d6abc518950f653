"""``vtw-kernels check``: tests every op, and withdrawal in a model, on this machine."""

import platform
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import AutoProcessor

from vtw_kernels.demo import data
from vtw_kernels.integration import Verification, verify
from vtw_kernels.integration.families import find_parts
from vtw_kernels.layer_search.records import Encoder, make_record
from vtw_kernels.layer_search.run import find_device, load_model
from vtw_kernels.ops import PackedPlan, backend_info, reference

OPS = torch.ops.vtw_kernels
DEMO_LAYER = 4  # which the search of the demo finds
LOGITS = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def run(options: Namespace) -> int:
    """Prints versions, the ops, and withdrawal in the demo's model, or in that of ``--model``. Returns 0, or 1 if
    something is not as it should be.

    Raises:
        ValueError, OSError, ImportError: about the options, the model or the image.
    """
    if (options.model is None) != (options.image is None):
        raise ValueError("model: expected --model and --image together, got one of them")
    console = Console()
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    print_versions(console, gpus)
    right = print_ops(console, [torch.device("cpu"), *gpus])
    verifications = verify_demo(gpus) if options.model is None else verify_own(options)
    for name, verification in verifications:
        console.print(f"\n{name}\n{verification}", highlight=False, markup=False, soft_wrap=True)
        right &= verification.rounding
    console.print("\nAll is as it should be." if right else "\nNot all is as it should be; see above.")
    return 0 if right else 1


def print_versions(console: Console, gpus: list[torch.device]) -> None:
    table = Table("version", "")
    table.add_row("Python", platform.python_version())
    for package in ("vtw_kernels", "torch", "triton", "transformers"):
        try:
            table.add_row(package, version(package))
        except ImportError:
            table.add_row(package, "not installed")
    for gpu in gpus:
        properties = torch.cuda.get_device_properties(gpu)
        table.add_row(str(gpu), f"{properties.name}, sm_{properties.major}{properties.minor}")
    if not gpus:
        table.add_row(
            "cuda", f"no GPU: torch sees none ({'built with CUDA' if torch.version.cuda else 'without CUDA'})"
        )
    console.print(table)


# --------------------------------------------------------------------------------------------------------------- ops


class Case(NamedTuple):
    """An op on tensors of the CPU. exact: it moves bytes, so the reference gets them as they are, not in fp64.
    expected: takes the place of the reference, for ops that are made of others."""

    op: str
    arguments: tuple
    exact: bool = False
    expected: Callable | None = None


def cases() -> Iterator[Case]:
    """Random inputs of odd sizes for every op; logits in each dtype, some of them -inf."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    batch, tokens = 3, 331
    keep = torch.rand(tokens, batch, generator=random).t() > 0.6  # strided
    for length, pad_left in ((-1, False), (100, False), (150, True)):
        yield Case("plan_compaction", (keep, length, pad_left), exact=True)
    source, _ = reference.plan_compaction(keep)
    padded, _ = reference.plan_compaction(keep, 150, True)
    tensors = [
        normal(batch, tokens, 67),
        normal(2, 1, tokens, 16, dtype=torch.float16),  # one for the whole batch
        torch.arange(tokens)[None],
        normal(batch, tokens, 5, 33, dtype=torch.bfloat16).transpose(1, 2),
        normal(batch, 2, tokens, 8, dtype=torch.float64) > 0,
    ]
    token_dims, batch_dims = [1, 2, 1, 2, 2], [0, 1, 0, 0, 0]
    yield Case("compact", (tensors, token_dims, batch_dims, padded), exact=True)
    rows = reference.compact(tensors, token_dims, batch_dims, padded)
    yield Case("expand", (rows, token_dims, batch_dims, padded, tokens), exact=True)
    own = [x for x, dim in zip(tensors, batch_dims) if x.shape[dim] == batch]
    yield Case("compact_", (own, [1, 2, 2], [0, 0, 0], source), exact=True)
    pages = torch.randperm(3 * 21, generator=random).int().view(batch, -1)
    lengths = torch.tensor([tokens, 40, 0], dtype=torch.int32)
    for layout, shape in (("NHD", (70, 16, 3, 32)), ("HND", (70, 3, 16, 32))):
        caches = [normal(*shape, dtype=torch.bfloat16), normal(*shape)]
        yield Case("compact_paged_", (caches, pages, lengths, keep, layout), exact=True)
    lists = ([0, 300, 301, 301], [320, 90, 0], [[5, 205], [210, 330], [0, 80]], [0, 2, 3, 3])
    step = [torch.tensor(x, dtype=torch.int32) for x in lists]
    yield Case("plan_packed_", (list(PackedPlan.empty(320, 3)), *step, pages, 16), exact=True)

    for dtype in LOGITS:
        p, q = 3 * normal(5, 16387), 3 * normal(1, 16387)
        p[:, 7::50] = -torch.inf
        p, q = p.to(dtype), q.to(dtype)
        for op in ("kl_divergence", "kl_state", "kl_divergence_with_state"):
            yield Case(op, (p, q, 2.0))
        state = reference.kl_state(p, q)
        yield Case("merge_kl_states", ([state, reference.kl_state(p.roll(1, dims=0), q), state],))
        yield Case("kl_from_state", (state,))
        weight = torch.rand(5, generator=random).to(state.dtype)
        yield Case("kl_divergence_backward", (weight, p, q, state, 1.0, True, True))
        yield Case("kl_divergence_with_gradients", (p, q, weight, 2.0, True, True))
        yield Case("kl_divergence_loss", (p, q, 2.0, weight), expected=loss)
        yield Case("scale_", ([q.clone(), normal(5, 33).to(dtype)], weight[0]))
    for dtype in (torch.float32, torch.float64):  # in lower precision, logits are rounded before they are compared
        p_hidden, q_hidden = normal(5, 64, dtype=dtype), normal(5, 32, dtype=dtype)
        p_weight, q_weight = normal(4099, 64, dtype=dtype) / 8, normal(4099, 32, dtype=dtype) / 6
        weights = (p_hidden, p_weight, q_hidden, q_weight)
        yield Case("linear_kl_divergence", weights, expected=lambda *x: linear_kl(*x)[0])
        biased = (p_hidden, p_weight, None, q_hidden, q_weight, normal(4099, dtype=dtype), 2.0, 1024)
        yield Case("linear_kl_divergence_with_state", biased, expected=linear_kl_with_biases)
        _, state = linear_kl_with_biases(*biased)
        grad = reference.grad_of_kl(state, torch.rand(5, generator=random).to(dtype))
        arguments = (grad, *biased[:-2], state, *biased[-2:], [True, True, False, True, True, True])
        yield Case("linear_kl_divergence_backward", arguments, expected=linear_kl_gradients)


def loss(p: Tensor, q: Tensor, temperature: float, weight: Tensor) -> Tensor:
    return (weight * reference.kl_divergence(p, q, temperature)).sum()


def linear_kl(p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor) -> tuple[Tensor, Tensor]:
    return linear_kl_with_biases(p_hidden, p_weight, None, q_hidden, q_weight, None, 1.0, None)


def linear_kl_with_biases(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, temperature, chunk):
    logits = F.linear(p_hidden, p_weight, p_bias), F.linear(q_hidden, q_weight, q_bias)
    return reference.kl_divergence_with_state(*logits, temperature)


def linear_kl_gradients(grad, p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, state, temperature, chunk, needs):
    inputs = (p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias)
    logits = F.linear(*inputs[:3]), F.linear(*inputs[3:])
    grads = reference.kl_divergence_backward(grad, *logits, state, temperature, True, True)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x, need in zip(inputs, needs) if need]
        given = iter(leaves)
        inputs = [next(given) if need else x for x, need in zip(inputs, needs)]
        outputs = F.linear(*inputs[:3]), F.linear(*inputs[3:])
        return torch.autograd.grad(outputs, leaves, grads)


class Error(NamedTuple):
    """relative: to the largest number. limit: of it. raised: what the op raised instead."""

    relative: float
    limit: float
    raised: str = ""

    @property
    def is_small(self) -> bool:
        return self.relative <= self.limit  # not of NaN


def print_ops(console: Console, devices: list[torch.device]) -> bool:
    """The largest errors of all ops, by backend and device; returns whether all are small."""
    ops = backend_info()["ops"]
    backends = [(name, device) for device in devices for name in backends_on(device)]
    errors: dict[str, list[list[Error]]] = {op: [[] for _ in backends] for op in ops}
    for case in cases():
        wanted = outcome(case, case.expected or getattr(reference, case.op), torch.device("cpu"), double=not case.exact)
        for column, (name, device) in enumerate(backends):
            if (function := function_of(case.op, name, device)) is not None:
                errors[case.op][column].append(error_of(case, function, device, wanted))
    table = Table("op", *(f"{name}, {device}" for name, device in backends), title="Ops against the reference in fp64")
    for op, row in errors.items():
        table.add_row(op, *map(cell, row))
    console.print(table)
    everything = [error for row in errors.values() for found in row for error in found]
    return all(error.is_small for error in everything) and bool(everything)


def backends_on(device: torch.device) -> list[str]:
    """Those that can run on a device of this machine, first the one that the ops use there."""
    info = backend_info()
    used = [by[device.type] for by in info["ops"].values() if by[device.type]]
    others = ["reference"]
    if device.type == "cuda" and info["backends"]["triton"] == "available":
        others.insert(0, "triton")
    return list(dict.fromkeys([*used, *others]))


def function_of(op: str, backend: str, device: torch.device) -> Callable | None:
    """The op as a backend has it. None where it is made of others, and these are another backend's."""
    if backend_info()["ops"][op][device.type] == backend:
        return getattr(OPS, op)
    if backend == "triton":
        modules = [import_module(f"vtw_kernels.triton.{name}") for name in ("compaction", "kl_divergence", "packed")]
    else:
        modules = [reference]
    return next((getattr(module, op) for module in modules if hasattr(module, op)), None)


def outcome(case: Case, function: Callable, device: torch.device, double: bool) -> list[Tensor]:
    """What the op returns, and the tensors that it wrote to."""

    def copied(x: Tensor) -> Tensor:
        return x.clone().to(device, torch.float64 if double and x.is_floating_point() else x.dtype)

    arguments = tree_map_only(Tensor, copied, case.arguments)
    returned = function(*arguments)
    tensors = tree_flatten((returned, arguments[0] if case.op.endswith("_") else None))[0]
    return [x for x in tensors if x is not None and x.numel()]  # gradients that were not asked for


def error_of(case: Case, function: Callable, device: torch.device, wanted: list[Tensor]) -> Error:
    try:
        given = outcome(case, function, device, double=False)
    except Exception as error:  # whatever a driver or a compiler raises
        return Error(float("inf"), 0.0, f"{type(error).__name__}: {error}")
    worst = Error(0.0, 0.0)
    for a, b in zip(given, wanted, strict=True):
        if case.exact:
            same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b)
            worst = max(worst, Error(0.0 if same else float("inf"), 0.0))
            continue
        # The five numbers of a state are of different sizes.
        columns = (x.unbind(-1) if b.shape[-1:] == (5,) else [x] for x in (a.cpu().double(), b))
        for x, y in zip(*columns):
            off = (x - y).abs().masked_fill(x == y, 0).max() / y[y.isfinite()].abs().max()
            worst = max(worst, Error(off.item(), TOLERANCES[a.dtype]), key=lambda e: (not e.is_small, e.relative))
    return worst


def cell(found: list[Error]) -> str:
    if not found:
        return "–"
    bad = next((error for error in found if not error.is_small), None)
    if bad is not None:
        return f"[bold red]FAILED[/] {escape(bad.raised) or f'{bad.relative:.1e}, expected {bad.limit:.1e} at most'}"
    largest = max(error.relative for error in found)
    return "exact" if not any(error.limit for error in found) else f"{largest:.1e}"


# ------------------------------------------------------------------------------------------------------- withdrawal


def verify_demo(gpus: list[torch.device]) -> Iterator[tuple[str, Verification]]:
    """The demo's model, at the layer that its search finds."""
    batch = data.load_batches("test", 4, limit=4)[0]
    for device in (torch.device("cpu"), *gpus):
        for dtype in (torch.float32, torch.bfloat16):
            model = data.load_model().to(device, dtype)
            inputs = batch.inputs | {"pixel_values": batch.inputs["pixel_values"].to(dtype)}
            yield f"The demo's model on {device}", verify(model, inputs, DEMO_LAYER)


def verify_own(options: Namespace) -> Iterator[tuple[str, Verification]]:
    encoder = Encoder(AutoProcessor.from_pretrained(options.model), options.prompt_template)
    model = load_model(options, find_device(options.device))
    encoder.dtype = model.dtype
    record = make_record(str(options.image), {"image": str(options.image), "question": options.prompt}, Path())
    parts = find_parts(model)
    layer = options.layer
    if layer is None:  # the one of its config, or halfway
        layer = (getattr(model.config, "vtw", None) or {}).get("layer", len(parts.layers) // 2)
        layer = min(max(layer, parts.min_layer), parts.max_layer)
    yield f"{options.model} on {model.device}", verify(model, encoder(record), layer)
