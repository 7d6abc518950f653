"""Prints, after pytest-benchmark's own table, how many times slower each peer is than vtw_kernels, group by group."""

from collections import defaultdict

import torch

import vtw_kernels

OURS = "vtw_kernels"


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release"):  # whose machine it was is nobody's business
        machine_info.pop(private, None)
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["build"] = vtw_kernels.backend_info()["build"]


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    medians: dict[str, dict[str, float]] = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        if bench.group and not bench.has_error:
            medians[bench.group][bench.params["peer"]] = bench.stats.median
    compared = {group: times for group, times in medians.items() if OURS in times and len(times) > 1}
    if not compared:
        return
    terminalreporter.section(f"median time, and its ratio to {OURS}")
    for group, times in compared.items():
        ours = times.pop(OURS)
        peers = "  ".join(f"{peer} {t * 1e6:.0f} us ({t / ours:.2f}x)" for peer, t in times.items())
        terminalreporter.write_line(f"{group}: {OURS} {ours * 1e6:.0f} us  {peers}")
