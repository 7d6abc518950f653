"""The options, the fixture that measures a case, and the report: every peer beside vtw_kernels and the roof.

With --benchmark-json=RUN.json the report is also written to RUN.md, with plots in RUN-roofline.png and RUN-ratio.png.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from harness import Case, Choice, Speed, check, clone, device_clock, keep_freed_memory, name_of, observe, time_on_cuda

import vtw_kernels
from vtw_kernels.bench import DTYPES, MODELS, OPS, OURS, ROOF, Model, plot, report

speeds: dict[str, Speed] = {}


def pytest_addoption(parser):
    group = parser.getgroup("vtw_kernels")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the benchmarks run")
    several = {"action": "append", "default": []}
    group.addoption(
        "--fresh-memory",
        action="store_true",
        help="on the CPU, leave glibc's malloc as it is, which returns large blocks to the system: peers are then "
        "timed with the page faults of their results",
    )
    group.addoption(
        "--busy",
        action="store_true",
        help="beside busy processes, one for every core but one, as on a machine that is shared",
    )
    group.addoption("--op", choices=OPS, help="these ops only; may be given several times", **several)
    group.addoption(
        "--model-shape", choices=list(MODELS), help="shapes of these models instead of the usual ones", **several
    )
    group.addoption("--dtype", choices=list(DTYPES), help="these dtypes instead of the usual ones", **several)


def pytest_configure(config):
    config.addinivalue_line("markers", "cases(function): a test for every peer of every case that it yields")
    config.addinivalue_line("markers", "op(name): what --op selects it by")
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device cuda: torch {torch.__version__} finds no CUDA device; leave it out for cpu")
    if config.getoption("device") == "cpu" and not config.getoption("fresh_memory"):
        keep_freed_memory()


def choice_of(config) -> Choice:
    option = config.getoption
    models = tuple(MODELS[name] for name in option("model_shape"))
    return Choice(option("device"), models, tuple(DTYPES[name] for name in option("dtype")))


def pytest_generate_tests(metafunc):
    """The peers of a case follow each other, so that they share its arguments and the state of the machine."""
    choice = choice_of(metafunc.config)
    if marker := metafunc.definition.get_closest_marker("cases"):
        cases = marker.args[0](choice) if is_wanted(metafunc.definition) else ()  # making them takes seconds
        rows = [pytest.param(case, peer, id=f"{case.name}-{peer}") for case in cases for peer in case.names()]
        metafunc.parametrize("case, peer", rows)
    # What was not asked for keeps its name, so that saved runs can be compared.
    if "model_shape" in metafunc.fixturenames:
        rows = [pytest.param(model, id=model.name) for model in choice.models]
        usual = pytest.param(MODELS["llava-1.5-7b"], id=pytest.HIDDEN_PARAM)
        metafunc.parametrize("model_shape", rows or [usual], scope="module")
    if "dtype" in metafunc.fixturenames:
        rows = [pytest.param(dtype, id=name_of(dtype)) for dtype in choice.dtypes]
        usual = torch.float32 if choice.device == "cpu" else torch.bfloat16
        metafunc.parametrize("dtype", rows or [pytest.param(usual, id=pytest.HIDDEN_PARAM)], scope="module")


def is_wanted(item) -> bool:
    wanted = item.config.getoption("op")
    return not wanted or any(mark.args[0] in wanted for mark in item.iter_markers("op"))


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cuda":
        for item in items:
            if "measure" in item.fixturenames:
                item.add_marker(pytest.mark.benchmark(timer=device_clock.now))
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = filter(is_wanted, items)


@pytest.fixture(scope="session", autouse=True)
def neighbours(request):
    count = os.cpu_count() - 1 if request.config.getoption("busy") else 0
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("device")


@pytest.fixture(scope="module")
def title(request, model_shape: Model, dtype: torch.dtype) -> str:
    """What a group's name ends with: the model and dtype, if they were asked for."""
    choice = choice_of(request.config)
    parts = [model_shape.name] * bool(choice.models) + [name_of(dtype)] * bool(choice.dtypes)
    return "".join(f", {part}" for part in parts)


@pytest.fixture(scope="session")
def speed(device) -> Speed:
    speeds[device] = Speed(device)
    return speeds[device]


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
def measure(request, benchmark, device, speed, arguments):
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
                info.update(observe(function, clone(args), device))
        if benchmark.enabled:
            time = benchmark.stats.stats.median
            info |= {"bytes": case.moved, "gb_per_second": case.moved / time / 1e9}
            info["percent_of_roof"] = 100 * case.ideal_seconds(speed) / time
            if case.flops:
                info["flops"] = case.flops

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
    if device == "cpu":
        machine_info["fresh_memory"] = config.getoption("fresh_memory")
        machine_info["busy"] = config.getoption("busy")
    if device == "cuda":
        machine_info |= {"gpu": torch.cuda.get_device_name(), "driver": driver(), "cuda": torch.version.cuda}
    machine_info |= measured_speeds(device)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """An interrupted run is saved as far as it got: without the benchmark that was cut off before its first round."""
    if run := getattr(session.config, "_benchmarksession", None):
        run.benchmarks[:] = [bench for bench in run.benchmarks if bench.stats.data]
    return (yield)


def measured_speeds(device: str) -> dict:
    if device not in speeds:
        return {}
    speed = speeds[device]
    products = {name_of(dtype): x / 1e12 for dtype, x in speed.products.items()}
    moving = {"copy": speed.copy / 1e9, "read": speed.read / 1e9}
    return {"bandwidth_gb_per_second": moving, "matmul_tflop_per_second": products}


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [bench for bench in session.benchmarks if bench and not bench.has_error] if session else []
    if not measured:
        return
    device = config.getoption("device")
    machine = {"torch": torch.__version__, **measured_speeds(device)}
    memory = ", fresh memory" * config.getoption("fresh_memory")
    busy = ", beside busy processes" * config.getoption("busy")
    on_cpu = f"CPU, {torch.get_num_threads()} threads{memory}{busy}"
    machine["gpu"] = torch.cuda.get_device_name() if device == "cuda" else on_cpu
    run = {"machine_info": machine, "benchmarks": [bench.as_dict(include_data=False) for bench in measured]}
    text = report(run)
    terminalreporter.section("report", sep="-")
    terminalreporter.write_line(text)
    if session.json:
        stem = Path(session.json).with_suffix("")
        Path(f"{stem}.md").write_text(text)
        for path in (f"{stem}.md", *plot(run, stem)):
            terminalreporter.write_line(f"wrote {path}")
