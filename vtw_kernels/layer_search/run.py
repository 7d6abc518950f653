"""``vtw-kernels search``: from records on disk to a chosen layer, in one process or many, stopped and resumed at will."""

import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vtw_kernels.integration.families import describe
from vtw_kernels.layer_search.attention import attention_mass
from vtw_kernels.layer_search.costs import measure_costs
from vtw_kernels.layer_search.records import BadRecord, DataSet, Encoder, JsonLines, load_records
from vtw_kernels.layer_search.report import Sample, write_report
from vtw_kernels.layer_search.result import METRICS, STATISTICS, LayerSearch, check_among
from vtw_kernels.layer_search.scorer import Scorer, Scores
from vtw_kernels.layer_search.state import State, append_line, read_lines
from vtw_kernels.ops import backend_info

SHOWN = 8  # samples in a report
STALLED_SECONDS = 1800  # no record takes as long
PLAN_SECONDS = 7200  # at the most: after a stop, all images are read anew for their digests
# Files of a model that decide its scores; of weights only size and time are looked at, as reading them takes minutes.
TEXT_FILES = (".json", ".jinja", ".txt", ".model", ".py")
WEIGHT_FILES = (".safetensors", ".bin")
Records = JsonLines | DataSet


def run(options: Namespace, command: str) -> int:
    """Searches, writes what was asked for, and prints the table.

    Records are scored one at a time: then a record's scores depend on nothing but itself, and a search that was stopped,
    or shared among ranks, gives to the bit what one process gives in one go.

    Args:
        options: as ``vtw-kernels search --help`` says.
        command: what the user typed, for the report.

    Returns:
        0, or 128 and the number of the signal that stopped it.

    Raises:
        ValueError, OSError, ImportError: about the options, the data, the model or the state of an earlier run.
    """
    ranks = Ranks(options.tp)
    check_options(options, ranks)
    records = load_records(options.data, options.images, options.subset, options.split, options.limit)
    index_of = {records.name(index): index for index in range(len(records))}
    device = find_device(options.device)
    machine = describe_device(device)
    state = State(options.out.with_name(options.out.name + ".partial"))
    done: dict[str, dict] = {}  # lines of earlier runs, by name; only rank 0 reads them
    with ExitStack() as stack:

        def plan() -> dict[str, Any]:
            describe(options.model)  # refuses a model before its weights are loaded
            if not options.skip_bad:
                records.check()
            settings = find_settings(options, machine, ranks)
            lines = stack.enter_context(state.open(settings, options.restart))
            if lines:
                done.update(match(records, lines))
                tell_of_earlier_runs(state, len(done), len(records))
            run, shares = state.begin([name for name in index_of if name not in done], ranks.shares)
            return {"run": run, "shares": shares, "settings": settings}

        planned = ranks.agree("plan", plan)
        if planned["settings"]["device"] != machine:
            raise ValueError(
                f"device: expected {planned['settings']['device']}, as on rank 0, because the last bits of scores "
                f"depend on it, got {machine} on rank {ranks.rank}"
            )
        encoder = Encoder(AutoProcessor.from_pretrained(options.model), options.prompt_template)
        scorer = Scorer(load_model(options, device), positions=options.positions, candidates=options.candidates)
        encoder.dtype = scorer.model.dtype

        files = [state.rank_file(planned["run"], share) for share in range(ranks.shares)]
        progress = Progress(files, len(done), len(records), ranks.rank)
        with stop_on_signals() as stop, files[ranks.share].open("ab") if ranks.writes else nullcontext() as file:
            for name in planned["shares"][ranks.share]:
                if ranks.stopped_by(stop):
                    break
                line = score(records, index_of[name], encoder, scorer, options.skip_bad)
                if file is not None:
                    append_line(file, line)
                progress.update()
            if ranks.rank == 0 and ranks.shares > 1:
                progress.wait_for_others(stop)
            progress.bar.close()
            stopped_by = ranks.stopped_by(stop)
        if ranks.rank and (stopped_by or not ranks.tensor_parallel):
            return 128 + stopped_by if stopped_by else 0

        lines = done | {line["name"]: line for path in files for line in read_lines(path)}
        lines = [lines[name] for name in index_of if name in lines]
        if stopped_by and all("bad" in line for line in lines):
            print("stopped before the first record was scored", file=sys.stderr)
            return 128 + stopped_by
        search: LayerSearch | None = None

        def conclude() -> dict[str, Any]:
            nonlocal search
            search = make_search(options, scorer, planned["settings"], lines, len(records))
            save(search, options.out)
            return choose_records(search)

        chosen = ranks.agree("chosen", conclude)
        if search is not None:
            tell_of_bad(search.settings["bad"])
        if stopped_by:
            print(
                f"stopped: {options.out} is of {len(lines)} of {len(records)} records; the same command goes on from "
                "there",
                file=sys.stderr,
            )
            return 128 + stopped_by
        costs = attention = None
        if options.costs:
            costs = measure_costs(scorer.model, encoder(records[index_of[chosen["typical"]]]), scorer.candidates)
        shown = [records[index_of[name]] for name in chosen["shown"]]
        if options.report:
            attention = torch.stack([attention_mass(scorer.model, encoder(record)) for record in shown]).mean(dim=0)
        if search is None:  # another rank of a tensor-parallel model
            return 0
        search = dataclasses.replace(search, costs=costs)
        save(search, options.out)
        if options.report:
            rows = map(search.settings["records"].index, chosen["shown"])
            samples = [Sample(x.question, x.image_bytes(), x.answer, row) for x, row in zip(shown, rows)]
            options.report.parent.mkdir(parents=True, exist_ok=True)
            write_report(options.report, search, samples=samples, attention=attention, command=command)
        state.remove()
        print(search.table())
        print(f"written: {options.out}" + (f", {options.report}" if options.report else ""))
    return 0


