"""Argument checks shared by the fakes and by every backend that is written in Python.

``csrc/checks.h`` makes the same checks for the compiled backends; ``python_tests/test_bad_input.py`` holds the two
together. Everything raises RuntimeError, as torch's own operators do, naming the argument, what is wanted and what was
given, and before anything is written.
"""

import torch
from torch import Tensor

FLOATING_LOGITS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require(condition: bool, op: str, argument: str, wanted: str, given: object) -> None:
    if not condition:
        raise RuntimeError(f"{op}: {argument}: expected {wanted}, got {given}")


def real_dtype(logits: Tensor) -> torch.dtype:
    """What logits of this dtype are computed in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_keep(keep: Tensor, length: int) -> None:
    op = "plan_compaction"
    require(keep.dtype == torch.bool, op, "keep", "dtype bool", str(keep.dtype))
    require(keep.dim() == 2, op, "keep", "2 dimensions [B, S]", f"shape {list(keep.shape)}")
    require(length >= -1, op, "length", "a number of rows, or -1 for all of S", length)


def check_source(op: str, source: Tensor) -> None:
    require(source.dtype == torch.int32, op, "source", "dtype int32", str(source.dtype))
    require(source.dim() == 2, op, "source", "2 dimensions [B, T]", f"shape {list(source.shape)}")


def check_tensors(
    op: str, tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor
) -> list[tuple[int, int]]:
    """Checks one list against one plan; returns each tensor's (token_dim, batch_dim), counted from the front."""
    check_source(op, source)
    batch, kept = source.shape
    for name, dims in (("token_dims", token_dims), ("batch_dims", batch_dims)):
        require(len(dims) == len(tensors), op, name, f"one entry for each of the {len(tensors)} tensors", len(dims))
    resolved = []
    for i, (x, token_dim, batch_dim) in enumerate(zip(tensors, token_dims, batch_dims)):
        require(x.device == source.device, op, f"tensors[{i}]", f"device {source.device} of source", str(x.device))
        require(x.dim() >= 2, op, f"tensors[{i}]", "a batch and a token dimension", f"shape {list(x.shape)}")
        for name, dim in (("token_dims", token_dim), ("batch_dims", batch_dim)):
            in_range = -x.dim() <= dim < x.dim()
            require(in_range, op, f"{name}[{i}]", f"a dimension in [{-x.dim()}, {x.dim() - 1}]", dim)
        token_dim, batch_dim = token_dim % x.dim(), batch_dim % x.dim()
        require(token_dim != batch_dim, op, f"batch_dims[{i}]", f"another dimension than token_dims[{i}]", batch_dim)
        rows = x.shape[batch_dim]
        if op == "compact_":
            require(rows == batch, op, f"tensors[{i}]", f"batch size {batch} of source", rows)
        else:
            require(rows in (1, batch), op, f"tensors[{i}]", f"batch size 1 or {batch} of source", rows)
        if op == "expand":
            tokens = x.shape[token_dim]
            require(tokens == kept, op, f"tensors[{i}]", f"{kept} rows of source in dimension {token_dim}", tokens)
        resolved.append((token_dim, batch_dim))
    return resolved


def check_source_rows(op: str, source: Tensor, rows: int, rows_of: str) -> None:
    """The values of ``source``: one ascending run per sequence, padded on one side, below ``rows``.

    Only where ``source`` lies in host memory: on a device this would be a synchronisation, and the kernels stay in
    bounds by themselves.
    """
    if source.device.type != "cpu" or source.numel() == 0:
        return
    require(int(source.min()) >= -1, op, "source", "rows, or -1 for padding", int(source.min()))
    require(int(source.max()) < rows, op, "source", f"rows below {rows} of {rows_of}", int(source.max()))
    kept = source >= 0
    neighbours = kept[:, 1:] & kept[:, :-1]
    ascending = bool((source.diff(dim=1) > 0)[neighbours].all())
    runs = (kept.diff(dim=1, prepend=kept.new_zeros(kept.shape[0], 1)) & kept).sum(1)
    require(
        ascending and int(runs.max()) <= 1, op, "source", "ascending rows with padding on one side", "another order"
    )
    if op == "compact_":
        left = bool((~kept[:, 0] & kept.any(1)).any())
        require(not left, op, "source", "a right-padded plan", "a left-padded one")


