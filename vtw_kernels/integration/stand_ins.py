"""What stands in for ``forward`` of a model's modules for a while."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class StandIns:
    """active: whether they are to do something, for one that outlives this, as another library has wrapped it."""

    def __init__(self) -> None:
        self.stood_before: dict[nn.Module, Any] = {}  # what another library had put into a module's own ``forward``
        self.placed: dict[nn.Module, Callable] = {}
        self.active = False

    def _stand_in(self, module: nn.Module, function: partial) -> None:
        function.__signature__ = inspect.signature(module.forward)  # which transformers and others look at
        if "forward" in vars(module):
            self.stood_before[module] = module.forward
        module.forward = self.placed[module] = function

    def remove(self) -> None:
        """Where another library has wrapped a hook since, that goes on standing there, and does nothing."""
        for module, function in self.placed.items():
            if vars(module).get("forward") is not function:
                continue
            if module in self.stood_before:
                module.forward = self.stood_before[module]
            else:
                del module.forward
        self.active = False

    def _call(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if module in self.stood_before:
            return self.stood_before[module](*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)
