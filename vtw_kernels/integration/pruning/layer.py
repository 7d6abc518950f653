"""Attention and MLP of a decoder layer in which visual rows go through only parts of the weights."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from vtw_kernels.integration.attention import observing
from vtw_kernels.integration.projections import Projections
from vtw_kernels.ops import CompactionPlan, compact, expand


class Heads:
    """Some of the heads of a layer.

    Args:
        query: the numbers of the query heads, ascending.
        group: how many query heads share a head of keys and values.
    """

    def __init__(self, query: Sequence[int], group: int):
        self.query = torch.tensor(query, dtype=torch.long)
        self.kv = torch.unique(self.query // group)  # the heads of keys and values that they need
        at = torch.searchsorted(self.kv, self.query // group)
        shared = torch.bincount(at, minlength=len(self.kv))
        # For attention of a single row: instead of repeating keys for each query head, the query heads are arranged so
        # that each head of keys has equally many, some of them twice; ``unpacked`` picks each result once.
        most = int(shared.max()) if len(self.kv) else 0
        first = shared.cumsum(0) - shared
        self.packed = (first[:, None] + torch.arange(most).clamp(max=shared[:, None] - 1)).flatten()
        self.unpacked = at * most + torch.arange(len(self.query)) - first[at]
        self.key_of = at  # of each query
        self.own_keys = len(self.kv) == len(self.query)

    def __len__(self) -> int:
        return len(self.query)


class LayerHeads(NamedTuple):
    """The heads of a layer: those that see visual tokens, and those that are blind to them. ``cut``: whether values of
    visual tokens count as zeros in all of them."""

    parts: Projections
    seeing: Heads
    blind: Heads
    cut: bool

    @property
    def plain(self) -> bool:
        """Whether attention is the model's own, but for its mask."""
        return not len(self.blind) and not self.cut


class SomeHeads:
    """Passed to an attention function in the place of its module, to compute only some of the module's heads: it has
    the attributes that such functions read."""

    num_key_value_groups = 1

    def __init__(self, whole: nn.Module):
        self.whole, self.training, self.config = whole, whole.training, whole.config
        self.layer_idx, self.is_causal = whole.layer_idx, whole.is_causal


def attend(
    parts: Projections, heads: Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, observed: bool
) -> Tensor:
    """``[B, q, heads * D]``: the model's attention function, for queries ``[B, heads, q, D]`` and the keys and values
    ``[B, kv, keys, D]`` that they need. ``observed``: whether a policy may observe this call; it needs all rows, with
    their visual keys."""
    attention, options = parts.attention, {}
    single = q.shape[2] == 1 and not heads.own_keys and (mask is None or mask.shape[1] == 1)
    if single:
        batch, kv, dim = len(k), k.shape[1], k.shape[3]
        q = q.index_select(1, heads.packed.to(q.device)).view(batch, kv, -1, dim)
        options["is_causal"] = False
    elif not heads.own_keys:
        k, v = (x.index_select(1, heads.key_of.to(x.device)) for x in (k, v))
    if mask is not None and mask.shape[1] > 1:
        raise ValueError(f"attention_mask: expected the same one for all heads, got one for each of {mask.shape[1]}")
    module = SomeHeads(attention)
    if observing() and not observed:
        module.whole = None
    dropout = attention.attention_dropout if attention.training else 0.0
    function = attention_function(attention)
    output, _ = function(module, q, k, v, mask, dropout=dropout, scaling=attention.scaling, **options)
    if single:
        output = output.transpose(1, 2).reshape(batch, -1, 1, dim).index_select(1, heads.unpacked.to(q.device))
        output = output.transpose(1, 2)
    return output.flatten(2)


def attention_function(attention: nn.Module) -> Callable:
    """That of the model, as its attention looks it up in each call."""
    name = attention.config._attn_implementation
    if name != "eager":
        return AttentionInterface()[name]
    return sys.modules[type(attention).__module__].eager_attention_forward


def rotated(attention: nn.Module, rope: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with their positions, as the file of the model's attention does it."""
    file = sys.modules[type(attention).__module__]
    if hasattr(attention, "rope_scaling") and hasattr(file, "apply_multimodal_rotary_pos_emb"):  # up to 4.57
        return file.apply_multimodal_rotary_pos_emb(q, k, *rope, attention.rope_scaling["mrope_section"])
    return file.apply_rotary_pos_emb(q, k, *rope)


def queries(parts: Projections, x: Tensor, heads: Tensor | None = None) -> Tensor:
    """``[B, heads, rows, D]`` of ``[B, rows, H]``; all heads, or some."""
    return _normed(parts.q_norm, _projected(parts.q, x, heads, parts.head_dim))


def keys(parts: Projections, x: Tensor, heads: Tensor | None = None) -> Tensor:
    return _normed(parts.k_norm, _projected(parts.k, x, heads, parts.head_dim))


def values(parts: Projections, x: Tensor, heads: Tensor | None = None) -> Tensor:
    return _projected(parts.v, x, heads, parts.head_dim).transpose(1, 2)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return (x if norm is None else norm(x)).transpose(1, 2)


def _projected(linear: nn.Linear, x: Tensor, heads: Tensor | None, dim: int) -> Tensor:
    if heads is None:
        return linear(x).unflatten(-1, (-1, dim))
    weight = take_heads(linear.weight.unflatten(0, (-1, dim)), heads, 0).flatten(0, 1)
    bias = None if linear.bias is None else take_heads(linear.bias.unflatten(0, (-1, dim)), heads, 0).flatten()
    return F.linear(x, weight, bias).unflatten(-1, (-1, dim))


def projected_out(parts: Projections, x: Tensor, heads: Tensor) -> Tensor:
    """What the outputs of some heads, ``[B, rows, heads * D]``, add to the hidden states, without the bias."""
    return F.linear(x, take_heads(parts.o.weight.unflatten(1, (-1, parts.head_dim)), heads, 1).flatten(1))


def are_neighbours(heads: Tensor) -> bool:
    return len(heads) == 0 or int(heads[-1] - heads[0]) == len(heads) - 1


def take_heads(x: Tensor, heads: Tensor, dim: int) -> Tensor:
    """Some heads of ``[..., heads, ...]``: a view if they are neighbours, otherwise a copy."""
    if are_neighbours(heads):
        return x.narrow(dim, int(heads[0]) if len(heads) else 0, len(heads))
    return x.index_select(dim, heads.to(x.device))


def narrow_mlp(parts: Projections, x: Tensor, columns: int) -> Tensor:
    """The MLP with its first columns alone; the weights are views."""

    def first(linear: nn.Linear) -> Tensor:
        return F.linear(x, linear.weight[:columns], None if linear.bias is None else linear.bias[:columns])

    inner = parts.activation(first(parts.gate)) * first(parts.up)
    return F.linear(inner, parts.down.weight[:, :columns], parts.down.bias)


def merge_rows(rows: int, *parts: tuple[Tensor, CompactionPlan]) -> Tensor:
    """``[B, rows, H]`` from parts, each of which has the rows that its plan names."""
    result: Any = 0
    for x, plan in parts:
        result = result + expand([x], plan, rows, 1)[0]
    return result


def take_rows(x: Tensor, plan: CompactionPlan) -> Tensor:
    return compact([x], plan, 1)[0]
