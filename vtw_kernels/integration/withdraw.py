"""Visual Tokens Withdrawal (VTW, arXiv 2405.05803) in transformers.

Before decoder layer ``K``, the rows of the visual tokens are removed; or, with a policy, some of them, there or before
several layers (``policies.py``). The other tokens keep their positions. Where images come in by cross-attention, that
is left out from ``K`` on (``cross_attention.py``).

Two rules make this independent of the model: masks are gathered, never rebuilt (kept rows, kept columns), and cache
layers from ``K`` on report lengths as if nothing had been withdrawn (``cache.py``). ``hooks.py`` follows a forward."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vtw_kernels.integration import compat
from vtw_kernels.integration.cross_attention import CrossAttentionHooks, check_layers
from vtw_kernels.integration.families import find_parts, find_visual_tokens
from vtw_kernels.integration.hooks import Hooks, PromptKnown
from vtw_kernels.integration.policies import Policy, boundaries_of, chosen_layer, policies_of, saved_in_config

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class withdraw(ContextDecorator):  # in lower case, as it is used like a function
    """Decoder layers ``0..layer-1`` see the visual tokens, layers from ``layer`` on run and cache without them.

    The result equals masking the visual keys for every query in those layers. ``generate``, training, and further turns
    on the same cache work as they do without it; prompts of text alone take exactly the usual path.

    ``last_hidden_state``, ``logits`` and ``hidden_states`` keep their length, with zeros in withdrawn rows and in
    padding. So labels stay aligned, but the label that a withdrawn row would predict (that of the first text token
    after an image) must be -100. ``attentions`` of the later layers are short. ``save_pretrained`` writes the layer
    into the config, as ``vtw``; the files of a PEFT adapter hold no config. A static cache has its full length in all
    layers, so it saves computation only. With gradient checkpointing, call ``backward`` inside the context, or use
    ``apply``: older releases of transformers recompute a layer with the hooks that it has at that time.

    Where images come in by cross-attention, layers from ``layer`` on treat all text as the model itself treats text
    without an image. In Mllama, whose cross-attention layers are counted with the others, these are not run at all; in
    steps of decoding, the model then leaves them out of ``hidden_states`` as well. In Idefics, the block in front of a
    decoder layer attends to nothing, and its MLP runs. No image states are projected or cached for them. ``layer`` is
    an int, or some for training, and all rows keep their outputs and labels.

    Args:
        model: of transformers, with or without its language modelling head, also within PEFT, DDP or torch.compile.
            Attention eager, sdpa, flex or flash (both with dynamic caches), or one of your own that is registered with
            a mask function.
        layer: 1..number of decoder layers; the latter withdraws nothing. Some models allow fewer, and the error says
            why. A sequence of layers, such as ``range(8, 24)``, is for training: each forward draws one, with torch's
            generator of the CPU. A path is that of a file which ``LayerSearch.save`` or, with the ending .safetensors,
            ``ExitRouters.save`` wrote. None takes the layer in the model's config. A ``Policy``, or several at
            different layers, says which visual tokens leave, and where; ``Withdraw(layer)`` is the same as ``layer``.
            Of a policy, a config gets only the ``repr``, which can not be loaded.
        visual_mask: bool ``[B, S]``, which tokens are visual, counted from the start of the sequence (of the cache, not
            of the forward); later tokens are text. Rows are repeated for beams. By default the placeholder tokens in
            ``input_ids`` or unmerged ``inputs_embeds``; a placeholder that continues a cache without any visual input
            in the same forward (a sampled one) is text.
        decoder: the module that has ``.layers``, for models that do not have it where others do.

    Raises:
        TypeError, ValueError: here for an argument, later from the forward for inputs or a cache that can't be handled,
            among them a label that is wanted of a withdrawn row, and a prompt whose last token is visual, which leaves
            no row to predict from. Chunks of a prompt that end in an image go to ``generate(prefill_chunk_size=)``, or
            to ``model.base_model``, if that makes no logits.

    Threads may share the model. A model may be compiled before or within the context, or be passed as
    ``torch.compile(model)``. Before a forward that may have visual tokens, their number is read outside of the graph
    (with ``fullgraph=True`` that is an error), and so is what a policy looks at later; a step of decoding with a static
    cache is one graph.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int | Sequence[int] | str | Path | Policy | Sequence[Policy] | None = None,
        *,
        visual_mask: Tensor | None = None,
        decoder: nn.Module | None = None,
    ):
        self._handle = Withdrawal(model, layer, visual_mask, decoder)
        self._used = False

    def __enter__(self) -> "Withdrawal":
        self._used = True
        return self._handle.place()

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def __call__(self, function: Decorated) -> Decorated:
        self._used = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not getattr(self, "_used", True):  # without the attribute, an argument was refused
            warnings.warn(
                "withdraw: nothing was withdrawn, as its context was not entered; write `with withdraw(...):`, or call "
                "apply(...) for withdrawal that stays",
                stacklevel=2,
            )