class Ranks:
    """The processes that torchrun, or another launcher with its environment variables, started. Each has a share of the
    records; or those of one tensor-parallel model do all records together, and the first writes.

    They talk through the launcher's store alone: scoring needs no collectives, and the process group is for loading a
    tensor-parallel model to set up.
    """

    def __init__(self, tensor_parallel: bool):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.tensor_parallel = tensor_parallel
        self.shares, self.share = (1, 0) if tensor_parallel else (self.world, self.rank)
        self.writes = self.rank == 0 or not tensor_parallel

    @cached_property
    def _store(self) -> dist.Store:
        return next(rendezvous("env://"))[0]

    @cached_property
    def _on_hosts(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo")

    def agree(self, key: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 decides. If it raises, so it says why, and the others just leave."""
        if self.world == 1:
            return decide()
        key, decided = f"vtw_kernels/{key}", None
        if self.rank:
            self._store.wait([key], timedelta(seconds=PLAN_SECONDS))
            decided = json.loads(self._store.get(key))
            if decided is None:
                raise SystemExit(1)
            return decided
        try:
            decided = decide()
        finally:
            self._store.set(key, json.dumps(decided))
        return decided

    def stopped_by(self, signals: list[int]) -> int:
        """The number of the signal that stops this rank, or 0: that which it has received or, as ranks of one model must
        stop at the same record, any of them has."""
        number = torch.tensor(signals[0] if signals else 0)
        if self.tensor_parallel:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._on_hosts)
        return int(number)


class Progress:
    """A bar of what all ranks did, by the lines of their files; only rank 0 has it."""

    def __init__(self, paths: list[Path], done: int, total: int, rank: int):
        self.paths, self.visible = paths, rank == 0
        self.offsets = [0] * len(paths)
        self.bar = tqdm(desc="search", unit=" records", initial=done, total=total, disable=not self.visible)

    def update(self) -> None:
        if not self.visible:
            return
        for number, path in enumerate(self.paths):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(self.offsets[number])
                    new = file.read()
                self.offsets[number] += len(new)
                self.bar.update(new.count(b"\n"))

    def wait_for_others(self, stop: list[int]) -> None:
        """Until all records are done, or a signal has come. TimeoutError where nothing has been written for long."""
        before, since = self.bar.n, time.monotonic()
        while self.bar.n < self.bar.total and not stop:
            time.sleep(0.1)
            self.update()
            if self.bar.n > before:
                before, since = self.bar.n, time.monotonic()
            elif time.monotonic() - since > STALLED_SECONDS:
                raise TimeoutError(
                    f"{self.bar.total - self.bar.n} records are missing and no rank has written for {STALLED_SECONDS} s; "
                    "what was done is kept, and the same command goes on"
                )


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Yields a list that SIGINT and SIGTERM are added to, for the record at hand to be finished. SIGINT again, but not
    at once, as launchers pass on what the terminal has sent already, interrupts."""
    received: list[int] = []
    last = -math.inf

    def note(number: int, frame: Any) -> None:
        nonlocal last
        if number == signal.SIGINT and received and time.monotonic() > last + 1:
            raise KeyboardInterrupt
        last = time.monotonic()
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_options(options: Namespace, ranks: Ranks) -> None:
    check_among("metric", options.metric, METRICS)
    check_among("statistic", options.statistic, STATISTICS)
    if not options.threshold >= 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {options.threshold}")
    if options.tp and (ranks.world == 1 or options.device or options.device_map):
        raise ValueError("tp: expected torchrun with several ranks, and neither device nor device_map")
    if options.device_map and ranks.world > 1:
        raise ValueError(f"device_map: expected one rank, which it gives all devices to, got {ranks.world}")
    if options.dtype != "auto" and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        raise ValueError(f"dtype: expected auto or one of torch, such as bfloat16, got {options.dtype}")
    for name in ("out", "report"):
        path = getattr(options, name)
        if path is not None and path.is_dir():
            raise ValueError(f"{name}: expected a file, got the folder {path}")


def find_device(name: str | None) -> torch.device:
    """The one asked for, or the accelerator, or the CPU; of several accelerators that of this rank."""
    if name is None:
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected one of torch, such as cpu or cuda:1, got {name}") from error
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))


