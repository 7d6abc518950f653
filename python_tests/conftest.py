"""The backends that the table of cases runs on, and which cases an emulated one is spared; fixtures for all tests."""

import contextlib
import os
import random
from types import SimpleNamespace

import pretend_gpu
import pytest

if pretend_gpu.WANTED:
    pretend_gpu.load()  # before torch

import torch
from cases import Backend

import vtw_kernels  # noqa: F401  registers torch.ops.vtw_kernels
from vtw_kernels.ops import reference

COMPACTION = ("plan_compaction", "compact", "compact_", "expand", "compact_paged_", "plan_packed_")
KL = ("kl_divergence_with_state", "kl_divergence_backward", "merge_kl_states", "kl_from_state")
KL += ("kl_divergence_with_gradients", "scale_")


def with_composites(name: str, ops, **options) -> Backend:
    """A backend, and the two ops that are halves of another one."""
    kernels = {op: getattr(ops, op) for op in (*COMPACTION, *KL)}
    kernels["kl_divergence"] = lambda p, q, temperature=1.0: ops.kl_divergence_with_state(p, q, temperature)[0]
    kernels["kl_state"] = lambda p, q, temperature=1.0: ops.kl_divergence_with_state(p, q, temperature)[1]
    return Backend(name, SimpleNamespace(**kernels), **options)


LIBRARIES = []  # kept alive, as their ops go when they do


def library_of(name: str, kernels=None, key: str = "CPU"):
    """The ops again in a library of their own, called through the dispatcher as the others are: ``torch.ops.NAME``."""
    library = torch.library.Library(name, "DEF")
    LIBRARIES.append(library)
    for op in (*COMPACTION, *KL):
        original = getattr(torch.ops.vtw_kernels, op).default
        library.define(str(original._schema).removeprefix("vtw_kernels::"))
        library.impl(op, original, "Meta")
        library.impl(op, getattr(reference, op), "CompositeExplicitAutograd")  # an empty list is on no device
        if kernels is not None:
            library.impl(op, getattr(kernels, op), key)
    return getattr(torch.ops, name)


def simt_backend(path: str) -> Backend:
    """The CUDA kernels on the host (test_simt.py)."""
    ops = library_of("vtw_simt")
    torch.ops.load_library(path)
    for op in (*COMPACTION, *KL):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vtw_simt::{op}", "CPU"), op
    return with_composites("simt", ops)


