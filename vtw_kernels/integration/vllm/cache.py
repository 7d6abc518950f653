"""A KV cache group whose blocks hold text tokens alone.

The layers that run without visual rows keep the ``t``-th text token of a request, counting text alone, in slot ``t %
block_size`` of its ``t // block_size``-th block: blocks are full, and visual tokens take none.

Prefix caching knows a prefix by the hash of all its tokens, images included, block by block of tokens. That is right
here too, for what these layers keep of a text token depends on the images before it. Only, a block of tokens adds
anything from none to ``block_size`` text tokens. So for each block of tokens, these layers' blocks that it reaches are
found by keys of its hash: ``SAME``, it adds to the last block, or nothing; ``NEXT``, it begins another one; and then,
by ``FULL``, the last one as it became full. A prefix that ends within a block of theirs is copied before the request
goes on in it, as vLLM does for other caches whose prefixes end so."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vtw_kernels.integration.vllm.ranges import text_tokens, visual_ranges

SAME, NEXT, FULL = b"same", b"next", b"full"


# Not a FullAttentionSpec: layers with those are merged into one group, subclasses included. scheduler.py looks whether
# there are two. A field that a release adds to AttentionSpec is copied too.
@dataclass(frozen=True, kw_only=True)
class TextOnlySpec(AttentionSpec):
    """What a layer keeps of a token is what it was; that it keeps text alone, this says."""

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> "TextOnlySpec":
        return cls(**{field.name: getattr(spec, field.name) for field in fields(AttentionSpec)})

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of a request without images."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class TextOnlyManager(SingleTypeKVCacheManager):
    """Allocates for text tokens what vLLM's own managers do for tokens: they count, and here the count is another one.

    Each method that is given tokens of a request and counts blocks is overridden. One that a release adds would count
    visual tokens: too many blocks at best, which the tests count. One that it renames or calls with more arguments
    fails at the first request.

    requests: by id, those of the scheduler, which alone knows where their images are; ``scheduler.py`` sets it."""

    requests: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ranges: dict[str, list[tuple[int, int]]] = {}

    def _text(self, request_id: str, tokens: int) -> int:
        if request_id not in self._ranges:
            self._ranges[request_id] = visual_ranges(self.requests[request_id].mm_features)
        return text_tokens(self._ranges[request_id], tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs: Any,
    ) -> int:
        counts = (num_tokens, total_computed_tokens, num_local_computed_tokens, num_tokens_main_model)
        tokens, total, local, main = (self._text(request_id, count) for count in counts)
        return super().get_num_blocks_to_allocate(request_id, tokens, new_computed_blocks, total, local, main, **kwargs)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        text = self._text(request_id, num_local_computed_tokens)
        super().add_local_computed_blocks(request_id, new_computed_blocks, text, num_external_computed_tokens)
        # Of tokens, as cache_blocks below has it; the base class counts blocks of its own.
        self.num_cached_block[request_id] = num_local_computed_tokens // self.block_size

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        text, main = self._text(request_id, num_tokens), self._text(request_id, num_tokens_main_model)
        return super().allocate_new_blocks(request_id, text, main)

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        size, blocks = self.block_size, self.req_to_blocks[request.request_id]
        first, last = self.num_cached_block.get(request.request_id, 0), num_tokens // self.block_size
        for i in range(first, last):
            before, text = (self._text(request.request_id, n * size) for n in (i, i + 1))
            if text == 0:
                continue  # nothing of it is kept here
            block_hash, begun = request.block_hashes[i], cdiv(before, size)
            if cdiv(text, size) == begun:
                self._remember(block_hash, SAME, blocks[begun - 1])
                continue
            if before % size:
                self._remember(block_hash, FULL, blocks[begun - 1])
            self._remember(block_hash, NEXT, blocks[begun])
        self.num_cached_block[request.request_id] = max(first, last)

    def _remember(self, block_hash: BlockHash, kind: bytes, block: KVCacheBlock) -> None:
        # A block may be found by many keys, and loses all of them when it is given away. The pool's public methods
        # make the key themselves. If a block had but one key, fewer prefixes would be found, and if it kept some, wrong
        # ones; the tests count the former and ask again for blocks that were given away.
        key = make_block_hash_with_group_id(block_hash + kind, self.kv_cache_group_id)
        self.block_pool._insert_block_hash(key, block, num_tokens=None)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._ranges.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: AttentionSpec,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        size = kv_cache_spec.block_size
        # One block for each group, in a row for each block of theirs. If vLLM no longer took the length that is
        # returned beside them, but counted blocks, it would find fewer tokens than there are, which the tests count.
        found: list[list[KVCacheBlock]] = []
        hit = 0
        for block_hash in block_hashes[: max_length // size]:

            def get(kind: bytes, block_hash: BlockHash = block_hash) -> list[KVCacheBlock] | None:
                return block_pool.get_cached_block(block_hash + kind, kv_cache_group_ids)

            # What is found by a longer prefix holds all that a shorter one says, so the last block is the latest one.
            if same := get(SAME):
                found[-1:] = [same]
            elif following := get(NEXT):
                if full := get(FULL):
                    found[-1:] = [full]
                found.append(following)
            else:
                break
            hit += size
        return tuple([row[i] for row in found] for i in range(len(kv_cache_group_ids))), hit


# vLLM's own way to add a spec. A registry with anything in it counts as one that has all of vLLM's own, so that these
# come first; without them, an engine fails at its start.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(TextOnlySpec, TextOnlyManager)
