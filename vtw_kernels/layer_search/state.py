"""What a search has done so far, on disk, so that it can be killed at any moment.

A folder holds ``settings.json``, all that decides the scores; and of each run ``run-K.json``, which records were whose,
and one ``run-K-rank-R.jsonl`` per rank, with a line per record. A line is on disk before the next record begins, and
each file has one writer and is only ever appended to: so nothing but its last line can be torn.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class State:
    """Of one search. Only rank 0 calls ``open``, ``begin`` and ``remove``."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def open(self, settings: dict[str, Any], restart: bool) -> Iterator[dict[str, dict]]:
        """Keeps others out, and yields the lines of earlier runs by the digest of their record.

        Raises:
            ValueError: another run is at work here; or earlier ones had other settings, and ``restart`` does not say to
                discard what they did.
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
            before = json.loads(path.read_text()) if path.exists() else settings
            changed = [
                f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
                for name in {**before, **settings}
                if before.get(name) != settings.get(name)
            ]
            written = [line for file in self.folder.glob("run-*.jsonl") for line in read_lines(file)]
            lines = {line["record"]: line for line in written if "record" in line}
            if changed and lines:
                raise ValueError(
                    f"settings: expected those of the {len(lines)} records in {self.folder}, but {'; '.join(changed)} "
                    "(--restart discards these records)"
                )
            write_whole(path, json.dumps(settings, indent=1) + "\n")
            yield lines

    def left_over(self) -> dict[int, list[str]]:
        """By rank, the names of the records of its share that the last run did not do."""
        run = self._last_run()
        if not run:
            return {}
        shares = json.loads((self.folder / f"run-{run}.json").read_text())
        left = {}
        for rank, share in enumerate(shares):
            done = {line["name"] for line in read_lines(self.rank_file(run, rank))}
            left[rank] = [name for name in share if name not in done]
        return {rank: share for rank, share in left.items() if share}

    def begin(self, todo: list[str], ranks: int) -> tuple[int, list[list[str]]]:
        """The number of a new run, and each rank's share of the names of records to do."""
        run, shares = self._last_run() + 1, [todo[rank::ranks] for rank in range(ranks)]
        write_whole(self.folder / f"run-{run}.json", json.dumps(shares))
        return run, shares

    def rank_file(self, run: int, rank: int) -> Path:
        return self.folder / f"run-{run}-rank-{rank}.jsonl"

    def remove(self) -> None:
        self._clear()
        (self.folder / "lock").unlink()
        self.folder.rmdir()

    def _last_run(self) -> int:
        return max((int(path.stem.removeprefix("run-")) for path in self.folder.glob("run-*.json")), default=0)

    def _clear(self) -> None:
        for pattern in ("run-*", "settings.json"):
            for path in self.folder.glob(pattern):
                path.unlink()


def append_line(file: Any, line: dict[str, Any]) -> None:
    """Python's JSON writes a float so that it is read back to the bit."""
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file but for one without its end; none of a file that is not there.

    Raises:
        ValueError: a line is not JSON.
    """
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ValueError(f"{path}: expected one JSON object a line, got {error} (--restart discards it)") from error


def write_whole(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
