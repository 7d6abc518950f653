"""Attention that is skipped (Efficient Attention Skipping, EAS, arXiv 2403.15226) in transformers.

A decoder layer whose attention is skipped keeps its MLP. What stands in for parts of a layer, its norms, its attention
and its MLP, leaves the layer's own ``forward`` as it is: so masks, positions, checkpointing and withdrawal go on as
ever, and a layer of cache that nothing is written to says the lengths that another one says (``cache.py``).
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vtw_kernels.integration import compat
from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.cache import Skipped, skip_layers
from vtw_kernels.integration.families import ATTENTION_LAYERS, Parts, find_parts
from vtw_kernels.integration.hooks import PromptKnown, prompt_length
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.integration.projections import check_shape
from vtw_kernels.integration.skipping.adapters import SkipAdapters
from vtw_kernels.integration.stand_ins import StandIns
from vtw_kernels.integration.withdraw import unwrapped

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
# The keyword argument that layers are given: bool [B, q], what adapters take their means over; or the books of the
# cache, which have these means.
PROMPT = "vtw_prompt"


class skip_attention(ContextDecorator):  # a context manager, named as a function is
    """Decoder layers ``layers`` run without their attention, and cache nothing.

    Without adapters, such a layer is what it would be if its attention put out zeros: ``x + MLP(norm2(x))``. That is
    the least change of a model that was not trained for it. With adapters, it is the layer of Efficient Attention
    Skipping (EAS, arXiv 2403.15226): one residual branch, ``x + MLP(g2 * A(norm1(x)))``, where ``g2`` is the weight of
    ``norm2``, and the adapter ``A`` is of low rank and reads a mean over the prompt (``SkipAdapters``). With an adapter
    that does nothing, this is ``x + MLP(g2 * norm1(x))``, not the layer without one: adapters mean something once they
    are trained.

    ``generate``, training, and further turns on the same cache work as without. Positions, masks and lengths stay
    those of the whole model; a layer that is skipped has no keys, so its ``attentions`` are missing. A cache that was
    filled here can only be used here. Works together with ``withdraw``, entered before or after it.

    With adapters, the prompt is what ``generate`` was given; or else the tokens of the first forward on an empty cache,
    up to the first label, or of each forward without a cache. What follows on the same cache reads the mean over that
    prompt and adds nothing to it: so nothing leaks from answers, and further turns stay with the first prompt's mean.

    Args:
        model: of transformers, as for ``withdraw``, with decoder layers of Llama's shape (``projections.py``).
        layers: which, each 0..number of decoder layers - 1, in any order; at least one layer has to stay. By default
            those of the adapters.
        adapters: ``SkipAdapters``, or the folder that their ``save_pretrained`` wrote.
        fold: whether, while one sequence is decoded, its adapters are folded into copies of the weights behind them,
            which are made once after each prompt: gate and up of the MLPs of skipped layers, and query, key and value
            of the others. The numbers are the same but for rounding. Larger batches, whose adapters differ from
            sequence to sequence, compiled code, training, and weights that are not plain, quantized ones or under
            LoRA, use adapters of low rank as they are.
        decoder: as for ``withdraw``.

    Raises:
        TypeError, ValueError, NotImplementedError: here for an argument, or for a model of another shape; later from
            the forward for a cache that was filled otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        adapters: SkipAdapters | str | Path | None = None,
        *,
        fold: bool = True,
        decoder: nn.Module | None = None,
    ):
        self._handle = Skipping(model, layers, adapters, fold, decoder)
        self._used = False

    def __enter__(self) -> "Skipping":
        return self.apply()

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def apply(self) -> "Skipping":
        """Skips until ``remove()`` of the returned handle is called."""
        self._used = True
        return self._handle.place()

    def __call__(self, function: Decorated) -> Decorated:
        self._used = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not getattr(self, "_used", True):  # without the attribute, an argument was refused
            warnings.warn(
                "skip_attention: nothing was skipped, as its context was not entered; write `with skip_attention(...):`"
                ", or call .apply() for what stays",
                stacklevel=2,
            )


@dataclass(frozen=True)
class SkipAttention:
    """``skip_attention`` as a setting, which ``compare`` takes beside policies, or in a list together with them.

    layers: a sequence of decoder layers, by default those of the adapters. adapters: as ``skip_attention`` takes them.
    """

    layers: Sequence[int] | None = None
    adapters: SkipAdapters | str | Path | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and isinstance(self.layers, Sequence):
            object.__setattr__(self, "layers", tuple(self.layers))


