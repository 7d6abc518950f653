import os

import pytest
import torch
from cases import Backend

import vtw_kernels  # noqa: F401  registers torch.ops.vtw_kernels
from vtw_kernels.ops import reference

# `reference` is called as it stands, `cpu` through the dispatcher, which takes the C++ kernels where they are built.
BACKENDS = [
    Backend("reference", reference, checks_values=True),
    Backend("cpu", torch.ops.vtw_kernels, checks_values=True),
]
if simt_ops := os.environ.get("VTW_SIMT_OPS"):
    # The CUDA kernels on the host (test_simt.py): the same schemas in a library of its own.
    library = torch.library.Library("vtw_simt", "DEF")
    for name in ("plan_compaction", "compact", "compact_", "expand", "compact_paged_"):
        schema = str(getattr(torch.ops.vtw_kernels, name).default._schema)
        library.define(schema.removeprefix("vtw_kernels::"))
    torch.ops.load_library(simt_ops)
    BACKENDS = [Backend("simt", torch.ops.vtw_simt, checks_values=False)]
if torch.cuda.is_available():
    BACKENDS.append(Backend("cuda", torch.ops.vtw_kernels, device="cuda"))


@pytest.fixture(
    params=[pytest.param(x, id=x.name, marks=[pytest.mark.gpu] if x.device == "cuda" else []) for x in BACKENDS]
)
def backend(request) -> Backend:
    return request.param


@pytest.fixture(params=[pytest.param(x, id=x.name) for x in BACKENDS if x.device == "cpu"])
def host_backend(request) -> Backend:
    """For what only a CPU has: a number of threads."""
    return request.param


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
