"""Attention among text rows alone: their places, lengths and slots in each step.

Made as vLLM makes cross-attention, whose keys have lengths and slots of their own too: the backend stays what it is,
but its metadata are built of other numbers, and its cache is written with the slots that stand in them. Names that
vLLM no longer has fail at the first step, or before; what would not is said where it is used."""

import functools
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import subclass_attention_backend_with_overrides

from vtw_kernels.ops import PackedPlan, plan_packed_

Ranges = list[list[tuple[int, int]]]


@dataclass
class TextRows:
    """The text rows of a step. source: int32 ``[1, n]``, which of the step's rows they are."""

    source: Tensor


@functools.lru_cache  # layers of one backend make one group only if theirs is one and the same class
def text_backend(backend: type) -> type:
    builder_cls, impl_cls = backend.get_builder_cls(), backend.get_impl_cls()

    # A runner that made metadata of its own would give none with text_rows, which decoder.py asks for in each step.
    class TextMetadataBuilder(builder_cls):
        # Metadata that only get another block table would keep the slots of the group before. Under another name, the
        # new slots would be those of all rows; then answers differ from transformers wherever there are images.
        supports_update_block_table = False

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            scheduler = vllm_config.scheduler_config
            # Their addresses stay, for graphs.
            self._plan = PackedPlan.empty(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, device)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: Any,
            fast_build: bool = False,
            ranges: Ranges | None = None,
        ) -> Any:
            # A GPU's runner gives ranges (model_state.py).
            ranges = ranges_of(common_attn_metadata) if ranges is None else ranges
            common, text = text_metadata(common_attn_metadata, ranges, self.kv_cache_spec.block_size, self._plan)
            metadata = super().build(common_prefix_len, common, fast_build)
            metadata.text_rows = text
            return metadata

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            # A graph of decoding, for requests that do not exist.
            common = copy(common_attn_metadata)
            common.mm_req_doc_ranges = {}
            return super().build_for_cudagraph_capture(common)

    class TextImpl(impl_cls):
        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            # Backends leave out rows that metadata do not count. More come where a decoder's forward is not the one of
            # decoder.py after all, and without this answers would be wrong.
            if attn_metadata is not None and len(query) != attn_metadata.text_rows.source.shape[1]:
                raise RuntimeError(
                    f"vtw: expected the {attn_metadata.text_rows.source.shape[1]} text rows of a step in "
                    f"{layer.layer_name}, got {len(query)} rows"
                )
            # The layer would write the cache before this, with the slots of the step's rows: it asks its backend, which
            # says below that forward does. If it asked no longer, both would write, and answers would differ.
            writes = not backend.forward_includes_kv_cache_update
            if writes and attn_metadata is not None and key is not None and value is not None:
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

    return subclass_attention_backend_with_overrides(
        "TextOnly",
        backend,
        {
            "get_builder_cls": lambda: TextMetadataBuilder,
            "get_impl_cls": lambda: TextImpl,
            "forward_includes_kv_cache_update": True,
        },
    )


def ranges_of(common: Any) -> Ranges:
    """What the first model runner says, whose ranges end with a visual token; config.py has it say so. Were nothing
    said and taken for no images, visual rows would stay, in blocks that are not theirs.

    Raises:
        RuntimeError: it says nothing.
    """
    if common.mm_req_doc_ranges is None:
        raise RuntimeError("vtw: expected a model runner that says where images are, got one that does not")
    given, requests = common.mm_req_doc_ranges, len(common.seq_lens_cpu_upper_bound)
    return [sorted((start, last + 1) for start, last in given.get(i, ())) for i in range(requests)]


def text_metadata(common: Any, ranges: Ranges, block_size: int, memory: PackedPlan) -> tuple[Any, TextRows]:
    """``CommonAttentionMetadata`` of the text rows, of those of all rows, and which rows they are. Written to
    ``memory``, which is large enough for any step. ranges: of each request, as ``visual_ranges`` has them."""
    # Without speculative decoding, which is refused, the upper bound is the length. If it were larger, lengths on the
    # host and those that plan_packed_ finds would differ, and so would answers.
    lengths = common.seq_lens_cpu_upper_bound.numpy()
    requests = len(lengths)
    starts = common.query_start_loc_cpu.numpy()
    visual_start = np.zeros(requests + 1, np.int32)
    visual_start[1:] = np.cumsum([len(some) for some in ranges])
    visual = np.array([x for some in ranges for x in some], np.int32).reshape(-1, 2)

    def texts(tokens: np.ndarray) -> np.ndarray:
        """How many of the first so many tokens of each request are text."""
        until = np.repeat(tokens, np.diff(visual_start))
        hidden = np.maximum(np.minimum(visual[:, 1], until) - visual[:, 0], 0)
        return tokens - np.diff(np.concatenate([[0], hidden.cumsum()])[visual_start])

    text_lengths = texts(lengths)
    text_starts = np.zeros(requests + 1, np.int32)
    text_starts[1:] = np.cumsum(text_lengths - texts(lengths - np.diff(starts)))
    rows = int(text_starts[-1])

    device, room = common.query_start_loc.device, common.num_actual_tokens
    plan = PackedPlan(
        memory.source[:room], memory.query_start[: requests + 1], memory.seq_lens[:requests], memory.slots[:room]
    )
    on_device = (torch.from_numpy(x).to(device, non_blocking=True) for x in (visual, visual_start))
    plan_packed_(plan, common.query_start_loc, common.seq_lens, *on_device, common.block_table_tensor, block_size)

    # All fields that count rows or tokens are replaced. One that a release adds keeps what it says of all rows, and a
    # backend that goes by it answers otherwise than transformers.
    text = copy(common)
    text.query_start_loc, text.seq_lens, text.slot_mapping = plan.query_start, plan.seq_lens, plan.slots[:rows]
    text.query_start_loc_cpu = torch.from_numpy(text_starts)
    text.seq_lens_cpu_upper_bound = torch.from_numpy(text_lengths.astype(np.int32))
    text.num_actual_tokens = rows
    text.max_query_len = int(np.diff(text_starts).max(initial=0))
    text.max_seq_len = int(text_lengths.max(initial=0))
    text.mm_req_doc_ranges = text.positions = None  # attention looks at neither
    text._num_computed_tokens_cache = text._token_to_req_indices_cache = None  # of the other groups' lengths
    return text, TextRows(plan.source[None, :rows])
