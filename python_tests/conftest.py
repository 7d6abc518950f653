import pytest
import torch
from cases import Backend

import vtw_kernels  # noqa: F401  registers torch.ops.vtw_kernels
from vtw_kernels.ops import reference

# `reference` is called as it stands, `cpu` through the dispatcher, which takes the C++ kernels where they are built.
BACKENDS = [Backend("reference", reference), Backend("cpu", torch.ops.vtw_kernels)]
if torch.cuda.is_available():
    BACKENDS.append(Backend("cuda", torch.ops.vtw_kernels, "cuda"))


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
