"""Visual Tokens Withdrawal (VTW, arXiv 2405.05803) in transformers, by hooks and cache layers alone.

Before decoder layer ``K``, the rows of the visual tokens are compacted away; the other tokens keep their positions.
Two rules make that independent of the model: masks are gathered, never rebuilt (kept rows, kept columns), and cache
layers from ``K`` on report lengths as if nothing had been withdrawn (``cache.py``).
"""

import inspect
import json
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, StaticLayer

from vtw_kernels.integration import compat
from vtw_kernels.integration.cache import Slots, shifted, slots_of, wrap_layers
from vtw_kernels.integration.families import NO_PLACEHOLDER, find_parts, find_visual_tokens
from vtw_kernels.integration.masks import attended_tokens, check_mask, kind_of_masks, take_blocks, take_columns
from vtw_kernels.ops import CompactionPlan, compact, expand, plan_compaction

# In names of inputs that carry visual features. Grids do not, and some models pass them on while decoding.
VISUAL_INPUTS, NOT_VISUAL = ("pixel", "image", "video", "mm_encoder"), "grid"


@contextmanager
def withdraw(
    model: nn.Module,
    layer: int | Sequence[int] | str | Path | None = None,
    *,
    visual_mask: Tensor | None = None,
    decoder: nn.Module | None = None,
) -> Iterator["Withdrawal"]:
    """Decoder layers ``0..layer-1`` see the visual tokens, layers from ``layer`` on run and cache without them.

    Equal to hiding the visual keys from every query in those layers. ``generate``, training, and further turns on the
    same cache work as without; text-only prompts take exactly the usual path. ``last_hidden_state``, ``logits`` and
    ``hidden_states`` keep their length, with zeros in rows that were withdrawn and in those of padding beside them; so
    labels stay aligned, but a label that a withdrawn row would predict (that of the first text token after an image)
    must be -100. ``attentions`` of the later layers are short. ``save_pretrained`` writes the layer into the config, as
    ``vtw``. With gradient checkpointing, call ``backward`` inside
    the context, or use ``apply``: older releases of transformers recompute a layer with the hooks it has by then.

    Args:
        model: of transformers, with or without its language modelling head, also within PEFT, DDP or torch.compile.
            Attention eager, sdpa, flex or flash (both with dynamic caches), or one of your own that is registered with a
            mask function.
        layer: 1..number of decoder layers; the latter withdraws nothing. Some models allow fewer, and the error says why.
            A sequence of them, as ``range(8, 24)``, is for training: each forward draws one, with torch's generator of
            the CPU. Or the path of what ``LayerSearch.save`` wrote; or None for what the model's config says.
        visual_mask: bool ``[B, S]``, which tokens are visual, counted from the start of the sequence (of the cache, not
            of the forward); later tokens are text. Rows are repeated for beams. By default the placeholder tokens in
            ``input_ids`` or unmerged ``inputs_embeds``; a placeholder that continues a cache without any visual input
            in the same forward (a sampled one) is text.
        decoder: the module that has ``.layers``, for models that do not have it where others do.

    Raises:
        TypeError, ValueError: here for an argument, later from the forward for inputs or a cache that can't be handled,
            among them a label that is wanted of a withdrawn row, and a prompt whose last token is visual, which leaves
            no row to predict from. Chunks of a prompt that end in an image go to ``generate(prefill_chunk_size=)``, or to
            ``model.base_model``, if that makes no logits.

    Threads may share the model: what belongs to a forward is kept per thread. A model may be compiled before, within
    or with ``torch.compile(model)`` as argument; a step of decoding with a static cache is one graph.
    """
    handle = apply(model, layer, visual_mask=visual_mask, decoder=decoder)
    try:
        yield handle
    finally:
        handle.remove()


