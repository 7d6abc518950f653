"""A policy of a comparison, in the form in which it is put into effect on a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.policies import Policy, Withdraw
from vtw_kernels.integration.skipping.skip_attention import SkipAttention, Skipping, skip_attention
from vtw_kernels.integration.withdraw import Withdrawal, withdraw


@dataclass(frozen=True)
class Setting:
    """Which rows leave before which layers, and in which layers attention is skipped; or a function of the user's.

    policy: a layer, a policy, or policies that act together; the number of layers if nothing leaves. skip: what is
    skipped, or None. skipped: its layers. function: from the model to a context manager within which it runs, or None.
    """

    policy: Any
    skip: SkipAttention | None = None
    skipped: tuple[int, ...] = ()
    function: Callable[[nn.Module], AbstractContextManager] | None = None

    @classmethod
    def of(cls, model: nn.Module, chosen: Any, decoder: nn.Module | None) -> "Setting":
        """What ``compare`` takes. Raises TypeError, ValueError for something else."""
        visual_mask = torch.zeros(1, 1, dtype=torch.bool)  # for models whose config names no visual token
        if is_function(chosen):
            with chosen(model):  # so that a function that does not fit the model raises now
                return cls(len(find_parts(model, decoder).layers), function=chosen)
        steps = list(chosen) if isinstance(chosen, list | tuple) else [chosen]
        skips = [x for x in steps if isinstance(x, SkipAttention)]
        if len(skips) > 1:
            raise ValueError(f"policies: expected at most one skip in each, got {len(skips)} in {chosen!r}")
        if not skips:
            return cls(Withdrawal(model, chosen, visual_mask, decoder).layer)
        handle = Skipping(model, skips[0].layers, skips[0].adapters, True, decoder)
        others = [Withdraw(x) if isinstance(x, int) else x for x in steps if x is not skips[0]]
        policy = others[0] if len(others) == 1 else others or len(handle.parts.layers)
        policy = Withdrawal(model, policy, visual_mask, decoder).layer
        return cls(policy, SkipAttention(handle.layers, handle.adapters), handle.layers)

    @property
    def is_layer(self) -> bool:
        return isinstance(self.policy, int)

    def replaced(self, policy: Any) -> "Setting":
        return replace(self, policy=policy)

    @contextmanager
    def under(self, model: nn.Module, visual_mask: Tensor | None, decoder: nn.Module | None) -> Iterator[None]:
        with ExitStack() as stack:
            if self.function is not None:
                stack.enter_context(self.function(model))
                yield
                return
            if self.skip is not None:
                stack.enter_context(skip_attention(model, self.skip.layers, self.skip.adapters, decoder=decoder))
            stack.enter_context(withdraw(model, self.policy, visual_mask=visual_mask, decoder=decoder))
            yield


def is_function(chosen: Any) -> bool:
    """Whether what ``compare`` is given is a function of the model."""
    return callable(chosen) and not isinstance(chosen, Policy)


def settings_of(model: nn.Module, policies: Mapping[str, Any], decoder: nn.Module | None) -> dict[str, Setting]:
    """By name, what ``compare`` takes. Raises TypeError, ValueError for something else."""
    return {
        name: policy if isinstance(policy, Setting) else Setting.of(model, policy, decoder)
        for name, policy in policies.items()
    }
