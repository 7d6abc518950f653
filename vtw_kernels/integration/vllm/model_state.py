"""What the second model runner of vLLM, that of a GPU, needs: it hands the ranges of visual tokens to the metadata of
the layers that see text alone. **It has not been run**: on a CPU, vLLM has the first model runner only.

``get_model_state_cls`` of a model is vLLM's own hook for this. If it, the arguments of ``prepare_attn`` or those of a
builder's ``build`` change, the first step of an engine fails: the builder is given no ranges, and raises."""

from dataclasses import dataclass
from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vtw_kernels.integration.vllm.cache import TextOnlySpec
from vtw_kernels.integration.vllm.ranges import visual_ranges


@dataclass
class VisualRanges(ModelSpecificAttnMetadata):
    """Of each request of a step, in their order, what ``visual_ranges`` says."""

    by_request: list[list[tuple[int, int]]]

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        if not isinstance(attn_metadata_builder.kv_cache_spec, TextOnlySpec):
            return {}
        padding = [[]] * (num_reqs - len(self.by_request))  # requests that only fill up a graph
        return {"ranges": self.by_request + padding}


class TextModelState(DefaultModelState):
    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # By request; there is no such cache where the engine takes no images. If requests leave it before they end,
        # their answers are wrong from then on: attention.py cannot tell that from a request without images.
        features = self.encoder_cache.mm_features if self.supports_mm_inputs else {}
        ranges = VisualRanges([visual_ranges(features.get(request, ())) for request in input_batch.req_ids])
        return super().prepare_attn(input_batch, *args, model_specific_attn_metadata=ranges, **kwargs)
