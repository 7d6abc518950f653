"""``vtw-kernels search`` and ``compare``: from records on disk to a result, in one process or many, stopped and resumed
at will. What the two do with the records, each in its own way, is their ``Job``."""

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
from functools import cached_property, partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from vtw_kernels.integration.families import describe
from vtw_kernels.layer_search.jobs import Job
from vtw_kernels.layer_search.records import BadRecord, DataSet, Encoder, JsonFile, brief, load_records
from vtw_kernels.layer_search.report import Sample, check_page, write_report
from vtw_kernels.layer_search.scored import METRICS, NO_GROUP, STATISTICS, Scored, check_among
from vtw_kernels.layer_search.state import State, append_line, differences, packed, read_lines, unpacked
from vtw_kernels.ops import backend_info

REASON_CHARACTERS = 500
STALLED_SECONDS = 1800  # no record takes as long
STAY_SECONDS = 60
PLAN_SECONDS = 7200  # at the most: after a stop, all images are read anew for their digests
# Files of a model that decide its scores; of weights only size and time are looked at, as reading them takes minutes.
TEXT_FILES = (".json", ".jinja", ".txt", ".model", ".py")
WEIGHT_FILES = (".safetensors", ".bin")
Records = JsonFile | DataSet


def run(options: Namespace, command: str, job: Job) -> int:
    """Scores records, writes what was asked for, and prints the table.

    Records are scored one at a time: then a record's scores depend on nothing but itself, and a search that was
    stopped, or shared among ranks, gives to the bit what one process gives in one go. What the result at
    ``options.out`` has of them already is not scored again: if that is all, the model is not loaded.

    Args:
        options: as ``vtw-kernels search --help`` says.
        command: what the user typed, for the report.
        job: what is to be found.

    Returns:
        0, or 128 and the number of the signal that stopped it.

    Raises:
        ValueError, OSError, ImportError: about the options, the data, the model or the state of an earlier run.
    """
    ranks = Ranks(options.tp)
    check_options(options, job, ranks)
    records = load_records(options.data, options.images, options.subset, options.split, options.limit, options.seed)
    index_of = {records.name(index): index for index in range(len(records))}
    device = find_device(options.device)
    machine = describe_device(device)
    state = State(options.out.with_name(options.out.name + ".partial"))
    earlier: Scored | None = None  # the result of an earlier run; only rank 0 reads it
    done: dict[str, dict] = {}  # lines of earlier runs, by name; likewise
    with ExitStack() as stack:
        stack.callback(ranks.stay_until_read)

        def plan() -> dict[str, Any]:
            nonlocal earlier
            describe(options.model)  # refuses a model before its weights are loaded
            if not options.skip_bad:
                records.check()
            settings = find_settings(options, job.settings(), machine, ranks)
            earlier, known = find_earlier(options, job, records, settings, state)
            scored = lines_of(earlier, job) | stack.enter_context(state.open(settings, options.restart))
            done.update(
                {
                    name: scored[digest] | {"name": name, "group": group}
                    for name, (digest, group) in known.items()
                    if digest in scored
                }
            )
            todo = [name for name in index_of if name not in done]
            if earlier is not None and todo:
                earlier = dataclasses.replace(earlier, **dict.fromkeys(job.measured))  # of other records
            missing = [name for name in job.wanted(earlier) if getattr(earlier, name, None) is None]
            needs_model = bool(todo or missing) or earlier is None
            if scored:
                tell_of_earlier_runs(options.out, state, len(done), len(records), needs_model)
            run, shares = state.begin(todo, ranks.shares)
            planned = {"run": run, "shares": shares, "settings": settings, "missing": missing}
            return planned | {"needs_model": needs_model}

        planned = ranks.agree("plan", plan, readers=ranks.world - 1)
        if planned["settings"]["device"] != machine:
            raise ValueError(
                f"device: expected {planned['settings']['device']}, as on rank 0, because the last bits of scores "
                f"depend on it, got {machine} on rank {ranks.rank}"
            )
        if ranks.rank and not planned["needs_model"]:
            return 0
        stopped_by, encoder, scorer = 0, None, None
        files = [state.rank_file(planned["run"], share) for share in range(ranks.shares)]
        if planned["needs_model"]:
            if options.quiet:
                disable_progress_bar()
            encoder = Encoder(AutoProcessor.from_pretrained(options.model), options.prompt_template)
            scorer = job.scorer(load_model(options, device))
            encoder.dtype = scorer.model.dtype
            progress = Progress(job.name, files, len(done), len(records), ranks.rank, options.quiet)
            with stop_on_signals() as stop, files[ranks.share].open("ab") if ranks.writes else nullcontext() as file:
                for name in planned["shares"][ranks.share]:
                    if ranks.stopped_by(stop):
                        break
                    line = score(records, index_of[name], encoder, scorer, options.skip_bad, ranks.tensor_parallel)
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
        if stopped_by and not job.of_some:
            print(
                f"stopped: {len(lines)} of {len(records)} records are done; the same command goes on from there",
                file=sys.stderr,
            )
            return 128 + stopped_by
        result: Scored | None = None

        def conclude() -> dict[str, list[str]]:
            nonlocal result
            if len(lines) < len(records) and not stopped_by:
                raise ValueError(f"{state.folder}: expected {len(records)} records, got {len(lines)}: run it again")
            result = make_result(options, job, device, scorer, earlier, planned["settings"], lines, len(records))
            save(result, options.out)
            return job.choose_records(result)

        together = ranks.tensor_parallel and scorer is not None and not stopped_by
        chosen = ranks.agree("chosen", conclude, readers=ranks.world - 1 if together else 0)
        if result is not None:
            tell_of_bad(result.settings["bad"])
        if stopped_by:
            print(
                f"stopped: {options.out} is of {len(lines)} of {len(records)} records; the same command goes on from "
                "there",
                file=sys.stderr,
            )
            return 128 + stopped_by
        measured = {
            name: job.measure(
                name,
                scorer,
                (encoder(records[index_of[x]], with_answer=job.answered) for x in chosen[name]),
                partial(state.keep, planned["run"]),
            )
            for name in planned["missing"]
        }
        if result is None:  # another rank of a tensor-parallel model
            return 0
        result = dataclasses.replace(result, **measured)
        save(result, options.out)
        if options.report:
            rows = map(list(result.settings["records"]).index, chosen["worst"])
            samples = [
                Sample(record.question, record.image_bytes(), record.answer, row)
                for record, row in zip((records[index_of[name]] for name in chosen["worst"]), rows)
            ]
            options.report.parent.mkdir(parents=True, exist_ok=True)
            write_report(options.report, result, samples=samples, command=command)
        state.remove()
        if not options.quiet:
            print(result.table())
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
        self._readers: dict[str, int] = {}  # how many are to read what rank 0 has decided

    @cached_property
    def _store(self) -> dist.Store:
        return next(rendezvous("env://"))[0]

    @cached_property
    def _on_hosts(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo")

    def agree(self, key: str, decide: Callable[[], dict[str, Any]], readers: int) -> dict[str, Any]:
        """What rank 0 decides, and ``readers`` others read. If it raises, so it says why, and the others just leave."""
        if self.world == 1:
            return decide()
        key, decided = f"vtw_kernels/{key}", None
        if self.rank:
            self._store.wait([key], timedelta(seconds=PLAN_SECONDS))
            decided = json.loads(self._store.get(key))
            self._store.add(f"{key}/read", 1)
            if decided is None:
                raise SystemExit(1)
            return decided
        try:
            decided = decide()
        finally:
            self._store.set(key, json.dumps(decided))
            self._readers[f"{key}/read"] = readers
        return decided

    def stay_until_read(self) -> None:
        """Where rank 0 keeps the store, that ends with it: the others must have read what it decided."""
        until = time.monotonic() + STAY_SECONDS
        for key, readers in self._readers.items():
            while self._store.add(key, 0) < readers and time.monotonic() < until:
                time.sleep(0.05)

    def stopped_by(self, signals: list[int]) -> int:
        """The number of the signal that stops this rank, or 0: that which it has received or, as ranks of one model
        must stop at the same record, any of them has."""
        number = torch.tensor(signals[0] if signals else 0)
        if self.tensor_parallel:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._on_hosts)
        return int(number)


