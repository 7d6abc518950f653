"""The ops of vtw_kernels as the package ``kernels`` loads them, by the signatures of ``csrc/ops.cpp``.

Gradients, ``torch.compile`` and Triton's kernels are in the package ``vtw_kernels``, which registers ops of the same
names: a process has one or the other.
"""

import torch

if hasattr(torch.ops.vtw_kernels, "plan_compaction"):  # a second library with the same ops would end the process
    raise ImportError("vtw_kernels: another build of its ops is loaded in this process; load one of the two")

from . import _ops  # noqa: F401  registers them

_OPS = torch.ops.vtw_kernels
plan_compaction, compact, compact_, expand = _OPS.plan_compaction, _OPS.compact, _OPS.compact_, _OPS.expand
compact_paged_, plan_packed_ = _OPS.compact_paged_, _OPS.plan_packed_
kl_divergence, kl_divergence_loss = _OPS.kl_divergence, _OPS.kl_divergence_loss
kl_state, merge_kl_states, kl_from_state = _OPS.kl_state, _OPS.merge_kl_states, _OPS.kl_from_state
linear_kl_divergence = _OPS.linear_kl_divergence

__all__ = [
    "compact",
    "compact_",
    "compact_paged_",
    "expand",
    "kl_divergence",
    "kl_divergence_loss",
    "kl_from_state",
    "kl_state",
    "linear_kl_divergence",
    "merge_kl_states",
    "plan_compaction",
    "plan_packed_",
]
