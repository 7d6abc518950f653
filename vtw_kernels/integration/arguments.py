"""What modules of transformers are called with, found by what it is: names change between releases."""

import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

# Where nothing tells its type.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


class Arguments:
    """The parameters of a module's ``forward``.

    names: of those that can be positional. passes_on: whether it takes keyword arguments that it does not know, which
    modules of transformers hand on to those inside. cache, mask: which parameter is the cache, and the attention mask
    of a decoder layer; None for none.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        parameters = inspect.signature(module.forward).parameters.values()
        if any(x.kind is x.VAR_POSITIONAL for x in parameters):  # a library's wrapper, which takes anything
            module = getattr(module, "_orig_mod", module)
            parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        self.names = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
        self.passes_on = any(x.kind is x.VAR_KEYWORD for x in parameters)
        typed = [x.name for x in parameters if "Cache" in str(x.annotation)]
        self.cache = next((name for name in (*typed, *CACHE_NAMES) if name in self.names), None)
        masks = [name for name in self.names if name.endswith("mask")]
        self.mask = next((name for name in ("attention_mask", *masks) if name in masks), None)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, args)) | kwargs

    def cache_in(self, args: tuple, kwargs: dict[str, Any]) -> Cache | None:
        """As ``cache_among``; quick where the cache comes by its name, as in every layer of every step."""
        cache = kwargs.get(self.cache)
        return cache if isinstance(cache, Cache) else self.cache_among(self.named(args, kwargs))

    def cache_among(self, named: dict[str, Any]) -> Cache | None:
        """The cache that ``forward`` is given, also by a name that it no longer has.

        Raises:
            TypeError: something else in its place.
        """
        for value in named.values():
            if isinstance(value, Cache):
                return value
        for name in (self.cache, *CACHE_NAMES):
            if named.get(name) is not None:
                raise TypeError(f"{name}: expected a Cache of transformers, got {type(named[name]).__name__}")
        return None

    def check_layer(self) -> None:
        """Raises ValueError for a decoder layer that is not called as those of transformers are."""
        for what, name in (("a Cache", self.cache), ("an attention mask", self.mask)):
            if name is None:
                raise ValueError(
                    f"decoder: expected layers that are called with {what}, got {type(self.module).__name__} with the "
                    f"parameters {', '.join(self.names)}"
                )
