"""Visual tokens withdrawal for vision-language models: fused kernels, and their use in transformers."""

from vtw_kernels.ops import (
    CompactionPlan,
    backend_info,
    compact,
    compact_,
    expand,
    kl_divergence,
    kl_from_state,
    kl_state,
    merge_kl_states,
    plan_compaction,
)

__all__ = [
    "CompactionPlan",
    "backend_info",
    "compact",
    "compact_",
    "expand",
    "kl_divergence",
    "kl_from_state",
    "kl_state",
    "merge_kl_states",
    "plan_compaction",
]
