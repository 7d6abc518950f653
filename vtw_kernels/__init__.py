"""Visual tokens withdrawal for vision-language models: fused kernels, and their use in transformers."""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _installed_elsewhere() -> ModuleSpec | None:
    """The installed package, if this one is a checkout that is not compiled: Python looks in the current directory
    first, and so finds the checkout although a compiled package is installed. None if this one is compiled, or no other
    is found."""
    if PathFinder.find_spec(f"{__name__}._C", __path__) is not None:
        return None
    checkout = Path(__path__[0]).parent.resolve()
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != checkout]
    for finder in sys.meta_path:
        spec = finder.find_spec(__name__, elsewhere)
        if spec is not None and PathFinder.find_spec(f"{__name__}._C", spec.submodule_search_locations) is not None:
            return spec
    return None


if (_installed := _installed_elsewhere()) is not None:
    warnings.warn(f"{Path(__file__).parent} is not compiled; imported instead: {_installed.origin}", stacklevel=2)
    # `import` returns what is in sys.modules after this file has run.
    sys.modules[__name__] = module_from_spec(_installed)
    assert _installed.loader is not None  # as for every file
    _installed.loader.exec_module(sys.modules[__name__])
else:
    from vtw_kernels.ops import (
        CompactionPlan,
        PackedPlan,
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
        plan_packed_,
    )

# By module, names that are imported when they are asked for, so that the ops work without transformers; type checkers
# see them as they are.
_LAZY = {
    "integration": (
        *("Boundary", "ExitRouters", "Policy", "RandomVisual", "SkipAdapters", "SkipAttention", "TopAttention"),
        *("Verification", "VisualPruning", "Withdraw", "apply", "parse_policy", "prune_visual", "remove"),
        *("skip_attention", "verify", "withdraw"),
    ),
    "layer_search": (
        *("Bandit", "Comparison", "ExitTraining", "LayerSearch", "SkipSearch", "compare", "find_layer"),
        *("find_skippable", "train_exit"),
    ),
    "layer_search.skip_training": ("AdapterTraining", "SkipTraining", "train_skip"),
    "layer_search.visual_heads": ("VisualHeads", "find_visual_heads"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "AdapterTraining",
    "Bandit",
    "Boundary",
    "CompactionPlan",
    "Comparison",
    "ExitRouters",
    "ExitTraining",
    "LayerSearch",
    "PackedPlan",
    "Policy",
    "RandomVisual",
    "SkipAdapters",
    "SkipAttention",
    "SkipSearch",
    "SkipTraining",
    "TopAttention",
    "Verification",
    "VisualHeads",
    "VisualPruning",
    "Withdraw",
    "apply",
    "backend_info",
    "compact",
    "compact_",
    "compact_paged_",
    "compare",
    "expand",
    "find_layer",
    "find_skippable",
    "find_visual_heads",
    "kl_divergence",
    "kl_divergence_loss",
    "kl_divergence_vocab_parallel",
    "kl_from_state",
    "kl_state",
    "linear_kl_divergence",
    "merge_kl_states",
    "parse_policy",
    "plan_compaction",
    "plan_packed_",
    "prune_visual",
    "remove",
    "skip_attention",
    "train_exit",
    "train_skip",
    "verify",
    "withdraw",
]


if TYPE_CHECKING:
    from vtw_kernels.integration.exit_routers import ExitRouters
    from vtw_kernels.integration.policies import Boundary, Policy, RandomVisual, TopAttention, Withdraw
    from vtw_kernels.integration.policy_text import parse_policy
    from vtw_kernels.integration.pruning.prune import prune_visual
    from vtw_kernels.integration.pruning.visual_pruning import VisualPruning
    from vtw_kernels.integration.skipping.adapters import SkipAdapters
    from vtw_kernels.integration.skipping.skip_attention import SkipAttention, skip_attention
    from vtw_kernels.integration.verify import Verification, verify
    from vtw_kernels.integration.withdraw import apply, remove, withdraw
    from vtw_kernels.layer_search import compare, find_layer, find_skippable, train_exit
    from vtw_kernels.layer_search.comparison import Comparison
    from vtw_kernels.layer_search.exit_training import ExitTraining
    from vtw_kernels.layer_search.result import LayerSearch
    from vtw_kernels.layer_search.skip_search import Bandit, SkipSearch
    from vtw_kernels.layer_search.skip_training import AdapterTraining, SkipTraining, train_skip
    from vtw_kernels.layer_search.visual_heads import VisualHeads, find_visual_heads
else:

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            return getattr(import_module(f"vtw_kernels.{_MODULE_OF[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
