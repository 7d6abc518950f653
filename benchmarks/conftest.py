"""`--device`, the fixture that measures a case, and the summary: every peer beside vtw_kernels and the roof."""

import subprocess
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

import pytest
import torch
from harness import OURS, ROOF, Bandwidth, Case, check, clone, device_clock, measure_bandwidth, time_on_cuda

import vtw_kernels

bandwidths: dict[str, Bandwidth] = {}


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the benchmarks run")


def pytest_configure(config):
    config.addinivalue_line("markers", "cases(function): a test for every peer of every case that it yields")
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device; leave it out for cpu")


def pytest_generate_tests(metafunc):
    """The peers of a case follow each other, so that they share its arguments and the state of the machine."""
    if marker := metafunc.definition.get_closest_marker("cases"):
        cases = list(marker.args[0](metafunc.config.getoption("device")))
        rows = [pytest.param(case, peer, id=f"{case.name}-{peer}") for case in cases for peer in case.names()]
        metafunc.parametrize("case, peer", rows)


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cuda":
        for item in items:
            if "measure" in item.fixturenames:
                item.add_marker(pytest.mark.benchmark(timer=device_clock.now))


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("device")


@pytest.fixture(scope="session")
def bandwidth(device) -> Bandwidth:
    bandwidths[device] = measure_bandwidth(device)
    return bandwidths[device]


@pytest.fixture(scope="session")
def arguments(device):
    """Those of the last case: its peers get clones."""
    kept = {}

    def arguments_of(case: Case) -> tuple:
        if case not in kept:
            kept.clear()  # before the next ones are made: memory is what limits a case
            if device != "cpu":
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            kept[case] = case.make(device)
        return kept[case]

    return arguments_of


@pytest.fixture
def measure(request, benchmark, device, bandwidth, arguments):
    """`measure(case, peer)` checks the peer's result, times it, and relates the time to the bytes of the case."""
    option = request.config.getoption

    def run(case: Case, peer: str) -> None:
        torch.compiler.reset()  # otherwise torch.compile gives up, silently, after its first eight shapes
        benchmark.group, benchmark.params = case.name, {"case": case.name, "peer": peer}
        info = benchmark.extra_info
        with torch.set_grad_enabled(case.grad):
            args = arguments(case)
            if peer not in (OURS, ROOF):
                check(case, peer, args)
            function, args = case.prepare(peer, args, device)
            if device == "cpu":
                benchmark(function, *clone(args))
            else:
                limits = float(option("benchmark_max_time")), option("benchmark_min_rounds")
                info.update(time_on_cuda(benchmark, function, args, case.moved, *limits))
        if benchmark.enabled:
            speed = case.moved / benchmark.stats.stats.median
            info["bytes"], info["gb_per_second"] = case.moved, speed / 1e9
            info["percent_of_copy"] = 100 * speed / bandwidth.copy
            info["percent_of_read"] = 100 * speed / bandwidth.read

    return run


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release"):  # whose machine it was is nobody's business
        machine_info.pop(private, None)
    device = config.getoption("device")
    machine_info["device"] = device
    machine_info["threads"] = torch.get_num_threads()
    machine_info["build"] = vtw_kernels.backend_info()["build"]
    for package in ("torch", "triton", "transformers", "liger_kernel"):
        machine_info[package] = version_of(package)
    if device == "cuda":
        machine_info |= {"gpu": torch.cuda.get_device_name(), "driver": driver(), "cuda": torch.version.cuda}
    if device in bandwidths:
        machine_info["bandwidth_gb_per_second"] = {k: v / 1e9 for k, v in bandwidths[device]._asdict().items()}


def seconds(t: float) -> str:
    return f"{t * 1e6:.1f} us" if t < 1e-3 else f"{t * 1e3:.2f} ms"


def row(bench, ours: float) -> list[str]:
    """Peer, median, spread, ratio, and what is known of its bytes; on CUDA also its latency outside a graph, what it
    allocates, and whether its median was taken in a graph."""
    info, t = bench.extra_info, bench.stats.median
    cells = [bench.params["peer"], seconds(t), seconds(bench.stats.iqr), f"{t / ours:.2f}x"]
    if "bytes" in info:
        cells += [
            f"{info['gb_per_second']:.1f}",
            f"{info['percent_of_copy']:.0f} %",
            f"{info['percent_of_read']:.0f} %",
        ]
    if "mode" in info:
        cells += [seconds(info["eager_seconds"]), f"{info['peak_extra_bytes'] / 1e6:.1f} MB", info["mode"]]
    return cells


HEADER = ["", "median", "IQR", "ratio", "GB/s", "of copy", "of read", "eager", "extra", "mode"]


def is_peer(name: str) -> bool:
    return name != ROOF and not name.startswith(OURS)


def lines(rows: list[list[str]]) -> list[str]:
    table = [HEADER[: max(map(len, rows))], *rows]
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(table[0]))]
    return [row[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(row[1:], widths[1:])) for row in table]


def groups_of(session) -> dict[tuple[str, str], dict]:
    """By test and case: the benchmark of each peer."""
    groups = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        if bench and bench.group and not bench.has_error:
            test = PurePath(bench.fullname.partition("[")[0]).name
            groups[test, bench.group][bench.params["peer"]] = bench
    return {group: peers for group, peers in groups.items() if OURS in peers}


def pytest_terminal_summary(terminalreporter, config):
    ratios = defaultdict(list)
    for (test, group), peers in groups_of(getattr(config, "_benchmarksession", None)).items():
        ours = peers[OURS].stats.median
        terminalreporter.section(group, sep="-")
        for line in lines([row(bench, ours) for bench in peers.values()]):
            terminalreporter.write_line(line)
        others = [(bench.stats.median / ours, peer) for peer, bench in peers.items() if is_peer(peer)]
        if others:
            for key in (test.partition("::")[0], test):
                ratios[key].append((*min(others), group))
    if ratios:
        terminalreporter.section(f"time of the best peer, divided by that of {OURS}")
    for key in sorted(ratios):
        worst, peer, group = min(ratios[key])
        best = max(ratios[key])[0]
        terminalreporter.write_line(f"{key}: worst {worst:.2f}x ({peer}; {group}), best {best:.2f}x")
    for device, speed in bandwidths.items():
        measured = f"{speed.copy / 1e9:.1f} GB/s copied (read + written), {speed.read / 1e9:.1f} GB/s read"
        terminalreporter.write_line(f"{device}: {measured}; above 100 % of it, the data was in a cache")
