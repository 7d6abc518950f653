"""Visual pruning (YOPO, arXiv 2410.06169) in transformers: all visual tokens stay, and less is computed for them.

``Hooks`` replace ``forward`` of a model, of its decoder layers, and of their attention and MLP; the code follows one
forward from the outside inwards. The outermost module finds the visual tokens, and hands two keyword arguments down to
the layers: the state of the forward, and the number of each row, which stages of withdrawal gather like every tensor
that has rows. Heads that do not see visual tokens run as under withdrawal before the first layer, with a ``Stage`` of
their own.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from vtw_kernels.integration import compat
from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.attention import observing
from vtw_kernels.integration.cache import Slots, WithdrawnLayer
from vtw_kernels.integration.families import NO_PLACEHOLDER, Parts, find_parts, find_visual_tokens
from vtw_kernels.integration.hooks import generating, may_be_visual
from vtw_kernels.integration.masks import attended_tokens, kind_of_masks
from vtw_kernels.integration.policies import Policy, Withdraw
from vtw_kernels.integration.projections import projections
from vtw_kernels.integration.pruning.cache import PrunedCache, check_cache, claim, past_visual
from vtw_kernels.integration.pruning.grids import Grid, Sizes, find_grids, near, places, within
from vtw_kernels.integration.pruning.layer import (
    Heads,
    LayerHeads,
    are_neighbours,
    attend,
    keys,
    merge_rows,
    narrow_mlp,
    projected_out,
    queries,
    rotated,
    take_rows,
    values,
)
from vtw_kernels.integration.pruning.visual_pruning import VisualPruning
from vtw_kernels.integration.pruning.windows import Blocks, make_blocks, of_blocks
from vtw_kernels.integration.stage import Stage
from vtw_kernels.integration.stand_ins import StandIns
from vtw_kernels.integration.withdraw import Withdrawal, unwrapped
from vtw_kernels.ops import CompactionPlan, compact, plan_compaction

FORWARD, ROWS = "vtw_pruning", "vtw_pruning_rows"  # the keyword arguments
MASK = "attention_mask"
DENSE = 0.6  # of a mask of all rows and keys, how much blocks may have to be worth their gathering


class prune_visual(ContextDecorator):  # in lower case, as it is used like a function
    """In this context, less is computed for visual tokens, as a ``VisualPruning`` says. Results are those of the model
    at full size in which attention weights and activations are masked; but what is masked is not computed. Visual rows
    go through slices of the projections and of the MLP. Heads without visual work never see visual keys, and caches do
    not hold these for them. Where heads share their keys (GQA), visual keys are held as long as one of the heads sees
    them; if only some do, keys of text are held twice.

    Prompts without visual tokens take the usual path, bit for bit. ``generate``, training and further turns on the
    same cache work as without. No weights are changed; slices are views where heads stand side by side and of the MLP,
    and are otherwise copied for the time of a product (``copied_bytes``).

    Args:
        model: of transformers, with decoder layers of Llama's shape, Linear projections, full attention in each layer,
            and attention "eager" or "sdpa", or one of your own that takes the same masks. A compiled model runs
            uncompiled.
        pruning: what is left out.
        policy: as ``withdraw`` takes it, at layers before ``layer_cut``: some visual tokens go on, and those that do
            are pruned. Not without ``renormalize``.
        visual_mask: as for ``withdraw``.
        grids: for ``window``: of each sequence, rows and columns of its images, tiles and frames, in the order of their
            tokens in the forward. By default those that the processor made for Qwen-VL, and squares for others.
        decoder: as for ``withdraw``.

    Raises:
        NotImplementedError: decoder layers of another shape, with what is missing.
        TypeError, ValueError: here for an argument; later from the forward for inputs or a cache that can't be handled,
            as of grids that do not fit the visual tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        pruning: VisualPruning,
        policy: Policy | Sequence[Policy] = (),
        *,
        visual_mask: Tensor | None = None,
        grids: Sizes | None = None,
        decoder: nn.Module | None = None,
    ):
        self._used = True
        if not isinstance(pruning, VisualPruning):
            raise TypeError(f"pruning: expected a VisualPruning, got {type(pruning).__name__}")
        self.model, self.pruning = unwrapped(model), pruning
        self.parts = find_parts(self.model, decoder)
        if self.parts.cross_attention:
            raise ValueError(f"model: expected images as tokens, got cross-attention in {type(self.model).__name__}")
        policies: list[Any] = list(policy) if isinstance(policy, Sequence) else [policy]
        if not all(isinstance(x, Policy) for x in policies):
            raise TypeError(f"policy: expected a Policy, or some, got {policy!r}")
        if policies and not pruning.renormalize:
            raise ValueError(f"policy: expected none without renormalize, got {policies}")
        if pruning.renormalize and pruning.layer_cut is not None:
            if late := [x for policy in policies for x in policy.boundaries if x >= pruning.layer_cut]:
                raise ValueError(f"policy: expected layers before layer_cut={pruning.layer_cut}, got {late[0]}")
            policies.append(Withdraw(pruning.layer_cut))
        self._hooks = Hooks(self.model, self.parts, pruning, visual_mask, grids)
        # The last layer withdraws nothing; so its arguments are checked in any case.
        self.withdrawal = Withdrawal(self.model, policies or len(self.parts.layers), visual_mask, decoder)
        if not policies:
            self.withdrawal = None
        self._used = False

    @property
    def copied_bytes(self) -> int:
        """Of weights, in a forward with visual tokens: one layer's after the other, each for the time of a product."""
        return sum(map(_copied_bytes, self._hooks.layers))

    def apply(self) -> "prune_visual":
        """Puts it into effect until ``remove()``."""
        self._used = True
        if (active := getattr(self.parts.decoder, "_vtw_pruning", None)) is not None:
            raise ValueError(f"model: expected one without visual pruning, got one under {active.pruning!r}")
        if getattr(self.parts.decoder, "_vtw_withdrawal", None) is not None:
            raise ValueError(
                "model: expected one without withdrawal, whose policy is an argument of prune_visual, got one under it"
            )
        if (skipping := getattr(self.parts.decoder, "_vtw_skipping", None)) is not None:
            raise ValueError(
                "model: expected one whose attention is not skipped, got one under "
                f"skip_attention(layers={list(skipping.layers)})"
            )
        self.parts.decoder._vtw_pruning = self
        self._hooks.place()
        if self.withdrawal is not None:
            self.withdrawal.place()
        self._generate = vars(self.model).get("generate")
        if hasattr(self.model, "generate"):
            self.model.generate = partial(self._generate_from_prompt, self.model.generate)
        return self

    def remove(self) -> None:
        """Restores the model; calling it again does nothing."""
        if getattr(self.parts.decoder, "_vtw_pruning", None) is not self:
            return
        if isinstance(made := vars(self.model).get("generate"), partial) and made.func == self._generate_from_prompt:
            del self.model.generate  # else another library has wrapped it since
            if self._generate is not None:
                self.model.generate = self._generate
        if self.withdrawal is not None:
            self.withdrawal.remove()
        self._hooks.remove()
        del self.parts.decoder._vtw_pruning

    def _generate_from_prompt(self, generate: Callable, *args: Any, **kwargs: Any) -> Any:
        """Remembers the sizes of images, which ``generate`` does not hand to the forward that sees them."""
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        before, _per_thread.prompt = _per_thread.prompt, kwargs | {"input_ids": ids}
        try:
            with generating(0 if ids is None else ids.shape[1]):
                return generate(*args, **kwargs)
        finally:
            _per_thread.prompt = before

    def __enter__(self) -> "prune_visual":
        return self.apply()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                "prune_visual: nothing was pruned, as its context was not entered; write `with prune_visual(...):`, or "
                "call prune_visual(...).apply() for pruning that stays",
                stacklevel=2,
            )


