"""Visual tokens withdrawal in transformers."""

from vtw_kernels.integration.verify import Verification, verify
from vtw_kernels.integration.withdraw import Withdrawal, apply, remove, withdraw

__all__ = ["Verification", "Withdrawal", "apply", "remove", "verify", "withdraw"]
