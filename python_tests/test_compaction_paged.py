"""compact_paged_ against a loop over tokens, byte for byte and with all memory around the caches."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cases import DTYPES, KEEPS, LAYOUTS, OVERLAPPING, Built, Spec, dense, image_spans, random_keep, swapped
from hypothesis import given, settings
from hypothesis import strategies as st

import vtw_kernels as vtw


@dataclass(frozen=True)
class Paged:
    """Caches of one geometry of pages, and the sequences in them. ``shared`` pages of prefix are common to all."""

    keep: np.ndarray  # bool [B, S]
    lens: tuple[int, ...]
    page_size: int
    specs: tuple[Spec, ...]
    layout: str = "NHD"
    shared: int = 0
    seed: int = 0

    @property
    def pages(self) -> int:
        return self.specs[0].shape[0] if self.specs else 8

    @property
    def table(self) -> np.ndarray:
        """Pages in random order, each used once but for a shared prefix; what no token needs is not a page at all."""
        rng = np.random.default_rng(self.seed)
        columns = -(-self.keep.shape[1] // self.page_size) + 1
        free = list(rng.permutation(self.pages))
        prefix = [free.pop() for _ in range(self.shared)]
        table = rng.choice(np.array([-1, self.pages, 2**31 - 1, -(2**31)]), (len(self.lens), columns))
        for b, length in enumerate(self.lens):
            for column in range(-(-length // self.page_size)):
                table[b, column] = prefix[column] if column < self.shared else free.pop()
        return table.astype(np.int32)

    def kept(self, b: int) -> list[int]:
        return [t for t in range(self.lens[b]) if self.keep[b, t]]


def cache(pages, page_size, heads=2, dim=6, order="NHD", **options) -> Spec:
    shape = (pages, page_size, heads, dim) if order == "NHD" else (pages, heads, page_size, dim)
    return Spec(shape, 1 if order == "NHD" else 2, **options)


def enough_pages(lens, page_size, spare=2):
    return sum(-(-length // page_size) for length in lens) + spare


def make_cases() -> dict[str, Paged]:
    cases = {}
    lens = (13, 0, 9)
    for layout in ("NHD", "HND"):
        for name, make in KEEPS.items():
            for page_size in (1, 4, 8, 16):
                specs = tuple(
                    cache(enough_pages(lens, page_size), page_size, heads, dim, layout, dtype=dtype)
                    for heads, dim, dtype in ((2, 6, torch.float16), (1, 8, torch.float8_e4m3fn), (3, 5, torch.float32))
                )
                cases[f"{layout}-{name}-{page_size}"] = Paged(make(3, 13), lens, page_size, specs, layout)
        for memory in LAYOUTS:
            if memory not in OVERLAPPING:
                specs = tuple(cache(9, 4, 2, dim, layout, dtype=torch.bfloat16, layout=memory) for dim in (3, 8))
                keep = image_spans(3, 13, (0.1, 0.3), (0.5, 0.8))
                cases[f"{layout}-memory-{memory}"] = Paged(keep, lens, 4, specs, layout)
        for dtype in DTYPES:
            specs = (cache(9, 4, 2, 5, layout, dtype=dtype),)
            cases[f"{layout}-dtype-{str(dtype)[6:]}"] = Paged(random_keep(3, 13), lens, 4, specs, layout)
        # vLLM's block sizes, with enough tokens for many pages and steps; two layers of keys and values.
        for page_size in (8, 16, 32, 128, 256):
            lens_long = (700, 331, 512)
            specs = (cache(enough_pages(lens_long, page_size), page_size, 2, 64, layout, dtype=torch.bfloat16),) * 4
            for name in ("prefix_suffix", "random", "first_dropped"):
                keep = KEEPS[name](3, 700)
                cases[f"{layout}-long-{page_size}-{name}"] = Paged(keep, lens_long, page_size, specs, layout)
        keep = random_keep(2, 24)
        keep[:, :8] = True
        specs = (cache(10, 4, order=layout),)
        cases[f"{layout}-shared_prefix"] = Paged(keep, (24, 20), 4, specs, layout, shared=2)
    cases["no_caches"] = Paged(random_keep(2, 5), (5, 3), 4, ())
    cases["no_sequences"] = Paged(np.zeros((0, 5), bool), (), 4, (cache(3, 4),))
    cases["no_tokens"] = Paged(np.zeros((2, 0), bool), (0, 0), 4, (cache(3, 4),))
    cases["no_heads"] = Paged(random_keep(2, 5), (5, 3), 4, (cache(4, 4, 0), cache(4, 4, 1)))
    cases["one_page"] = Paged(random_keep(1, 7), (7,), 16, (cache(1, 16),))
    return cases


CASES = make_cases()


def oracle(built: Built, case: Paged) -> np.ndarray:
    memory = built.snapshot()
    before, after = built.numpy(), built.numpy(memory)
    if case.layout == "HND":
        before, after = before.swapaxes(1, 2), after.swapaxes(1, 2)
    for b in range(len(case.lens)):
        for row, token in enumerate(case.kept(b)):
            if row != token:
                to, source = divmod(row, case.page_size), divmod(token, case.page_size)
                after[case.table[b, to[0]], to[1]] = before[case.table[b, source[0]], source[1]]
    return memory


def arguments(case: Paged, device: str):
    table = torch.from_numpy(case.table).to(device)
    return table, torch.tensor(case.lens, dtype=torch.int32, device=device), torch.from_numpy(case.keep).to(device)


def check(backend, case: Paged) -> None:
    built = [spec.build(backend.device, seed) for seed, spec in enumerate(case.specs)]
    expected = [oracle(x, case) for x in built]
    given = arguments(case, backend.device)
    lengths = backend.compact_paged_([x.tensor for x in built], *given, case.layout)
    assert lengths.dtype == torch.int32 and lengths.device == given[1].device
    assert lengths.tolist() == [len(case.kept(b)) for b in range(len(case.lens))]
    for x, want in zip(built, expected):
        assert np.array_equal(x.snapshot(), want), x.spec
    assert all(torch.equal(x, y) for x, y in zip(given, arguments(case, backend.device)))


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_compact_paged(backend, case):
    check(backend, case)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_two_views_of_one_cache(backend, layout):
    """vLLM keeps keys and values in one tensor: [2, blocks, ...], or interleaved as [blocks, 2, ...]."""
    for axis in (0, 1):
        case = Paged(random_keep(2, 13), (13, 10), 4, (cache(9, 4, order=layout),) * 2, layout)
        page = list(case.specs[0].shape)
        whole = Spec((2, *page) if axis == 0 else (page[0], 2, *page[1:]), 0, dtype=torch.float16).build(backend.device)
        halves = whole.tensor.unbind(axis)
        memory = whole.snapshot()
        for half in whole.numpy(memory).swapaxes(0, axis):
            rows = half if layout == "NHD" else half.swapaxes(1, 2)
            before = rows.copy()
            for b in range(2):
                for row, token in enumerate(case.kept(b)):
                    to, source = divmod(row, 4), divmod(token, 4)
                    rows[case.table[b, to[0]], to[1]] = before[case.table[b, source[0]], source[1]]
        backend.compact_paged_(list(halves), *arguments(case, backend.device), layout)
        assert np.array_equal(whole.snapshot(), memory)


def test_strided_arguments(backend):
    case = Paged(random_keep(3, 13), (13, 4, 9), 4, (cache(9, 4),))
    x = case.specs[0].build(backend.device)
    expected = oracle(x, case)
    table, lens, keep = arguments(case, backend.device)
    wide = [torch.stack((y, y), -1)[..., 0] for y in (table, lens)]
    backend.compact_paged_([x.tensor], *wide, keep.t().contiguous().t(), "NHD")
    assert np.array_equal(x.snapshot(), expected)


def test_offsets_beyond_32_bits(backend):
    """Pages 2^30 elements apart."""
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.int8, device=backend.device)
    x = memory.as_strided((4, 2, 1, 3), (2**30, 3, 3, 1))
    x.copy_(torch.arange(24).view(4, 2, 1, 3))
    table = torch.tensor([[3, 0, 2, 1]], dtype=torch.int32, device=backend.device)
    lens = torch.tensor([8], dtype=torch.int32, device=backend.device)
    keep = torch.tensor([[False, True, True, False, True, True, False, True]], device=backend.device)
    want = x.cpu()
    rows = [(page, slot) for page in (3, 0, 2, 1) for slot in (0, 1)]
    for to, source in enumerate((1, 2, 4, 5, 7)):
        want[rows[to]] = x.cpu()[rows[source]]
    assert backend.compact_paged_([x], table, lens, keep, "NHD").tolist() == [5]
    assert torch.equal(x.cpu(), want)


def test_pages_out_of_range_on_a_device(backend):
    """What host memory refuses, a device leaves where it is: nothing out of range is read or written."""
    if backend.checks_values:
        pytest.skip("refused: see test_bad_input")
    spec = cache(4, 2)
    x = spec.build(backend.device)
    before = x.tensor.cpu().clone()
    table = torch.tensor([[1, 99, 2, -5], [3, 0, 0, 0]], dtype=torch.int32, device=backend.device)
    lens = torch.tensor([2**31 - 1, -7], dtype=torch.int32, device=backend.device)
    keep = torch.tensor([[False, True, True, True, True, True, True, True]] * 2, device=backend.device)
    assert backend.compact_paged_([x.tensor], table, lens, keep, "NHD").tolist() == [7, 0]
    want = before.clone()
    want[1, 0] = before[1, 1]  # from 1 to 0
    want[2, 0] = before[2, 1]  # from 5 to 4; all others come from or go to a page that isn't there
    assert torch.equal(x.tensor.cpu().view(torch.int32), want.view(torch.int32))


def test_public():
    keys, values = torch.randn(2, 6, 4, 2, 3).unbind(0)
    table = torch.tensor([[4, 1, 5], [0, 3, 2]], dtype=torch.int32)
    lens = torch.tensor([11, 9], dtype=torch.int32)
    keep = torch.rand(2, 11) > 0.5
    dense_keys = [keys[table[b].long()].flatten(0, 1)[: lens[b]][keep[b, : lens[b]]] for b in (0, 1)]
    new = vtw.compact_paged_([keys, values], table, lens, keep)
    for b in (0, 1):
        assert torch.equal(keys[table[b].long()].flatten(0, 1)[: new[b]], dense_keys[b])
    with pytest.raises(TypeError, match="compact_paged_: caches: expected a list of tensors, got one tensor"):
        vtw.compact_paged_(keys, table, lens, keep)


@st.composite
def any_case(draw):
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(0, 24))
    keep = np.array(draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)), bool)
    lens = tuple(draw(st.integers(0, tokens)) for _ in range(batch))
    page_size, layout = draw(st.integers(1, 9)), draw(st.sampled_from(["NHD", "HND"]))
    pages = enough_pages(lens, page_size, draw(st.integers(0, 2)))
    specs = []
    for _ in range(draw(st.integers(1, 3))):
        spec = cache(pages, page_size, draw(st.integers(0, 3)), draw(st.integers(0, 9)), layout)
        strides = draw(st.sampled_from([dense, swapped]))(spec.shape)
        specs.append(replace(spec, dtype=draw(st.sampled_from(DTYPES)), strides=tuple(strides)))
    return Paged(keep.reshape(batch, tokens), lens, page_size, tuple(specs), layout, seed=draw(st.integers(0, 99)))


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(case=any_case())
def check_any(backend, case):
    check(backend, case)


def test_any_compact_paged(backend):
    check_any(backend)
