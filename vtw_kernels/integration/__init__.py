"""Visual tokens withdrawal in transformers."""

from vtw_kernels.integration.withdraw import Withdrawal, apply, remove, withdraw

__all__ = ["Withdrawal", "apply", "remove", "withdraw"]