def apply(
    model: nn.Module,
    layer: int | Sequence[int] | str | Path | Policy | Sequence[Policy] | None = None,
    *,
    visual_mask: Tensor | None = None,
    decoder: nn.Module | None = None,
) -> "Withdrawal":
    """The same as ``withdraw``, until ``remove()`` of the returned handle, or ``remove(model)``, is called. A copy of
    the model is under withdrawal as well, until it is restored itself."""
    return Withdrawal(model, layer, visual_mask, decoder).place()


def remove(model: nn.Module) -> None:
    """Restores a model that is under withdrawal; also a copy of one, which has no handle of its own.

    Raises:
        ValueError: it is not.
    """
    handle = _active(find_parts(unwrapped(model)).decoder)
    if handle is None:
        raise ValueError("model: expected one under withdrawal, got one without")
    handle.remove()


class Withdrawal:
    """What ``apply`` returns: withdrawal from one model, in effect until ``remove()``."""

    def __init__(
        self,
        model: nn.Module,
        layer: int | Sequence[int] | str | Path | Policy | Sequence[Policy] | None,
        visual_mask: Tensor | None,
        decoder: nn.Module | None,
    ):
        self.model = model = unwrapped(model)
        self.parts = find_parts(model, decoder)
        self._prompt = PromptKnown(model)
        self.layer = chosen_layer(layer, model, len(self.parts.layers))
        policies = self.layer if isinstance(self.layer, list) else [self.layer]
        for policy in policies:
            if isinstance(policy, Policy):
                policy.check_model(model, self.parts.config, len(self.parts.layers))
        layers = boundaries_of(self.layer)
        for candidate in layers:
            self.parts.check_layer(candidate)
        if self.parts.cross_attention:
            check_layers(self.layer)
            self.parts.check_visual_mask(visual_mask)
            self._hooks = CrossAttentionHooks(self.parts, partial(policies_of, self.layer), min(layers))
            return
        for policy in policies:
            if isinstance(policy, Policy) and policy.attention:
                self.parts.check_attention_before(policy.boundaries)
                if (getattr(model, "_tp_size", None) or 1) > 1:
                    raise ValueError(
                        f"model: expected all heads on each rank, as {policy!r} looks at their attention, got a "
                        "tensor-parallel one"
                    )
        if visual_mask is not None and not isinstance(visual_mask, Tensor):
            raise TypeError(f"visual_mask: expected a tensor, got {type(visual_mask).__name__}")
        if visual_mask is not None and (visual_mask.dtype != torch.bool or visual_mask.ndim != 2):
            raise ValueError(
                f"visual_mask: expected bool [B, S], got {visual_mask.dtype} with shape {list(visual_mask.shape)}"
            )
        if visual_mask is None and not self.parts.token_ids:
            find_visual_tokens(self.parts, {})  # raises, and says why a mask is needed
        self._hooks = Hooks(model, self.parts, partial(policies_of, self.layer), min(layers), visual_mask)

    def place(self) -> "Withdrawal":
        """Puts it into effect.

        Raises:
            ValueError: another one is, or visual pruning that it is no part of.
        """
        if (active := _active(self.parts.decoder)) is not None:
            raise ValueError(
                f"model: expected one without withdrawal, got one with withdraw(layer={active.layer}) in effect"
            )
        pruned = getattr(self.parts.decoder, "_vtw_pruning", None)
        if pruned is not None and pruned.withdrawal is not self:
            raise ValueError(
                "model: expected one without visual pruning, which takes the policy as an argument, got one under "
                f"{pruned.pruning!r}"
            )
        compat.warn_if_newer()
        self.parts.decoder._vtw_withdrawal = self
        self._config_before = getattr(self.model.config, "vtw", None)
        self.model.config.vtw = saved_in_config(self.layer)
        if self._hooks.first < len(self.parts.layers):
            self._hooks.place()
            self._prompt.place()
        return self

    def remove(self) -> None:
        """Restores the model; calling it again does nothing."""
        if _active(self.parts.decoder) is not self:
            return
        del self.parts.decoder._vtw_withdrawal
        self._hooks.remove()
        self._prompt.remove()
        if self._config_before is not None:
            self.model.config.vtw = self._config_before
        else:
            del self.model.config.vtw


def _active(decoder: nn.Module) -> Withdrawal | None:
    return getattr(decoder, "_vtw_withdrawal", None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers within torch.compile, PEFT or data parallelism."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model
