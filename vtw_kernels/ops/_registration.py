"""How the Python half of an op is registered, and what the dispatcher then does with a tensor of each device."""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import has_torch_function
from torch.utils._pytree import tree_leaves

from vtw_kernels.ops._extension import FORCED_BACKEND, build_info, op_names

# Ops that are made of other ops have no kernels of their own. For each, the op whose kernel does its work.
KERNEL_OF = {
    "kl_divergence": "kl_divergence_with_state",
    "kl_state": "kl_divergence_with_state",
    "kl_divergence_loss": "kl_divergence_with_gradients",
    "linear_kl_divergence": "kl_divergence_with_state",
    "linear_kl_divergence_with_state": "kl_divergence_with_state",
    "linear_kl_divergence_backward": "kl_divergence_backward",
}

_library = torch.library.Library("vtw_kernels", "IMPL")

HAS_TRITON = importlib.util.find_spec("triton") is not None
_in_triton: set[str] = set()  # ops whose CUDA kernel is Triton's


def register(name: str, *, reference: Callable, fake: Callable, triton: str | None = None) -> None:
    """Registers an op's fake, Triton's kernel for GPUs if there is no compiled one, and the reference as the kernel of
    every device that has none of its own.

    If a backend is forced, only that one registers kernels, so that a tensor on a device it doesn't serve raises.

    Args:
        triton: the module of ``vtw_kernels.triton`` that has the op.
    """
    torch.library.register_fake(f"vtw_kernels::{name}", fake)
    if triton and HAS_TRITON and FORCED_BACKEND in (None, "triton") and not _has_kernel(name, "CUDA"):
        _library.impl(name, _triton_kernel(triton, name), "CUDA")
        _in_triton.add(name)
    others = reference if FORCED_BACKEND in (None, "reference") else _refusal(name)
    _library.impl(name, others, "CompositeExplicitAutograd")


def _refusal(name: str) -> Callable:
    """The kernel for devices that a forced backend does not serve: it raises."""

    def refuse(*args):
        given = next((x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor)), "no device")
        serves = f"serves {'cpu' if FORCED_BACKEND == 'cpu' else 'cuda'}, and is {_backends()[FORCED_BACKEND]}"
        raise RuntimeError(
            f"{name}: VTW_KERNELS_BACKEND: expected a backend for tensors on {given}, got {FORCED_BACKEND}, "
            f"which {serves}"
        )

    return refuse


def _triton_kernel(module: str, name: str) -> Callable:
    """A kernel that imports Triton when it is first called, so that machines without a GPU don't wait for the
    import."""

    def kernel(*args):
        return getattr(import_module(f"vtw_kernels.triton.{module}"), name)(*args)

    return kernel


def register_over_ops(name: str, *, kernel: Callable, fake: Callable) -> None:
    """Registers the fake and the only kernel of an op that has a gradient of its own but computes by calling other ops:
    the dispatcher picks a backend for each of those."""
    torch.library.register_fake(f"vtw_kernels::{name}", fake)
    _replace(name, kernel, "CompositeExplicitAutograd")


def _replace(name: str, kernel: Callable, key: str) -> None:
    """Replaces a kernel of ``csrc/composite.cpp``. Those are for programs without Python: they call other ops through
    the C interface of the stable ABI, on which an error loses its type and, before torch 2.13, its text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is a kernel already
        _library.impl(name, kernel, key)


def register_autocast(name: str, *, cast: bool) -> None:
    """Turns torch.autocast off inside an op, so that nothing that it calls changes a dtype behind its back; ``cast``
    first brings its tensors to the dtype of the autocast, fp64 excepted, as F.linear does."""
    op = getattr(torch.ops.vtw_kernels, name).default
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args, device: str = device, off: torch._C.DispatchKeySet = off):
            if cast:
                args = torch.amp.autocast_mode._cast(args, device, torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(off):
                return op(*args)

        _library.impl(name, run, key)


def register_mutation(name: str) -> None:
    """Tells autograd that an in-place op writes to its first argument, a list, as torch's own in-place ops do."""
    op = getattr(torch.ops.vtw_kernels, name).default
    written = op._schema.arguments[0].name

    def record(keyset, tensors, *args):
        refuse_tangents(name, tensors)
        for i, x in enumerate(tensors):
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(f"{name}: {written}[{i}]: expected one that requires no gradient, got one that does")
        torch.autograd.graph.increment_version(tensors)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, tensors, *args)

    _library.impl(name, record, "ADInplaceOrView", with_keyset=True)


EACH_RANK = "call it on every rank with x.to_local(), which has the sequences or heads of that rank"


