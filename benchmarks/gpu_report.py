"""The last step of gpu_check.sh: one JSON, a summary and the logs of its steps. python gpu_report.py ROOT WORK FOLDER

The JSON is also a run, with the headline cases, that `vtw-kernels bench --compare` takes.
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

FAILED = ("failed", "out of time")
LOG_LINES = 2000


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(root: Path) -> dict:
    query = "--query-gpu=name,driver_version,memory.total,power.limit,compute_cap"
    found = {
        "gpus": (output_of("nvidia-smi", query, "--format=csv,noheader") or "").splitlines(),
        "nvcc": (output_of("nvcc", "--version") or "").splitlines()[-1:],
        "python": platform.python_version(),
        "commit": output_of("git", "-C", str(root), "rev-parse", "HEAD"),
        "changed": bool(output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")),
    }
    found |= {package: installed(package) for package in ("torch", "triton", "transformers")}
    try:
        import torch

        found["cuda"] = torch.version.cuda
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        from vtw_kernels.ops import backend_info

        found["build"] = backend_info()["build"]
    except ImportError as error:
        found["problem"] = str(error)
    return found


def read_steps(folder: Path, tests: dict | None) -> list[dict]:
    names = ("step", "status", "exit_code", "seconds", "reason")
    rows = (line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines())
    steps = [dict(zip(names, row)) for row in rows]
    for step in steps:
        if step["step"] == "tests" and tests and tests["tests"] == tests["skipped"]:
            step |= {"status": "failed", "reason": "every test was skipped"}
        log = folder / f"{step['step']}.log"
        if step["status"] in FAILED and log.exists():
            step["log"] = log.read_text(errors="replace").splitlines()[-30:]
    return steps


def read_tests(path: Path) -> dict | None:
    if not path.exists():
        return None
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    cases = [case for suite in suites for case in suite.iter("testcase")]
    name = lambda case: f"{case.get('classname')}::{case.get('name')}"  # noqa: E731
    bad = [name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = {name(case): case.find("skipped").get("message") for case in cases if case.find("skipped") is not None}
    return {**counts, "failed": bad, "reasons_for_skipping": skipped}


def read_benchmarks(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"machine_info": {}, "benchmarks": []}


def logs(folder: Path) -> str:
    """Of all steps, the end of each."""
    parts = []
    for path in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime):
        lines = path.read_text(errors="replace").splitlines()
        cut = [f"({len(lines) - LOG_LINES} lines are left out)"] * (len(lines) > LOG_LINES)
        parts += [f"===== {path.stem}", *cut, *lines[-LOG_LINES:], ""]
    return "\n".join(parts)


def summary(found: dict) -> str:
    about = found["environment"]
    gpus = ", ".join(about["gpus"]) or about.get("gpu") or "no GPU"
    lines = ["# gpu_check", "", f"{gpus}; CUDA {about.get('cuda')}; torch {about['torch']}; triton {about['triton']}"]
    lines += [f"commit {about['commit']}{' with changes' if about['changed'] else ''}; build {about.get('build')}", ""]
    lines += ["| step | | seconds | |", "|---|---|--:|---|"]
    lines += [f"| {s['step']} | {s['status']} | {s['seconds']} | {s['reason']} |" for s in found["steps"]]
    if tests := found["tests"]:
        counts = ", ".join(f"{tests[key]} {key}" for key in ("tests", "failures", "errors", "skipped"))
        lines += ["", f"Tests: {counts}.", *(f"* {name}" for name in tests["failed"])]
    text = "\n".join(lines) + "\n"
    if found["benchmarks"]:
        from vtw_kernels.bench import report

        text += "\n## Benchmarks\n\n" + report(found)
    return text


def main() -> int:
    root, work, folder = map(Path, sys.argv[1:])
    tests = read_tests(work / "tests.xml")
    found = {"environment": environment(root), "steps": read_steps(work, tests), "tests": tests}
    found |= read_benchmarks(work / "bench.json")
    (folder / "gpu_check.json").write_text(json.dumps(found, indent=1))
    (folder / "gpu_check.log").write_text(logs(work))
    text = summary(found)
    (folder / "gpu_check.md").write_text(text)
    print(text)
    print(f"wrote {folder}/gpu_check.json, .md and .log")
    failed = [step["step"] for step in found["steps"] if step["status"] in FAILED]
    skipped = [step["step"] for step in found["steps"] if step["status"] == "skipped"]
    print(f"failed: {', '.join(failed) or 'nothing'}; skipped: {', '.join(skipped) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
