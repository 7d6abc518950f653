"""What a search has done so far, on disk, so that it can be killed at any moment.

A folder holds ``settings.json``, with all that decides the scores, and for each run K the files ``run-K.json``, which
says which rank has which records, and ``run-K-rank-R.jsonl`` of each rank R, with a line per record. A line is on disk
before the next record begins. Each file has one writer, which only appends, so that only its last line can be
incomplete. Each line has a checksum; if that is wrong, the record is scored again.

Steps that look at all records together come after that, and begin again in each run. But each number that takes a
forward of the model is a line of ``run-K-together.jsonl``, and so is not computed again. A training of adapters keeps
its weights and its whole state in ``training.pt`` instead, which is replaced as a whole.
"""

import base64
import fcntl
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = re.compile(r"((settings|run-(?P<run>\d+)(-rank-\d+|-together)?)\.jsonl?|training\.pt)(\.part)?")

DIFFERENCES = 8  # that are told


class State:
    """Of one search. Only rank 0 calls ``open``, ``begin`` and ``remove``."""

    def __init__(self, folder: Path):
        self.folder, self.checkpoint = folder, folder / "training.pt"

    @contextmanager
    def open(self, settings: dict[str, Any], restart: bool) -> Iterator[dict[str, dict]]:
        """Keeps others out, and yields the lines of earlier runs by the digest of their record.

        Raises:
            ValueError: another run is at work here; or earlier ones had other settings, or they can't be read, and
                ``restart`` does not say to discard what they did.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"out: another run is at work in {self.folder}") from None
            if restart:
                self._clear()
            path = self.folder / "settings.json"
            before = _read_settings(path) if path.exists() else {}
            self._lines = {file: read_lines(file) for file in self._files() if file.suffix == ".jsonl"}
            every = [line for file in self._lines.values() for line in file]
            lines = {line["record"]: line for line in every if "record" in line}
            self.kept = {line["key"]: line["values"] for line in every if "key" in line}
            has_some = lines or self.kept or self.checkpoint.exists()
            if (changed := differences(before, settings)) and has_some:
                raise ValueError(
                    f"settings: expected those of the {len(lines)} records in {self.folder}, but {changed} "
                    "(--restart discards what was done)"
                )
            write_whole(path, json.dumps(settings, indent=1) + "\n")
            yield lines

    def left_over(self) -> dict[int, list[str]]:
        """By rank, the names of the records of its share that the last run before ``open`` did not do."""
        run, left = self._last_run(), {}
        for line in read_lines(self.folder / f"run-{run}.json"):
            for rank, share in enumerate(line["shares"]):
                done = {line["name"] for line in self._lines.get(self.rank_file(run, rank), [])}
                left[rank] = [name for name in share if name not in done]
        return {rank: share for rank, share in left.items() if share}

    def begin(self, todo: list[str], ranks: int) -> tuple[int, list[list[str]]]:
        """The number of a new run, and each rank's share of the names of records to do."""
        run, shares = self._last_run() + 1, [todo[rank::ranks] for rank in range(ranks)]
        write_whole(self.folder / f"run-{run}.json", _with_checksum({"shares": shares}))
        return run, shares

    def rank_file(self, run: int, rank: int) -> Path:
        return self.folder / f"run-{run}-rank-{rank}.jsonl"

    def keep(self, run: int, key: str, compute: Callable[[], list]) -> list:
        """What ``compute`` returns, numbers, or lists of them. It is called once for a key, in all runs together."""
        if key not in self.kept:
            self.kept[key] = compute()
            with (self.folder / f"run-{run}-together.jsonl").open("ab") as file:
                append_line(file, {"key": key, "values": self.kept[key]})
        return self.kept[key]

    def remove(self) -> None:
        self._clear()
        (self.folder / "lock").unlink()
        if any(self.folder.iterdir()):
            print(f"{self.folder}: kept, as there are files of something else in it", file=sys.stderr)
        else:
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if OURS.fullmatch(path.name) and path.is_file()]

    def _last_run(self) -> int:
        return max((int(OURS.fullmatch(path.name)["run"] or 0) for path in self._files()), default=0)

    def _clear(self) -> None:
        for path in self._files():
            path.unlink()


def append_line(file: Any, line: dict[str, Any]) -> None:
    file.write(_with_checksum(line).encode())
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file as ``append_line`` was given them, but for one without its end, and for damaged ones, which
    it names; none of a file that is not there."""
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            intact = line.pop("crc32") == _checksum(line)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
            intact = False
        if intact:
            lines.append(line)
        else:
            print(f"{path}:{number}: damaged, and ignored", file=sys.stderr)
    return lines


def packed(x: Tensor) -> Any:
    """A tensor for a line: numbers or, of several rows of them, their bytes."""
    if x.ndim < 2:
        return x.tolist()
    content = base64.b64encode(x.contiguous().view(torch.uint8).numpy().tobytes()).decode()
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "base64": content}


def unpacked(value: Any) -> Tensor:
    """The inverse of ``packed``."""
    if not isinstance(value, dict):
        return torch.tensor(value)
    content = bytearray(base64.b64decode(value["base64"]))
    return torch.frombuffer(content, dtype=getattr(torch, value["dtype"])).view(value["shape"])


def _with_checksum(line: dict[str, Any]) -> str:
    """Python's JSON writes a float so that it is read back to the bit."""
    return json.dumps(line | {"crc32": _checksum(line)}) + "\n"


def _checksum(line: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(line).encode())


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
        if isinstance(settings, dict):
            return settings
        error = type(settings).__name__
    except (ValueError, RecursionError) as raised:
        error = raised
    raise ValueError(f"{path}: expected a JSON object, got {error} (--restart discards what is there)")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between settings, in words; empty where nothing does."""
    said = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            said += [f"{name}: {inner}"] if (inner := differences(old, new)) else []
        elif old != new:
            said.append(f"{name} was {old!r} and is {new!r}")
    return "; ".join(said[:DIFFERENCES]) + ("; ..." if len(said) > DIFFERENCES else "")


def write_whole(path: Path, content: str | bytes) -> None:
    """Readers see the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
