"""vtw-kernels bench: a small run of one op with its report, plots and comparison; what is chosen, and what is
refused."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version

import pytest
import torch

from vtw_kernels import bench, cli, extras

QUICK = ["--", "--benchmark-max-time", "0.01", "--benchmark-min-rounds", "3"]


def run_command(folder, *arguments):
    command = [sys.executable, "-m", "vtw_kernels", "bench", *arguments]
    # Within a worker of pytest-xdist, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    chosen = ["--op", "plan_compaction", "--model-shape", "llava-1.5-7b"]
    result = run_command(folder, *chosen, "--json", "run.json", *QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def run(saved):
    return json.loads((saved[0] / "run.json").read_text())


def test_run(saved, run):
    folder, printed = saved
    assert {path.name for path in folder.iterdir()} == {"run.json", "run.md", "run-roofline.png", "run-ratio.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.glob("*.png"))
    assert (folder / "run.md").read_text().strip() in printed
    groups = bench.groups_of(run)
    assert [group for _, group in groups] == [
        "plan, llava-1.5-7b, 661 to 85",
        "plan, llava-1.5-7b, 661 to 373 at random",
    ]
    for peers in groups.values():
        assert list(peers) == ["vtw_kernels", "argsort", "cumsum + scatter", "nonzero", "roof"]
    machine = run["machine_info"]
    assert machine["device"] == "cpu" and machine["torch"] == version("torch")
    assert min(*machine["bandwidth_gb_per_second"].values(), *machine["matmul_tflop_per_second"].values()) > 0
    assert "node" not in machine
    assert machine["fresh_memory"] is False


def test_busy(tmp_path):
    result = run_command(
        tmp_path, "--op", "plan_compaction", "--json", "run.json", *QUICK, "--busy", "-k", "vtw_kernels"
    )
    assert result.returncode == 0 and "beside busy processes; torch" in result.stdout
    assert json.loads((tmp_path / "run.json").read_text())["machine_info"]["busy"] is True


def test_fresh_memory(tmp_path):
    chosen = ["--op", "kl_divergence", "--dtype", "bf16", "--json", "run.json"]
    result = run_command(tmp_path, *chosen, *QUICK, "--fresh-memory", "-k", "against and vtw_kernels")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "threads, fresh memory; torch" in result.stdout
    assert json.loads((tmp_path / "run.json").read_text())["machine_info"]["fresh_memory"] is True


def test_what_is_reported_of_a_case(run):
    peers = bench.groups_of(run)["bench_compaction.py::test_plan", "plan, llava-1.5-7b, 661 to 85"]
    info, stats = peers["vtw_kernels"]["extra_info"], peers["vtw_kernels"]["stats"]
    assert info["bytes"] == 661 + 4 * 85 + 4  # the mask; the plan and its length in int32
    assert info["launches"] == 1
    assert info["peak_extra_bytes"] == 4 * 85 + 4
    assert info["gb_per_second"] == pytest.approx(info["bytes"] / stats["median"] / 1e9)
    copy = run["machine_info"]["bandwidth_gb_per_second"]["copy"]
    assert info["percent_of_roof"] == pytest.approx(100 * info["gb_per_second"] / copy)


@pytest.mark.filterwarnings("ignore:Unknown pytest.mark")  # benchmarks/conftest.py makes them known
def test_launches_and_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(bench.find_benchmarks()))
    from harness import observe

    x = torch.ones(1000)
    assert observe(lambda x: x.neg_(), (x,), "cpu") == {"launches": 1, "peak_extra_bytes": 0}
    # Two results of 4000 bytes are alive at once, the third takes the place of the first.
    assert observe(lambda x: x.neg().neg().neg(), (x,), "cpu") == {"launches": 3, "peak_extra_bytes": 8000}


def saved_as(run, path):
    path.write_text(json.dumps(run))
    return path


def test_compare(run, tmp_path, capsys):
    before = copy.deepcopy(run)
    for x in before["benchmarks"]:
        x["stats"] |= {"median": 1e-3, "iqr": 3e-5}
    after = copy.deepcopy(before)
    slower, within, faster, missing, *_ = after["benchmarks"]
    slower["stats"] |= {"median": 1.06e-3, "iqr": 4e-5}  # the spreads combine to 5e-5
    within["stats"] |= {"median": 1.04e-3, "iqr": 4e-5}
    faster["stats"] |= {"median": 0.5e-3}
    after["benchmarks"].remove(missing)
    after["machine_info"]["threads"] = 77
    paths = [str(saved_as(x, tmp_path / name)) for name, x in (("a.json", before), ("b.json", after))]
    assert cli.main(["bench", "--compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert f"2 of {len(run['benchmarks']) - 1} differ by more than their combined spread" in printed
    [line_of_slower] = [line for line in printed.splitlines() if line.endswith("slower |")]
    [line_of_faster] = [line for line in printed.splitlines() if line.endswith("faster |")]
    assert ": vtw_kernels " in line_of_slower and "+6.0 %" in line_of_slower and "5.0 %" in line_of_slower
    assert ": cumsum + scatter " in line_of_faster and "-50.0 %" in line_of_faster
    assert "Only in a: bench_compaction.py::test_plan: plan, llava-1.5-7b, 661 to 85: nonzero" in printed
    assert "Only in b" not in printed
    assert "The runs differ in threads: " in printed and "and 77." in printed


def test_fail_if_slower(run, tmp_path, capsys):
    """Of vtw_kernels alone, beyond the spread, which combines to 5e-5 s, and beyond the percentage."""

    def compared(median: float, *options: str, peer: str = "vtw_kernels") -> int:
        before = copy.deepcopy(run)
        for x in before["benchmarks"]:
            x["stats"] |= {"median": 1e-3, "iqr": 3e-5}
        after = copy.deepcopy(before)
        next(x for x in after["benchmarks"] if bench.peer_of(x) == peer)["stats"] |= {"median": median, "iqr": 4e-5}
        paths = [str(saved_as(x, tmp_path / name)) for name, x in (("a.json", before), ("b.json", after))]
        return cli.main(["bench", "--compare", *paths, *options])

    assert compared(1.06e-3, "--fail-if-slower") == 3
    said = capsys.readouterr()
    assert "differ by more than their combined spread" in said.out
    assert said.err == "slower: plan, llava-1.5-7b, 661 to 85: vtw_kernels: 1.00 ms before, 1.06 ms after (+6.0 %)\n"
    assert compared(1.06e-3) == 0
    assert compared(1.04e-3, "--fail-if-slower") == 0
    assert compared(0.5e-3, "--fail-if-slower") == 0
    assert compared(1.06e-3, "--fail-if-slower", peer="argsort") == 0
    assert compared(1.06e-3, "--fail-if-slower", "5") == 3
    assert compared(1.06e-3, "--fail-if-slower", "7") == 0
    assert not capsys.readouterr().err.replace(said.err, "")


def test_fail_if_slower_where_nothing_is_compared(run, tmp_path, capsys):
    others = copy.deepcopy(run)
    others["benchmarks"] = [x for x in others["benchmarks"] if bench.peer_of(x) != "vtw_kernels"]
    paths = [str(saved_as(x, tmp_path / name)) for name, x in (("a.json", run), ("b.json", others))]
    assert cli.main(["bench", "--compare", *paths, "--fail-if-slower"]) == 1
    assert "--compare: expected runs with cases of vtw_kernels in common, got none in" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", *paths, "--fail-if-slower=-1"]) == 1
    assert "--fail-if-slower: expected a percentage of at least 0, got -1" in capsys.readouterr().err
    assert cli.main(["bench", "--fail-if-slower"]) == 1
    assert "--fail-if-slower: expected --compare with it, got none" in capsys.readouterr().err


def test_above_the_roof(run):
    """A row says itself what that means."""
    ours = [x for x in run["benchmarks"] if bench.peer_of(x) == "vtw_kernels"]
    ours[0]["extra_info"] |= {"percent_of_roof": 180.0}
    ours[1]["extra_info"] |= {"percent_of_roof": 103.0, "flops": 7}
    cells = [bench.row_of(x, None)[5] for x in ours]
    assert cells == ["180 %, from the cache", "103 %, faster than the product measured"]
    ours[0]["extra_info"] |= {"percent_of_roof": 100.0}
    assert bench.row_of(ours[0], None)[5] == "100 %"


def test_compare_with_itself(run, tmp_path):
    path = saved_as(run, tmp_path / "a.json")
    text = bench.compare(path, path)
    assert f"0 of {len(run['benchmarks'])} differ" in text and "Only in" not in text and "The runs differ" not in text


def test_the_machine_itself_changed(run, tmp_path):
    after = copy.deepcopy(run)
    for x in after["benchmarks"]:
        x["stats"] |= {"median": 10 * x["stats"]["median"], "iqr": 0.0}
    before = copy.deepcopy(run)
    for x in before["benchmarks"]:
        x["stats"]["iqr"] = 0.0
    text = bench.compare(saved_as(before, tmp_path / "a.json"), saved_as(after, tmp_path / "b.json"))
    assert "2 of these are a roof" in text


def test_committed_results_can_be_read():
    """Those of a checkout, in its table and its plots."""
    paths = sorted(bench.find_benchmarks().glob("results/*/*.json"))
    for path in paths:
        assert "vtw_kernels" in bench.report(bench.read_run(path))


def test_every_op_has_benchmarks(tmp_path):
    """Of every model and in every dtype: what a run would do, done without a call."""
    chosen = [x for name in bench.OPS for x in ("--op", name)]
    chosen += [x for name in bench.MODELS for x in ("--model-shape", name)]
    chosen += [x for name in bench.DTYPES for x in ("--dtype", name)]
    code = (
        "import json, sys, pytest; from vtw_kernels import bench\n"
        "class Seen:\n"
        "    def pytest_collection_finish(self, session):\n"
        "        rows = [(sorted(m.args[0] for m in x.iter_markers('op')), x.name) for x in session.items]\n"
        "        open('seen.json', 'w').write(json.dumps(rows))\n"
        "folder = bench.find_benchmarks()\n"
        f"chosen = {chosen!r}\n"
        "files = list(map(str, folder.glob('bench_*.py')))\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '--rootdir', str(folder), *chosen, *files], [Seen()]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    items = json.loads((tmp_path / "seen.json").read_text())
    seen = {op: [name for ops, name in items if op in ops] for op in bench.OPS}
    for op in ("compact", "compact_", "compact_paged_", "expand", "withdraw", "search"):
        assert all(any(model in name for name in seen[op]) for model in bench.MODELS), op
        assert any("fp16" in name for name in seen[op]), op
    for op in ("kl_divergence", "kl_divergence_loss", "linear_kl_divergence"):
        assert all(any(str(m.vocabulary) in name for name in seen[op]) for m in bench.MODELS.values()), op
        assert any("16" in name for name in seen[op]), op
    assert seen["plan_compaction"]


def test_models():
    """A decoder's heads make up its width."""
    for model in bench.MODELS.values():
        assert model.heads * model.head_dim == model.hidden and model.heads % model.kv_heads == 0, asdict(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "compaction"], "argument --op: invalid choice: 'compaction'"),
        (["--model-shape", "llava"], "argument --model-shape: invalid choice: 'llava'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--compare", "a.json"], "argument --compare: expected 2 arguments"),
    ],
)
def test_bad_choices(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_bad_files(tmp_path, capsys):
    assert cli.main(["bench", "--json", str(tmp_path / "no" / "run.json")]) == 1
    assert "--json: expected a file in a folder that exists, got" in capsys.readouterr().err
    path = tmp_path / "other.json"
    for text in ("no json", "[]", "{}", '{"machine_info": {}, "benchmarks": [{"name": "x"}]}'):
        path.write_text(text)
        assert cli.main(["bench", "--compare", str(path), str(path)]) == 1
        assert f"{path}: expected what vtw-kernels bench --json writes" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", str(tmp_path / "missing.json"), str(path)]) == 1
    assert "missing.json" in capsys.readouterr().err


def test_without_pytest_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "pytest_benchmark" else True)
    assert cli.main(["bench"]) == 1
    assert "bench needs pytest-benchmark, which is not installed; run: pip install 'vtw_kernels[bench]'" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu(tmp_path):
    result = run_command(tmp_path, "--device", "cuda")
    assert result.returncode != 0
    assert "--device cuda: torch" in result.stderr and "finds no CUDA device" in result.stderr