class Progress:
    """Counts what all ranks did, by the lines of their files, and shows it as a bar; only rank 0 does."""

    def __init__(self, name: str, paths: list[Path], done: int, total: int, rank: int, quiet: bool):
        self.paths, self.counts = paths, rank == 0
        self.done, self.total = done, total
        self.offsets = [0] * len(paths)
        self.bar = tqdm(desc=name, unit=" records", initial=done, total=total, disable=rank > 0 or quiet)

    def update(self) -> None:
        if not self.counts:
            return
        for number, path in enumerate(self.paths):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(self.offsets[number])
                    new = file.read()
                self.offsets[number] += len(new)
                self.done += new.count(b"\n")
        self.bar.update(self.done - self.bar.n)

    def wait_for_others(self, stop: list[int]) -> None:
        """Until all records are done, or a signal has come. TimeoutError where nothing has been written for long."""
        before, since = self.done, time.monotonic()
        while self.done < self.total and not stop:
            time.sleep(0.1)
            self.update()
            if self.done > before:
                before, since = self.done, time.monotonic()
            elif time.monotonic() - since > STALLED_SECONDS:
                raise TimeoutError(
                    f"{self.total - self.done} records are missing and no rank has written for {STALLED_SECONDS} s; "
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


def check_options(options: Namespace, job: Job, ranks: Ranks) -> None:
    check_among("metric", options.metric, METRICS)
    check_among("statistic", options.statistic, STATISTICS)
    job.check()
    check_loading(options, ranks)
    if ranks.rank == 0:
        check_files(options, job)


def check_loading(options: Namespace, ranks: Ranks) -> None:
    """Raises ValueError for options of loading a model that do not go together."""
    if options.tp and (ranks.world == 1 or options.device or options.device_map):
        raise ValueError("tp: expected torchrun with several ranks, and neither device nor device_map")
    if options.device_map and ranks.world > 1:
        raise ValueError(f"device_map: expected one rank, which it gives all devices to, got {ranks.world}")
    if options.dtype != "auto" and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        raise ValueError(f"dtype: expected auto or one of torch, such as bfloat16, got {options.dtype}")


def check_files(options: Namespace, job: Job) -> None:
    """Raises ValueError where something would be overwritten that is not an earlier result, or an earlier report."""
    check_different({name: getattr(options, name) for name in ("data", "out", "report")} | job.files())
    if options.out.is_dir():
        raise ValueError(f"out: expected a file, got the folder {options.out}")
    if has_content(options.out):
        try:
            job.result.load(options.out)
        except ValueError as error:
            raise ValueError(f"out: expected a new file or an earlier result, got something else: {error}") from error
    check_report(options.report)


def check_different(files: dict[str, Path | str | None]) -> None:
    """Raises ValueError for two options with the same file."""
    paths = {name: Path(x) for name, x in files.items() if x is not None}
    for (name, path), (other_name, other) in combinations(paths.items(), 2):
        if path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other)):
            raise ValueError(f"{other_name}: expected another file than that of {name}, got {other}")


