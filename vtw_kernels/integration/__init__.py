"""Visual tokens withdrawal in transformers."""

from vtw_kernels.integration.layer_search import LayerSearch, find_layer
from vtw_kernels.integration.withdraw import Withdrawal, apply, withdraw

__all__ = ["LayerSearch", "Withdrawal", "apply", "find_layer", "withdraw"]