class Skipping:
    """Attention skipped in one model, in effect until ``remove()``.

    layers: which, ascending. adapters: ``SkipAdapters`` or None.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None,
        adapters: SkipAdapters | str | Path | None,
        fold: bool,
        decoder: nn.Module | None,
    ):
        self.model = model = unwrapped(model)
        self.parts = find_parts(model, decoder)
        if isinstance(adapters, str | Path):
            adapters = SkipAdapters.from_pretrained(adapters)
        if adapters is not None and not isinstance(adapters, SkipAdapters):
            raise TypeError(f"adapters: expected SkipAdapters or their folder, got {type(adapters).__name__}")
        if adapters is not None:
            adapters.check_model(model, self.parts.config, len(self.parts.layers))
        if layers is None and adapters is None:
            raise ValueError("layers: expected some decoder layers, got None without adapters")
        self.layers = check_skipped(adapters.layers if layers is None else layers, self.parts)
        if adapters is not None and (missing := [x for x in self.layers if x not in adapters.layers]):
            raise ValueError(f"layers: expected some of {list(adapters.layers)}, which have adapters, got {missing}")
        self.adapters = adapters
        self._hooks = SkipHooks(model, self.parts, self.layers, adapters, fold)
        self._prompt = PromptKnown(model)

    def place(self) -> "Skipping":
        """Puts it into effect. Raises ValueError where another one is, or visual pruning."""
        if (active := getattr(self.parts.decoder, "_vtw_skipping", None)) is not None:
            raise ValueError(
                "model: expected one whose attention is not skipped, got one under "
                f"skip_attention(layers={list(active.layers)})"
            )
        if (pruned := getattr(self.parts.decoder, "_vtw_pruning", None)) is not None:
            raise ValueError(f"model: expected one without visual pruning, got one under {pruned.pruning!r}")
        compat.warn_if_newer()
        self.parts.decoder._vtw_skipping = self
        self._hooks.place()
        if self.adapters is not None:
            self._prompt.place()
        return self

    def remove(self) -> None:
        """Restores the model; calling it again does nothing."""
        if getattr(self.parts.decoder, "_vtw_skipping", None) is not self:
            return
        del self.parts.decoder._vtw_skipping
        self._hooks.remove()
        self._prompt.remove()


def check_skipped(layers: Sequence[int], parts: Parts) -> tuple[int, ...]:
    """The layers whose attention is to be skipped, ascending.

    Raises:
        TypeError, ValueError, NotImplementedError: what ``skip_attention`` does not take, of layers or of a model.
    """
    count = len(parts.layers)
    if isinstance(layers, str) or not isinstance(layers, Sequence) or any(type(x) is not int for x in layers):
        raise TypeError(f"layers: expected numbers of decoder layers, got {layers!r}")
    if not layers or len(set(layers)) < len(layers) or not 0 <= min(layers) <= max(layers) < count:
        raise ValueError(f"layers: expected different ones in 0..{count - 1}, at least one, got {list(layers)}")
    if len(layers) == count:
        raise ValueError(f"layers: expected at least one of {count} to keep its attention, got all of them")
    if parts.cross_attention or parts.num_cached < count:
        what = "images come in by cross-attention" if parts.cross_attention else "layers share keys and values"
        raise ValueError(f"model: expected layers with attention of their own, got a model in which {what}")
    for i, layer in enumerate(parts.layers):
        if parts.layer_types[i] not in ATTENTION_LAYERS:
            raise ValueError(f"model: expected attention in all layers, got {parts.layer_types[i]} in {i}")
        check_shape(layer, f"decoder layer {i}")
    return tuple(sorted(layers))


Folded = dict[nn.Module, tuple[Tensor, Tensor]]  # weight and bias, by the module that they stand in for


class _PerThread(threading.local):
    folded: Folded | None = None  # of the layer whose attention runs


_per_thread = _PerThread()


class SkipHooks(StandIns):
    """What stands in for ``forward`` of a model, its body and its decoder, which hand on what adapters take their means
    over, and of parts of its decoder layers, which take it out again and act on it.

    Args:
        model: of transformers, without wrappers.
        parts: of it.
        layers: whose attention is skipped, ascending.
        adapters: of these layers at least, or None.
        fold: as for ``skip_attention``.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, layers: tuple[int, ...], adapters: SkipAdapters | None, fold: bool
    ):
        super().__init__()
        self.parts, self.layers, self.adapters, self.fold = parts, layers, adapters, fold
        kept = [i for i in range(len(parts.layers)) if i not in layers]
        same_kind = {i: [x for x in kept if parts.layer_types[x] == parts.layer_types[i]] for i in layers}
        self.like = {i: (same_kind[i] or kept)[0] for i in layers}  # where none is, nobody needs that kind of mask
        self.entered = [parts.decoder]
        if adapters is not None:
            self.entered = list(dict.fromkeys((model, parts.body, parts.decoder)))
        attentions = [layer.self_attn for layer in parts.layers]
        self.arguments = {module: Arguments(module) for module in (*self.entered, *attentions)}
        if adapters is not None:
            norms = {i: parts.layers[i].post_attention_layernorm for i in layers}
            self.offsets = {i: _offset(norm, f"decoder layer {i}") for i, norm in norms.items()}
            for module in (*self.entered, *parts.layers, *attentions):
                if not (self.arguments.get(module) or Arguments(module)).passes_on:
                    raise ValueError(
                        "model: expected modules that pass keyword arguments on, as adapters need them, got "
                        f"{type(module).__name__}"
                    )

    def place(self) -> None:
        self.active = True
        for module in self.entered:
            self._stand_in(module, partial(self.enter, module))
        for i, layer in enumerate(self.parts.layers):
            skipped = i in self.layers
            if skipped or self.adapters is not None:
                self._stand_in(layer.self_attn, partial(self.attend, i, layer.self_attn))
            if not skipped and self.adapters is not None and self.fold and i in self.adapters.kept:
                for name in ("q_proj", "k_proj", "v_proj"):
                    projection = getattr(layer.self_attn, name)
                    if type(projection) is nn.Linear:
                        self._stand_in(projection, partial(self.project, projection))
            if skipped and self.adapters is None:
                self._stand_in(layer.input_layernorm, partial(self.pass_on, layer.input_layernorm))
            elif skipped:
                self._stand_in(layer.post_attention_layernorm, partial(self.pass_on, layer.post_attention_layernorm))
                self._stand_in(layer.mlp, partial(self.put_out_zeros, layer.mlp))

    # ------------------------------------------------------------------------------- the model, its body, its decoder

    def enter(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self._call(module, args, kwargs)
        cache = self.arguments[module].cache_in(args, kwargs)
        books = None if cache is None else self._books(cache)
        if self.adapters is not None and PROMPT not in kwargs:
            kwargs[PROMPT] = self._prompt(self.arguments[module].named(args, kwargs), cache, books)
        return self._call(module, args, kwargs)

    def _books(self, cache: Cache) -> Skipped:
        first = self.layers[0]
        books = getattr(cache.layers[first], "skipped", None) if first < len(cache.layers) else None
        return books if books is not None and books.layers == self.layers else self._begin(cache)

    @torch.compiler.disable
    def _begin(self, cache: Cache) -> Skipped:
        return skip_layers(cache, self.like, len(self.parts.layers))

    def _prompt(self, inputs: dict[str, Any], cache: Cache | None, books: Skipped | None) -> Tensor | Skipped:
        """What layers are told of the prompt."""
        if books is not None and books.states:
            self._check_states(cache, books)
            return books
        prompt = prompt_length()
        sequence = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        rows, device = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device), sequence.device
        rows = attended_tokens(inputs.get("attention_mask"), rows)
        columns = torch.arange(rows.shape[1], device=device)
        if prompt:
            if prompt > rows.shape[1] and cache is not None:
                raise ValueError(
                    f"input_ids: expected the whole prompt, {prompt} tokens, in the first forward on a cache, as "
                    f"adapters read the mean over it, got {rows.shape[1]}"
                )
            rows = rows & (columns < prompt)
        labels = inputs.get("labels")
        if labels is not None and labels.shape == rows.shape and not labels.is_floating_point():
            rows = rows & (labels == -100).cumprod(1).bool()
        if books is not None:
            books.prompt = min(prompt or rows.shape[1], rows.shape[1])
        return rows

    @torch.compiler.disable
    def _check_states(self, cache: Cache, books: Skipped) -> None:
        if len(books.states) < len(self.adapters.layers_of(self.layers)):
            raise ValueError("past_key_values: expected a cache whose last forward came to its end, got another one")
        if (length := int(cache.get_seq_length())) < books.prompt:
            raise ValueError(
                f"past_key_values: expected a cache with all of the prompt, {books.prompt} tokens, over which adapters "
                f"took their means, got one that was cropped to {length}"
            )

    # ---------------------------------------------------------------------------------------- parts of decoder layers

    def pass_on(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A norm that is left out."""
        if not self.active:
            return self._call(module, args, kwargs)
        return args[0] if args else next(iter(kwargs.values()))

    def put_out_zeros(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """An MLP that has run in the place of attention."""
        if not self.active:
            return self._call(module, args, kwargs)
        return (args[0] if args else next(iter(kwargs.values()))).new_zeros(())

    def attend(self, index: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs.pop(PROMPT, None)
        if not self.active or (index not in self.layers and index not in self.adapters.kept):
            return self._call(module, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        books = prompt
        if not isinstance(prompt, Skipped):
            cache = self.arguments[module].cache_in(args, kwargs)  # a decoder that was given none may have made one
            books = None if cache is None else self._books(cache)
        if self.adapters is None:
            return hidden.new_zeros(()), None  # and no weights
        if prompt is None:
            raise RuntimeError(
                f"skip_attention: expected decoder layer {index} to run within a forward of its model, got a call of "
                "its own, which does not say what the prompt is"
            )
        if prompt is books and self._folds(hidden) and (folded := self._folded(index, books)):
            if index in self.layers:
                mlp = self.parts.layers[index].mlp
                gate, up = F.linear(hidden, *folded[mlp]).chunk(2, dim=-1)
                return mlp.down_proj(mlp.act_fn(gate) * up), None
            _per_thread.folded = folded
            try:
                return self._call(module, args, kwargs)
            finally:
                _per_thread.folded = None
        adapted = self._adapted(index, hidden, prompt, books)
        if index in self.layers:
            layer = self.parts.layers[index]
            gain = layer.post_attention_layernorm.weight + self.offsets[index]
            return self._call(layer.mlp, (adapted * gain,), {}), None
        if args:
            return self._call(module, (adapted, *args[1:]), kwargs)
        return self._call(module, args, kwargs | {"hidden_states": adapted})

    def _adapted(self, index: int, hidden: Tensor, prompt: Tensor | Skipped, books: Skipped | None) -> Tensor:
        """By the adapter of a layer, which reads the prompt if that is what there is."""
        adapter = self.adapters.adapter(index, index in self.layers)
        if prompt is books:
            return adapter(hidden, books.states[index])
        state = adapter.read(hidden, prompt.to(hidden.device))
        if books is not None:
            books.states[index] = tuple(x.detach() for x in state)
        return adapter(hidden, state)

    def _folds(self, hidden: Tensor) -> bool:
        """Whether a forward of a sequence whose prompt was read before uses folded weights."""
        return (
            self.fold
            and len(hidden) == 1
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not self.adapters.training
        )

    def _folded(self, index: int, books: Skipped) -> Folded | None:
        """Weights of a layer with its adapter in them, made once: of its MLP's gate and up, one below the other, if its
        attention is skipped; or else of its query, key and value. None where these are not plain."""
        if index in books.folded:
            return books.folded[index]
        layer, skipped = self.parts.layers[index], index in self.layers
        adapter, state, gain = self.adapters.adapter(index, skipped), books.states[index], None
        if skipped:
            modules = [layer.mlp.gate_proj, layer.mlp.up_proj]
            gain = layer.post_attention_layernorm.weight + self.offsets[index]
        else:
            modules = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        books.folded[index] = None
        if all(type(x) is nn.Linear and x.weight.is_floating_point() and not x.weight.is_meta for x in modules):
            folded = [adapter.fold(x.weight, x.bias, state, gain) for x in modules]
            books.folded[index] = dict(zip(modules, folded))
            if skipped:
                books.folded[index] = {layer.mlp: tuple(map(torch.cat, zip(*folded)))}
        return books.folded[index]

    def project(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        folded = _per_thread.folded
        if not self.active or folded is None or module not in folded:
            return self._call(module, args, kwargs)
        return F.linear(args[0] if args else kwargs["input"], *folded[module])


def _offset(norm: nn.Module, where: str) -> float:
    """What a norm multiplies by, once it has divided by the root mean square, is its weight, or, as in Gemma, 1 more.

    Raises:
        ValueError: it does something else.
    """
    with torch.no_grad():
        gain = norm(torch.ones_like(norm.weight)).float()
        for offset in (0.0, 1.0):
            if torch.allclose(gain, norm.weight.float() + offset, rtol=0.02, atol=1e-3):
                return offset
    raise ValueError(f"model: expected norms that divide by the root mean square, got {type(norm).__name__} in {where}")
