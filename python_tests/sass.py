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
    """A kernel's instructions, and for each of them which may come next: none after EXIT, RET or a call (which here
    only the slow ways of a division make)."""

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

    def loop(self, wanted: str, times: int) -> list[str]:
        """The shortest way round a loop on which this many instructions match `wanted`."""
        ends = [(first, last) for last, after in enumerate(self.following) for first in after if first <= last]
        ways = [self._shortest(first, last, wanted, times) for first, last in ends]
        return min((way for way in ways if way), key=len)

    def path(self, wanted: str, times: int) -> list[str]:
        """The shortest way through the kernel, with no loop gone round twice, on which this many match `wanted`."""
        return self._shortest(0, None, wanted, times)

    def _shortest(self, first: int, last: int | None, wanted: str, times: int) -> list[str]:
        """From `first` to `last`, or to the end of the kernel; forwards only. Empty if there is none."""
        # From each instruction on, by the number of matches: the length of the shortest way, and the next instruction.
        best: dict[int, dict[int, tuple[int, int | None]]] = {}
        for i in reversed(range(first, len(self.instructions) if last is None else last + 1)):
            found = re.fullmatch(wanted, self.instructions[i]) is not None
            ends = i == last or (last is None and self.instructions[i].startswith("EXIT"))
            ways = [(found, 1, None)] * ends
            for j in self.following[i]:
                if j > i and i != last:
                    ways += [(found + more, 1 + length, j) for more, (length, _) in best.get(j, {}).items()]
            best[i] = {}
            for count, length, after in ways:
                if count <= times and length < best[i].get(count, (length + 1,))[0]:
                    best[i][count] = (length, after)
        way, i = [], first
        while i is not None:
            if times not in best[i]:
                return []
            way.append(self.instructions[i])
            times, i = times - (re.fullmatch(wanted, self.instructions[i]) is not None), best[i][times][1]
        return way
