"""plan_packed_ against a loop over tokens, with all memory around what it writes; and packed rows there and back."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtw_kernels as vtw

POISON = -77


@dataclass(frozen=True)
class Step:
    """requests: of each, how many tokens came before this step, how many come in it, and the ranges of its images."""

    requests: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    block_size: int = 4
    spare: int = 0  # rows that there is room for, and are none
    seed: int = 0

    @property
    def rows(self) -> int:
        return sum(new for _, new, _ in self.requests)

    @property
    def table(self) -> np.ndarray:
        """Blocks in any order, some of which are not there; every other column, of twice as many."""
        longest = max((past + new for past, new, _ in self.requests), default=0)
        columns = -(-longest // self.block_size) + 1
        rng = np.random.default_rng(self.seed)
        table = rng.integers(0, 2**31 // self.block_size, (len(self.requests), 2 * columns))
        return np.where(rng.random(table.shape) < 0.1, -1, table).astype(np.int32)[:, ::2]

    def arguments(self, device: str) -> list:
        starts = np.cumsum([0, *(new for _, new, _ in self.requests)])
        lengths = [past + new for past, new, _ in self.requests]
        ranges = [list(one) for *_, images in self.requests for one in images]
        images = np.cumsum([0, *(len(images) for *_, images in self.requests)])
        lists = (starts, lengths, np.reshape(ranges, (-1, 2)), images)
        tensors = [torch.from_numpy(np.asarray(x, np.int32)).to(device) for x in lists]
        table = torch.from_numpy(np.repeat(self.table, 2, 1)).to(device)[:, ::2]
        return [*tensors, table, self.block_size]

    def oracle(self) -> list[list[int]]:
        source, starts, lengths, slots, row = [], [0], [], [], 0
        for b, (past, new, images) in enumerate(self.requests):
            text = 0
            for token in range(past + new):
                is_text = not any(start <= token < stop for start, stop in images)
                if token >= past:
                    if is_text:
                        block = int(self.table[b, text // self.block_size])
                        source.append(row)
                        slots.append(-1 if block < 0 else block * self.block_size + text % self.block_size)
                    row += 1
                text += is_text
            starts.append(len(source))
            lengths.append(text)
        room = self.rows + self.spare
        return [x + [-1] * (room - len(x)) for x in (source,)] + [starts, lengths, slots + [-1] * (room - len(slots))]


def poisoned(step: Step, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Memory with room on both sides, and the plan within."""
    plan = vtw.PackedPlan.empty(step.rows + step.spare, len(step.requests), device)
    memory = [torch.full((len(x) + 6,), POISON, dtype=x.dtype, device=device) for x in plan]
    return memory, [x[3:-3] for x in memory]


IMAGES = ((3, 9), (9, 10), (14, 26))
CASES = {
    "prompt": Step(((0, 30, IMAGES),)),
    "text alone": Step(((0, 7, ()), (3, 2, ())), spare=2),
    "decoding": Step(((30, 1, IMAGES), (7, 1, ()), (26, 1, IMAGES)), 16),
    "mixed": Step(((0, 30, IMAGES), (7, 1, ()), (12, 9, IMAGES), (40, 1, IMAGES)), 8, 5),
    "a chunk within an image": Step(((15, 5, IMAGES), (2, 1, ())), 4),
    "nothing but images": Step(((0, 9, ((0, 20),)), (4, 3, IMAGES)), 4, 1),
    "images to come": Step(((0, 2, IMAGES), (1, 3, ((40, 50),))), 4),
    "an image first": Step(((0, 12, ((0, 8),)), (8, 4, ((0, 8),))), 4),
    "empty images": Step(((0, 6, ((2, 2), (4, 4))),), 4),
    "a request without rows": Step(((5, 0, IMAGES), (0, 3, ()), (0, 0, ())), 4),
    "slots of one": Step(((2, 20, IMAGES),), 1),
    "rows of several tiles": Step(((10, 900, ((40, 616), (700, 701))), (0, 300, ((1, 290),))), 32, 700),
    "several requests": Step(tuple((i, 1 + i % 3, IMAGES[: i % 4]) for i in range(40)), 16, 9),
    "many requests": Step(tuple((i, 1 + i % 3, IMAGES[: i % 4]) for i in range(300)), 16, 9),
    "no requests": Step((), 4, 3),
    "nothing at all": Step((), 4),
}


