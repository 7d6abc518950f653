"""One forward under withdrawal, from its outermost module to its last layer, in the order in which it runs.

``Hooks`` replace ``forward`` of a model, of its body, of its decoder and of its layers. The outermost of these that is
called makes a ``Forward``, which holds all that belongs to this call, and hands it on as a keyword argument. Modules of
transformers pass it to the modules inside them, and the layers' hooks take it out again. So this state is kept nowhere
but in the call itself: each call in each thread has its own, traced and eager code share it, and it is gone however the
call ends.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from vtw_kernels.integration import compat
from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.attention import last_row, observed_attention, unobserved
from vtw_kernels.integration.cache import Slots, WithdrawnLayer, slots_of, wrap_layers
from vtw_kernels.integration.families import NO_PLACEHOLDER, Parts, find_visual_tokens
from vtw_kernels.integration.masks import attended_tokens, kind_of_masks
from vtw_kernels.integration.policies import Boundary, Policy
from vtw_kernels.integration.stage import Stage, Window, compact_on_device, on_device
from vtw_kernels.integration.stand_ins import StandIns
from vtw_kernels.ops import CompactionPlan, expand, plan_compaction

KEY = "vtw_forward"  # the keyword argument
ROWS = ("visual", "text", "image", "token")  # what ``Boundary`` says of each row
# In names of inputs that carry visual features. Grids do not, and some models pass them on while decoding.
VISUAL_INPUTS, NOT_VISUAL = ("pixel", "image", "video", "mm_encoder"), "grid"


def may_be_visual(inputs: dict[str, Any], seen: int, visual_mask: Tensor | None) -> bool:
    """Whether there may be visual tokens in a forward after ``seen`` tokens, as far as can be known without asking the
    device."""
    if visual_mask is not None:
        return seen < visual_mask.shape[1]
    given = [name for name, value in inputs.items() if value is not None and NOT_VISUAL not in name]
    has_features = any(word in name for name in given for word in VISUAL_INPUTS)
    return not seen or has_features or inputs.get("input_ids") is None


class _PerThread(threading.local):
    forward: "Forward | None" = None  # for models whose modules do not pass keyword arguments on
    prompt: int = 0  # the length of the prompt that it generates from, 0 outside of ``generate``


_per_thread = _PerThread()


class Hooks(StandIns):
    """The functions that replace ``forward`` of a model's modules.

    Args:
        model: of transformers, without wrappers.
        parts: of it.
        policies: a function that is told whether the model is in training mode, and returns the policies of a forward
            by the layers before which they are asked, ascending.
        first: the lowest layer that ``policies`` may return.
        visual_mask: as for ``withdraw``.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        policies: Callable[[bool], dict[int, Policy]],
        first: int,
        visual_mask: Tensor | None,
    ):
        super().__init__()
        self.parts, self.policies, self.first, self.visual_mask = parts, policies, first, visual_mask
        self.model = model
        self.makes_logits = model is not parts.body or model.get_output_embeddings() is not None
        self.entered = list(dict.fromkeys((model, parts.body, parts.decoder)))
        self.arguments = {module: Arguments(module) for module in (*self.entered, *parts.layers)}
        for layer in parts.layers[first:]:
            self.arguments[layer].check_layer()
        self.not_passing = next((x for x in _on_the_way(model, parts.decoder) if not Arguments(x).passes_on), None)
        if model.config.model_type in compat.NOT_PASSING:
            self.not_passing = model

    def place(self) -> None:
        self.active = True
        for module in self.entered:
            self._stand_in(module, partial(self.enter, module))
        for i, layer in enumerate(self.parts.layers):
            self._stand_in(layer, partial(self.enter_layer, i, layer))

    # ------------------------------------------------------------------------------- the model, its body, its decoder

    def enter(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = kwargs.pop(KEY, None)
        if not self.active:
            return self._call(module, args, kwargs)
        if self.not_passing is not None and torch.compiler.is_compiling():
            return self._enter_untraced(module, args, kwargs)
        if forward is None and self.not_passing is not None:
            forward = _per_thread.forward
            if forward is not None and forward.outermost is module:
                forward = None  # the model is called within itself
        if forward is not None and not (forward.returned and module is self.parts.decoder):
            return self._go_on(module, forward, args, kwargs)
        # The outermost module: here a forward begins, and ends whatever ends it.
        inputs = self.arguments[module].named(args, kwargs)
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    "torch.export: expected a model without withdrawal, whose number of rows is not known before it "
                    "runs; export its decoder layers instead, those from withdraw's layer on for the text alone"
                )
            if self.may_be_visual(module, inputs):
                return self._run_untraced(module, inputs, args, kwargs)
            return self._run(module, Forward(self, module, inputs), args, kwargs)
        forward = Forward(self, module, inputs)
        forward.look(inputs)
        with unobserved():
            return self._run(module, forward, args, kwargs)

    @torch.compiler.disable(reason="A module of this model does not pass on which forward it belongs to")
    def _enter_untraced(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self.enter(module, *args, **kwargs)

    def may_be_visual(self, module: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether there may be visual tokens in a forward, as far as can be known without asking the device."""
        cache = self.arguments[module].cache_among(inputs)
        layers = () if cache is None else cache.layers
        seen = next((x.slots.at_least for x in layers if isinstance(x, WithdrawnLayer) and x.slots is not None), 0)
        return may_be_visual(inputs, seen, self.visual_mask)

    @torch.compiler.disable(recursive=False, reason="How many rows are left is read beforehand, outside of the graph")
    def _run_untraced(self, module: nn.Module, inputs: dict[str, Any], args: tuple, kwargs: dict) -> Any:
        """Runs a forward from uncompiled code; the modules that it calls are compiled as usual."""
        return self._run(module, self._decided(module, inputs), args, kwargs)

    @torch.compiler.disable
    def _decided(self, module: nn.Module, inputs: dict[str, Any]) -> "Forward":
        forward = Forward(self, module, inputs)
        forward.look(inputs)
        forward.decide()
        return forward

    def _run(self, module: nn.Module, forward: "Forward", args: tuple, kwargs: dict) -> Any:
        try:
            return self._go_on(module, forward, args, kwargs)
        finally:
            forward.close()

    def _go_on(self, module: nn.Module, forward: "Forward", args: tuple, kwargs: dict) -> Any:
        decoder, as_tuple = self.parts.decoder, False
        if forward.sequence is None:
            return self._call(module, args, kwargs)  # without inputs; the model's own error says so
        if module is decoder:
            forward.decide()
            kwargs, as_tuple = forward.before_decoder(kwargs)
        output = self._call_with(module, forward, args, kwargs)
        if module is decoder or (module is self.parts.body and not forward.returned):
            output = forward.put_back(output)
        return output.to_tuple() if as_tuple else output

    def _call_with(self, module: nn.Module, forward: "Forward", args: tuple, kwargs: dict) -> Any:
        if self.not_passing is None:
            return self._call(module, args, kwargs | {KEY: forward})
        before, _per_thread.forward = _per_thread.forward, forward
        try:
            return self._call(module, args, kwargs)
        finally:
            _per_thread.forward = before

    # ------------------------------------------------------------------------------------------------ decoder layers

    def enter_layer(self, index: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = kwargs.pop(KEY, None)
        if not self.active:
            return self._call(module, args, kwargs)
        if self.not_passing is None:
            return self._run_layer(index, module, forward, args, kwargs)
        return self._run_layer_untraced(index, module, args, kwargs)

    @torch.compiler.disable(
        recursive=False, reason="A module of this model does not pass on which forward it belongs to"
    )
    def _run_layer_untraced(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self._run_layer(index, module, _per_thread.forward, args, kwargs)

    def _run_layer(self, index: int, module: nn.Module, forward: "Forward | None", args: tuple, kwargs: dict) -> Any:
        if forward is not None:
            args, kwargs = forward.before_layer(index, args, kwargs)
            if forward.looks_at_attention(index):
                cache = self.arguments[module].cache_in(args, kwargs)
                return forward.look_at_attention(index, cache, partial(self._call, module, args, kwargs))
        elif index >= self.first:
            raise RuntimeError(
                f"withdraw: expected decoder layer {index} to run within a forward of its model, got a call of its "
                f"own, or of {type(self.parts.decoder).__name__} without the keyword arguments that this was given"
            )
        return self._call(module, args, kwargs)


class Forward:
    """One call of a model under withdrawal.

    Made of what its outermost module is given, before anything is computed.

    Raises:
        TypeError, ValueError: inputs or a cache that can't be handled.
    """

    def __init__(self, hooks: Hooks, module: nn.Module, inputs: dict[str, Any]):
        self.hooks, self.parts, self.outermost = hooks, hooks.parts, module
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        self.sequence = embeds if ids is None else ids  # [B, S, ...]
        self.embedded = hooks.visual_mask is None and ids is None  # visual tokens are looked for among embeddings
        self.counts: Tensor | None = None  # int64 [6, B], until read: what ``look`` makes and ``decide`` reads
        self.counted: torch.cuda.Event | None = None  # after which they are on the host
        self.keep: Tensor | None = None  # bool [B, S], which rows go on at the first boundary
        self.there: Boundary | None = None  # the rows still there, as long as a policy may be asked about some
        self.attention: Tensor | None = None  # which the next policy looks at
        self.prompt: int | None = None  # as ``Boundary`` says
        self.withdraws = False  # whether there are visual tokens
        self.plan: CompactionPlan | None = None  # which rows of the forward are left; None for all
        self.padded = False  # whether a row of the plan may be padding
        self.moves: dict[int, CompactionPlan] = {}  # by boundary: which of the rows that reach it go on; none for all
        self.stages: dict[int, Stage] = {}  # by boundary; the previous one again if its rows all go on
        self.windows: dict[tuple[Stage, str], Window] = {}  # by stage and type of layer
        self.returned = False  # whether the decoder has
        attention, cache = self.parts.config._attn_implementation, hooks.arguments[module].cache_among(inputs)
        self.masks = kind_of_masks(attention)
        policies = hooks.policies(module.training).items()
        self.policies = {layer: policy for layer, policy in policies if layer < len(self.parts.layers)}
        self.boundaries = tuple(self.policies)
        self.books: list[Slots] = []  # of the cache, by stage; stages that cache the same rows share theirs
        self.unwritten: Slots | None = None  # the books that were updated last, as they were before this forward
        self.router_logits = inputs.get(
            "output_router_logits", getattr(self.parts.config, "output_router_logits", False)
        )
        if not self.boundaries:
            return
        kinds = set(self.parts.layer_types[self.boundaries[0] :]) - {"full_attention"}
        if self.masks == "padding" and kinds:
            raise ValueError(
                f"model: expected attention that gets the window in its mask, as 'sdpa', in layers of type "
                f"{', '.join(sorted(kinds))}, got {attention!r}"
            )
        self.books = slots_of(cache, self.boundaries, self.parts.num_cached)
        if self.masks != "dense" and cache is not None and any(isinstance(x, StaticLayer) for x in cache.layers):
            # Flash attention cuts a static cache by the length of its mask. Flex attention reads a mask late, when the
            # cache has moved on: transformers' own static caches go wrong with it.
            raise ValueError(f"past_key_values: expected a dynamic cache with {attention!r}, got a static one")

    @property
    def tokens(self) -> int:
        return self.sequence.shape[1]

    def look(self, inputs: dict[str, Any]) -> None:
        """Starts counting visual tokens on the device, before the model computes anything; ``decide`` reads the
        counts."""
        if not self.boundaries or self.sequence is None or not self.hooks.may_be_visual(self.outermost, inputs):
            return
        visual = self._visual_tokens(inputs)
        past = int(self.books[0].tokens)
        self.past, self.end = past, past + self.tokens
        attended = attended_tokens(inputs.get("attention_mask"), visual, past)
        text = attended & ~visual
        image = (visual & ~F.pad(visual, (1, -1))).cumsum(1) - 1
        token = torch.arange(past, self.end, device=visual.device).expand_as(visual)
        self.prompt = _per_thread.prompt if _per_thread.prompt > past else None
        self.there = Boundary(self.boundaries[0], visual & attended, text, image, token, prompt=self.prompt)
        first = self.policies[self.boundaries[0]]
        stays = _stays(first, self.there) if first.from_inputs else self.there.visual
        self.keep = text | stays  # padding is dropped as well
        leaving = (visual if first.from_inputs else self.there.visual) & ~stays
        ends, labelled = torch.zeros(2, len(visual), dtype=torch.bool, device=visual.device)
        makes_logits = self.hooks.makes_logits and self.outermost is self.hooks.model
        predicts = makes_logits and self.end >= _per_thread.prompt
        labels = inputs.get("labels") if makes_logits else None
        if labels is not None and labels.shape == visual.shape and not labels.is_floating_point():  # one for each token
            labelled, predicts = (visual[:, :-1] & (labels[:, 1:] != -100)).any(1), False
        if predicts or self._asking_for_attention:
            last = attended.long().cumsum(1).argmax(1)
            ends = visual.gather(1, last[:, None])[:, 0]
        self.count(torch.stack([visual.any(1), ends, labelled, self.keep.sum(1), leaving.any(1), stays.any(1)]))

    def _visual_tokens(self, inputs: dict[str, Any]) -> Tensor:
        """Those of this forward, bool ``[B, q]``."""
        mask = self.hooks.visual_mask
        if mask is None:
            return find_visual_tokens(self.parts, inputs)
        past, batch = int(self.books[0].tokens), len(self.sequence)
        visual = mask[:, past : past + self.tokens].to(self.sequence.device)
        if batch % len(visual):
            raise ValueError(f"visual_mask: expected {batch} rows, or a divisor, as the inputs have, got {len(visual)}")
        return F.pad(visual, (0, self.tokens - visual.shape[1])).repeat_interleave(batch // len(visual), dim=0)

    def count(self, counts: Tensor) -> None:
        """Copies the counts to the host without waiting for them."""
        self.counts = counts
        if counts.is_cuda:
            self.counts, self.counted = counts.to("cpu", non_blocking=True), torch.cuda.Event()  # to pinned memory
            self.counted.record(torch.cuda.current_stream(counts.device))

    @property
    def _asking_for_attention(self) -> Policy | None:
        return next((policy for policy in self.policies.values() if policy.attention), None)

    def decide(self) -> None:
        """Reads the counts, refuses inputs that can't be handled, and decides which rows leave at the first boundary,
        if the inputs alone tell. Nothing is cached yet. The host does not wait here for long: it has just waited for
        the device in the model's own code, which checks that there is a placeholder for each visual feature."""
        if self.counts is None:
            return
        if self.counted is not None:
            self.counted.synchronize()
        visual, ends_visual, wrongly_labelled, *counts = self.counts.tolist()
        self.counts = None
        if self.embedded and not any(visual):
            raise ValueError(NO_PLACEHOLDER)
        if any(wrongly_labelled):
            raise ValueError(
                "labels: expected -100 after each visual token, whose row is withdrawn and predicts nothing, got a "
                f"label in row {wrongly_labelled.index(1)}"
            )
        if any(ends_visual) and (policy := self._asking_for_attention) is not None:
            raise ValueError(
                f"input_ids: expected text after the last image of each sequence of a forward, as {policy!r} looks at "
                f"its attention, got a visual token at the end of row {ends_visual.index(1)}"
            )
        if any(ends_visual):
            raise ValueError(
                "input_ids: expected prompts whose last token is text, as no row is left to predict from, got a "
                f"visual one in row {ends_visual.index(1)}; for chunks of a prompt that end in an image, there are "
                "generate(prefill_chunk_size=) and model.base_model, which makes no logits"
            )
        self.withdraws = any(visual)
        if not self.withdraws:
            self.there = None
            return
        self.parts.check_tokens(self.end)
        if self.router_logits:
            raise ValueError(
                "output_router_logits: expected False, as later layers have no rows of visual tokens whose experts "
                "could be counted, got True"
            )
        if self.policies[self.boundaries[0]].from_inputs:
            self._leave(self.boundaries[0], self.keep, *counts)

    def before_decoder(self, kwargs: dict) -> tuple[dict, bool]:
        """The decoder's keyword arguments, and whether its output is to be a tuple in the end. Here it has to return a
        dataclass, as a tuple does not tell what its entries are."""
        if not self.withdraws and all(slots.columns is None for slots in self.books):
            return kwargs, False
        # Gemma 4's decoder would drop rows itself, in layers without keys of their own.
        if kwargs.get("logits_to_keep"):
            kwargs = kwargs | {"logits_to_keep": 0}
        return_dict = kwargs.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.parts.config, "return_dict", True)
        return (kwargs, False) if return_dict else (kwargs | {"return_dict": True}, True)

    def looks_at_attention(self, index: int) -> bool:
        """Whether the policy at the boundary right after a layer looks at the attention of that layer."""
        policy = self.policies.get(index + 1)
        return policy is not None and policy.attention and self.there is not None and index + 1 not in self.stages

    @torch.compiler.disable
    def look_at_attention(self, index: int, cache: Cache | None, layer: Callable[[], Any]) -> Any:
        """Runs a layer, and keeps how much the last row of the prompt attends to each row."""
        self.attention = None
        last, rows = self.there.asking.long().cumsum(1).argmax(1), self.there.text.shape[1]
        before = None  # how many slots of a static cache are filled
        cached = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        if isinstance(cached, StaticLayer):
            slots = getattr(cached, "slots", None)
            before = self.past if slots is None else slots.held - rows

        @torch.no_grad()
        def observe(_: int, attend: Callable, query: Tensor, key: Tensor, mask: Any, options: dict) -> Any:
            first = key.shape[2] - rows  # the key of the first row
            if before is not None:
                first = torch.as_tensor(before, device=key.device).clamp(max=first)
            weights = last_row(query, key, mask, options, last.to(key.device), first).mean(1)
            keys = first + torch.arange(rows, device=key.device)
            self.attention = weights.index_select(1, keys)
            return attend()

        observe.for_policy = True
        with observed_attention({index: self.parts.layers[index]}, observe):
            output = layer()
        if self.attention is None:
            raise ValueError(
                f"model: expected attention that transformers' AttentionInterface hands out, as "
                f"{self.policies[index + 1]!r} looks at it, got none in layer {index} of "
                f"{type(self.parts.decoder).__name__}"
            )
        return output

    def before_layer(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a decoder layer: those that it is given or, from the first boundary on, the rows left."""
        if not self.boundaries or index < self.boundaries[0]:
            return args, kwargs
        arguments = self.hooks.arguments[self.parts.layers[index]]
        args, kwargs = args[:1], dict(zip(arguments.names[1:], args[1:])) | kwargs
        cache, hidden = arguments.cache_among(kwargs), args[0] if args else kwargs[arguments.names[0]]
        begin = max(x for x in self.boundaries if x <= index)
        if begin not in self.stages:  # else it is recomputed
            self.stages[begin] = self._begin_stage(begin, hidden, cache, arguments.mask)
        stage, moves = self.stages[begin], self.moves.get(index)
        # A layer without keys of its own reads those of the last layer of its type, and so has the same window.
        kind = (stage, self.parts.layer_types[index])
        cached = cache.layers[index] if cache is not None and index < self.parts.num_cached else None
        skipped = cached is not None and cached.skipped is not None  # such a layer needs no mask
        if skipped:
            kwargs.pop(arguments.mask, None)
        elif cached is not None:
            self.windows[kind] = cached.keys_returned(self._rows(stage.plan), self.tokens)
        together = moves is not None and moves is stage.plan  # hidden states of full length join the others' launch
        kwargs, gathered = stage(kwargs, hidden if together else None, self.windows.get(kind))
        if skipped:
            kwargs[arguments.mask] = None
        if moves is None:
            return args, kwargs
        if not together:
            (gathered,) = compact_on_device([hidden], moves, [-2], [-3])
        return ((gathered,), kwargs) if args else ((), kwargs | {arguments.names[0]: gathered})

    def _rows(self, plan: CompactionPlan | None) -> int:
        return self.tokens if plan is None else plan.source.shape[1]

    def _begin_stage(self, layer: int, hidden: Tensor, cache: Cache | None, mask: str) -> Stage:
        """The stage that begins at a layer, or the last one if it goes on there. Everything that may raise, except the
        policy, has been checked before, so here the books of the cache are updated."""
        place = self.boundaries.index(layer)
        coming = self.tokens if place == 0 else self._rows(self.plan)
        if hidden.shape[-2] != coming:
            raise ValueError(
                f"input_ids: expected {hidden.shape[-2]} tokens, one for each of those that the decoder makes of "
                f"them, visual ones included, got {coming}"
            )
        self.decide()  # does nothing unless the layers are called without their decoder
        if self.there is not None and not (place == 0 and self.policies[layer].from_inputs):
            self._ask(layer, hidden)
        slots, shared = self.books[place], place > 0 and self.books[place] is self.books[place - 1]
        if shared and layer not in self.moves:
            return self.stages[self.boundaries[place - 1]]
        if shared:
            slots, self.unwritten.layer = self.unwritten, layer
            self.books[place:] = [slots if x is self.books[place] else x for x in self.books[place:]]
        plan, padded = self.plan, self.padded or slots.padded
        batch, device = self.sequence.shape[0], self.sequence.device
        past = slots.tokens if isinstance(slots.tokens, int) else slots.tokens.clone()
        capacity = None
        if cache is not None:
            wrap_layers(cache, self.books, self.parts.num_cached)
            # Windows alone do not say how long the sequence may become; their books grow as those of dynamic layers.
            static = [x.max_cache_len for x in cache.layers if isinstance(x, StaticLayer) and not x.is_sliding]
            capacity = max(static, default=None)
        if self.there is not None:
            self.unwritten = slots.copied()
        slots.past, slots.open, slots.whole = past, True, False
        slots.append(self.tokens, None if plan is None else plan.source, batch, device, capacity)
        slots.padded = padded
        # With a single row, None no longer means causal to sdpa but all slots, and the rest are not filled yet.
        is_static = cache is not None and isinstance(cache.layers[slots.layer], StaticLayer)
        padded = padded or (is_static and plan is not None and plan.source.shape[1] == 1)
        return Stage(self.tokens, plan, slots.columns, past, padded, self.masks == "padding", mask)

    @torch.compiler.disable
    @torch.no_grad()
    def _ask(self, layer: int, hidden: Tensor) -> None:
        """Asks the policy which of the rows that reach a boundary leave there; the host waits for the device."""
        policy, device = self.policies[layer], hidden.device
        rows = {name: getattr(self.there, name).to(device) for name in ROWS}
        attention = self.attention.to(device) if policy.attention else None
        seen = {"hidden_states": hidden.detach(), "attention": attention, "prompt": self.prompt}
        stays = _stays(policy, Boundary(layer, **rows, **seen))
        stays = stays.to(self.there.visual.device)
        keep, leaving = self.there.text | stays, self.there.visual & ~stays
        self._leave(layer, keep, *torch.stack([keep.sum(1), leaving.any(1), stays.any(1)]).tolist())

    def _leave(self, layer: int, keep: Tensor, kept: list[int], leaving: list[int], stays: list[int]) -> None:
        """Makes the plan of the rows that go on from a boundary.

        Args:
            keep: bool ``[B, rows]``: which of the rows that reach it go on.
            kept: how many go on in each sequence.
            leaving, stays: of each sequence, whether visual rows leave, and whether visual rows stay.
        """
        moves = None
        if any(leaving):
            length = max(1, *kept)  # layers do not run on no rows at all
            moves = self.moves[layer] = plan_compaction(keep, length, pad="left")
            self.plan = moves if self.plan is None else _chained(self.plan, moves)
            self.padded = min(kept) < length
        if layer == self.boundaries[-1] or not any(stays):
            self.there = None
        elif moves is not None:
            index, padding = moves.source.clamp(min=0).long(), moves.source < 0
            rows = {name: getattr(self.there, name).gather(1, index).masked_fill(padding, 0) for name in ROWS}
            self.there = Boundary(layer, **rows, prompt=self.prompt)

    def put_back(self, output: Any) -> Any:
        """The output of the decoder, or of the body, at full length, with zeros for the rows that have left."""
        self.returned = True
        for slots in self.books:
            slots.whole = True
        if not self.withdraws:
            return output
        if missing := [layer for layer in self.boundaries if layer not in self.stages]:
            raise RuntimeError(f"withdraw: the decoder did not run its layer {missing[0]}; nothing was withdrawn")
        hidden = list(getattr(output, "hidden_states", None) or ())
        states = [output[0], *hidden]
        # Hidden state i + 1 is the output of layer i; the last one has also gone through the norm.
        ran = [None, *map(self._stage_of, range(len(self.parts.layers)))]
        by_stage = defaultdict(list)
        for i, (state, stage) in enumerate(zip(states, [ran[-1], *ran])):
            if state is not None and stage is not None and stage.plan is not None:
                by_stage[stage].append(i)
        for stage, places in by_stage.items():
            short = [states[i] for i in places]
            plan = on_device(stage.plan, short[0].device)
            for i, state in zip(places, expand(short, plan, self.tokens, token_dims=-2, batch_dims=-3)):
                states[i] = state
        if isinstance(output, tuple):
            return (states[0], *output[1:])
        output.last_hidden_state = states[0]
        if hidden:
            output.hidden_states = tuple(states[1:])
        return output

    def _stage_of(self, index: int) -> Stage | None:
        """That of a decoder layer, or None before the first boundary."""
        return next((self.stages[x] for x in reversed(self.boundaries) if x <= index), None)

    def close(self) -> None:
        for slots in self.books:
            slots.open = False


@contextmanager
def generating(prompt: int) -> Iterator[None]:
    """In this context, this thread generates from a prompt of so many tokens. A forward that ends before the end of the
    prompt is a chunk of it, whose logits nobody reads; so it may end in an image."""
    before, _per_thread.prompt = _per_thread.prompt, prompt
    try:
        yield
    finally:
        _per_thread.prompt = before


def prompt_length() -> int:
    """How many tokens this thread generates from, padding included; 0 outside of ``generate``."""
    return _per_thread.prompt


class PromptKnown:
    """Wraps ``generate`` of a model so that forwards know how long the prompt is, of which they may see only a
    chunk."""

    def __init__(self, model: nn.Module):
        self.model = model

    def place(self) -> None:
        self._generate = None
        if hasattr(self.model, "generate") and "generate" not in vars(self.model):
            self._generate, self.model.generate = self.model.generate, self._generate_from_prompt

    def remove(self) -> None:
        if vars(self.model).get("generate") == self._generate_from_prompt:  # else another library has wrapped it since
            del self.model.generate

    def _generate_from_prompt(self, *args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else kwargs.get("inputs")
        known = (kwargs.get("attention_mask"), inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((x for x in known if x is not None), None)
        with generating(0 if prompt is None else prompt.shape[1]):
            return self._generate(*args, **kwargs)


def _on_the_way(model: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    """The modules from a model down to its decoder, each of which calls the next."""
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    yield model
    for name in path.split(".") if path else ():
        model = getattr(model, name)
        if not isinstance(model, nn.ModuleList | nn.ModuleDict):
            yield model


def _stays(policy: Policy, boundary: Boundary) -> Tensor:
    """Which visual rows a policy keeps."""
    keep = policy.keep(boundary)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != boundary.visual.shape:
        given = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep: expected bool {list(boundary.visual.shape)} from {policy!r}, got {given}")
    return boundary.visual & keep.to(boundary.visual.device)


def _chained(plan: CompactionPlan, moves: CompactionPlan) -> CompactionPlan:
    """Two plans as one: the rows that ``moves`` names among those of ``plan``, as rows of the forward."""
    source = plan.source.gather(1, moves.source.clamp(min=0).long())
    return CompactionPlan(source.where(moves.source >= 0, -1), moves.lengths, plan.tokens)
