"""Replacing ``forward`` of a model's modules for a while."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class StandIns:
    """Functions in the place of ``forward`` of some modules, until ``remove``.

    active: whether they are to do anything. A function can outlive ``remove`` if another library has wrapped it since.
    """

    def __init__(self) -> None:
        self.stood_before: dict[nn.Module, Any] = {}  # what another library had put in the place of ``forward``
        self.placed: dict[nn.Module, Callable] = {}
        self.active = False

    def _stand_in(self, module: nn.Module, function: partial) -> None:
        function.__signature__ = inspect.signature(module.forward)  # which transformers and others look at
        if "forward" in vars(module):
            self.stood_before[module] = module.forward
        module.forward = self.placed[module] = function

    def remove(self) -> None:
        """Puts back what was there before. A function that another library has wrapped since stays, and does
        nothing."""
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