def describe_device(device: torch.device) -> str:
    """All of it that rounding depends on: sums are split by the number of threads, candidates in groups by memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {memory:.0f} GiB"


def find_settings(options: Namespace, machine: str, ranks: Ranks) -> dict[str, Any]:
    """All that decides the scores of a record."""
    chosen = ("model", "dtype", "attention", "device_map", "candidates", "positions", "prompt_template")
    settings = {name: getattr(options, name) for name in chosen}
    settings |= {"model_files": fingerprint(options.model), "device": machine}
    settings |= {"tensor_parallel": ranks.world if ranks.tensor_parallel else 1, "backend": backend_info()["forced"]}
    return settings | {package: version(package) for package in ("vtw_kernels", "torch", "transformers")}


def fingerprint(model: str) -> str:
    """The commit of a model on the Hub, or a digest of a folder's files: what they say, and of weights size and time."""
    folder = Path(model)
    if not folder.is_dir():
        return AutoConfig.from_pretrained(model)._commit_hash
    state = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in TEXT_FILES:
            state.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
        elif path.suffix in WEIGHT_FILES:
            state.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return state.hexdigest()


def load_model(options: Namespace, device: torch.device) -> nn.Module:
    placed = {"device_map": options.device_map} if options.device_map else {"tp_plan": "auto"} if options.tp else {}
    attention = {"attn_implementation": options.attention} if options.attention else {}
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype, **placed, **attention)
    return (model if placed else model.to(device)).eval()


def match(records: Records, lines: dict[str, dict]) -> dict[str, dict]:
    """By name, the lines of those records that are still as they were when they were scored."""
    matched = {}
    for index in range(len(records)):
        try:
            line = lines.get(records[index].digest())
        except (BadRecord, OSError):
            continue  # its turn comes
        if line is not None:
            matched[records.name(index)] = line | {"name": records.name(index)}
    return matched


def tell_of_earlier_runs(state: State, done: int, total: int) -> None:
    print(f"{state.folder}: {done} of {total} records were scored before", file=sys.stderr)
    for rank, names in state.left_over().items():
        more = ", ..." if len(names) > 3 else ""
        print(f"rank {rank} of the last run left {len(names)}: {', '.join(names[:3])}{more}", file=sys.stderr)


def score(records: Records, index: int, encoder: Encoder, scorer: Scorer, skip_bad: bool) -> dict[str, Any]:
    """The line of one record: its scores; or what is bad about it, or BadRecord for that."""
    name = records.name(index)
    try:
        record = records[index]
        scores = scorer.score(encoder(record, with_answer=scorer.positions == "answer"))
        if scores.kl.isnan().any():
            raise BadRecord("expected logits that are numbers, got NaN")
        return {"name": name, "record": record.digest()} | {
            field: values[0].tolist() for field, values in scores._asdict().items()
        }
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{name}: ")
        if skip_bad:
            return {"name": name, "bad": reason}
        raise BadRecord(
            f"{name}: {reason}; what was done is kept: mend this record, or pass --skip-bad, and run the same command"
        ) from error
    except Exception:
        print(f"vtw-kernels: {name} made the model or its processor fail", file=sys.stderr)
        raise


def tell_of_bad(bad: dict[str, str]) -> None:
    if bad:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:3])
        more = "; ..." if len(bad) > 3 else ""
        print(f"{len(bad)} bad records were skipped: {reasons}{more}", file=sys.stderr)


def make_search(
    options: Namespace, scorer: Scorer, settings: dict[str, Any], lines: list[dict], total: int
) -> LayerSearch:
    """The result, of lines in the order of records, of which there are ``total``."""
    good = [line for line in lines if "bad" not in line]
    bad = {line["name"]: line["bad"] for line in lines if "bad" in line}
    if not good:
        first = next((f"; {name}: {reason}" for name, reason in bad.items()), "")
        raise ValueError(f"data: expected at least one record that is not bad, got {len(bad)} bad ones{first}")
    return LayerSearch(
        type(scorer.model).__name__,
        len(scorer.parts.layers),
        scorer.candidates,
        *(torch.tensor([line[field] for line in good]) for field in Scores._fields),
        threshold=options.threshold,
        metric=options.metric,
        statistic=options.statistic,
        positions=options.positions,
        settings=settings
        | {"data": options.data, "finished": len(lines) == total}
        | {"records": [line["name"] for line in good], "bad": bad},
    )


def choose_records(search: LayerSearch) -> dict[str, Any]:
    """The names of a record of median length, to measure costs on, and of those to show: the worst ones at the chosen
    layer, or at the one with the lowest value."""
    names = search.settings["records"]
    layer = search.candidates[int(search.values().argmin())] if search.layer is None else search.layer
    values = search.by_sample()[:, search.candidates.index(layer)]
    worst = values.argsort(descending=True, stable=True)[:SHOWN].tolist()
    typical = search.tokens.argsort(stable=True)[len(names) // 2]
    return {"typical": names[typical], "shown": [names[row] for row in worst]}


def save(search: LayerSearch, path: Path) -> None:
    """Readers of ``path`` see the old result or the new one."""
    part = path.with_name(path.name + ".part")
    search.save(part)
    os.replace(part, path)