def _copied_bytes(layer: LayerHeads) -> int:
    if layer.plain:
        return 0
    parts, total = layer.parts, 0
    for heads in (layer.seeing, layer.blind):
        projections = ((parts.q, heads.query), (parts.o, heads.query), (parts.k, heads.kv), (parts.v, heads.kv))
        for linear, which in projections:
            if not are_neighbours(which):
                total += len(which) * parts.head_dim * parts.q.in_features * linear.weight.element_size()
    return total


class _PerThread(threading.local):
    run: "LayerRun | None" = None  # the layer that this thread is in
    prompt: dict[str, Any] | None = None  # the arguments of ``generate`` that it is in


_per_thread = _PerThread()


class Hooks(StandIns):
    """The functions that replace ``forward`` of a model's modules. Arguments as for ``prune_visual``."""

    def __init__(
        self, model: nn.Module, parts: Parts, pruning: VisualPruning, visual_mask: Tensor | None, grids: Sizes | None
    ):
        super().__init__()
        self.model, self.parts, self.pruning, self.visual_mask, self.grids = model, parts, pruning, visual_mask, grids
        found = [projections(layer, f"decoder layer {i}") for i, layer in enumerate(parts.layers)]
        pruning.check_model(found)
        self.last = len(found)  # the layers from here on see no visual rows
        if pruning.renormalize and pruning.layer_cut is not None:
            self.last = pruning.layer_cut
        if odd := [kind for kind in parts.layer_types[: self.last] if kind != "full_attention"]:
            raise ValueError(f"model: expected full attention in each layer, got {odd[0]}")
        config = parts.config
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
            raise ValueError(f"model: expected full attention in each layer, got a window of {config.sliding_window}")
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise ValueError("model: expected all heads on each rank, got a tensor-parallel one")
        self.layers = [self._heads(i, x) for i, x in enumerate(found)]
        self.entered = list(dict.fromkeys((model, parts.body, parts.decoder)))
        inner = [module for x in found for module in (x.attention, x.mlp)]
        self.arguments = {module: Arguments(module) for module in (*self.entered, *parts.layers, *inner)}
        if not_passing := [x for x in self.entered if not self.arguments[x].passes_on]:
            raise ValueError(f"model: expected keyword arguments to be passed on, got {type(not_passing[0]).__name__}")

    def _heads(self, index: int, parts: Any) -> LayerHeads:
        keep = self.pruning.heads
        kept = torch.ones(parts.heads, dtype=torch.bool) if keep is None else keep[index].cpu()
        group, cut = parts.heads // parts.kv_heads, self.pruning.layer_cut
        seeing, blind = (Heads(x.nonzero().flatten().tolist(), group) for x in (kept, ~kept))
        cut_here = not self.pruning.renormalize and cut is not None and index >= cut
        return LayerHeads(parts, seeing, blind, cut_here)

    def place(self) -> None:
        self.active = True
        for module in self.entered:
            self._stand_in(module, partial(self.enter, module))
        for i, layer in enumerate(self.parts.layers[: self.last]):
            self._stand_in(layer, partial(self.enter_layer, i, layer))
            self._stand_in(self.layers[i].parts.attention, partial(self.attention, self.layers[i].parts.attention))
            self._stand_in(self.layers[i].parts.mlp, partial(self.mlp, self.layers[i].parts.mlp))
        for layer in self.parts.layers[self.last :]:
            self._stand_in(layer, partial(self.enter_later_layer, layer))

    # ------------------------------------------------------------------------------- the model, its body, its decoder

    @torch.compiler.disable(reason="How many rows are visual is read from the device")
    def enter(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.active or FORWARD in kwargs:
            return self._call(module, args, kwargs)
        forward = Forward(self, self.arguments[module].named(args, kwargs), self.arguments[module])
        if forward.sequence is None:
            return self._call(module, args, kwargs)  # without inputs; the model's own error says so
        try:
            output = self._call(module, args, kwargs | {FORWARD: forward, ROWS: forward.rows})
            forward.end()
            return output
        finally:
            forward.close()

    # --------------------------------------------------------------------------------------------------- its layers

    def enter_layer(self, index: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, rows = kwargs.pop(FORWARD, None), kwargs.pop(ROWS, None)
        if not self.active:
            return self._call(module, args, kwargs)
        if forward is None:
            raise RuntimeError(
                f"prune_visual: expected decoder layer {index} to run within a forward of its model, got a call of its "
                f"own, or of {type(self.parts.decoder).__name__} without the keyword arguments that this was given"
            )
        arguments = self.arguments[module]
        named = arguments.named(args, kwargs)
        forward.begin(named, arguments.cache_among(named))
        before, _per_thread.run = _per_thread.run, LayerRun(self.layers[index], index, forward, forward.view(rows))
        try:
            return self._call(module, args, kwargs)
        finally:
            _per_thread.run = before

    def enter_later_layer(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A layer from the cut on, which has no visual rows: it runs without the two keyword arguments."""
        kwargs.pop(FORWARD, None), kwargs.pop(ROWS, None)
        return self._call(module, args, kwargs)

    # ------------------------------------------------------------------------------------- their attention and MLPs

    def attention(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = _per_thread.run
        if not self.active or run is None or run.forward.plain:
            return self._call(module, args, kwargs)
        named = self.arguments[module].named(args, kwargs)
        cache = self.arguments[module].cache_among(named)
        mask, blocks = named.get(MASK), None
        if run.view is not None and self.pruning.window is not None:
            blocks = run.forward.blocks(run.view, mask, cache, run.index)
            if blocks is None:
                named[MASK] = run.forward.windowed(run.view, mask, cache, run.index)
        if run.layer.plain and blocks is None:
            return self._call(module, (), named)
        return run.attention(named, mask, cache, blocks), None

    def mlp(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = _per_thread.run
        if not self.active or run is None or run.view is None or self.pruning.ffn_ratio is None:
            return self._call(module, args, kwargs)
        (x,) = (*args, *kwargs.values())
        parts, view = run.layer.parts, run.view
        columns = int(parts.gate.out_features / self.pruning.ffn_ratio)
        text, visual = (take_rows(x, plan) for plan in (view.text, view.images))
        text = self._call(module, (text,), {})
        return merge_rows(x.shape[1], (text, view.text), (narrow_mlp(parts, visual, columns), view.images))


class View(NamedTuple):
    """The rows that reach a layer, ``[B, R]``: which token of the forward each is, counted from 1, or 0 for padding;
    which of them are visual and which are text; and a plan of the text rows and one of the visual rows."""

    rows: Tensor
    visual: Tensor
    text_rows: Tensor
    text: CompactionPlan
    images: CompactionPlan


class Forward:
    """One call of a model under visual pruning.

    Args:
        inputs: of the outermost module.
        arguments: of it.

    Raises:
        TypeError, ValueError: inputs or a cache that can't be handled.
    """

    def __init__(self, hooks: Hooks, inputs: dict[str, Any], arguments: Arguments):
        self.hooks, self.pruning = hooks, hooks.pruning
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        self.sequence = embeds if ids is None else ids
        self.rows: Tensor | None = None  # int64 [B, S], see ``View``
        self.visual: Tensor | None = None  # bool [B, S]; None for a forward without visual tokens
        self.views: list[View] = []
        self.masks: list[tuple[View, Any, Tensor]] = []  # that have windows
        self.blocked: tuple | None = None  # blocks of visual rows and their mask, or () where they do not pay
        self.books: Slots | None = None
        self.began = False
        cache = arguments.cache_among(inputs)
        if self.sequence is None:
            return
        batch, self.tokens = self.sequence.shape[:2]
        self.device = self.sequence.device
        self.attends = hooks.parts.config._attn_implementation
        if kind_of_masks(self.attends) != "dense":
            raise ValueError(f"model: expected attention 'eager' or 'sdpa' under prune_visual, got {self.attends!r}")
        if inputs.get("output_attentions") or hooks.parts.config.output_attentions:
            raise ValueError("output_attentions: expected False, as no weights of all heads are there, got True")
        if cache is not None:
            check_cache(cache, self.pruning)
        self.past = cache.books.at_least if isinstance(cache, PrunedCache) else 0
        self.rows = torch.arange(1, self.tokens + 1, device=self.device).expand(batch, -1)
        if may_be_visual(inputs, self.past, hooks.visual_mask):
            self._look(inputs)

    def _look(self, inputs: dict[str, Any]) -> None:
        """Finds visual tokens; here the host waits for the device."""
        visual = self._visual_tokens(inputs)
        attended = attended_tokens(inputs.get(MASK), visual, self.past)
        visual, text = visual & attended, attended & ~visual
        on_host = visual.cpu()
        if not on_host.any():
            if self.hooks.visual_mask is None and inputs.get("input_ids") is None:
                raise ValueError(NO_PLACEHOLDER)
            return
        self.visual = visual
        if self.pruning.window is not None:
            self.grids = self._grids(on_host, inputs)
            self.places = places(self.grids, *visual.shape).to(self.device)
        self.text_rows, counts = text, text.sum(1)
        length = max(1, int(counts.max()))
        self.text, self.padded = plan_compaction(text, length, pad="left"), int(counts.min()) < length

    def _grids(self, visual: Tensor, inputs: dict[str, Any]) -> list[Grid]:
        config, prompt, names = self.hooks.model.config, _per_thread.prompt, ("image_grid_thw", "video_grid_thw")
        here = self.hooks.grids is not None or any(inputs.get(name) is not None for name in names)
        if here or prompt is None or all(prompt.get(name) is None for name in names):
            ids = inputs.get("input_ids")
            return find_grids(visual, self.hooks.grids, config, inputs, None if ids is None else ids.cpu())
        ids = prompt["input_ids"]
        if ids is None:
            raise ValueError("grids: expected them, or input_ids of the prompt, to tell which image is where, got None")
        whole = find_visual_tokens(self.hooks.parts, prompt) & attended_tokens(
            prompt.get(MASK), torch.ones_like(ids) > 0
        )
        return within(find_grids(whole.cpu(), None, config, prompt, ids.cpu()), len(ids), visual, self.past)

    def _visual_tokens(self, inputs: dict[str, Any]) -> Tensor:
        mask, batch = self.hooks.visual_mask, len(self.sequence)
        if mask is None:
            return find_visual_tokens(self.hooks.parts, inputs)
        visual = mask[:, self.past : self.past + self.tokens].to(self.device)
        if batch % len(visual):
            raise ValueError(f"visual_mask: expected {batch} rows, or a divisor, as the inputs have, got {len(visual)}")
        visual = torch.nn.functional.pad(visual, (0, self.tokens - visual.shape[1]))
        return visual.repeat_interleave(batch // len(visual), dim=0)

    @property
    def plain(self) -> bool:
        """Whether there are no visual tokens, neither in it nor in the cache."""
        return self.visual is None and (self.books is None or self.books.columns is None)

    def begin(self, named: dict[str, Any], cache: Cache | None) -> None:
        """Called before the first layer, whose arguments have all rows: updates the books of the cache, and gathers the
        mask and the rotary tables of text."""
        if self.began:
            return
        self.began = True
        hidden, batch = named["hidden_states"], len(self.sequence)
        if hidden.shape[-2] != self.tokens:
            raise ValueError(
                f"input_ids: expected {hidden.shape[-2]} tokens, one for each of those that the decoder makes of "
                f"them, visual ones included, got {self.tokens}"
            )
        plan = None if self.visual is None else self.text
        past: int | Tensor = 0
        padded, static, columns = self.visual is not None and self.padded, False, None
        if cache is not None:
            check_cache(cache, self.pruning)
            claim(cache, self.pruning)
            self.books = books = cache.books
            self.visual_before = past_visual(books, batch, self.device)
            static = any(isinstance(x, StaticLayer) for x in cache.layers)
            capacity = max((x.max_cache_len for x in cache.layers if isinstance(x, StaticLayer)), default=None)
            past = books.tokens if isinstance(books.tokens, int) else books.tokens.clone()
            books.past, books.open, books.whole = past, True, False
            books.append(self.tokens, None if plan is None else plan.source, batch, self.device, capacity)
            books.padded = padded = padded or books.padded
            columns = books.columns
        else:
            self.visual_before = torch.zeros(batch, 0, dtype=torch.bool, device=self.device)
        if self.plain:
            return
        # With a single row, None no longer means causal to sdpa but all slots, and the rest are not filled yet.
        padded = padded or (static and plan is not None and plan.source.shape[1] == 1)
        self.mask, self.rope = named.get(MASK), named["position_embeddings"]
        stage = Stage(self.tokens, plan, columns, past, padded)
        short, _ = stage({MASK: self.mask, "position_embeddings": self.rope})
        self.text_mask, self.text_rope = short[MASK], short["position_embeddings"]

    def end(self) -> None:
        if self.books is not None:
            self.books.whole = True

    def close(self) -> None:
        if self.books is not None:
            self.books.open = False

    def view(self, rows: Tensor) -> View | None:
        """Of the rows that a layer is given; None if none of them is visual."""
        if self.visual is None:
            return None
        for view in self.views:
            if view.rows is rows:
                return view
        at = (rows - 1).clamp(min=0)
        visual = self.visual.gather(1, at) & (rows > 0)
        is_text = self.text_rows.gather(1, at) & (rows > 0)
        text = plan_compaction(is_text, self.text.source.shape[1], pad="left")
        images = plan_compaction(visual, int(visual.sum(1).max()), pad="left")
        self.views.append(View(rows, visual, is_text, text, images))
        return self.views[-1]

    def blocks(self, view: View, mask: Tensor | None, cache: Cache | None, index: int) -> tuple[Blocks, Tensor] | None:
        """The blocks in which visual rows of a layer attend, and their mask ``[N, 1, q, k]``. None where one mask of
        all rows and keys is needed or cheaper: if some rows have left, if attention is observed, and for small
        images."""
        layer = None if cache is None else _layer_of(cache, index)
        if view.rows is not self.rows or observing():
            return None
        if self.blocked is None:
            text = torch.cat((~self.visual_before, view.text_rows), dim=1).cpu()
            blocks = make_blocks(self.grids, self.places.cpu(), text, self.past, self.pruning.window // 2)
            blocks = Blocks(*(x.to(self.device) for x in blocks))
            rows, columns = view.rows.shape[1], text.shape[1]
            pays = blocks.pairs + view.text.source.numel() * columns < DENSE * len(text) * rows * columns
            self.blocked = (blocks, self._block_mask(blocks, mask, layer)) if pays else ()
        return self.blocked or None

    def _block_mask(self, blocks: Blocks, mask: Tensor | None, layer: Any) -> Tensor:
        base = self._dense(mask, self.tokens, 0 if layer is None else _slots_filled(layer, self.past), layer)
        base = base.expand(len(self.sequence), -1, -1, -1)
        at = blocks.sequence[:, None, None], 0, blocks.rows[:, :, None], blocks.keys[:, None, :]
        seen = _as(blocks.seen, base)
        return torch.where(blocks.text[:, None] & blocks.seen, base[at], seen)[:, None]

    def windowed(self, view: View, mask: Tensor | None, cache: Cache | None, index: int) -> Tensor:
        """The mask of a layer, in which visual rows see no visual keys but their neighbours'."""
        for known, given, result in self.masks:
            if known is view and given is mask:
                return result
        rows, layer = view.rows, None if cache is None else _layer_of(cache, index)
        held = 0 if layer is None else _slots_filled(layer, self.past)
        base = self._dense(mask, rows.shape[1], held, layer)
        columns = base.shape[-1]
        tokens = torch.arange(columns, device=rows.device).expand(len(rows), -1)  # of each key, of the whole sequence
        if isinstance(layer, WithdrawnLayer) and layer.slots is not None and layer.slots.columns is not None:
            tokens = layer.slots.columns[:, :columns]
            tokens = torch.nn.functional.pad(tokens, (0, columns - tokens.shape[1]), value=-1)
        elif rows.shape[1] < self.tokens and layer is None:
            tokens = rows - 1
        visual = torch.cat((self.visual_before, self.visual), dim=1)
        there = (tokens >= 0) & (tokens < visual.shape[1])
        tokens = tokens.clamp(0, visual.shape[1] - 1)
        is_visual = visual.gather(1, tokens) & there
        place = torch.nn.functional.pad(self.places, (0, 0, self.past, 0), value=-1)
        key_place = _gathered(place, tokens).masked_fill(~is_visual[..., None], -1)
        row_place = _gathered(self.places, (rows - 1).clamp(min=0)).masked_fill(~view.visual[..., None], -1)
        between = (view.visual[:, :, None] & is_visual[:, None, :])[:, None]
        neighbours = near(row_place, key_place, self.pruning.window // 2)[:, None]
        result = torch.where(between, _as(neighbours, base), base)
        self.masks.append((view, mask, result))
        return result

    def rows_of_text(self, view: View | None, mask: Tensor | None, cache: Cache | None, index: int) -> Tensor | None:
        """Of a mask, the rows of text."""
        if view is None:
            return mask
        layer = None if cache is None else _layer_of(cache, index)
        held = 0 if layer is None else _slots_filled(layer, self.past)
        base = self._dense(mask, view.rows.shape[1], held, layer)
        index_ = view.text.source.long().clamp(min=0)[:, None, :, None]
        return torch.take_along_dim(base, index_.to(base.device), dim=-2)

    def _dense(self, mask: Tensor | None, rows: int, held: int, layer: Any) -> Tensor:
        """``[B or 1, 1, rows, keys]``: a mask, or what None stands for."""
        if mask is not None:
            return mask
        columns = layer.max_cache_len if isinstance(layer, StaticLayer) else held + rows
        causal = torch.ones(rows, columns, dtype=torch.bool, device=self.device).tril(held)[None, None]
        if self.attends != "eager":
            return causal
        return _as(causal, torch.zeros((), dtype=self.hooks.parts.decoder.dtype, device=self.device))


def _as(allowed: Tensor, like: Tensor) -> Tensor:
    """A mask of bools as one like another."""
    if like.dtype == torch.bool:
        return allowed
    return torch.zeros((), dtype=like.dtype, device=like.device).where(allowed, torch.finfo(like.dtype).min)


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _layer_of(cache: Cache, index: int) -> Any:
    return cache.layers[index] if index < len(cache.layers) else None


def _slots_filled(layer: Any, past: int) -> int:
    """How many keys a layer holds before a forward."""
    if isinstance(layer, StaticLayer):
        return past
    return layer.keys.shape[-2] if layer.is_initialized and layer.keys is not None and layer.keys.ndim > 1 else 0


class LayerRun(NamedTuple):
    """One layer in one forward."""

    layer: LayerHeads
    index: int
    forward: Forward
    view: View | None  # None without visual rows

    def attention(
        self, named: dict[str, Any], mask: Tensor | None, cache: Cache | None, blocks: tuple[Blocks, Tensor] | None
    ) -> Tensor:
        """``[B, R, H]``, from two groups of heads. ``named``: the module's arguments, with the mask for heads that see
        visual tokens; ``mask``: the one that the layer was given; ``blocks``: in which visual rows attend, if any."""
        x, rope = named["hidden_states"], named["position_embeddings"]
        parts, seeing, blind = self.layer.parts, self.layer.seeing, self.layer.blind
        forward, attention = self.forward, self.layer.parts.attention
        if cache is not None and len(blind):
            cache.split(self.index, seeing.kv, blind.kv)
        blind_mask = text_mask = forward.text_mask
        if blocks is not None or not forward.pruning.renormalize:  # before anything is cached
            text_mask = forward.rows_of_text(self.view, mask, cache, self.index)
        if not forward.pruning.renormalize:
            blind_mask = text_mask
        further = compat.written_to(named)
        results = []
        whole = self._projected(x, rope) if self.view is None else None
        if len(seeing):
            q, k, v = self._seeing(x, rope) if whole is None else _heads_of(whole, seeing)
            if cache is not None:
                k, v = cache.update(k, v, self.index, *further)
            if blocks is None:
                results.append((seeing, attend(parts, seeing, q, k, v, named.get(MASK), observed=True)))
            else:
                results.append((seeing, self._in_blocks(q, k, v, text_mask, *blocks)))
        if len(blind):
            q, k, v = self._blind(x, rope) if whole is None else _heads_of(whole, blind)
            if cache is not None:
                k, v = cache.blind[self.index].update(k, v, *further)
            results.append((blind, attend(parts, blind, q, k, v, blind_mask, observed=False)))
        if self.view is None:
            order = torch.cat([heads.query for heads, _ in results]).argsort().to(x.device)
            output = torch.cat([y.unflatten(-1, (-1, parts.head_dim)) for _, y in results], dim=2)
            return attention.o_proj(output.index_select(2, order).flatten(2))
        output: Any = 0
        for heads, y in results:
            y = projected_out(parts, y, heads.query)
            output = output + (y if heads is seeing else merge_rows(x.shape[1], (y, self.view.text)))
        return output if parts.o.bias is None else output + parts.o.bias

    def _in_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, blocks: Blocks, mask: Tensor
    ) -> Tensor:
        """Of heads that see visual tokens: text rows with all keys, and visual rows block by block."""
        parts, heads, view = self.layer.parts, self.layer.seeing, self.view
        text = compact([q], view.text, 2)[0]
        text = attend(parts, heads, text, k, v, text_mask, observed=False)
        inside = of_blocks(q, blocks.sequence, blocks.rows)
        around = (of_blocks(x, blocks.sequence, blocks.keys) for x in (k, v))
        inside = attend(parts, heads, inside, *around, mask, observed=False)
        at = blocks.sequence[:, None].expand_as(blocks.rows)[blocks.real], blocks.rows[blocks.real]
        return merge_rows(q.shape[2], (text, view.text)).index_put(at, inside[blocks.real])

    def _projected(self, x: Tensor, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads."""
        parts = self.layer.parts
        return *rotated(parts.attention, rope, queries(parts, x), keys(parts, x)), values(parts, x)

    def _seeing(self, x: Tensor, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads that see visual tokens, for all rows."""
        parts, heads = self.layer.parts, self.layer.seeing
        q, k = rotated(parts.attention, rope, queries(parts, x, heads.query), keys(parts, x, heads.kv))
        return q, k, self._values(x, heads) if self.layer.cut else values(parts, x, heads.kv)

    def _blind(self, x: Tensor, rope: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the other heads: for text rows alone; or, without renormalisation, keys and values for all rows, as
        visual keys are then part of the softmax."""
        parts, heads, text_rope = self.layer.parts, self.layer.blind, self.forward.text_rope
        text = take_rows(x, self.view.text)
        q = queries(parts, text, heads.query)
        if self.forward.pruning.renormalize:
            q, k = rotated(parts.attention, text_rope, q, keys(parts, text, heads.kv))
            return q, k, values(parts, text, heads.kv)
        k = keys(parts, x, heads.kv)
        q, k = rotated(parts.attention, text_rope, q, q)[0], rotated(parts.attention, rope, k, k)[1]
        return q, k, self._values(x, heads)

    def _values(self, x: Tensor, heads: Heads) -> Tensor:
        """Those of text, with zeros for visual rows."""
        parts = self.layer.parts
        text = values(parts, take_rows(x, self.view.text), heads.kv).transpose(1, 2).flatten(2)
        return merge_rows(x.shape[1], (text, self.view.text)).unflatten(-1, (-1, parts.head_dim)).transpose(1, 2)


def _heads_of(whole: tuple[Tensor, Tensor, Tensor], heads: Heads) -> tuple[Tensor, ...]:
    which = (heads.query, heads.kv, heads.kv)
    return tuple(x.index_select(1, y.to(x.device)) for x, y in zip(whole, which))
