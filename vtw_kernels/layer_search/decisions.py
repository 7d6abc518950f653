"""Recording what policies decide in one forward, and replaying it in another."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from vtw_kernels.integration.policies import Boundary, Policy

# By boundary, in ascending order, bool [B, tokens]: which visual tokens stay. None for none of them.
Decisions = dict[int, Tensor | None]


def recording(chosen: Policy | Sequence[Policy], decided: Decisions) -> list[Policy]:
    """Copies of the policies, which record in ``decided`` what they decide in a forward without a past."""

    def record(policy: Policy) -> Policy:
        copied = copy.copy(policy)

        def keep(boundary: Boundary) -> Tensor:
            stays = policy.keep(boundary)
            if isinstance(stays, Tensor) and stays.dtype == torch.bool and stays.shape == boundary.visual.shape:
                first = next(iter(decided.values()), boundary.visual)  # at the first boundary all rows are still there
                # Rows of padding have token 0, but are not visual, so they add nothing to it.
                counts = torch.zeros_like(first, dtype=torch.int32)
                stayed = (boundary.visual & stays).int()
                decided[boundary.layer] = counts.scatter_add(1, boundary.token.to(stayed.device), stayed) > 0
            return stays  # if it is anything else, the forward refuses it

        object.__setattr__(copied, "keep", keep)  # also of a frozen dataclass
        return copied

    return list(map(record, [chosen] if isinstance(chosen, Policy) else chosen))


class Replayed(Policy):
    """Decides what was recorded: in the same forward, or in one with more text at its end."""

    def __init__(self, decided: Decisions):
        self.decided, self.boundaries = decided, tuple(decided)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(boundaries={self.boundaries})"

    def keep(self, boundary: Boundary) -> Tensor:
        decided = self.decided[boundary.layer].to(boundary.token.device)
        return decided.gather(1, boundary.token.clamp(max=decided.shape[1] - 1))
