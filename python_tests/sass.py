"""The machine code of compiled kernels, read with the tools of the CUDA toolkit or of Triton's package."""

import importlib.util
import re
import shutil
import subprocess
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path


def cuda_tool(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else None
    return str(bundled) if bundled and bundled.exists() else shutil.which(name)


def sass_of(cubin: Path) -> dict[str, str]:
    """Machine code by (mangled) name of the kernel."""
    text = subprocess.check_output([cuda_tool("nvdisasm"), "-c", cubin], text=True)
    # Sections in the order of the file: each begins with its kernel's label.
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def count(sass: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", sass))


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;", re.MULTILINE)
LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and for each of them which may come next: none after EXIT, RET or a call (which here only
    the slow ways of a division make)."""

    instructions: list[str]
    following: list[list[int]]

    @staticmethod
    def of(sass: str) -> "Code":
        lines = [(m.start(), m) for m in INSTRUCTION.finditer(sass)]
        starts = [start for start, _ in lines]
        target = {m[1]: bisect_left(starts, m.start()) for m in LABEL.finditer(sass)}
        instructions, following = [], []
        for i, (_, line) in enumerate(lines):
            predicate, name, operands = line[1], line[2], line[3] or ""
            name_only = name.partition(".")[0]
            after = [i + 1] if i + 1 < len(lines) else []
            if name_only in ("BRA", "BRX"):
                to = [target[label] for label in re.findall(r"\.L_\w+", operands)]
                always = predicate is None and not re.match(r"!?U?P\d", operands)
                after = to if always else after + to
            elif name_only in ("EXIT", "RET", "CALL") and predicate is None:
                after = []
            instructions.append(name)
            following.append(after)
        return Code(instructions, following)

    def loop(self, wanted: str) -> list[str]:
        """The shortest way round the innermost loop, of those whose instructions match `wanted` the most often."""
        return max(
            (self._shortest(first, last + 1, wanted) for last, after in enumerate(self.following) for first in after if first <= last),
            key=lambda way: (self._matches(way, wanted), -len(way)),
        )  # fmt: skip

    def path(self, wanted: str) -> list[str]:
        """The shortest way through the kernel, each loop at most once, of those that match `wanted` the most often."""
        return self._shortest(0, len(self.instructions), wanted)

    @staticmethod
    def _matches(way: list[str], wanted: str) -> int:
        return sum(re.fullmatch(wanted, name) is not None for name in way)

    def _shortest(self, first: int, end: int, wanted: str) -> list[str]:
        best = {}  # from each instruction on: how often it matches, its length negated, what comes next
        for i in reversed(range(first, end)):
            if self.instructions[i].startswith("CALL"):
                continue
            ways = [best[j][:2] + (j,) for j in self.following[i] if i < j and j in best]
            leaves = not self.following[i] or any(j >= end or j <= i for j in self.following[i])
            matches, length, after = max(ways + [(0, 0, None)] * leaves, default=(None, 0, None))
            if matches is not None:
                found = re.fullmatch(wanted, self.instructions[i]) is not None
                best[i] = (matches + found, length - 1, after)
        way, i = [], first if first in best else None
        while i is not None:
            way.append(self.instructions[i])
            i = best[i][2]
        return way
