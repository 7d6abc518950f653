"""Wrong input raises before any write, and says the op, the argument, what is wanted and what was given."""

import copy
import pickle
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import bytes_of

import vtw_kernels as vtw

# One valid call of each op; a bad case changes some of its arguments.
SOURCE = torch.tensor([[0, 2, 3, -1], [1, 2, 3, 4]], dtype=torch.int32)
LEFT_PADDED = torch.tensor([[-1, 0, 2, 3], [1, 2, 3, 4]], dtype=torch.int32)


def rows(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def zeros(*shape, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


def paged_call() -> dict[str, Any]:
    keep = torch.tensor([[True, False, True, True, False, True, True]] * 2)
    table, lens = rows([3, 0, 1, -1], [2, 4, -9, 99]), torch.tensor([6, 4], dtype=torch.int32)
    caches = [torch.randn(5, 2, 3, 4), torch.randn(5, 2, 1, 8).half()]
    return dict(caches=caches, block_table=table, seq_lens=lens, keep=keep, layout="NHD")


def packed_call() -> dict[str, Any]:
    plan = [x.fill_(9) for x in vtw.PackedPlan.empty(6, 2)]
    images = dict(visual=rows([0, 2], [3, 5], [1, 2]), visual_start=rows(0, 2, 3))
    table = rows([3, 1], [0, 2])
    return dict(plan=plan, query_start=rows(0, 2, 5), seq_lens=rows(6, 3), **images, block_table=table, block_size=2)


def valid_calls() -> dict[str, dict[str, Any]]:
    tensors = [torch.randn(2, 5, 3), torch.randn(4, 2, 5), torch.randn(2, 3, 6, 2)]
    dims = dict(token_dims=[1, 2, -2], batch_dims=[0, 1, 0])
    narrow = [x.narrow(d, 0, 4).clone() for x, d in zip(tensors, (1, 2, 2))]
    logits = dict(p_logits=torch.randn(2, 1, 7), q_logits=torch.randn(3, 7), temperature=1.0)
    state = torch.rand(2, 3, 5)
    backward = dict(grad=state, state=state, need_p=True, need_q=True)
    weighted = dict(logits, weight=torch.rand(2, 3), temperature=1.0)
    weighted = {name: weighted[name] for name in ("p_logits", "q_logits", "weight", "temperature")}
    projections = dict(
        p_hidden=torch.randn(2, 1, 4),
        p_weight=torch.randn(7, 4),
        q_hidden=torch.randn(3, 5),
        q_weight=torch.randn(7, 5),
        temperature=1.0,
        p_bias=torch.randn(7),
        q_bias=None,
        chunk=None,
    )
    return {
        "plan_compaction": dict(keep=torch.tensor([[True, False, True]]), length=-1, pad_left=False),
        "compact": dict(tensors=tensors, **dims, source=SOURCE),
        "compact_": dict(tensors=tensors, **dims, source=SOURCE),
        "expand": dict(tensors=narrow, **dims, source=SOURCE, length=6),
        "compact_paged_": paged_call(),
        "plan_packed_": packed_call(),
        "kl_divergence": logits,
        "kl_state": logits,
        "kl_divergence_with_state": logits,
        "kl_divergence_backward": logits | backward,
        "kl_divergence_with_gradients": weighted | dict(need_p=True, need_q=True),
        "scale_": dict(tensors=[torch.randn(3), torch.randn(2, 2).half()], factor=torch.tensor(2.0)),
        "merge_kl_states": dict(states=[state, state]),
        "kl_from_state": dict(state=state),
        "linear_kl_divergence": projections,
    }


@dataclass(frozen=True)
class Bad:
    ops: tuple[str, ...]
    changes: dict[str, Any]
    argument: str
    wanted: str  # a part of what the message says is wanted
    given: str  # and of what it says was given
    device_values: bool = False  # about the values of a plan, which are looked at in host memory only

    def arguments(self, op: str) -> dict[str, Any]:
        arguments = valid_calls()[op]
        for name, value in self.changes.items():
            first = re.match(r"(\w+)\[(\d+)\]", name)
            if first:  # one element of a list
                arguments[first[1]] = list(arguments[first[1]])
                arguments[first[1]][int(first[2])] = value
            else:
                arguments[name] = value
        return arguments


ALL = ("compact", "compact_", "expand")
AT_ONCE = ("kl_divergence_with_gradients",)
KL = ("kl_divergence", "kl_state", "kl_divergence_with_state", "kl_divergence_backward", *AT_ONCE)
SCALE = ("scale_",)
BACKWARD = ("kl_divergence_backward",)
LINEAR = ("linear_kl_divergence",)
PLAN = ("plan_compaction",)
PAGED = ("compact_paged_",)
PACKED = ("plan_packed_",)
OVERLAPPING = torch.randn(60)
SHARED = torch.randn(2, 5, 6)
PAGES = torch.randn(5, 2, 3, 4)

BAD = {
    # plan_compaction
    "keep_dtype": Bad(PLAN, {"keep": zeros(2, 3)}, "keep", "bool", "float32"),
    "keep_int64": Bad(PLAN, {"keep": zeros(2, 3, dtype=torch.int64)}, "keep", "bool", "int64"),
    "keep_1d": Bad(PLAN, {"keep": zeros(3, dtype=torch.bool)}, "keep", "2 dimensions", "[3]"),
    "keep_3d": Bad(PLAN, {"keep": zeros(1, 2, 3, dtype=torch.bool)}, "keep", "2 dimensions", "[1, 2, 3]"),
    "length_negative": Bad(PLAN, {"length": -2}, "length", "number of rows", "-2"),
    # the plan
    "source_int64": Bad(ALL, {"source": SOURCE.long()}, "source", "int32", "int64"),
    "source_float": Bad(ALL, {"source": SOURCE.float()}, "source", "int32", "float32"),
    "source_1d": Bad(ALL, {"source": SOURCE[0]}, "source", "2 dimensions", "[4]"),
    "source_3d": Bad(ALL, {"source": SOURCE[None]}, "source", "2 dimensions", "[1, 2, 4]"),
    "row_too_large": Bad(ALL, {"source": rows([0, 1, 2, 3], [0, 1, 2, 9])}, "source", "rows below", "9", True),
    "row_at_the_end": Bad(
        ("compact", "compact_"), {"source": rows([0, 5, -1], [0, 1, 2])}, "source", "below 5", "5", True
    ),
    "row_below_padding": Bad(
        ALL, {"source": rows([0, 1, 2, -2], [0, 1, 2, 3])}, "source", "-1 for padding", "-2", True
    ),
    "row_far_below": Bad(ALL, {"source": rows([0, 1, 2, 3], [-(2**31), 1, 2, 3])}, "source", "-1", str(-(2**31)), True),
    "descending": Bad(ALL, {"source": rows([0, 1, 2, 3], [0, 2, 1, 3])}, "source", "ascending", "another order", True),
    "repeated": Bad(ALL, {"source": rows([0, 1, 1, 3], [0, 1, 2, 3])}, "source", "ascending", "another order", True),
    "padding_inside": Bad(
        ALL, {"source": rows([0, 1, -1, 3], [0, 1, 2, 3])}, "source", "one side", "another order", True
    ),
    "padding_both_sides_inside": Bad(ALL, {"source": rows([-1, 1, -1, 3], [0, 1, 2, 3])}, "source", "", "", True),
    "descending_across_padding": Bad(ALL, {"source": rows([3, -1, -1, 1], [0, 1, 2, 3])}, "source", "", "", True),
    "left_padded": Bad(("compact_",), {"source": LEFT_PADDED}, "source", "right-padded", "left-padded", True),
    "length_of_expand": Bad(("expand",), {"length": -1}, "length", "number of rows", "-1"),
    "row_beyond_length": Bad(("expand",), {"length": 4}, "source", "below 4 of length", "4", True),
    # dimensions
    "token_dims_few": Bad(ALL, {"token_dims": [1, 2]}, "token_dims", "3 tensors", "2"),
    "token_dims_many": Bad(ALL, {"token_dims": [1, 2, 2, 1]}, "token_dims", "3 tensors", "4"),
    "batch_dims_few": Bad(ALL, {"batch_dims": []}, "batch_dims", "3 tensors", "0"),
    "token_dim_large": Bad(ALL, {"token_dims[1]": 3}, "token_dims[1]", "[-3, 2]", "3"),
    "token_dim_negative": Bad(ALL, {"token_dims[2]": -5}, "token_dims[2]", "[-4, 3]", "-5"),
    "batch_dim_large": Bad(ALL, {"batch_dims[2]": 4}, "batch_dims[2]", "[-4, 3]", "4"),
    "batch_dim_negative": Bad(ALL, {"batch_dims[0]": -4}, "batch_dims[0]", "[-3, 2]", "-4"),
    "equal_dims": Bad(ALL, {"batch_dims[1]": 2}, "batch_dims[1]", "token_dims[1]", "2"),
    "equal_dims_by_sign": Bad(ALL, {"batch_dims[1]": -1}, "batch_dims[1]", "token_dims[1]", "2"),
    # tensors
    "tensor_1d": Bad(ALL, {"tensors[2]": zeros(5), "token_dims[2]": 0}, "tensors[2]", "batch and a token", "[5]"),
    "tensor_0d": Bad(ALL, {"tensors[1]": zeros()}, "tensors[1]", "batch and a token", "[]"),
    "batch_mismatch": Bad(ALL, {"tensors[2]": zeros(3, 3, 4, 2)}, "tensors[2]", "2 of source", "3"),
    "batch_zero": Bad(ALL, {"tensors[0]": zeros(0, 4, 2)}, "tensors[0]", "2 of source", "0"),
    "batch_one_in_place": Bad(("compact_",), {"tensors[2]": zeros(1, 3, 5, 2)}, "tensors[2]", "2 of source", "1"),
    "tokens_mismatch": Bad(("expand",), {"tensors[2]": zeros(2, 3, 5, 2)}, "tensors[2]", "4 rows of source", "5"),
    "device": Bad(ALL, {"tensors[1]": zeros(4, 2, 4, device="meta")}, "tensors[1]", "device", ""),
    "source_device": Bad(ALL, {"source": SOURCE.to("meta")}, "tensors[0]", "device", ""),
    # memory, in place
    "same_tensor_twice": Bad(
        ("compact_",),
        {"tensors": [SHARED, torch.randn(2, 5), SHARED], "token_dims": [1, 1, 1], "batch_dims": [0, 0, 0]},
        "tensors[2]",
        "memory apart from tensors[0]",
        "overlap",
    ),
    "overlapping_slices": Bad(
        ("compact_",),
        {"tensors": [SHARED[..., :4], SHARED[..., 3:]], "token_dims": [1, 1], "batch_dims": [0, 0]},
        "tensors[1]",
        "memory apart from tensors[0]",
        "overlap",
    ),
    "overlapping_shift": Bad(
        ("compact_",),
        {
            "tensors": [OVERLAPPING[10:40].view(2, 5, 3), OVERLAPPING[:30].view(2, 5, 3)],
            "token_dims": [1] * 2,
            "batch_dims": [0] * 2,
        },
        "tensors[1]",
        "memory apart from tensors[0]",
        "overlap",
    ),
    "overlapping_other_dtype": Bad(
        ("compact_",),
        {"tensors": [SHARED, SHARED.view(torch.int32)], "token_dims": [1, 1], "batch_dims": [0, 0]},
        "tensors[1]",
        "memory apart from tensors[0]",
        "overlap",
    ),
    "inside_another": Bad(
        ("compact_",),
        {"tensors": [SHARED, SHARED[:, :, 2:3]], "token_dims": [1, 1], "batch_dims": [0, 0]},
        "tensors[1]",
        "memory apart from tensors[0]",
        "overlap",
    ),
    "expanded_inner": Bad(
        ("compact_",), {"tensors[0]": zeros(2, 5, 1).expand(2, 5, 3)}, "tensors[0]", "memory of its own", "strides"
    ),
    "expanded_batch": Bad(
        ("compact_",), {"tensors[2]": zeros(1, 3, 6, 2).expand(2, 3, 6, 2)}, "tensors[2]", "memory", "strides"
    ),
    "expanded_tokens": Bad(
        ("compact_",), {"tensors[1]": zeros(4, 2, 1).expand(4, 2, 5)}, "tensors[1]", "memory", "strides"
    ),
    "sliding_windows": Bad(
        ("compact_",), {"tensors[0]": zeros(30).as_strided((2, 5, 3), (8, 1, 1))}, "tensors[0]", "memory", ""
    ),
    # packed rows
    "packed_few": Bad(PACKED, {"plan": [zeros(3, dtype=torch.int32)]}, "plan", "4 tensors", "1"),
    "packed_source": Bad(PACKED, {"plan[0]": zeros(6, dtype=torch.int64)}, "plan[0]", "int32", "int64"),
    "packed_starts": Bad(PACKED, {"plan[1]": rows(0, 0)}, "plan[1]", "shape [3]", "[2]"),
    "packed_lens": Bad(PACKED, {"plan[2]": rows([0, 0])}, "plan[2]", "shape [2]", "[1, 2]"),
    "packed_slots": Bad(PACKED, {"plan[3]": rows(*[0] * 6)}, "plan[3]", "int64", "int32"),
    "packed_room": Bad(PACKED, {"plan[3]": zeros(5, dtype=torch.int64)}, "plan[3]", "shape [6]", "[5]"),
    "packed_steps": Bad(PACKED, {"plan[0]": rows(*[0] * 12)[::2]}, "plan[0]", "contiguous", "strides [2]"),
    "packed_query_int64": Bad(PACKED, {"query_start": zeros(3, dtype=torch.int64)}, "query_start", "int32", "int64"),
    "packed_query_none": Bad(PACKED, {"query_start": rows()}, "query_start", "[B + 1]", "[0]"),
    "packed_query_steps": Bad(PACKED, {"query_start": rows(0, 9, 2, 9, 5, 9)[::2]}, "query_start", "contiguous", "[2]"),
    "packed_lengths": Bad(PACKED, {"seq_lens": rows(6)}, "seq_lens", "shape [2]", "[1]"),
    "packed_lengths_device": Bad(PACKED, {"seq_lens": rows(6, 3).to("meta")}, "seq_lens", "device", ""),
    "packed_visual": Bad(PACKED, {"visual": rows([0, 2, 3])}, "visual", "shape [R, 2]", "[1, 3]"),
    "packed_visual_steps": Bad(PACKED, {"visual": rows([0, 3, 1], [2, 5, 2]).t()}, "visual", "contiguous", "[1, 3]"),
    "packed_images": Bad(PACKED, {"visual_start": rows(0, 3)}, "visual_start", "shape [3]", "[2]"),
    "packed_table": Bad(PACKED, {"block_table": rows([0, 1])}, "block_table", "[2, blocks]", "[1, 2]"),
    "packed_block_size": Bad(PACKED, {"block_size": 0}, "block_size", "at least 1", "0"),
    # and what their lists say
    "packed_first": Bad(PACKED, {"query_start": rows(1, 2, 5)}, "query_start", "0 first", "1", device_values=True),
    "packed_back": Bad(
        PACKED, {"query_start": rows(0, 5, 2)}, "query_start", "ascending", "2 behind 5", device_values=True
    ),
    "packed_beyond": Bad(
        PACKED, {"query_start": rows(0, 2, 7)}, "query_start", "at most the 6 rows", "7", device_values=True
    ),
    "packed_short": Bad(PACKED, {"seq_lens": rows(6, 2)}, "seq_lens", "at least the 3 rows", "2", device_values=True),
    "packed_no_range": Bad(
        PACKED, {"visual_start": rows(0, 2, 4)}, "visual_start", "at most the 3", "4", device_values=True
    ),
    "packed_overlap": Bad(
        PACKED,
        {"visual": rows([0, 4], [3, 5], [1, 2])},
        "visual",
        "ascending ranges apart",
        "[3, 5]",
        device_values=True,
    ),
    "packed_backwards": Bad(
        PACKED,
        {"visual": rows([0, 2], [5, 3], [1, 2])},
        "visual",
        "ascending ranges apart",
        "[5, 3]",
        device_values=True,
    ),
    "packed_blocks": Bad(
        PACKED,
        {"block_table": rows([3], [0])[:, :0]},
        "block_table",
        "1 blocks for the 2 text tokens",
        "0",
        device_values=True,
    ),
    # pages
    "paged_layout": Bad(PAGED, {"layout": "nhd"}, "layout", "NHD or HND", "nhd"),
    "paged_keep_dtype": Bad(PAGED, {"keep": zeros(2, 7)}, "keep", "bool", "float32"),
    "paged_keep_1d": Bad(PAGED, {"keep": zeros(7, dtype=torch.bool)}, "keep", "2 dimensions", "[7]"),
    "table_int64": Bad(PAGED, {"block_table": zeros(2, 4, dtype=torch.int64)}, "block_table", "int32", "int64"),
    "table_batch": Bad(PAGED, {"block_table": rows([0, 1, 2])}, "block_table", "[2, pages]", "[1, 3]"),
    "table_1d": Bad(PAGED, {"block_table": rows(0, 1)}, "block_table", "[2, pages]", "[2]"),
    "table_device": Bad(PAGED, {"block_table": rows([0, 1], [2, 3]).to("meta")}, "block_table", "device", ""),
    "lens_int64": Bad(PAGED, {"seq_lens": zeros(2, dtype=torch.int64)}, "seq_lens", "int32", "int64"),
    "lens_batch": Bad(PAGED, {"seq_lens": rows(1, 2, 3)}, "seq_lens", "shape [2]", "[3]"),
    "lens_2d": Bad(PAGED, {"seq_lens": rows([6], [4])}, "seq_lens", "shape [2]", "[2, 1]"),
    "cache_3d": Bad(PAGED, {"caches[1]": zeros(5, 2, 3)}, "caches[1]", "4 dimensions", "[5, 2, 3]"),
    "cache_pages": Bad(PAGED, {"caches[1]": zeros(6, 2, 3, 4)}, "caches[1]", "5 pages of 2 slots", "[6, 2, 3, 4]"),
    "cache_slots": Bad(PAGED, {"caches[1]": zeros(5, 3, 3, 4)}, "caches[1]", "5 pages of 2 slots", "[5, 3, 3, 4]"),
    "cache_of_the_other_layout": Bad(PAGED, {"layout": "HND"}, "caches[1]", "5 pages of 3 slots", "[5, 2, 1, 8]"),
    "cache_no_slots": Bad(PAGED, {"caches": [zeros(5, 0, 3, 4)]}, "caches[0]", "at least 1 slot", "[5, 0, 3, 4]"),
    "cache_device": Bad(PAGED, {"caches[1]": zeros(5, 2, 3, 4, device="meta")}, "caches[1]", "device", ""),
    "cache_twice": Bad(PAGED, {"caches": [PAGES, PAGES]}, "caches[1]", "memory apart from caches[0]", "overlap"),
    "cache_expanded": Bad(PAGED, {"caches[0]": zeros(5, 2, 1, 4).expand(5, 2, 3, 4)}, "caches[0]", "memory", "strides"),
    "lens_negative": Bad(PAGED, {"seq_lens": rows(6, -1)}, "seq_lens", "[0, 7]", "-1", True),
    "lens_beyond_keep": Bad(PAGED, {"seq_lens": rows(8, 4)}, "seq_lens", "[0, 7]", "8", True),
    "page_negative": Bad(PAGED, {"block_table": rows([3, -1, 1], [2, 4, 0])}, "block_table", "[0, 4]", "-1", True),
    "page_beyond": Bad(PAGED, {"block_table": rows([3, 0, 5], [2, 4, 0])}, "block_table", "[0, 4]", "5", True),
    "pages_few": Bad(
        PAGED, {"block_table": rows([3, 0], [2, 4])}, "block_table", "3 pages for a sequence of 6", "2", True
    ),
    "page_shared": Bad(PAGED, {"block_table": rows([3, 0, 1], [2, 0, 4])}, "block_table", "no shared page", "0", True),
    "page_twice": Bad(PAGED, {"block_table": rows([3, 0, 3], [2, 1, 4])}, "block_table", "no shared page", "3", True),
    # logits
    "p_dtype": Bad(
        KL, {"p_logits": zeros(2, 1, 7, dtype=torch.int64)}, "p_logits", "fp32, fp16, bf16 or fp64", "int64"
    ),
    "p_bool": Bad(KL, {"p_logits": zeros(2, 1, 7, dtype=torch.bool)}, "p_logits", "fp32, fp16, bf16 or fp64", "bool"),
    "p_complex": Bad(KL, {"p_logits": zeros(2, 1, 7, dtype=torch.cfloat)}, "p_logits", "fp32, fp16, bf16 or fp64", ""),
    "q_dtype": Bad(KL, {"q_logits": zeros(3, 7).bfloat16()}, "q_logits", "float32 of p_logits", "bfloat16"),
    "q_integer": Bad(KL, {"q_logits": zeros(3, 7, dtype=torch.int32)}, "q_logits", "float32 of p_logits", "int32"),
    "q_device": Bad(KL, {"q_logits": zeros(3, 7, device="meta")}, "q_logits", "device", ""),
    "vocabulary": Bad(KL, {"q_logits": zeros(3, 8)}, "q_logits", "7 of p_logits", "8"),
    "vocabulary_of_one": Bad(KL, {"q_logits": zeros(3, 1)}, "q_logits", "7 of p_logits", "1"),
    "leading": Bad(KL, {"p_logits": zeros(2, 7)}, "q_logits", "broadcast", "[2, 7] and [3, 7]"),
    "p_scalar": Bad(KL, {"p_logits": zeros()}, "p_logits", "1 dimension", "scalar"),
    "q_scalar": Bad(KL, {"q_logits": zeros()}, "q_logits", "1 dimension", "scalar"),
    **{
        f"temperature_{value}": Bad(
            (*KL, *LINEAR), {"temperature": value}, "temperature", "above 0", f"{value:g}".split(".")[0]
        )
        for value in (0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e39, 1e-39)
    },
    # what autograd hands to the backward
    "slope_shape": Bad(BACKWARD, {"grad": zeros(2, 3, 4)}, "grad", "[2, 3, 5]", "[2, 3, 4]"),
    "slope_shape_of_divergence": Bad(BACKWARD, {"grad": zeros(3, 5)}, "grad", "[2, 3]", "[3, 5]"),
    "slope_rank": Bad(BACKWARD, {"grad": zeros(3)}, "grad", "[2, 3, 5]", "[3]"),
    "slope_dtype": Bad(BACKWARD, {"grad": zeros(2, 3, 5).double()}, "grad", "float32", "float64"),
    "state_shape": Bad(BACKWARD, {"state": zeros(2, 5)}, "state", "[2, 3, 5]", "[2, 5]"),
    "state_dtype_": Bad(BACKWARD, {"state": zeros(2, 3, 5).double()}, "state", "float32", "float64"),
    # the loss
    "weight_shape": Bad(AT_ONCE, {"weight": zeros(3)}, "weight", "[2, 3]", "[3]"),
    "weight_dtype": Bad(AT_ONCE, {"weight": zeros(2, 3).half()}, "weight", "float32", "float16"),
    "weight_device": Bad(AT_ONCE, {"weight": zeros(2, 3, device="meta")}, "weight", "device", ""),
    "scaled_dtype": Bad(SCALE, {"tensors[1]": rows(1, 2)}, "tensors[1]", "fp32, fp16, bf16 or fp64", "int32"),
    "scaled_strides": Bad(SCALE, {"tensors[0]": zeros(2, 3).t()}, "tensors[0]", "contiguous", ""),
    "scaled_device": Bad(SCALE, {"tensors[1]": zeros(3, device="meta")}, "tensors[1]", "device", ""),
    "factor_shape": Bad(SCALE, {"factor": zeros(1)}, "factor", "scalar", "[1]"),
    "factor_dtype": Bad(SCALE, {"tensors[1]": zeros(3).double()}, "factor", "float64", "float32"),
    # projections
    "p_hidden_dtype": Bad(LINEAR, {"p_hidden": zeros(2, 1, 4, dtype=torch.int64)}, "p_hidden", "fp32, fp16", "int64"),
    "p_weight_dtype": Bad(LINEAR, {"p_weight": zeros(7, 4).half()}, "p_weight", "float32 of p_hidden", "float16"),
    "q_hidden_dtype": Bad(LINEAR, {"q_hidden": zeros(3, 5).double()}, "q_hidden", "float32 of p_hidden", "float64"),
    "q_weight_dtype": Bad(LINEAR, {"q_weight": zeros(7, 5).bfloat16()}, "q_weight", "float32 of p_hidden", "bfloat16"),
    "q_bias_dtype": Bad(LINEAR, {"q_bias": zeros(7, dtype=torch.int32)}, "q_bias", "float32 of p_hidden", "int32"),
    "p_weight_device": Bad(LINEAR, {"p_weight": zeros(7, 4, device="meta")}, "p_weight", "device", ""),
    "q_hidden_device": Bad(LINEAR, {"q_hidden": zeros(3, 5, device="meta")}, "q_hidden", "device", ""),
    "q_bias_device": Bad(LINEAR, {"q_bias": zeros(7, device="meta")}, "q_bias", "device", ""),
    "p_hidden_scalar": Bad(LINEAR, {"p_hidden": zeros()}, "p_hidden", "[..., H_p]", "scalar"),
    "q_hidden_scalar": Bad(LINEAR, {"q_hidden": zeros()}, "q_hidden", "[..., H_q]", "scalar"),
    "p_weight_size": Bad(LINEAR, {"p_weight": zeros(7, 5)}, "p_weight", "[V, 4] by p_hidden", "[7, 5]"),
    "q_weight_transposed": Bad(LINEAR, {"q_weight": zeros(5, 7)}, "q_weight", "[V, 5] by q_hidden", "[5, 7]"),
    "p_weight_1d": Bad(LINEAR, {"p_weight": zeros(4)}, "p_weight", "[V, 4] by p_hidden", "[4]"),
    "q_weight_3d": Bad(LINEAR, {"q_weight": zeros(1, 7, 5)}, "q_weight", "[V, 5] by q_hidden", "[1, 7, 5]"),
    "q_weight_vocabulary": Bad(LINEAR, {"q_weight": zeros(8, 5)}, "q_weight", "7 of p_weight", "8"),
    "p_bias_size": Bad(LINEAR, {"p_bias": zeros(4)}, "p_bias", "[7] by p_weight", "[4]"),
    "q_bias_2d": Bad(LINEAR, {"q_bias": zeros(1, 7)}, "q_bias", "[7] by q_weight", "[1, 7]"),
    "hidden_leading": Bad(LINEAR, {"p_hidden": zeros(2, 4)}, "q_hidden", "broadcast", "[2, 4] and [3, 5]"),
    "chunk_zero": Bad(LINEAR, {"chunk": 0}, "chunk", "at least 1", "0"),
    "chunk_negative": Bad(LINEAR, {"chunk": -1024}, "chunk", "at least 1", "-1024"),
    # states
    "state_last_dim": Bad(("kl_from_state",), {"state": zeros(3, 4)}, "state", "[..., 5]", "[3, 4]"),
    "state_0d": Bad(("kl_from_state",), {"state": zeros()}, "state", "[..., 5]", "[]"),
    "state_dtype": Bad(("kl_from_state",), {"state": zeros(5).half()}, "state", "fp32 or fp64", "float16"),
    "states_empty": Bad(("merge_kl_states",), {"states": []}, "states", "at least one", "0"),
    "states_last_dim": Bad(("merge_kl_states",), {"states[1]": zeros(2, 3, 6)}, "states[1]", "[..., 5]", "[2, 3, 6]"),
    "states_dtype": Bad(
        ("merge_kl_states",), {"states[0]": zeros(5, dtype=torch.int32)}, "states[0]", "fp32 or fp64", "int32"
    ),
    "states_shape": Bad(
        ("merge_kl_states",), {"states[1]": zeros(3, 5)}, "states[1]", "[2, 3, 5] of states[0]", "[3, 5]"
    ),
    "states_dtypes": Bad(
        ("merge_kl_states",), {"states[1]": zeros(2, 3, 5).double()}, "states[1]", "float32 of", "float64"
    ),
    "states_device": Bad(("merge_kl_states",), {"states[1]": zeros(2, 3, 5, device="meta")}, "states[1]", "device", ""),
}


def on_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """Copies all tensors but those of another device; two that share memory share its copy."""
    storages: dict[int, torch.UntypedStorage] = {}

    def moved(value):
        if isinstance(value, list):
            return [moved(x) for x in value]
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        memory = value.untyped_storage()
        copy = storages.setdefault(memory.data_ptr(), memory.clone() if device == "cpu" else memory.to(device=device))
        empty = torch.empty(0, dtype=value.dtype, device=device)
        return empty.set_(copy, value.storage_offset(), value.shape, value.stride())

    return {name: moved(value) for name, value in arguments.items()}


def call(backend, op: str, arguments: dict[str, Any]):
    if op == "kl_divergence_backward":
        names = ("grad", "p_logits", "q_logits", "state", "temperature", "need_p", "need_q")
        arguments = {name: arguments[name] for name in names}
    if op in LINEAR:  # the same for every backend
        return vtw.linear_kl_divergence(**arguments)
    return getattr(backend, op)(*arguments.values())


@pytest.mark.parametrize(
    "case, op", [pytest.param(case, op, id=f"{op}-{name}") for name, case in BAD.items() for op in case.ops]
)
def test_bad_input(backend, case, op):
    arguments = on_device(case.arguments(op), backend.device)
    if case.device_values and not backend.checks_values:
        call(backend, op, arguments)  # any result, but within bounds: the sanitizers watch
        return
    lists = (arguments[name] for name in ("tensors", "caches", "plan") if name in arguments)
    written = [x for some in lists for x in some if x.device.type != "meta"]
    before = [bytes_of(x) for x in written]
    # kl_divergence, kl_state and the backward are one op to those who read a message.
    named = "kl_divergence" if op in KL else op
    with pytest.raises(RuntimeError) as raised:
        call(backend, op, arguments)
    message = str(raised.value).splitlines()[0]
    found = re.fullmatch(rf"{re.escape(named)}\w*: {re.escape(case.argument)}: expected (.+), got (.+)", message)
    assert found, message
    assert case.wanted in found[1] and case.given in found[2], message
    assert [bytes_of(x) for x in written] == before


@pytest.mark.parametrize("op", valid_calls())
def test_valid_input(backend, op):
    """What the cases above change is itself accepted: each fails for the reason that it names."""
    call(backend, op, on_device(valid_calls()[op], backend.device))


@pytest.mark.parametrize(
    "strides", [(6, 12, 1), (3, 6, 1), (30, 3, 1)], ids=["batches_inside_tokens", "dense_reversed", "padded"]
)
def test_unusual_memory_that_is_not_shared(backend, strides):
    x = torch.randn(100, device=backend.device).as_strided((2, 5, 3), strides)
    want = x.clone()
    for b, kept in enumerate(([0, 2, 3], [1, 2, 3, 4])):
        want[b, : len(kept)] = x[b, kept]
    backend.compact_([x], [1], [0], SOURCE.to(backend.device))
    assert torch.equal(x, want)


def test_what_is_read_lies_in_what_is_written(backend):
    """Rows would go where a plan says that is no longer there."""
    memory = torch.zeros(64, dtype=torch.int32, device=backend.device)
    source, other = memory[4:8].view(1, 4), torch.arange(8, device=backend.device)[None]
    source.copy_(rows([1, 3, 4, -1]))
    before = memory.clone(), other.clone()
    for x in (memory[None, :8], memory[None, 6:20], memory[:64:2].view(1, 32)):
        for i, tensors in enumerate(([x, other], [other, x])):
            with pytest.raises(RuntimeError, match=rf"compact_: tensors\[{i}\]: expected memory apart from source"):
                backend.compact_(tensors, [1, 1], [0, 0], source)
    assert torch.equal(memory, before[0]) and torch.equal(other, before[1])
    backend.compact_([memory[None, 8:20], other], [1, 1], [0, 0], source)  # behind it

    call = {name: x for name, x in paged_call().items() if isinstance(x, torch.Tensor)}
    places = {"block_table": memory[:8], "seq_lens": memory[8:10], "keep": memory[12:16].view(torch.bool)[:14]}
    for name, place in places.items():
        inside = place.view(call[name].shape).copy_(call[name])
        given = {key: inside if key == name else x.to(backend.device) for key, x in call.items()}
        before = memory.clone()
        with pytest.raises(RuntimeError, match=rf"compact_paged_: caches\[0\]: expected memory apart from {name}"):
            backend.compact_paged_([memory.view(8, 2, 1, 4)], **given, layout="NHD")
        assert torch.equal(memory, before)

    call = on_device(packed_call(), backend.device)
    before = bytes_of(call["query_start"])
    with pytest.raises(RuntimeError, match=r"plan_packed_: plan\[1\]: expected memory apart from query_start"):
        backend.plan_packed_(*(call | {"plan": [call["plan"][0], call["query_start"], *call["plan"][2:]]}).values())
    assert bytes_of(call["query_start"]) == before


@pytest.mark.parametrize("length", [2**52, 2**61])
def test_a_result_that_no_memory_holds(length):
    """One that has a size, and one whose size is beyond 64 bits."""
    with pytest.raises(
        RuntimeError, match=r"out of memory: expected room for .*e\+\d+ GiB, a result of shape \[8, \d+\]"
    ):
        torch.ops.vtw_kernels.plan_compaction(torch.ones(8, 4, dtype=torch.bool), length)


# --- the public functions -------------------------------------------------------------------------

PUBLIC_PLAN = vtw.CompactionPlan(SOURCE, torch.tensor([3, 4]))


@pytest.mark.parametrize("op", [vtw.compact, vtw.compact_, vtw.expand], ids=lambda op: op.__name__)
def test_one_tensor_instead_of_a_list(op):
    length = [4] if op is vtw.expand else []
    with pytest.raises(TypeError, match=f"{op.__name__}: tensors: expected a list of tensors, got one tensor"):
        op(torch.zeros(2, 5, 3), PUBLIC_PLAN, *length, 1)


@pytest.mark.parametrize("op", [vtw.compact, vtw.compact_], ids=lambda op: op.__name__)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_plan_made_for_another_number_of_tokens(op, device):
    """A stale plan, or a wrong dimension, would lose rows without a word: values of a plan are not looked at on a
    device."""
    plan = vtw.plan_compaction(torch.ones(2, 4, dtype=torch.bool, device=device))
    x, y = torch.rand(2, 4, 8, device=device), torch.rand(2, 8, 4, device=device)
    before = x.clone()
    for tensors, dims in (([x, y], 1), ([x], 2), ([y], -2)):
        i = len(tensors) - 1
        given = rf"expected the 4 rows in dimension {dims} that plan was made for, got 8; .* longer=True"
        with pytest.raises(RuntimeError, match=rf"{op.__name__}: tensors\[{i}\]: {given}"):
            op(tensors, plan, dims)
    assert device == "meta" or torch.equal(x, before)
    op([x, y], plan, 1, longer=True)
    with pytest.raises(
        RuntimeError, match=r"expected at least the 4 rows in dimension 1 that plan was made for, got 3"
    ):
        op([x, x[:, :3]], plan, 1, longer=True)


def test_a_plan_made_for_another_length():
    plan = vtw.plan_compaction(torch.ones(2, 4, dtype=torch.bool, device="meta"), 2)
    x = torch.ones(2, 2, 3, device="meta")
    with pytest.raises(
        RuntimeError, match="expand: length: expected at least the 4 rows that plan was made for, got 3"
    ):
        vtw.expand([x], plan, 3, 1)
    assert vtw.expand([x], plan, 5, 1)[0].shape == (2, 5, 3)


def test_a_plan_knows_its_tokens():
    """Beside the two tensors that it has always been."""
    keep = torch.tensor([[True, False, True]])
    plan = vtw.plan_compaction(keep, 2)
    source, lengths = plan
    assert plan.tokens == 3 and len(plan) == 2 and source is plan.source and lengths is plan.lengths
    assert copy.copy(plan).tokens == pickle.loads(pickle.dumps(plan)).tokens == 3
    assert vtw.CompactionPlan(source, lengths).tokens is None and vtw.CompactionPlan(source, lengths, 3).tokens == 3
    vtw.compact([torch.zeros(1, 8)], vtw.CompactionPlan(source, lengths), 1)  # which says nothing of tokens


@pytest.mark.parametrize("pad", ["middle", "", None, "Right"])
def test_pad(pad):
    with pytest.raises(ValueError, match=rf"plan_compaction: pad: expected 'right' or 'left', got {pad!r}"):
        vtw.plan_compaction(torch.ones(1, 2, dtype=torch.bool), pad=pad)


@pytest.mark.parametrize("length", [-1, -7])
def test_negative_length(length):
    with pytest.raises(RuntimeError, match=f"plan_compaction: length: expected .*, got {length}"):
        vtw.plan_compaction(torch.ones(1, 2, dtype=torch.bool), length=length)
    with pytest.raises(RuntimeError, match=f"expand: length: expected .*, got {length}"):
        vtw.expand([torch.zeros(2, 4, 3)], PUBLIC_PLAN, length, 1)


@pytest.mark.parametrize("given", ["mask", "tuple", "none"])
def test_what_is_no_plan(given):
    keep = torch.ones(1, 2, dtype=torch.bool)
    plan = {"mask": keep, "tuple": tuple(vtw.plan_compaction(keep)), "none": None}[given]
    x, kind = torch.zeros(1, 2, 3), type(plan).__name__
    for op, call in (
        ("compact", lambda: vtw.compact([x], plan, 1)),
        ("compact_", lambda: vtw.compact_([x], plan, 1)),
        ("expand", lambda: vtw.expand([x], plan, 2, 1)),
    ):
        with pytest.raises(TypeError, match=f"^{op}: plan: expected what plan_compaction returns, got {kind}$"):
            call()


def test_no_second_derivative():
    """The gradients of the divergence can't be differentiated again: that must be said, not computed wrongly."""
    p = torch.randn(2, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(vtw.kl_divergence(p, torch.randn(2, 5)).sum(), p, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), p)
