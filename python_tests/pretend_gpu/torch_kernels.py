"""torch's own CUDA kernels, which the pretend device has no twins of: the CPU's run in their place, on tensors over the
same memory. Where CUDA makes the host wait, so does this, and says so in torch's sync debug mode.

Not here: what the CPU has no kernel for (fused attention: SDPA takes its composite form; cuDNN: convolutions take
another way), and the generators of CUDA (the CPU's is drawn from).
"""

import ctypes
import warnings

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import pretend_gpu

# They only allocate, or look at what a tensor is and not at what it holds; or they copy.
NATIVE = {"empty.memory_format", "empty_strided", "as_strided", "view", "_reshape_alias", "unfold", "view_as_real"}
NATIVE |= {"view_as_complex", "resize_", "set_", "set_.source_Storage", "set_.source_Storage_storage_offset"}
NATIVE |= {"set_.source_Tensor", "record_stream", "_pin_memory", "is_pinned", "is_set_to", "_local_scalar_dense"}
# The host must know their results, as something's size depends on them.
WAITING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
WAITING |= {"equal", "repeat_interleave.Tensor", "bincount"}
INDEXING = {"index.Tensor", "_unsafe_index.Tensor", "index_put_", "_index_put_impl_", "_unsafe_index_put"}  # by a mask

LIBRARY = torch.library.Library("aten", "IMPL")
TASKS = []  # that a graph may run at any time


class opened:
    """Lets the host touch the devices' memory."""

    def __enter__(self) -> None:
        pretend_gpu.runtime.pretend_open(1)

    def __exit__(self, *_) -> None:
        pretend_gpu.runtime.pretend_open(0)


def on_cpu(x: Tensor) -> Tensor:
    """A CPU tensor over the memory of one on a device."""
    size = x.untyped_storage().nbytes()
    if size == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * size).from_address(x.untyped_storage().data_ptr())
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())


def on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def is_cuda(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_cuda


def wait(device: torch.device) -> None:
    with torch.cuda.device(device):
        if pretend_gpu.runtime.pretend_wait(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def tell_of_waiting() -> None:
    mode = torch.cuda.get_sync_debug_mode()
    if mode == 2:
        raise RuntimeError("called a synchronizing CUDA operation")
    if mode == 1:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=3)


def indexes_by_mask(args: tuple) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None)


def for_numbers(op, args: tuple):
    """``x % 3`` calls the op with a tensor of 3, which comes here as the number."""
    pairs = zip(args, op._schema.arguments)
    mixed = any(isinstance(x, (int, float, complex)) and str(argument.type) == "Tensor" for x, argument in pairs)
    return op.overloadpacket if mixed else op


def served_by_cpu(overload, name: str):
    def kernel(*args, **kwargs):
        op = for_numbers(overload, args)
        twins = {}  # of the arguments, by identity: (twin, original)
        devices = []

        def over_memory(x, twin_of=on_cpu, place="cpu"):
            if is_cuda(x):
                devices.append(x.device)
                twin = twin_of(x)
                twins[id(twin)] = twin, x
                return twin
            if isinstance(x, torch.device) and x.type == "cuda":
                devices.append(x)
                return torch.device(place)
            return None if isinstance(x, torch.Generator) and x.device.type == "cuda" else x

        def to_device(x):
            if not isinstance(x, Tensor):
                return x
            if id(x) in twins:
                return twins[id(x)][1]
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=devices[0])

        def resized() -> list[tuple[Tensor, Tensor]]:
            """Outputs that were made to fit, with their twins."""
            changed = [(twin, x) for twin, x in twins.values() if twin.shape != x.shape]
            for twin, x in changed:
                x.resize_(twin.shape)
            return changed

        host_args = tree_map(over_memory, (args, kwargs))
        waiting = name in WAITING or name in INDEXING and indexes_by_mask(args)
        with torch.cuda.device(devices[0]):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing and not waiting:
            twins.clear()
            meta_args = tree_map(lambda x: over_memory(x, on_meta, "meta"), (args, kwargs))
            results = tree_map(to_device, op(*meta_args[0], **meta_args[1]))
            if resized():
                host_args = tree_map(over_memory, (args, kwargs))
            record(op, host_args, results, devices[0])
            return results

        if waiting:
            tell_of_waiting()
        wait(devices[0])
        with opened():
            results = op(*host_args[0], **host_args[1])
        for twin, x in resized():
            fill(x, twin)
        made = tree_map(to_device, results)
        tree_map(lambda x, y: fill(x, y) if is_cuda(x) and id(y) not in twins else None, made, results)
        return made

    return kernel


def fill(x: Tensor, values: Tensor) -> None:
    if x.numel():
        with opened():
            on_cpu(x).copy_(values)


def record(op, host_args: tuple, results, device: torch.device) -> None:
    """Adds the op to the graph that is being captured."""
    places = tree_map(lambda x: on_cpu(x) if is_cuda(x) else None, results)

    def compute(_) -> None:
        tree_map(
            lambda place, x: None if place is None or place.data_ptr() == x.data_ptr() else place.copy_(x),
            places,
            op(*host_args[0], **host_args[1]),
        )

    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compute)
    TASKS.append(task)
    with torch.cuda.device(device):
        pretend_gpu.runtime.pretend_run(task, None, torch.cuda.current_stream().cuda_stream)


def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """From device to device, and to and from the host, as torch does it: what lies alike is copied by CUDA, and all
    else is laid out alike first."""
    op = torch.ops.aten.copy_.default
    alike = self.dtype == src.dtype and self.shape == src.shape and self.is_contiguous() and src.is_contiguous()
    if alike and not (self.is_neg() or src.is_neg() or self.is_conj() or src.is_conj()):
        return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, self, src, non_blocking)
    if self.device == src.device:
        return served_by_cpu(op, "copy_")(self, src)
    values = src.resolve_conj().resolve_neg().to(self.dtype).expand(self.shape).contiguous()
    return self.copy_(torch.empty_like(values, device=self.device).copy_(values, non_blocking))


def install() -> None:
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full_name.partition("::")
        if namespace != "aten" or name in NATIVE:
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA"):
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            LIBRARY.impl(name, served_by_cpu(op, name), "CUDA", allow_override=True)
    LIBRARY.impl("copy_", copy_, "CUDA", allow_override=True)
    torch.backends.cudnn.enabled = False
    for enable in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(False)
