import os
import random
from types import SimpleNamespace

import pytest
import torch
from cases import Backend

import vtw_kernels  # noqa: F401  registers torch.ops.vtw_kernels
from vtw_kernels.ops import reference

COMPACTION = ("plan_compaction", "compact", "compact_", "expand", "compact_paged_")
KL = ("kl_divergence_with_state", "kl_divergence_backward", "merge_kl_states", "kl_from_state")


def with_composites(name: str, ops, **options) -> Backend:
    """A backend whose kernels are called as they stand, and the two ops that are halves of another one."""
    kernels = {op: getattr(ops, op) for op in (*COMPACTION, *KL)}
    kernels["kl_divergence"] = lambda p, q, temperature=1.0: ops.kl_divergence_with_state(p, q, temperature)[0]
    kernels["kl_state"] = lambda p, q, temperature=1.0: ops.kl_divergence_with_state(p, q, temperature)[1]
    return Backend(name, SimpleNamespace(**kernels), **options)


def simt_backend(library: str) -> Backend:
    """The CUDA kernels on the host (test_simt.py): the same schemas in a library of their own."""
    definitions = torch.library.Library("vtw_simt", "DEF")
    for op in (*COMPACTION, *KL):
        definitions.define(str(getattr(torch.ops.vtw_kernels, op).default._schema).removeprefix("vtw_kernels::"))
    torch.ops.load_library(library)
    simt_backend.definitions = definitions  # which end with it
    return with_composites("simt", torch.ops.vtw_simt)


def triton_backends() -> list[Backend]:
    """Triton's kernels, called as they stand: on a GPU, or in the interpreter, programs in order and at random."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are decorated
    from permuted_grid import permuted_grid

    from vtw_kernels.triton import compaction, kl_divergence

    kernels = SimpleNamespace(**vars(compaction), **vars(kl_divergence))
    if on_gpu:
        return [with_composites("triton", kernels, device="cuda")]

    def permuted(op):
        def call(*args):
            with permuted_grid(random.randrange(2**32)):
                return op(*args)

        return call

    shuffled = SimpleNamespace(**{op: permuted(getattr(kernels, op)) for op in (*COMPACTION, *KL)})
    return [with_composites("triton", kernels), with_composites("triton_permuted", shuffled)]


# `reference` is called as it stands, `cpu` and `cuda` through the dispatcher, which takes the C++ kernels.
if "VTW_SIMT_OPS" in os.environ:
    BACKENDS = [simt_backend(os.environ["VTW_SIMT_OPS"])]
else:
    BACKENDS = [
        Backend("reference", reference, checks_values=True),
        Backend("cpu", torch.ops.vtw_kernels, checks_values=True),
        *triton_backends(),
    ]
    if torch.cuda.is_available():
        BACKENDS.append(Backend("cuda", torch.ops.vtw_kernels, device="cuda"))


@pytest.fixture(
    params=[pytest.param(x, id=x.name, marks=[pytest.mark.gpu] if x.device == "cuda" else []) for x in BACKENDS]
)
def backend(request) -> Backend:
    return request.param


@pytest.fixture(params=[pytest.param(x, id=x.name) for x in BACKENDS if x.name in ("reference", "cpu")])
def host_backend(request) -> Backend:
    """For what only a CPU has: a number of threads."""
    return request.param


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