def apply(
    model: nn.Module,
    layer: int | Sequence[int] | str | Path | None = None,
    *,
    visual_mask: Tensor | None = None,
    decoder: nn.Module | None = None,
) -> "Withdrawal":
    """``withdraw`` until ``remove()`` of the returned handle is called. A copy of the model is withdrawn as well."""
    return Withdrawal(model, layer, visual_mask, decoder)


class LayerCompaction:
    """Compacts what one forward passes to its decoder layers: rows by a plan, and mask columns by what is cached.

    Results are remembered, so that tensors shared by all layers are compacted once, together, in one ``compact`` call.

    Args:
        tokens: rows of the forward before compaction, ``q``.
        plan: which of them survive; None for all.
        columns: int ``[B, slots]``, the token that each key stands for, or -1 for one that nothing may attend to. By
            default those of the plan: the keys are the rows. None together with no plan leaves masks alone.
        past: tokens before this forward, an int or int64 [].
        padded: whether -1 may be among ``columns``; then a mask of None (plain causal) is written out.
        flash: whether masks are ``[B, keys]``. Such attention takes gaps in ``position_ids`` for packed sequences, but
            not if it is given a mask.
    """

    def __init__(
        self,
        tokens: int,
        plan: CompactionPlan | None,
        columns: Tensor | None = None,
        past: int | Tensor = 0,
        padded: bool = True,
        flash: bool = False,
    ):
        self.tokens, self.plan, self.past, self.flash = tokens, plan, past, flash
        self.needs_mask = padded or (flash and plan is not None)
        self.columns = plan.source if columns is None and plan is not None else columns
        self.done: list[tuple[Any, Any]] = []  # full length, compacted
        self.last: tuple[list, dict[str, Any]] | None = None  # what the last layer was given, and got
        self.causal: dict[Any, Tensor] = {}  # by window

    def __call__(
        self, kwargs: dict[str, Any], hidden_states: Tensor | None = None, window: tuple[int, int, int] | None = None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Compacts the keyword arguments of a decoder layer and, if given, its full-length input ``[..., B, q, H]``.

        ``window``: how many keys the layer attends to, the slot of the first of them, and the token of the mask's first
        column; by default all slots and all tokens.

        Raises:
            TypeError: an attention mask of no known kind.
        """
        if self.columns is None:
            return kwargs, hidden_states
        mask = kwargs.get("attention_mask")
        if self.plan is None and mask is None and not self.needs_mask:
            return kwargs, hidden_states  # a step of decoding, in every layer
        given = [window, *kwargs, *kwargs.values()]
        if hidden_states is None and self.last is not None and all(map(operator.is_, given, self.last[0])):
            return dict(self.last[1]), None  # layers of one type are given the very same objects
        check_mask(mask)
        if mask is not None and not any(mask is x for x, _ in self.done):
            if isinstance(mask, BlockMask):
                self.done.append((mask, take_blocks(mask, self._rows(), self._mask_columns(window))))
            elif mask.ndim == 2:
                self.done.append((mask, take_columns(mask, self._mask_columns(window))))

        new: list[tuple[Tensor, int, int]] = []
        for name, value in kwargs.items():
            for x in _tensors(value):
                known = any(x is y for y, *_ in self.done) or any(x is y for y, *_ in new)
                if not known and (dims := self._dims(name, x)) is not None:
                    new.append((x, *dims))
        moved = [x for x, *_ in new]
        if self.plan is not None:
            rows = new if hidden_states is None else [*new, (hidden_states, -2, -3)]
            if rows:
                moved, token_dims, batch_dims = map(list, zip(*rows))
                device = moved[-1].device
                moved = compact([x.to(device) for x in moved], self._plan_on(device), token_dims, batch_dims)
            if hidden_states is not None:
                hidden_states = moved.pop()
        self.done += [
            (x, take_columns(y, self._mask_columns(window)) if x is mask else y) for (x, *_), y in zip(new, moved)
        ]

        kwargs = _replace(self.done, kwargs)
        if self.plan is not None:
            kwargs = compat.rows_left(kwargs, self.plan.source.shape[1])
        if mask is None and self.needs_mask and "attention_mask" in kwargs:
            if window not in self.causal:
                self.causal[window] = self._causal_mask(window)
            kwargs["attention_mask"] = self.causal[window]
        self.last = given, kwargs
        return dict(kwargs), hidden_states

    def _dims(self, name: str, x: Tensor) -> tuple[int, int] | None:
        """The token and the batch dimension of a layer's keyword argument, or None for one that has no tokens."""
        if name == "attention_mask":
            return -2, 0
        if self.plan is None:
            return None
        if name.startswith("position_embeddings"):
            return -2, -3
        if name == "position_ids":
            return -1, -2
        return (1, 0) if x.shape[:2] == (self.plan.source.shape[0], self.tokens) else None

    def _plan_on(self, device: torch.device) -> CompactionPlan:
        return CompactionPlan(*(x.to(device) for x in self.plan))

    def _columns(self, window: tuple[int, int, int] | None) -> Tensor:
        """The token of each key, int ``[B, keys]``, or -1 for those that nothing may attend to."""
        if window is None:
            return self.columns
        length, first, _ = window
        columns = self.columns[:, first : first + length]
        return F.pad(columns, (0, length - columns.shape[1]), value=-1)

    def _mask_columns(self, window: tuple[int, int, int] | None) -> Tensor:
        """The same as columns of the model's mask, negative for those that nothing may attend to."""
        return self._columns(window) - (0 if window is None else window[2])

    def _rows(self) -> Tensor:
        """int ``[B, q]``: which rows of the forward are left, or -1."""
        if self.plan is not None:
            return self.plan.source
        return torch.arange(self.tokens, device=self.columns.device).expand(len(self.columns), -1)

    def _causal_mask(self, window: tuple[int, int, int] | None) -> Tensor:
        if self.flash:
            return self._columns(window) >= 0
        rows, columns = shifted(self._rows(), self.past)[:, None, :, None], self._columns(window)[:, None, None, :]
        return (columns >= 0) & (columns <= rows)


@dataclass
class _Forward:
    sequence: Tensor  # [B, S, ...]
    slots: Slots  # of the withdrawn layers, before this forward
    masks: str  # what kind of them the attention gets
    keep: Tensor | None = None  # bool [B, S], if there may be visual tokens
    counts: Tensor | None = None  # int64 [4, B], until read: how many rows are kept, and three things to look at
    counted: torch.cuda.Event | None = None  # after which they are on the host
    end: int = 0  # tokens seen after this forward
    embedded: bool = False  # whether visual tokens are looked for among embeddings
    plan: CompactionPlan | None = None
    padded: bool = False  # whether a row of the plan may be padding
    compaction: LayerCompaction | None = None
    windows: dict[str, tuple[int, int, int] | None] = field(default_factory=dict)  # by type of layer

    def count(self, counts: Tensor) -> None:
        """Copies them to the host, which goes on meanwhile."""
        self.counts = counts
        if counts.is_cuda and not torch.compiler.is_compiling():
            self.counts, self.counted = counts.to("cpu", non_blocking=True), torch.cuda.Event()  # to pinned memory
            self.counted.record(torch.cuda.current_stream(counts.device))

    @property
    def rows(self) -> int:
        """How many there are in the withdrawn layers."""
        return self.sequence.shape[1] if self.plan is None else self.plan.source.shape[1]


class Withdrawal:
    """What ``apply`` returns: the hooks of one model. Its state is that of the forwards that are running."""

    def __init__(
        self,
        model: nn.Module,
        layer: int | Sequence[int] | str | Path | None,
        visual_mask: Tensor | None,
        decoder: nn.Module | None = None,
    ):
        model = unwrapped(model)
        self.parts = find_parts(model, decoder)
        layer = _chosen(layer, model.config)
        for candidate in [layer] if isinstance(layer, int) else layer:
            self.parts.check_layer(candidate)
        if visual_mask is not None and not isinstance(visual_mask, Tensor):
            raise TypeError(f"visual_mask: expected a tensor, got {type(visual_mask).__name__}")
        if visual_mask is not None and (visual_mask.dtype != torch.bool or visual_mask.ndim != 2):
            raise ValueError(
                f"visual_mask: expected bool [B, S], got {visual_mask.dtype} with shape {list(visual_mask.shape)}"
            )
        if visual_mask is None and not self.parts.token_ids:
            find_visual_tokens(self.parts, {})  # raises, and says why a mask is needed
        if (active := getattr(self.parts.decoder, "_vtw_withdrawal", None)) is not None:
            raise ValueError(
                f"model: expected one without withdrawal, got one with withdraw(layer={active.layer}) in effect"
            )
        self.layer, self.visual_mask = layer, visual_mask
        first = layer if isinstance(layer, int) else min(layer)
        self._forwards: dict[int, _Forward] = {}  # by thread
        self._labels: dict[int, Tensor | None] = {}  # by thread, while its forward is to make logits
        self._prompts: dict[int, int] = {}  # by thread, how many tokens it generates from
        self._rebound: list[tuple[nn.Module, str, Callable]] = []
        self._names = {
            module: list(inspect.signature(module.forward).parameters)
            for module in (self.parts.body, self.parts.decoder, *self.parts.layers[first:])
        }
        self.parts.decoder._vtw_withdrawal = self
        self._hooks = self._register(model, first) if first < len(self.parts.layers) else []
        self._config, self._config_before = model.config, getattr(model.config, "vtw", None)
        if isinstance(layer, int):
            model.config.vtw = {"layer": layer}

    def remove(self) -> None:
        """Restores the model; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module, name, method in self._rebound:
            if vars(module).get(name) == method:  # else another library has wrapped it since
                delattr(module, name)
        self._rebound = []
        for module in self.parts.layers:
            if (checkpoint := self._own_checkpoint(module)) is not None:
                module._gradient_checkpointing_func = checkpoint.args[0]
        if getattr(self.parts.decoder, "_vtw_withdrawal", None) is self:
            del self.parts.decoder._vtw_withdrawal
            if self._config_before is not None:
                self._config.vtw = self._config_before
            elif isinstance(self.layer, int):
                del self._config.vtw

    def _register(self, model: nn.Module, first: int) -> list:
        body, decoder, layers = self.parts[:3]
        # Compiled code does not look whether hooks have changed, but whether `forward` still is that of the class.
        self._rebound = [(x, "forward", x.forward) for x in {model, body, decoder, *layers} if "forward" not in vars(x)]
        if hasattr(model, "generate") and "generate" not in vars(model):
            self._generate = model.generate
            self._rebound.append((model, "generate", self._generate_from_prompt))
        for module, name, method in self._rebound:
            setattr(module, name, method)
        hooks = []
        if model is not body or model.get_output_embeddings() is not None:
            hooks.append(model.register_forward_pre_hook(self._enter_head, with_kwargs=True))
        for module in dict.fromkeys((body, decoder)):
            hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
        for i in range(first, len(layers)):
            hooks.append(layers[i].register_forward_pre_hook(partial(self._enter_layer, i), with_kwargs=True))
        for module in dict.fromkeys((decoder, body)):
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        return hooks

    def _generate_from_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Remembers how long the prompt is: a forward may see but a chunk of it, and then nobody reads its logits."""
        inputs = args[0] if args else kwargs.get("inputs")
        known = (kwargs.get("attention_mask"), inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((x for x in known if x is not None), None)
        self._prompts[_thread()] = 0 if prompt is None else prompt.shape[1]
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._prompts.pop(_thread(), None)

    def _enter_head(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._labels[_thread()] = kwargs.get("labels")

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._forwards.get(_thread()) is None:
            self._begin(module, dict(zip(self._names[module], args)) | kwargs)
        forward = self._forwards.get(_thread())
        if module is not self.parts.decoder or forward is None:
            return None
        self._decide(forward)
        return self._keep_all_rows(forward, args, kwargs)

    def _begin(self, module: nn.Module, inputs: dict) -> None:
        """Looks, before anything is computed, at what a forward is given, and has the device count its rows."""
        makes_logits = _thread() in self._labels
        labels = self._labels.pop(_thread(), None)
        sequence = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if sequence is None:
            return  # the model says it better
        masks = kind_of_masks(self.parts.decoder.config._attn_implementation)
        layer = self._draw(module)
        kinds = set(self.parts.layer_types[layer:]) - {"full_attention"}
        if masks == "padding" and kinds:
            raise ValueError(
                f"model: expected attention that gets the window in its mask, as 'sdpa', in layers of type "
                f"{', '.join(sorted(kinds))}, got {self.parts.decoder.config._attn_implementation!r}"
            )

        (batch, tokens), device = sequence.shape[:2], sequence.device
        cache = inputs.get("past_key_values")
        slots = slots_of(cache, layer, self.parts.num_cached) or Slots(layer)
        if masks != "dense" and cache is not None and any(isinstance(x, StaticLayer) for x in cache.layers):
            # Flash attention cuts a static cache by the length of its mask. Flex attention reads a mask late, when the
            # cache has moved on: transformers' own static caches go wrong with it.
            attention = self.parts.decoder.config._attn_implementation
            raise ValueError(f"past_key_values: expected a dynamic cache with {attention!r}, got a static one")
        forward = _Forward(sequence, slots, masks)
        visual = None
        if layer < len(self.parts.layers):
            visual = self._visual_tokens(inputs, batch, tokens, slots, device)
        if visual is not None:
            past = int(slots.tokens)
            attended = attended_tokens(inputs.get("attention_mask"), visual, past)
            forward.keep = attended & ~visual  # padding is of no more use than a visual token is
            ends, labelled = torch.zeros(2, batch, dtype=torch.bool, device=device)
            if labels is not None:
                labelled = (visual[:, :-1] & (labels[:, 1:] != -100)).any(1)
            elif makes_logits and past + tokens >= self._prompts.get(_thread(), 0):
                last = attended.long().cumsum(1).argmax(1)
                ends = visual.gather(1, last[:, None])[:, 0]
            forward.count(torch.stack([forward.keep.sum(1), visual.any(1), ends, labelled]))
            forward.end = past + tokens
            forward.embedded = self.visual_mask is None and inputs.get("input_ids") is None
        self._forwards[_thread()] = forward
        if compat.RECOMPUTES_HOOKS and module.training:
            for x in self.parts.layers[layer:]:
                if getattr(x, "_gradient_checkpointing_func", None) and self._own_checkpoint(x) is None:
                    x._gradient_checkpointing_func = partial(self._checkpoint, x._gradient_checkpointing_func)

    def _decide(self, forward: _Forward) -> None:
        """Which rows a forward drops. Nothing has been cached, and the host has long waited for the device: models look
        themselves whether there is a placeholder for each visual feature."""
        if forward.counts is None:
            return
        if forward.counted is not None:
            forward.counted.synchronize()
        kept, withdrawn, ends_visual, wrongly_labelled = forward.counts.tolist()
        forward.counts = None
        if forward.embedded and not any(withdrawn):
            raise ValueError(NO_PLACEHOLDER)
        if any(wrongly_labelled):
            raise ValueError(
                "labels: expected -100 after each visual token, whose row is withdrawn and predicts nothing, got a "
                f"label in row {wrongly_labelled.index(1)}"
            )
        if any(ends_visual):
            raise ValueError(
                "input_ids: expected prompts whose last token is text, as no row is left to predict from, got a "
                f"visual one in row {ends_visual.index(1)}; for chunks of a prompt that end in an image, there are "
                "generate(prefill_chunk_size=) and model.base_model, which makes no logits"
            )
        if any(withdrawn):
            self.parts.check_tokens(forward.end)
            length = max(1, *kept)  # layers do not run on no rows at all
            forward.plan = plan_compaction(forward.keep, length, pad="left")
            forward.padded = min(kept) < length

    def _draw(self, module: nn.Module) -> int:
        if isinstance(self.layer, int):
            return self.layer
        if not module.training:
            raise ValueError(f"layer: expected an int where a model is not in training mode, got {self.layer}")
        return self.layer[int(torch.randint(len(self.layer), ()))]

    def _keep_all_rows(self, forward: _Forward, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Gemma 4's decoder would drop rows itself: all but those of the logits, in layers without keys of their own."""
        if not kwargs.get("logits_to_keep") or (forward.plan is None and forward.slots.columns is None):
            return None
        return args, kwargs | {"logits_to_keep": 0}

    def _visual_tokens(
        self, inputs: dict, batch: int, tokens: int, slots: Slots, device: torch.device
    ) -> Tensor | None:
        """Those of this forward, bool ``[B, q]``; None for none, known without asking the device."""
        if self.visual_mask is None:
            given = [name for name, value in inputs.items() if value is not None and NOT_VISUAL not in name]
            has_features = any(word in name for name in given for word in VISUAL_INPUTS)
            if slots.at_least and inputs.get("input_ids") is not None and not has_features:
                return None
            return find_visual_tokens(self.parts, inputs)
        if slots.at_least >= self.visual_mask.shape[1]:
            return None
        past = int(slots.tokens)
        visual = self.visual_mask[:, past : past + tokens].to(device)
        if batch % len(visual):
            raise ValueError(f"visual_mask: expected {batch} rows, or a divisor, as the inputs have, got {len(visual)}")
        if visual.shape[1] == 0:
            return None
        return F.pad(visual, (0, tokens - visual.shape[1])).repeat_interleave(batch // len(visual), dim=0)

    def _own_checkpoint(self, module: nn.Module) -> partial | None:
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        return checkpoint if getattr(checkpoint, "func", None) == self._checkpoint else None

    def _checkpoint(self, checkpoint: Callable, run: Callable, *args: Any) -> Any:
        """Has a layer that is recomputed with its hooks, later and by whatever thread, find its forward again."""
        forward = self._forwards.get(_thread())

        def run_within_forward(*args):
            before, self._forwards[_thread()] = self._forwards.get(_thread()), forward
            try:
                return run(*args)
            finally:
                self._forwards[_thread()] = before

        return checkpoint(run_within_forward, *args)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        forward = self._forwards.get(_thread())
        if forward is None:
            raise RuntimeError(
                f"withdraw: expected decoder layer {index} to run within a forward of its model, got a call of its own"
            )
        args, kwargs = args[:1], dict(zip(self._names[module][1:], args[1:])) | kwargs
        if index < forward.slots.layer:
            return None
        first, cache = index == forward.slots.layer, kwargs.get("past_key_values")
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = forward.sequence.shape[1]
        if first:
            if hidden.shape[-2] != tokens:
                raise ValueError(
                    f"input_ids: expected {hidden.shape[-2]} tokens, one for each of those that the decoder makes of "
                    f"them, visual ones included, got {tokens}"
                )
            if forward.compaction is None:  # else it is recomputed
                self._decide(forward)  # if the decoder has not been called, only its layers
                self._start(forward, cache)
        kind = self.parts.layer_types[index]  # layers that share keys have those of the last one of their type
        if cache is not None and index < self.parts.num_cached:
            forward.windows[kind] = cache.layers[index].keys_returned(forward.rows, tokens)
        kwargs, compacted = forward.compaction(kwargs, hidden if first else None, forward.windows.get(kind))
        if not first:
            return args, kwargs
        return ((compacted,), kwargs) if args else ((), kwargs | {"hidden_states": compacted})

    def _start(self, forward: _Forward, cache: Cache | None) -> None:
        """All that may raise has been looked at, so what is cached is written down."""
        slots, plan, padded = forward.slots, forward.plan, forward.padded or forward.slots.padded
        (batch, tokens), device = forward.sequence.shape[:2], forward.sequence.device
        past = slots.tokens if isinstance(slots.tokens, int) else slots.tokens.clone()
        capacity = None
        if cache is not None:
            wrap_layers(cache, slots, self.parts.num_cached)
            # Windows alone do not say how long the sequence may become; their books grow as those of dynamic layers.
            static = [x.max_cache_len for x in cache.layers if isinstance(x, StaticLayer) and not x.is_sliding]
            capacity = max(static, default=None)
        slots.past = past
        slots.append(tokens, None if plan is None else plan.source, batch, device, capacity)
        slots.padded, slots.open = padded, True
        # With a single row, None no longer means causal to sdpa but all slots, and the rest are not filled yet.
        is_static = cache is not None and isinstance(cache.layers[slots.layer], StaticLayer)
        padded = padded or (is_static and plan is not None and forward.rows == 1)
        forward.compaction = LayerCompaction(tokens, plan, slots.columns, past, padded, forward.masks == "padding")

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Puts rows back; also runs after an exception, then without an output."""
        forward = self._forwards.pop(_thread(), None)
        if forward is None:
            return None
        forward.slots.open, layer = False, forward.slots.layer
        if output is None or forward.plan is None:
            return None
        if forward.compaction is None:
            raise RuntimeError(f"withdraw: the decoder did not run its layer {layer}; nothing was withdrawn")
        states = [output[0], *(getattr(output, "hidden_states", None) or ())[layer + 1 :]]
        short = [x for x in states if x is not None]
        plan = CompactionPlan(*(x.to(short[0].device) for x in forward.plan))
        full = iter(expand(short, plan, forward.sequence.shape[1], token_dims=-2, batch_dims=-3))
        states = [x if x is None else next(full) for x in states]
        if isinstance(output, tuple):
            return (states[0], *output[1:])
        output.last_hidden_state = states[0]
        if len(states) > 1:
            output.hidden_states = (*output.hidden_states[: layer + 1], *states[1:])
        return output


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


def _chosen(layer: Any, config: Any) -> int | Sequence[int]:
    """``layer`` as ``withdraw`` takes it, as one layer or as those to draw from."""
    if layer is None:
        layer = (getattr(config, "vtw", None) or {}).get("layer")
        if layer is None:
            raise ValueError("layer: expected one, as the model's config has none under vtw, got None")
    elif isinstance(layer, str | Path):
        path, search = layer, json.loads(Path(layer).read_text())
        layer = search["layer"]
        if not search.get("settings", {}).get("finished", True):
            warnings.warn(f"layer: {path} is of a search that was stopped before its end", stacklevel=4)
        if layer is None:
            raise ValueError(
                f"layer: expected a search that found one, got {path}, in which none is below its threshold"
            )
    drawn = isinstance(layer, Sequence) and len(layer) > 0
    for candidate in layer if drawn else [layer]:
        if isinstance(candidate, bool) or not isinstance(candidate, int):
            raise TypeError(f"layer: expected an int, or some, got {type(candidate).__name__}")
    return layer


def _thread() -> int:
    """Whose forward this is. A compiled one begins and ends between two looks at the state, so it has no name."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in plain containers: a cache, say, is nobody's business here."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):
        for x in value.values() if type(value) is dict else value:
            yield from _tensors(x)


def _replace(done: list[tuple[Any, Any]], value: Any) -> Any:
    if isinstance(value, Tensor | BlockMask):
        return next((result for x, result in done if x is value), value)
    if type(value) in (tuple, list):
        return type(value)(_replace(done, x) for x in value)
    return {key: _replace(done, x) for key, x in value.items()} if type(value) is dict else value