def check_report(path: Path | None) -> None:
    """Raises ValueError where it would take the place of something else."""
    if path is not None and path.is_dir():
        raise ValueError(f"report: expected a file, got the folder {path}")
    if path is not None:
        check_page("report", path)


def has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def find_device(name: str | None) -> torch.device:
    """The one asked for, or the accelerator, or the CPU; of several accelerators that of this rank."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(accelerator if name is None else name)
    except RuntimeError as error:
        raise ValueError(f"device: expected one of torch, such as cpu or cuda:1, got {name}") from error
    if device.type == "cpu":
        return device
    if device.index is None:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
    found = ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(device) not in found:
        raise ValueError(
            f"device: expected one that torch {torch.__version__} finds here, {' or '.join(found)}, got {device}"
        )
    return device


def describe_device(device: torch.device) -> str:
    """All of it that rounding depends on: sums are split by the number of threads, candidates in groups by memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {memory:.0f} GiB"


def find_settings(options: Namespace, own: dict[str, Any], machine: str, ranks: Ranks) -> dict[str, Any]:
    """All that decides the scores of a record. ``own``: of what is done with records."""
    chosen = ("model", "dtype", "attention", "device_map", "positions", "prompt_template")
    settings = {name: getattr(options, name) for name in chosen} | own
    settings |= {"model_files": fingerprint(options.model), "device": machine}
    settings |= {"tensor_parallel": ranks.world if ranks.tensor_parallel else 1, "backend": backend_info()["forced"]}
    return settings | {package: version(package) for package in ("vtw_kernels", "torch", "transformers")}


def fingerprint(model: str) -> str:
    """The commit of a model on the Hub, or a digest of a folder's files: what they say, and of weights size and
    time."""
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


def find_earlier(
    options: Namespace, job: Job, records: Records, settings: dict[str, Any], state: State
) -> tuple[Scored | None, dict[str, tuple[str, str | None]]]:
    """What an earlier run has found, if there is a result; and if that or lines of state may have scores of the
    records, their digests and groups by name.

    Raises:
        ValueError: the result is of other settings, or complete and of records that are not asked for now.
    """
    earlier = None
    if not options.restart and has_content(options.out):
        earlier = job.result.load(options.out)
        changed = differences({name: earlier.settings.get(name) for name in settings}, settings)
        known = earlier.settings.get("records")
        if not isinstance(known, dict) or len(known) != len(earlier.per_sample):
            changed = "it does not say of which records it is"
        if changed:
            raise ValueError(
                f"out: expected a new file or an earlier result of this {job.name}, got {options.out}, which is of "
                f"another one: {changed} (--restart discards it)"
            )
    if earlier is None and not state.folder.is_dir():
        return None, {}
    known = read_known(records)
    if earlier is not None and earlier.settings.get("finished"):
        asked = {digest for digest, _ in known.values()}
        if lost := [name for name, digest in earlier.settings["records"].items() if digest not in asked]:
            raise ValueError(
                f"out: expected a new file or an earlier result of this {job.name}, got {options.out}, which is also "
                f"of {len(lost)} records that are no longer asked for, or have changed: {listed(lost)} (--restart "
                "discards it)"
            )
    return earlier, known