def check(backend, step: Step) -> None:
    memory, plan = poisoned(step, backend.device)
    before = step.arguments(backend.device)
    given_ = step.arguments(backend.device)
    backend.plan_packed_(plan, *given_)
    for name, x, want in zip(vtw.PackedPlan._fields, plan, step.oracle(), strict=True):
        assert x.tolist() == want, name
    for x in memory:
        assert x[:3].tolist() == x[-3:].tolist() == [POISON] * 3
    assert all(torch.equal(a, b) for a, b in zip(before[:5], given_[:5]))


@pytest.mark.parametrize("name", CASES)
def test_cases(backend, name):
    check(backend, CASES[name])


@st.composite
def steps(draw) -> Step:
    requests = []
    for _ in range(draw(st.integers(0, 5))):
        past, new = draw(st.integers(0, 25)), draw(st.sampled_from((0, 1, 2, 9, 30)))
        edges = sorted(draw(st.lists(st.integers(0, 60), max_size=8)))
        requests.append((past, new, tuple(zip(edges[::2], edges[1::2]))))
    return Step(tuple(requests), draw(st.sampled_from((1, 3, 16))), draw(st.integers(0, 4)), draw(st.integers(0, 99)))


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(step=steps())
def check_any(backend, step):
    check(backend, step)


def test_any_step(backend):
    check_any(backend)


@pytest.mark.parametrize("seed", range(6))
def test_values_that_make_no_sense_stay_within_memory(backend, seed):
    """On a device nothing looks at values: what is around the plan shows it, and an emulated GPU sees reads. In host
    memory they are refused, and nothing is written."""
    step = CASES["mixed"]
    memory, plan = poisoned(step, backend.device)
    *tensors, block_size = step.arguments(backend.device)
    rng = np.random.default_rng(seed)
    for x in tensors:
        values = rng.choice([-(2**31), -5, -1, 0, 1, 3, 30, 2**31 - 1], x.shape).astype(np.int32)
        keep = rng.random(x.shape) < 0.5
        x.copy_(torch.where(torch.from_numpy(keep).to(x.device), x, torch.from_numpy(values).to(x.device)))
    if backend.checks_values:
        with pytest.raises(RuntimeError, match="^plan_packed_: "):
            backend.plan_packed_(plan, *tensors, block_size)
        assert all((x == POISON).all() for x in memory)
        return
    backend.plan_packed_(plan, *tensors, block_size)
    for x in memory:
        assert x[:3].tolist() == x[-3:].tolist() == [POISON] * 3


@pytest.mark.parametrize("name", ["mixed", "prompt", "rows of several tiles"])
def test_packed_rows_are_compacted_as_a_batch_of_one(name):
    step = CASES[name]
    plan = vtw.PackedPlan.empty(step.rows + step.spare, len(step.requests))
    vtw.plan_packed_(plan, *step.arguments("cpu"))
    text = int(plan.query_start[-1])
    rows = vtw.CompactionPlan(plan.source[None, :text], torch.tensor([text], dtype=torch.int32))
    hidden, positions = torch.randn(step.rows, 8), torch.arange(3 * step.rows).view(3, -1)
    some, places = vtw.compact([hidden[None], positions[None]], rows, [1, 2])
    source = plan.source[:text].long()
    assert torch.equal(some[0], hidden[source]) and torch.equal(places[0], positions[:, source])
    (back,) = vtw.expand([some], rows, step.rows, 1)
    assert torch.equal(back[0, source], hidden[source])
    assert back.count_nonzero() == some.count_nonzero()
