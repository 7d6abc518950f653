"""Visual tokens withdrawal in transformers."""

from vtw_kernels.integration.withdraw import LayerCompaction, Withdrawal, apply, withdraw

__all__ = ["LayerCompaction", "Withdrawal", "apply", "withdraw"]