def call_on_list(op: OpOverload, tensors: list[torch.Tensor], *args: Any, in_place: bool = False) -> Any:
    """``op(tensors, *args)``, without the detour through autograd's kernels where nothing is to be differentiated.

    Those kernels are written in Python and take longer than a small compaction. (They can't be written in C++: the C
    interface of the stable ABI always calls an op from the top of the dispatcher, so a kernel could not call the one
    below it.) If somebody else may want to see the call (a compiler, torch.func, ``__torch_function__``), it is made in
    the usual way."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or has_torch_function((*tensors, *args))
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(tensors))
    ):
        return op(tensors, *args)
    try:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(tensors, *args)
    except (NotImplementedError, RuntimeError):  # which DTensor raises for an op that it does not know
        refuse_sharded(op._schema.name.removeprefix("vtw_kernels::"), EACH_RANK, tensors, args)
        raise
    if in_place:
        torch.autograd.graph.increment_version(tensors)
    return result


def is_sharded(*values: Any) -> bool:
    """Whether a DTensor is among them. Its module takes long to import; if nobody has imported it, there is none."""
    if torch.compiler.is_compiling() or (module := sys.modules.get("torch.distributed.tensor")) is None:
        return False
    return any(type(x) is not torch.Tensor and isinstance(x, module.DTensor) for x in tree_leaves(values))


def refuse_sharded(name: str, instead: str, *values: Any) -> None:
    if is_sharded(*values):
        raise RuntimeError(f"{name}: expected plain tensors, got a DTensor; {instead}")


def register_gradient(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """Does what torch.library.register_autograd does, for two reasons: that one takes several times as long per call
    if tensors come in lists, and it silently drops the tangents of forward-mode differentiation, which raise here.

    Only the first argument may be a list of tensors.
    """
    op = getattr(torch.ops.vtw_kernels, name).default
    arguments = op._schema.arguments
    takes_list, gives_list = (x.type.kind() == "ListType" for x in (arguments[0], op._schema.returns[0]))

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *flat):
            *flat, below = flat
            split = len(flat) - len(arguments) + 1
            args = [flat[:split], *flat[split:]] if takes_list else flat
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(below, *args)
            if setup_context:
                setup_context(ctx, args, output)
            return tuple(output) if gives_list else output

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, grads) if gives_list else backward(ctx, *grads)
            first, *rest = result if isinstance(result, tuple) else (result,)
            return *(first if takes_list else [first]), *rest, None

    def record(keyset, *args):
        below = keyset & torch._C._after_autograd_keyset
        if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return op._handle.redispatch_boxed(below, *args)
        args += tuple(x.default_value for x in arguments[len(args) :])  # the dispatcher leaves out defaults
        first, *rest = args
        refuse_tangents(name, first if takes_list else args)
        output = apply(Recorded, *(first if takes_list else [first]), *rest, below)
        return list(output) if gives_list else output

    register_autograd_kernel(name, record)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, also within torch.func. There, torch refuses a function that has no rules for transforms; but
    a kernel of the dispatcher needs none, as the ops that it calls are transformed themselves."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return _of_one_level(function).apply(*args)


@cache
def _of_one_level(function: type[torch.autograd.Function]) -> Any:
    """The function in the form in which torch.func runs it under a single transform."""
    both = {name: vars(function)[name] for name in ("forward", "backward")}
    return type(function.__name__, (_SingleLevelFunction,), both)


def refuse_tangents(name: str, values: Sequence[Any]) -> None:
    """Raises if one of the values carries a tangent of forward-mode differentiation (torch.func.jvp, dual numbers)."""
    if forward_ad._current_level < 0:
        return
    for x in values:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name}: expected tensors to differentiate backward, got one with a forward-mode tangent"
            )


def register_autograd_kernel(name: str, function: Callable) -> None:
    """Registers an op's autograd kernel ``function(keyset, *args)``, which has to call the kernel below it by
    itself."""
    _library.impl(name, function, "Autograd", with_keyset=True)


def register_composite(name: str, function: Callable) -> None:
    """Registers an op that only calls other ops, and so needs no fake and no gradient of its own."""
    _replace(name, function, "CompositeImplicitAutograd")


def backend_info() -> dict[str, Any]:
    """What was built, and which backend each op will use on each device.

    Returns:
        ``build``: torch, compiler, CUDA and architectures of the compiled extension, or why it has no CUDA, and the
        vector set that its CPU kernels chose on this machine; ``forced``: the value of VTW_KERNELS_BACKEND, if any;
        ``backends``: for each backend "available", or why it is not; ``ops``: for each op and device type the backend
        that runs it, or None when a call would raise.
    """
    ops = [name.removeprefix("vtw_kernels::") for name in op_names()]
    return {
        "build": build_info(),
        "forced": FORCED_BACKEND,
        "backends": _backends(),
        "ops": {name: {device: _backend_of(name, device) for device in ("cpu", "cuda")} for name in ops},
    }


def _backends() -> dict[str, str]:
    build, on_gpu = build_info(), "available" if torch.cuda.is_available() else "idle: torch finds no GPU"
    return {
        "cpu": "available",
        "cuda": on_gpu if build["cuda"] else f"not built: {build['why_no_cuda']}",
        "triton": on_gpu if HAS_TRITON else "not installed",
        "reference": "available",
    }


def _backend_of(name: str, device: str) -> str | None:
    name = KERNEL_OF.get(name, name)
    if _has_kernel(name, device.upper()):
        return "triton" if device == "cuda" and name in _in_triton else device
    if FORCED_BACKEND in (None, "reference") and _has_kernel(name, "CompositeExplicitAutograd"):
        return "reference"
    return None


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vtw_kernels::{name}", key)