def triton_backends() -> list[Backend]:
    """Triton's kernels on a GPU; or in the interpreter, programs in order and at random."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are decorated
    from permuted_grid import permuted_grid

    from vtw_kernels.triton import compaction, kl_divergence, packed

    kernels = SimpleNamespace(**(vars(compaction) | vars(kl_divergence) | vars(packed)))
    if on_gpu:
        return [with_composites("triton", library_of("vtw_triton", kernels, "CUDA"), device="cuda")]

    def permuted(op):
        def call(*args):
            with permuted_grid(random.randrange(2**32)):
                return op(*args)

        return call

    shuffled = SimpleNamespace(**{op: permuted(getattr(kernels, op)) for op in (*COMPACTION, *KL)})
    return [
        with_composites("triton", library_of("vtw_triton", kernels)),
        with_composites("triton_permuted", library_of("vtw_triton_permuted", shuffled)),
    ]


# `reference` is called as it stands, `cpu` and `cuda` through the dispatcher, which takes the C++ kernels.
if "VTW_SIMT_OPS" in os.environ:
    BACKENDS = [simt_backend(os.environ["VTW_SIMT_OPS"])]
elif pretend_gpu.WANTED:
    BACKENDS = [Backend("cuda", torch.ops.vtw_kernels, device=os.environ["PRETEND_DEVICE"])]
else:
    BACKENDS = [
        Backend("reference", reference, checks_values=True),
        Backend("cpu", torch.ops.vtw_kernels, checks_values=True),
        *triton_backends(),
    ]
    if torch.cuda.is_available():
        BACKENDS.append(Backend("cuda", torch.ops.vtw_kernels, device="cuda"))


collect_ignore = [] if pretend_gpu.WANTED else ["test_pretend_gpu.py"]

# What an emulated GPU takes minutes for, kernels do in milliseconds: beyond these sizes nothing new happens to them.
EMULATED_LOGITS, EMULATED_SHARDS = 40_000, 100
# Only in these tests do several programs share a row of logits, so that their order could matter.
KL_IN_RANDOM_ORDER = ("test_sizes", "test_broadcast", "test_merged_shards", "test_backward")


def affordable(item) -> bool:
    # No kernel of Triton runs on a pretend GPU, and 2^31 elements would take it hours.
    if pretend_gpu.WANTED and ("inductor" in item.name or "more_than_2_31_elements" in item.name):
        return False
    values = item.callspec.params if hasattr(item, "callspec") else {}
    backend = values.get("backend")
    if not isinstance(backend, Backend) or backend.name in ("reference", "cpu"):
        return True
    if backend.device != "cpu" and not pretend_gpu.WANTED:  # a GPU
        return True
    if backend.name == "triton" and "[triton-large" in item.name:  # one order of programs will do
        return False
    if backend.name == "triton_permuted" and item.path.stem == "test_kl_divergence":
        if not item.name.startswith(KL_IN_RANDOM_ORDER):
            return False
    of_triton = backend.name.startswith("triton")
    if of_triton and values.get("name") == "many requests":  # which takes the interpreter minutes
        return False
    if of_triton and item.path.stem == "test_kl_divergence" and values.get("dtype") == torch.float16:
        if not item.name.startswith("test_sizes"):  # all that is special about it is how it is loaded and stored
            return False
    # A special value at each place of rows of several blocks takes the interpreter minutes; one dtype will do.
    if item.name.startswith("test_special_values[triton-5001") and values.get("dtype") != torch.float32:
        return False
    logits = values.get("rows", 4) * values.get("vocabulary", 0)
    return logits <= EMULATED_LOGITS and len(values.get("sizes", ())) <= EMULATED_SHARDS


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if not affordable(item)])
    # The longest ones first, so that no worker is left alone with them.
    items[:] = sorted(filter(affordable, items), key=lambda item: item.path.stem != "test_simt")


@pytest.fixture(
    params=[pytest.param(x, id=x.name, marks=[pytest.mark.gpu] if x.device != "cpu" else []) for x in BACKENDS]
)
def backend(request) -> Backend:
    return request.param


@pytest.fixture(params=[pytest.param(x, id=x.name) for x in BACKENDS if x.name in ("reference", "cpu")])
def host_backend(request) -> Backend:
    """For what only a CPU has: a number of threads."""
    return request.param


@pytest.fixture(params=[pytest.param(x, id=x.name) for x in BACKENDS if x.device != "cpu"])
def gpu_backend(request) -> Backend:
    """For what only a GPU has: streams, graphs, memory for more than 2^31 elements."""
    return request.param


def on_the_pretend_gpu(path):
    """Tests that name no device run there, and so do the tensors of their parameters."""
    wanted = pretend_gpu.WANTED and path.stem in ("test_kl_loss", "test_transforms")
    return torch.device(os.environ["PRETEND_DEVICE"]) if wanted else contextlib.nullcontext()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    with on_the_pretend_gpu(collector.path):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with on_the_pretend_gpu(item.path):
        return (yield)


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few numbers are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Kernels that need a GPU, or minutes to compile, in plain torch; all that transformers does around them is
    real."""
    import transformers
    from torch.nn.attention.flex_attention import flex_attention
    from vlm import flash, flash_varlen

    lib = transformers.modeling_flash_attention_utils
    functions = {"_flash_fn": flash, "_flash_varlen_fn": flash_varlen, "_flash_with_kvcache_fn": None}
    functions |= {
        "_pad_fn": lib._pad_input,
        "_unpad_fn": lib._unpad_input,
        "_loaded_implementation": "flash_attention_2",
    }
    functions |= {"_process_flash_kwargs_fn": lib._lazy_define_process_function(flash_varlen)}
    for name, function in functions.items():
        if hasattr(lib, name):
            monkeypatch.setattr(lib, name, function)
    monkeypatch.setattr(
        transformers.integrations.flex_attention.WrappedFlexAttention, "__call__", lambda _: flex_attention
    )
