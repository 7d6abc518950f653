"""Visual tokens withdrawal for vision-language models: fused kernels, and their use in transformers."""

from importlib import import_module
from typing import Any

from vtw_kernels.ops import (
    CompactionPlan,
    backend_info,
    compact,
    compact_,
    compact_paged_,
    expand,
    kl_divergence,
    kl_divergence_loss,
    kl_divergence_vocab_parallel,
    kl_from_state,
    kl_state,
    linear_kl_divergence,
    merge_kl_states,
    plan_compaction,
)

# Imported when asked for, so that the ops work without transformers.
ROOMS = dict.fromkeys(("Verification", "apply", "remove", "verify", "withdraw"), "integration")
ROOMS |= dict.fromkeys(("LayerSearch", "find_layer"), "layer_search")

__all__ = [
    "CompactionPlan",
    "LayerSearch",
    "Verification",
    "apply",
    "backend_info",
    "compact",
    "compact_",
    "compact_paged_",
    "expand",
    "find_layer",
    "kl_divergence",
    "kl_divergence_loss",
    "kl_divergence_vocab_parallel",
    "kl_from_state",
    "kl_state",
    "linear_kl_divergence",
    "merge_kl_states",
    "plan_compaction",
    "remove",
    "verify",
    "withdraw",
]


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return getattr(import_module(f"vtw_kernels.{ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
