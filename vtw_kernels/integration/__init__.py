"""Visual tokens withdrawal in transformers."""

from vtw_kernels.extras import require

require("vtw_kernels.integration", "transformers")

from vtw_kernels.integration.exit_routers import ExitRouters
from vtw_kernels.integration.policies import Boundary, Policy, RandomVisual, TopAttention, Withdraw
from vtw_kernels.integration.policy_text import parse_policy
from vtw_kernels.integration.pruning.prune import prune_visual
from vtw_kernels.integration.pruning.visual_pruning import VisualPruning
from vtw_kernels.integration.skipping.adapters import SkipAdapters
from vtw_kernels.integration.skipping.skip_attention import SkipAttention, Skipping, skip_attention
from vtw_kernels.integration.verify import Verification, verify
from vtw_kernels.integration.withdraw import Withdrawal, apply, remove, withdraw

__all__ = [
    "Boundary",
    "ExitRouters",
    "Policy",
    "RandomVisual",
    "SkipAdapters",
    "SkipAttention",
    "Skipping",
    "TopAttention",
    "Verification",
    "VisualPruning",
    "Withdraw",
    "Withdrawal",
    "apply",
    "parse_policy",
    "prune_visual",
    "remove",
    "skip_attention",
    "verify",
    "withdraw",
]
