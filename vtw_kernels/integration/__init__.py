"""Visual tokens withdrawal in transformers."""

from vtw_kernels.integration.withdraw import Withdrawal, apply, withdraw

__all__ = ["Withdrawal", "apply", "withdraw"]