def lines_of(result: Scored | None, job: Job) -> dict[str, dict]:
    """What ``score`` gave for the records of a result, by their digests. NaN is no score."""
    if result is None:
        return {}
    scores = {
        field: list(map(packed, getattr(result, name)))
        for field, name in zip(job.fields, (*result.SCORES, *result.COUNTS))
    }
    return {
        digest: {"name": name, "record": digest} | {field: x[row] for field, x in scores.items()}
        for row, (name, digest) in enumerate(result.settings["records"].items())
        if not result.per_sample[row].isnan().any()
    }


def read_known(records: Records) -> dict[str, tuple[str, str | None]]:
    """Digests and groups by name, of those records that can be read."""
    known = {}
    for index in range(len(records)):
        try:
            record = records[index]
            known[record.name] = record.digest(), record.group
        except (BadRecord, OSError):
            continue  # its turn comes
    return known


def tell_of_earlier_runs(out: Path, state: State, done: int, total: int, needs_model: bool) -> None:
    further = f", and {len(state.kept)} steps of what looks at all of them were done" if state.kept else ""
    further += "" if needs_model else "; the model is not run"
    print(f"{out}: {done} of {total} records were scored before{further}", file=sys.stderr)
    for rank, names in state.left_over().items():
        print(f"rank {rank} of the last run left {len(names)}: {listed(names)}", file=sys.stderr)


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def score(
    records: Records, index: int, encoder: Encoder, scorer: Any, skip_bad: bool, tensor_parallel: bool = False
) -> dict[str, Any]:
    """The line of one record: its scores; or what is bad about it, or BadRecord for that.

    Whatever is raised is of the record, as records are what differs between calls. Two things are not: a device that
    has failed for good; and a model that fails on one of its tensor-parallel ranks, while the others go on waiting for
    it."""
    name, device = records.name(index), scorer.model.device
    try:
        record = records[index]
        scores = scorer.score(encoder(record, with_answer=scorer.positions == "answer"))
        return {"name": name, "record": record.digest(), "group": record.group} | {
            field: packed(values[0]) for field, values in scores._asdict().items()
        }
    except Exception as error:
        said = " ".join(str(error).split()).removeprefix(f"{name}: ")
        is_ours = isinstance(error, OSError | ValueError)
        reason = brief(said if is_ours else f"{type(error).__name__}: {said}", REASON_CHARACTERS)
        if skip_bad and not (tensor_parallel and not is_ours) and still_works(device):
            return {"name": name, "bad": reason}
        otherwise = "leave it out" if skip_bad else "pass --skip-bad"
        raise BadRecord(
            f"{name}: {reason}; what was done is kept: mend this record, or {otherwise}, and run the same command"
        ) from error


def still_works(device: torch.device) -> bool:
    """Whether it takes orders. After some errors, an index out of range for one, a GPU does not."""
    if device.type == "cpu":
        return True
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:
        return False
    return True


def tell_of_bad(bad: dict[str, str]) -> None:
    if bad:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:3])
        more = "; ..." if len(bad) > 3 else ""
        print(f"{len(bad)} bad records were skipped: {reasons}{more}", file=sys.stderr)


def make_result(
    options: Namespace,
    job: Job,
    device: torch.device,
    scorer: Any,
    earlier: Scored | None,
    settings: dict[str, Any],
    lines: list[dict],
    total: int,
) -> Scored:
    """The result, of lines in the order of records, of which there are ``total``; what is known of the model is the
    scorer's, or an earlier result's."""
    good = [line for line in lines if "bad" not in line]
    bad = {line["name"]: line["bad"] for line in lines if "bad" in line}
    if not good:
        first = next((f"; {name}: {reason}" for name, reason in bad.items()), "")
        raise ValueError(f"data: expected at least one record that is not bad, got {len(bad)} bad ones{first}")
    groups = [line.get("group") for line in good]
    return job.make(
        (earlier.model, earlier.num_layers, *job.columns(earlier))
        if scorer is None
        else (type(scorer.model).__name__, len(scorer.parts.layers), *job.columns(scorer)),
        [torch.stack([unpacked(line[field]) for line in good]) for field in job.fields],
        device,
        groups=[group or NO_GROUP for group in groups] if any(groups) else None,
        settings=settings
        | {"data": options.data, "finished": len(lines) == total}
        | {"records": {line["name"]: line["record"] for line in good}, "bad": bad},
        **{name: getattr(earlier, name, None) for name in job.measured},
        **job.further(earlier if scorer is None else scorer),
    )


def save(result: Scored, path: Path) -> None:
    """Readers of ``path`` see the old result or the new one."""
    part = path.with_name(path.name + ".part")
    result.save(part)
    os.replace(part, path)