def check_paged(caches: list[Tensor], block_table: Tensor, seq_lens: Tensor, keep: Tensor, layout: str) -> None:
    op = "compact_paged_"
    require(keep.dtype == torch.bool, op, "keep", "dtype bool", str(keep.dtype))
    require(keep.dim() == 2, op, "keep", "2 dimensions [B, S]", f"shape {list(keep.shape)}")
    batch = keep.shape[0]
    for argument, x, fits, wanted in (
        ("block_table", block_table, block_table.dim() == 2, f"shape [{batch}, pages]"),
        ("seq_lens", seq_lens, seq_lens.dim() == 1, f"shape [{batch}]"),
    ):
        require(x.dtype == torch.int32, op, argument, "dtype int32", str(x.dtype))
        require(fits and x.shape[0] == batch, op, argument, wanted, f"shape {list(x.shape)}")
        require(x.device == keep.device, op, argument, f"device {keep.device} of keep", str(x.device))
    require(layout in ("NHD", "HND"), op, "layout", "NHD or HND", layout)
    for i, cache in enumerate(caches):
        argument, given = f"caches[{i}]", f"shape {list(cache.shape)}"
        require(cache.dim() == 4, op, argument, f"4 dimensions in the order {layout} behind the pages", given)
        pages, slots = paged_sizes(cache, layout)
        wanted = "the {} pages of {} slots of caches[0]".format(*paged_sizes(caches[0], layout))
        require((pages, slots) == paged_sizes(caches[0], layout), op, argument, wanted, given)
        require(slots > 0, op, argument, "pages of at least 1 slot", given)
        require(cache.device == keep.device, op, argument, f"device {keep.device} of keep", str(cache.device))


def paged_sizes(cache: Tensor, layout: str) -> tuple[int, int]:
    """The number of pages, and of slots in each."""
    return cache.shape[0], cache.shape[1 if layout == "NHD" else 2]


