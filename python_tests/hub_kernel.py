"""The package ``kernels`` loads what ``make hub`` has made, and its parser takes ``build.toml``. ``make hub`` runs
this, without the conftest, which would load the ops first."""

import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from kernels._rust import Build

ROOT = Path(__file__).parents[1]


def test_build_toml():
    build = Build.open(ROOT)
    assert [str(backend).lower() for backend in build.general.backends] == ["cpu", "cuda"]
    text = (ROOT / "build.toml").read_text()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert [path for path in sorted(sources) if "/python/" not in path and f'"{path}"' not in text] == []


def test_ops():
    ops = kernels.get_local_kernel(ROOT / "build/hub", backend="cpu", trust_remote_code=True)
    source, lengths = ops.plan_compaction(torch.tensor([[True, False, True]]))
    assert source.tolist() == [[0, 2, -1]] and lengths.tolist() == [2]
    rows = torch.arange(12.0).view(1, 3, 4)
    torch.testing.assert_close(ops.compact([rows], [1], [0], source)[0], torch.cat([rows[:, ::2], rows[:, :1] * 0], 1))
    p, q = torch.randn(5, 100, dtype=torch.float64), torch.randn(5, 100, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(ops.kl_divergence(p, q), expected)
    with pytest.raises(RuntimeError, match="keep"):
        ops.plan_compaction(torch.ones(3))


def test_two_in_a_process():
    """Ops of these names are registered once: a second library says so, and does not end the process."""
    code = (
        "import sys, pathlib, kernels, torch; hub = pathlib.Path(sys.argv[1]);"
        "torch.ops.load_library(next(hub.glob('build/*/_vtw_kernels.abi3.so')));"
        "kernels.get_local_kernel(hub, backend='cpu', trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT / "build/hub"], capture_output=True, text=True)
    assert "ImportError: vtw_kernels: another build of its ops is loaded in this process" in done.stderr
