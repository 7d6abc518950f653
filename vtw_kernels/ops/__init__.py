"""The ops, usable on their own: knows torch and the compiled extension, nothing of transformers."""

from vtw_kernels.ops import _extension  # noqa: F401, I001  registers torch.ops.vtw_kernels, which all others use
from vtw_kernels.ops import batching  # noqa: F401  registers the rules of torch.func.vmap
from vtw_kernels.ops._registration import backend_info
from vtw_kernels.ops.compaction import CompactionPlan, compact, compact_, compact_paged_, expand, plan_compaction
from vtw_kernels.ops.kl_divergence import kl_divergence, kl_from_state, kl_state, merge_kl_states
from vtw_kernels.ops.kl_divergence_loss import kl_divergence_loss
from vtw_kernels.ops.linear_kl_divergence import linear_kl_divergence
from vtw_kernels.ops.packed import PackedPlan, plan_packed_
from vtw_kernels.ops.vocab_parallel import kl_divergence_vocab_parallel

__all__ = [
    "CompactionPlan",
    "PackedPlan",
    "backend_info",
    "compact",
    "compact_",
    "compact_paged_",
    "expand",
    "kl_divergence",
    "kl_divergence_loss",
    "kl_divergence_vocab_parallel",
    "kl_from_state",
    "kl_state",
    "linear_kl_divergence",
    "merge_kl_states",
    "plan_compaction",
    "plan_packed_",
]