def check_pages(caches: list[Tensor], block_table: Tensor, seq_lens: Tensor, keep: Tensor, layout: str) -> None:
    """The values of ``seq_lens`` and ``block_table``, where they lie in host memory."""
    if keep.device.type != "cpu":
        return
    op = "compact_paged_"
    tokens = keep.shape[1]
    pages, slots = paged_sizes(caches[0], layout) if caches else (0, 1)
    users: dict[int, int] = {}
    written: list[int] = []
    for length, row, kept in zip(seq_lens.tolist(), block_table.tolist(), keep):
        require(0 <= length <= tokens, op, "seq_lens", f"lengths in [0, {tokens}] of keep", length)
        if not caches:
            continue
        needed = -(-length // slots)
        wanted = f"{needed} pages for a sequence of {length} tokens"
        require(needed <= len(row), op, "block_table", wanted, len(row))
        for page in row[:needed]:
            require(0 <= page < pages, op, "block_table", f"pages in [0, {pages - 1}] of caches", page)
            users[page] = users.get(page, 0) + 1
        stays = int(kept[:length].long().cumprod(0).sum())
        written += row[stays // slots : -(-int(kept[:length].sum()) // slots)] if stays < kept[:length].sum() else []
    for page in written:
        wanted = "no shared page at or after the first dropped token"
        require(users[page] == 1, op, "block_table", wanted, f"page {page} in {users[page]} places")


def check_packed(
    plan: list[Tensor],
    query_start: Tensor,
    seq_lens: Tensor,
    visual: Tensor,
    visual_start: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    op, int32 = "plan_packed_", torch.int32
    require(len(plan) == 4, op, "plan", "4 tensors: source, query_start, seq_lens and slots", len(plan))

    def integers(name: str, x: Tensor, dtype: torch.dtype, fits: bool, wanted: str) -> None:
        require(x.dtype == dtype, op, name, f"dtype {dtype}".replace("torch.", ""), str(x.dtype))
        require(fits, op, name, wanted, f"shape {list(x.shape)}")
        require(x.device == query_start.device, op, name, f"device {query_start.device} of query_start", str(x.device))

    def in_a_row(name: str, x: Tensor) -> None:
        require(x.is_contiguous(), op, name, "contiguous memory", f"strides {list(x.stride())}")

    def numbers(name: str, x: Tensor, dtype: torch.dtype, size: int | None = None) -> None:
        fits = x.dim() == 1 and (size is None or x.shape[0] == size)
        integers(name, x, dtype, fits, "1 dimension" if size is None else f"shape [{size}]")
        in_a_row(name, x)

    numbers("query_start", query_start, int32)
    require(query_start.shape[0] > 0, op, "query_start", "shape [B + 1]", f"shape {list(query_start.shape)}")
    batch = query_start.shape[0] - 1
    numbers("seq_lens", seq_lens, int32, batch)
    integers("visual", visual, int32, visual.dim() == 2 and visual.shape[1] == 2, "shape [R, 2]")
    in_a_row("visual", visual)
    numbers("visual_start", visual_start, int32, batch + 1)
    fits = block_table.dim() == 2 and block_table.shape[0] == batch
    integers("block_table", block_table, int32, fits, f"shape [{batch}, blocks]")
    require(0 < block_size < 2**31, op, "block_size", "at least 1", block_size)
    numbers("plan[0]", plan[0], int32)
    numbers("plan[1]", plan[1], int32, batch + 1)
    numbers("plan[2]", plan[2], int32, batch)
    numbers("plan[3]", plan[3], torch.int64, plan[0].shape[0])


def check_packed_values(
    plan: list[Tensor],
    query_start: Tensor,
    seq_lens: Tensor,
    visual: Tensor,
    visual_start: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    """The values of all lists, where they lie in host memory."""
    if query_start.device.type != "cpu":
        return
    op = "plan_packed_"

    def starts(name: str, x: list[int], limit: int, of: str) -> None:
        require(x[0] == 0, op, name, "0 first", x[0])
        for before, after in zip(x, x[1:]):
            require(before <= after, op, name, "ascending numbers", f"{after} behind {before}")
        require(x[-1] <= limit, op, name, f"at most the {limit} {of}", x[-1])

    first, images = query_start.tolist(), visual_start.tolist()
    starts("query_start", first, plan[0].shape[0], "rows of plan[0]")
    starts("visual_start", images, visual.shape[0], "ranges of visual")
    ranges = visual.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        rows = first[b + 1] - first[b]
        require(length >= rows, op, "seq_lens", f"at least the {rows} rows of sequence {b}", length)
        text, end = length, 0
        for start, stop in ranges[images[b] : images[b + 1]]:
            require(end <= start <= stop, op, "visual", "ascending ranges apart", f"[{start}, {stop}] behind {end}")
            text -= max(0, min(stop, length) - start)
            end = stop
        needed = -(-text // block_size)
        wanted = f"{needed} blocks for the {text} text tokens of sequence {b}"
        require(needed <= block_table.shape[1], op, "block_table", wanted, block_table.shape[1])


def check_packed_disjoint(plan: list[Tensor], *read: Tensor) -> None:
    names = ("query_start", "seq_lens", "visual", "visual_start", "block_table")
    check_disjoint("plan_packed_", "plan", plan, **dict(zip(names, read, strict=True)))


def check_disjoint(op: str, name: str, tensors: list[Tensor], **read: Tensor) -> None:
    """Raises if tensors that are written to in place overlap themselves, one another, or a tensor that is only
    ``read``, such as the plan, which must not change while rows move. The latter is refused even where its bytes lie in
    a gap between those of a tensor.

    Strides *nest* when each is at least as long as all that lies inside it. Every view of a cache nests, and for nested
    strides overlap can be decided exactly. Any other strides are refused.
    """
    extents = []
    for i, x in enumerate(tensors):
        if x.numel() == 0:
            continue
        item = x.element_size()
        dims = sorted(((stride * item, size) for stride, size in zip(x.stride(), x.shape) if size > 1), reverse=True)
        inside = item
        for stride, size in reversed(dims):
            own = f"strides {list(x.stride())}"
            require(stride >= inside, op, f"{name}[{i}]", "memory of its own for every element", own)
            inside += stride * (size - 1)
        extents.append((x.data_ptr(), x.data_ptr() + inside, i, item, dims))
    for argument, x in read.items():
        if x.numel() == 0:
            continue
        reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape)) + 1
        for begin, end, i, *_ in extents:
            apart = x.data_ptr() >= end or x.data_ptr() + reach * x.element_size() <= begin
            require(apart, op, f"{name}[{i}]", f"memory apart from {argument}", "an overlap")
    extents.sort(key=lambda extent: extent[0])
    for at, (begin, end, i, item, dims) in enumerate(extents):
        for other_begin, _, j, other_item, other_dims in extents[at + 1 :]:
            if other_begin >= end:
                break
            same = item == other_item and [stride for stride, _ in dims] == [stride for stride, _ in other_dims]
            apart = same and not _meet(dims, other_dims, other_begin - begin, item)
            require(apart, op, f"{name}[{max(i, j)}]", f"memory apart from {name}[{min(i, j)}]", "an overlap")


def _meet(dims: list[tuple[int, int]], other: list[tuple[int, int]], apart: int, item: int) -> bool:
    """Whether two tensors of equal strides, ``apart`` bytes from each other, share bytes. All that lies inside a stride
    is shorter than it, so only the two multiples of it that are nearest to the distance have to be tried."""
    if not dims:
        return abs(apart) < item
    (stride, size), (_, other_size) = dims[0], other[0]
    nearest = (apart // stride, apart // stride + 1)
    return any(
        -other_size < steps < size and _meet(dims[1:], other[1:], apart - steps * stride, item) for steps in nearest
    )


def check_logits(op: str, p_logits: Tensor, q_logits: Tensor, temperature: float) -> None:
    require(
        p_logits.dtype in FLOATING_LOGITS, op, "p_logits", "a dtype of fp32, fp16, bf16 or fp64", str(p_logits.dtype)
    )
    require(
        q_logits.dtype == p_logits.dtype, op, "q_logits", f"dtype {p_logits.dtype} of p_logits", str(q_logits.dtype)
    )
    require(
        q_logits.device == p_logits.device,
        op,
        "q_logits",
        f"device {p_logits.device} of p_logits",
        str(q_logits.device),
    )
    require(p_logits.dim() >= 1, op, "p_logits", "at least 1 dimension [..., V]", "a scalar")
    require(q_logits.dim() >= 1, op, "q_logits", "at least 1 dimension [..., V]", "a scalar")
    same = p_logits.shape[-1] == q_logits.shape[-1]
    require(same, op, "q_logits", f"vocabulary size {p_logits.shape[-1]} of p_logits", q_logits.shape[-1])
    _check_rows(op, "logits", p_logits, q_logits)
    _check_temperature(op, temperature)


def _check_rows(op: str, name: str, p: Tensor, q: Tensor) -> None:
    for p_size, q_size in zip(reversed(p.shape[:-1]), reversed(q.shape[:-1])):
        fits = p_size == q_size or p_size == 1 or q_size == 1
        shapes = f"shapes {list(p.shape)} and {list(q.shape)}"
        require(fits, op, f"q_{name}", f"leading dimensions that broadcast with p_{name}", shapes)


def _check_temperature(op: str, temperature: float) -> None:
    normal = torch.finfo(torch.float32).tiny <= temperature <= torch.finfo(torch.float32).max
    require(normal, op, "temperature", "a number above 0, from 1.2e-38 to 3.4e38 as fp32 has it", temperature)


def check_linear_kl(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    temperature: float,
    chunk: int | None,
) -> None:
    op = "linear_kl_divergence"
    dtype, device = p_hidden.dtype, p_hidden.device
    require(dtype in FLOATING_LOGITS, op, "p_hidden", "a dtype of fp32, fp16, bf16 or fp64", str(dtype))
    for side, hidden, weight, bias in (("p", p_hidden, p_weight, p_bias), ("q", q_hidden, q_weight, q_bias)):
        for argument, x in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
            if x is not None:
                require(x.dtype == dtype, op, argument, f"dtype {dtype} of p_hidden", str(x.dtype))
                require(x.device == device, op, argument, f"device {device} of p_hidden", str(x.device))
        require(hidden.dim() >= 1, op, f"{side}_hidden", f"at least 1 dimension [..., H_{side}]", "a scalar")
        size, shape = hidden.shape[-1], f"shape {list(weight.shape)}"
        fits = weight.dim() == 2 and weight.shape[1] == size
        require(fits, op, f"{side}_weight", f"shape [V, {size}] by {side}_hidden", shape)
        vocabulary = p_weight.shape[0]
        same = weight.shape[0] == vocabulary
        require(same, op, f"{side}_weight", f"vocabulary size {vocabulary} of p_weight", weight.shape[0])
        if bias is not None:
            wanted = f"shape [{vocabulary}] by {side}_weight"
            require(bias.shape == (vocabulary,), op, f"{side}_bias", wanted, f"shape {list(bias.shape)}")
    _check_rows(op, "hidden", p_hidden, q_hidden)
    _check_temperature(op, temperature)
    require(chunk is None or chunk >= 1, op, "chunk", "at least 1 entry of the vocabulary, or None", chunk)


def check_state(op: str, argument: str, state: Tensor) -> None:
    require(state.dtype in (torch.float32, torch.float64), op, argument, "dtype fp32 or fp64", str(state.dtype))
    wanted = "[..., 5]: (m_p, z_p, a, m_q, z_q)"
    require(state.dim() >= 1 and state.shape[-1] == 5, op, argument, wanted, f"shape {list(state.shape)}")


def check_row_states(op: str, p_logits: Tensor, q_logits: Tensor, *last: int, **given: Tensor) -> None:
    """Tensors ``[..., *last]`` with an entry for each pair of rows, in the dtype that logits are computed in."""
    rows = torch.broadcast_shapes(p_logits.shape[:-1], q_logits.shape[:-1])
    dtype = real_dtype(p_logits)
    for argument, x in given.items():
        require(x.dtype == dtype, op, argument, f"dtype {dtype}", str(x.dtype))
        require(x.device == p_logits.device, op, argument, f"device {p_logits.device} of p_logits", str(x.device))
        require(x.shape == (*rows, *last), op, argument, f"shape {[*rows, *last]}", f"shape {list(x.shape)}")


def check_backward(grad: Tensor, p_logits: Tensor, q_logits: Tensor, state: Tensor, temperature: float) -> bool:
    """Returns whether ``grad`` is that of the divergence, and not of its state."""
    op = "kl_divergence_backward"
    check_logits(op, p_logits, q_logits, temperature)
    check_row_states(op, p_logits, q_logits, 5, state=state)
    of_divergence = grad.dim() == state.dim() - 1
    check_row_states(op, p_logits, q_logits, *([] if of_divergence else [5]), grad=grad)
    return of_divergence


def check_loss(op: str, p_logits: Tensor, q_logits: Tensor, weight: Tensor | None, temperature: float) -> None:
    check_logits(op, p_logits, q_logits, temperature)
    if weight is not None:
        check_row_states(op, p_logits, q_logits, weight=weight)


def check_scaled(tensors: list[Tensor], factor: Tensor) -> None:
    op = "scale_"
    require(factor.dim() == 0, op, "factor", "a scalar", f"shape {list(factor.shape)}")
    for i, x in enumerate(tensors):
        dtype = real_dtype(x)
        require(x.dtype in FLOATING_LOGITS, op, f"tensors[{i}]", "a dtype of fp32, fp16, bf16 or fp64", str(x.dtype))
        require(factor.dtype == dtype, op, "factor", f"dtype {dtype}", str(factor.dtype))
        require(x.device == factor.device, op, f"tensors[{i}]", f"device {factor.device} of factor", str(x.device))
        require(x.is_contiguous(), op, f"tensors[{i}]", "contiguous memory", f"strides {list(x.stride())}")


def check_states(states: list[Tensor]) -> None:
    op = "merge_kl_states"
    require(len(states) > 0, op, "states", "at least one state", 0)
    for i, state in enumerate(states):
        check_state(op, f"states[{i}]", state)
        for what, wanted, given in (
            ("dtype", states[0].dtype, state.dtype),
            ("device", states[0].device, state.device),
            ("shape", list(states[0].shape), list(state.shape)),
        ):
            require(wanted == given, op, f"states[{i}]", f"{what} {wanted} of states[0]", given)
