"""The ops in plain PyTorch: what the kernels are compared with, and what a device without kernels runs.

Signatures are those of the schemas in ``csrc/ops.cpp``; semantics are in ``compaction.py`` and ``kl_divergence.py``.
"""

from typing import Any

import torch
from torch import Tensor

from vtw_kernels.ops.checks import (
    check_backward,
    check_disjoint,
    check_keep,
    check_logits,
    check_loss,
    check_packed,
    check_packed_disjoint,
    check_packed_values,
    check_paged,
    check_pages,
    check_scaled,
    check_source_rows,
    check_state,
    check_states,
    check_tensors,
    paged_sizes,
    real_dtype,
    require,
)


def plan_compaction(keep: Tensor, length: int = -1, pad_left: bool = False) -> tuple[Tensor, Tensor]:
    check_keep(keep, length)
    batch, tokens = keep.shape
    length = tokens if length < 0 else length
    counts = keep.sum(1, keepdim=True)
    lengths = counts.clamp(max=length)
    # Row s is the n-th kept row of its sequence; it lands in slot n, or further right by what padding or cutting takes.
    slot = keep.cumsum(1) - 1
    if pad_left:
        slot = slot + length - counts
    kept = keep & (slot >= 0) & (slot < length)
    # What is not kept is written to one slot beyond the end, which is then cut off.
    source = keep.new_full((batch, length + 1), -1, dtype=torch.int32)
    rows = torch.arange(tokens, dtype=torch.int32, device=keep.device).expand(batch, tokens)
    source.scatter_(1, torch.where(kept, slot, length), rows)
    return source[:, :length].contiguous(), lengths.squeeze(1).to(torch.int32)


def compact(tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor) -> list[Tensor]:
    dims = check_tensors("compact", tensors, token_dims, batch_dims, source)
    for i, (x, (token_dim, _)) in enumerate(zip(tensors, dims)):
        check_source_rows("compact", source, x.shape[token_dim], f"tensors[{i}]")
    return [_gather(x, token_dim, batch_dim, source) for x, (token_dim, batch_dim) in zip(tensors, dims)]


def compact_(tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor) -> None:
    dims = check_tensors("compact_", tensors, token_dims, batch_dims, source)
    for i, (x, (token_dim, _)) in enumerate(zip(tensors, dims)):
        check_source_rows("compact_", source, x.shape[token_dim], f"tensors[{i}]")
    check_disjoint("compact_", "tensors", tensors, source=source)
    for x, (token_dim, batch_dim) in zip(tensors, dims):
        kept = min(source.shape[1], x.shape[token_dim])
        front = _as_bytes(x).movedim((batch_dim, token_dim), (0, 1))[:, :kept]
        moved = _gather(x, token_dim, batch_dim, source[:, :kept])
        moved = _as_bytes(moved).movedim((batch_dim, token_dim), (0, 1))
        valid = (source[:, :kept] >= 0).view(*source[:, :kept].shape, *[1] * (x.dim() - 2))
        front.copy_(torch.where(valid, moved, front))


def expand(
    tensors: list[Tensor], token_dims: list[int], batch_dims: list[int], source: Tensor, length: int
) -> list[Tensor]:
    dims = check_tensors("expand", tensors, token_dims, batch_dims, source)
    require(length >= 0, "expand", "length", "a number of rows", length)
    check_source_rows("expand", source, length, "length")
    # The inverse of a gather is a gather by the inverse index: which slot does row s come from?
    slots = torch.arange(source.shape[1], dtype=torch.int32, device=source.device).expand(source.shape)
    inverse = source.new_full((source.shape[0], length + 1), -1)
    inverse.scatter_(1, torch.where(source < 0, length, source).long(), slots)
    inverse = inverse[:, :length]
    return [_gather(x, token_dim, batch_dim, inverse) for x, (token_dim, batch_dim) in zip(tensors, dims)]


def compact_paged_(
    caches: list[Tensor], block_table: Tensor, seq_lens: Tensor, keep: Tensor, layout: str = "NHD"
) -> Tensor:
    check_paged(caches, block_table, seq_lens, keep, layout)
    check_disjoint("compact_paged_", "caches", caches, block_table=block_table, seq_lens=seq_lens, keep=keep)
    check_pages(caches, block_table, seq_lens, keep, layout)
    row = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    source, lengths = plan_compaction(keep & (row < seq_lens.unsqueeze(1)))
    moved = (source >= 0) & (source != row)
    # Reads a count back to the host, which no kernel does.
    sequence, target = moved.nonzero(as_tuple=True)
    for cache in caches:
        _, slots = paged_sizes(cache, layout)
        rows = _as_bytes(cache) if layout == "NHD" else _as_bytes(cache).transpose(1, 2)

        def place(row: Tensor, slots: int = slots) -> tuple[Tensor, Tensor]:
            return block_table[sequence, row // slots].long(), row % slots

        rows[place(target)] = rows[place(source[moved].long())]
    return lengths


def plan_packed_(
    plan: list[Tensor],
    query_start: Tensor,
    seq_lens: Tensor,
    visual: Tensor,
    visual_start: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    args = (query_start, seq_lens, visual, visual_start, block_table)
    check_packed(plan, *args, block_size)
    check_packed_disjoint(plan, *args)
    check_packed_values(plan, *args, block_size)
    source, text_start, text_lens, slots = plan
    source.fill_(-1)
    slots.fill_(-1)
    text_start.zero_()
    # What lies on a GPU comes to the host here, which no kernel does.
    first, lens, images, table = (x.tolist() for x in (query_start, seq_lens, visual_start, block_table))
    written = 0
    for b, length in enumerate(lens):
        is_text = torch.ones(max(length, 0), dtype=torch.bool)
        for start, stop in visual[images[b] : images[b + 1]].tolist():
            is_text[max(start, 0) : max(stop, 0)] = False
        rows = first[b + 1] - first[b]
        text_lens[b] = int(is_text.sum())
        index = is_text.cumsum(0) - 1  # of each text token among those of its sequence
        for i in is_text[length - rows :].nonzero().flatten().tolist():
            t = int(index[length - rows + i])
            block = table[b][t // block_size]
            source[written] = first[b] + i
            slots[written] = -1 if block < 0 else block * block_size + t % block_size
            written += 1
        text_start[b + 1] = written


def _as_bytes(x: Tensor) -> Tensor:
    """fp8 tensors as uint8, which torch can index; rows are only moved, never computed with."""
    return x.view(torch.uint8) if x.is_floating_point() and x.element_size() == 1 else x


def _gather(x: Tensor, token_dim: int, batch_dim: int, source: Tensor) -> Tensor:
    batch, kept = source.shape
    rows = _as_bytes(x).movedim((batch_dim, token_dim), (0, 1))
    valid = (source >= 0).view(batch, kept, *[1] * (x.dim() - 2))
    if rows.shape[1] == 0:
        out = rows.new_zeros(batch, kept, *rows.shape[2:])
    else:
        rows = rows.expand(batch, *rows.shape[1:])
        sequence = torch.arange(batch, device=source.device).unsqueeze(1)
        out = rows[sequence, source.clamp(min=0).long()]
        out = torch.where(valid, out, torch.zeros((), dtype=out.dtype, device=out.device))
    return out.movedim((0, 1), (batch_dim, token_dim)).contiguous().view(x.dtype)


# The sums a = Σ e^(p - m_p)·(p - q) are in units of 2^40, as in the kernels. Where q is masked by the most negative
# finite number, p - q is close to the largest number, and a sum of several overflows, although it may weigh nothing in
# the end, where p is low as well.
UNIT = 2.0**40


def kl_divergence_with_state(p_logits: Tensor, q_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_logits("kl_divergence", p_logits, q_logits, temperature)
    p, q = torch.broadcast_tensors(*(x.to(real_dtype(x)) for x in (p_logits, q_logits)))
    m_p, e_p = _max_and_exp(p, temperature)
    m_q, e_q = _max_and_exp(q, temperature)
    # Where p is 0 the term is 0, whatever q is; where only q is 0 it is +inf, even if e_p has underflowed.
    term = torch.where(q == -torch.inf, torch.inf, e_p * (p / UNIT - q / UNIT))
    term = torch.where(p == -torch.inf, 0.0, term)
    term = torch.where(p.isnan() | q.isnan(), torch.nan, term)
    # The rest in fp64, so that the subtraction of the two log-sum-exps does not round again.
    z_p, a, z_q = (x.sum(-1).double() for x in (e_p, term, e_q))
    m_p, a, m_q = (x.double() / temperature for x in (m_p, a, m_q))
    return _divergence(m_p, z_p, a, m_q, z_q).to(p.dtype), _rounded_state(m_p, z_p, a, m_q, z_q, p.dtype)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    return kl_divergence_with_state(p_logits, q_logits, temperature)[0]


def kl_state(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    return kl_divergence_with_state(p_logits, q_logits, temperature)[1]


def merge_kl_states(states: list[Tensor]) -> Tensor:
    check_states(states)
    m_p, z_p, a, m_q, z_q = torch.stack(list(states)).double().unbind(-1)
    weight_p, weight_q = _merge_weight(m_p), _merge_weight(m_q)
    # An infinite divergence stays infinite, however small the probability that carries it has become.
    a = torch.where(a == torch.inf, a, a / UNIT * weight_p)
    merged = m_p.amax(0), (z_p * weight_p).sum(0), a.sum(0), m_q.amax(0), (z_q * weight_q).sum(0)
    return _rounded_state(*merged, states[0].dtype)


def kl_from_state(state: Tensor) -> Tensor:
    check_state("kl_from_state", "state", state)
    m_p, z_p, a, m_q, z_q = state.double().unbind(-1)
    return _divergence(m_p, z_p, a / UNIT, m_q, z_q).to(state.dtype)


def kl_divergence_backward(
    grad: Tensor,
    p_logits: Tensor,
    q_logits: Tensor,
    state: Tensor,
    temperature: float,
    need_p: bool,
    need_q: bool,
) -> tuple[Tensor, Tensor]:
    if check_backward(grad, p_logits, q_logits, state, temperature):
        grad = grad_of_kl(state, grad)
    p, q = torch.broadcast_tensors(_scaled(p_logits, temperature), _scaled(q_logits, temperature))
    m_p, _, _, m_q, _ = state.unsqueeze(-2).unbind(-1)
    _, g_zp, g_a, _, g_zq = grad.unsqueeze(-2).unbind(-1)
    # A row that counts for nothing has no gradient, not even that of a NaN.
    counts = (g_zp != 0) | (g_a != 0) | (g_zq != 0)
    e_p = torch.where(p == -torch.inf, 0.0, (p - m_p).exp())
    grad_p = grad_q = p_logits.new_empty(0)
    if need_p:
        # Nothing for an entry without probability, where p - q may be infinite.
        slope = torch.where(~counts | (e_p == 0), 0.0, e_p * (g_zp + g_a * (p - q + 1)))
        grad_p = (slope / temperature).to(p_logits.dtype).contiguous()
    if need_q:
        e_q = torch.where(q == -torch.inf, 0.0, (q - m_q).exp())
        slope = torch.where(counts, g_zq * e_q - g_a * e_p, 0.0)
        grad_q = (slope / temperature).to(q_logits.dtype).contiguous()
    return grad_p, grad_q


def grad_of_kl(state: Tensor, grad_kl: Tensor) -> Tensor:
    """Gradient of ``kl_from_state``. The maxima get none: what the divergence gains through them it loses through
    the exponentials that they scale."""
    z_p, a, z_q = (state.select(-1, i) for i in (1, 2, 4))
    zero, grad_a = torch.zeros_like(grad_kl), grad_kl / z_p
    grad = torch.stack((zero, -torch.addcmul(grad_a, grad_a, a / z_p), grad_a, zero, grad_kl / z_q), dim=-1)
    return torch.where((grad_kl == 0).unsqueeze(-1), 0.0, grad)


def weights_of(kl: Tensor, weight: Tensor | None) -> Tensor:
    """What rows weigh in a loss: ``weight``, or as much as in their mean."""
    return kl.new_full(kl.shape, 1 / max(1, kl.numel())) if weight is None else weight


def kl_divergence_with_gradients(
    p_logits: Tensor, q_logits: Tensor, weight: Tensor | None, temperature: float, need_p: bool, need_q: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_loss("kl_divergence_with_gradients", p_logits, q_logits, weight, temperature)
    kl, state = kl_divergence_with_state(p_logits, q_logits, temperature)
    grad = weights_of(kl, weight)
    return kl, *kl_divergence_backward(grad, p_logits, q_logits, state, temperature, need_p, need_q)


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    check_scaled(tensors, factor)
    if factor.device.type == "cpu" and factor.item() == 1:  # of a GPU, no number is read back
        return
    for x in tensors:
        x.copy_(x.to(factor.dtype) * factor)  # mul_ would round the factor to the dtype of x


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(real_dtype(logits)) / temperature


def _max_and_exp(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if logits.shape[-1] == 0:  # an empty shard: the neutral state
        return logits.new_full(logits.shape[:-1], -torch.inf), logits
    m = logits.amax(-1)
    return m, torch.where(logits == -torch.inf, 0.0, ((logits - m.unsqueeze(-1)) / temperature).exp())


def _divergence(m_p: Tensor, z_p: Tensor, a: Tensor, m_q: Tensor, z_q: Tensor) -> Tensor:
    """Of fp64 numbers, ``a`` in units."""
    return (a / z_p * UNIT - (m_p + z_p.log()) + (m_q + z_q.log())).clamp(min=0)


def _rounded_state(m_p: Tensor, z_p: Tensor, a: Tensor, m_q: Tensor, z_q: Tensor, dtype: torch.dtype) -> Tensor:
    """The state of fp64 numbers, given ``a`` in units of ``UNIT``, in which a state does not have it. If ``a`` would
    overflow without the unit, the sums of p are made relative to a number above the maximum instead, which describes
    the same sums. For maxima beyond 2^27 or so, numbers are too coarse for that; but there each logit weighs all or
    nothing, and it is enough that ``a`` is finite: it is limited to the largest number."""
    largest, step = torch.finfo(dtype).max, 27.7  # ln 2^40
    raised = (m_p + step).to(dtype).double()
    raises = a.isfinite() & (a.abs() > largest / UNIT) & ((raised - m_p - step).abs() < 8)
    weight = torch.where(raises, (m_p - raised).exp(), 1.0)
    m_p, unit = torch.where(raises, raised, m_p), weight * UNIT

    def within(x: Tensor, limit: Any) -> Tensor:  # what is finite stays finite; a limit is a number or a tensor
        return torch.where(x.isfinite(), x.clamp(-limit, limit), x)

    numbers = within(m_p, largest), z_p * weight, within(a, largest / unit) * unit, within(m_q, largest), z_q
    return torch.stack(numbers, -1).to(dtype)


def _merge_weight(m: Tensor) -> Tensor:
    return torch.where(m == -torch.inf, 0.0, (m - m.amax(0)).exp())
