"""A check of withdrawal on a given model and machine: against the same model at full length, with visual keys *hidden*,
that is, masked for every query.

The keys are hidden by an attention function, registered with transformers for this purpose, that adds one more mask to
those of the model. It shares no code with the plans, masks and caches of withdrawal. Where images come in by
cross-attention, the modules that look at them run, and their results are discarded.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.families import Parts, find_parts
from vtw_kernels.integration.inputs import in_eval_mode, prepare
from vtw_kernels.integration.withdraw import unwrapped, withdraw

NAME = "vtw_hidden_keys"
PREFILL_ROWS = 256  # of a prompt, the last ones, whose logits are compared
NOISE_RUNS, MOST_NOISE_RUNS = 3, 12  # the latter if only the worst position is off by more
LIMIT = 2.0  # times the noise: what passes for rounding


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found. Differences are those of logits, at the positions of text.

    layer: that was withdrawn before, of ``num_layers``. dtype: of the model. tokens, visual_tokens: of all prompts
    together, without padding. prefill_rows, decode_rows: positions that were compared, of the prompts and of tokens
    decoded after them. prefill_difference, decode_difference: the largest ones between withdrawal and hidden keys.
    noise: the largest one between hidden keys and the same with the results of modules rounded at random. effect: the
    largest one that hiding the keys makes. other_tokens: at how many positions withdrawal makes another token the most
    likely one. rounding: whether withdrawal differs from hidden keys by no more than rounding does. conclusive: whether
    the keys matter by more than that, so that it would show if they were not hidden. cross_attention: whether images
    come in by that; then it is all their keys that are hidden, and none of the tokens is visual.
    """

    layer: int
    num_layers: int
    dtype: str
    tokens: int
    visual_tokens: int
    prefill_rows: int
    decode_rows: int
    prefill_difference: float
    decode_difference: float
    noise: float
    effect: float
    other_tokens: int
    rounding: bool
    conclusive: bool
    cross_attention: bool = False

    @property
    def difference(self) -> float:
        return max(self.prefill_difference, self.decode_difference)

    def __str__(self) -> str:
        if not self.rounding:
            verdict = "NOT the same: more than rounding"
        elif not self.conclusive:
            verdict = "no more than rounding, but neither is what the visual keys do here: this shows little"
        else:
            verdict = "the same but for rounding"
        visual = "images by cross-attention" if self.cross_attention else f"{self.visual_tokens} of them visual"
        return "\n".join(
            [
                f"Withdrawal before layer {self.layer} of {self.num_layers} against hidden keys, {self.dtype}: "
                f"{verdict}.",
                f"  {self.tokens} tokens, {visual}; compared at {self.prefill_rows} "
                f"positions of the prompts and {self.decode_rows} decoded ones, {self.other_tokens} with another top "
                "token",
                f"  largest difference of logits: prefill {self.prefill_difference:.2g}, decoding "
                f"{self.decode_difference:.2g}",
                f"  the model's own rounding: {self.noise:.2g}; what hiding the keys does: {self.effect:.2g}",
            ]
        )


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layer: Any,
    decode: int = 8,
    *,
    visual_mask: Tensor | None = None,
    decoder: nn.Module | None = None,
) -> Verification:
    """Compares withdrawal with its definition, on this model, these inputs and this machine: the same model at full
    length, whose layers from ``layer`` on cannot see visual keys; or, where images come in by cross-attention, whose
    cross-attention from there on (in Mllama, the whole layer with it) runs and has no effect.

    The keys are hidden by an attention function registered for it, whatever implementation the model has: it calls
    sdpa where that is the model's own, and otherwise the model's eager attention, with one more condition in the mask
    and in fp32 at least. Its cache evicts nothing. Both sides decode the same tokens, those that the model with hidden
    keys finds most likely, but for placeholders and ends of text.

    What rounding does is measured: the model with hidden keys runs again in the precision of its own attention, and
    each result of a module in its decoder is moved at random by as much as it may be off: half a unit in the last
    place, and what a sum of so many terms adds (as a random walk: Higham and Mary, "A new approach to probabilistic
    rounding error analysis", 2019). Withdrawal passes if it is off by at most twice as much, by the root mean square
    over the vocabulary, both in the median position and in the worst one. Noise is drawn three times, and up to twelve
    times where it is the worst position alone: in a mixture of experts, rounding now and then sends a token to another
    expert.

    Of a prompt, the last 256 positions are compared, or all where the model makes no fewer logits. In bf16, rounding
    may hide an error that shows in fp32. The model is as it was afterwards, whatever happens; while this runs, no other
    thread may use it.

    Args:
        model, layer, visual_mask, decoder: as for ``withdraw``, but one layer. A compiled model is compared as it runs
            compiled with the plain one.
        inputs: keyword arguments of the model's forward, as ``find_layer`` takes them, for one prompt or more.
        decode: how many steps are decoded after the prompt.

    Raises:
        TypeError, ValueError: what ``withdraw`` does not take; a model whose attention does not go through the
            ``AttentionInterface`` of transformers, or computes something else than its eager one.
    """
    if isinstance(decode, bool) or not isinstance(decode, int) or decode < 0:
        raise ValueError(f"decode: expected a number of steps, 0 or more, got {decode!r}")
    plain_model = unwrapped(model)
    parts = find_parts(plain_model, decoder)
    by_mask = visual_mask is not None or inputs.get("visual_mask") is not None
    inputs, visual = prepare(plain_model, parts, inputs, visual_mask)
    chosen = {"visual_mask": visual if by_mask else None, "decoder": decoder}
    with withdraw(model, layer, **chosen) as handle:
        layer = handle.layer
    if not isinstance(layer, int):
        raise TypeError(f"layer: expected one, got {layer}")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected [B, S], 0 for padding, got {given}")
    attended = torch.ones_like(visual) if mask is None else mask.to(visual.device) != 0
    answer = Answer(plain_model, parts.token_ids)

    def run(runner: nn.Module = plain_model, **cache: Cache | None) -> "Rows":
        return run_rows(runner, inputs, attended & ~visual, decode, answer, cache)

    def hide(layer: int, precise: bool) -> AbstractContextManager:
        if parts.cross_attention:
            return without_effect([x.looking for i, x in parts.cross_attention.items() if i >= layer])
        hidden = [visual if i >= layer else None for i in range(len(parts.layers))]
        return hide_keys(plain_model, hidden, decoder=decoder, precise=precise)

    def run_hidden(layer: int, precise: bool = True) -> "Rows":
        with hide(layer, precise):
            # With a cache of one's own, no other one may be asked for, as the model's config may.
            return run(**{Arguments(parts.decoder).cache: full_cache(parts), "cache_implementation": None})

    with torch.inference_mode(), in_eval_mode(plain_model):
        wanted = run_hidden(layer)
        with withdraw(model, layer, **chosen):
            given = run(model)
        with torch.compiler.set_stance("force_eager"):
            plain = run()
        difference, effect = given.minus(wanted), plain.minus(wanted)
        noise, loudest = torch.zeros(0), 0.0
        with rounded_at_random(plain_model, parts):
            for runs in range(MOST_NOISE_RUNS):
                if runs >= NOISE_RUNS and exceeds(difference.sizes, noise) != [torch.max]:
                    break
                rounded = run_hidden(layer, precise=False).minus(wanted)
                noise, loudest = torch.cat([noise, rounded.sizes]), max(loudest, rounded.largest)
        rounding = not exceeds(difference.sizes, noise)
        if not rounding:
            unlike, attention = run_hidden(len(parts.layers)).minus(plain), parts.decoder.config._attn_implementation
        if not rounding and torch.median in exceeds(unlike.sizes, noise):
            raise ValueError(
                f"model: expected attention {attention!r} that computes what {type(parts.decoder).__name__} does with "
                f"eager attention, got logits that differ by {unlike.largest:.2g} with all keys visible: nothing can "
                "be compared"
            )
    return Verification(
        layer=layer,
        num_layers=len(parts.layers),
        dtype=str(plain_model.dtype).removeprefix("torch."),
        tokens=int(attended.sum()),
        visual_tokens=int((visual & attended).sum()),
        prefill_rows=len(wanted.prefill),
        decode_rows=len(wanted.decode),
        prefill_difference=_largest(difference.prefill),
        decode_difference=_largest(difference.decode),
        noise=loudest,
        effect=effect.largest,
        other_tokens=int((given.all.argmax(-1) != wanted.all.argmax(-1)).sum()),
        rounding=rounding,
        conclusive=bool(exceeds(effect.sizes, noise)),
        cross_attention=bool(parts.cross_attention),
    )


# ------------------------------------------------------------------------------------------------------- hidden keys


@dataclass
class HiddenKeys:
    """Of one decoder layer. tokens: bool ``[B, tokens]`` or None. own: the model's own attention implementation.
    precise: as for ``hide_keys``. reached: whether attention has run."""

    tokens: Tensor | None
    own: str
    precise: bool
    reached: bool = False


_hidden: WeakKeyDictionary[nn.Module, HiddenKeys] = WeakKeyDictionary()


@contextmanager
def hide_keys(
    model: nn.Module, hidden: Sequence[Tensor | None], *, decoder: nn.Module | None = None, precise: bool = True
) -> Iterator[None]:
    """The plain model, in which no query sees the hidden keys: withdrawal by definition, of any rows at any layers.

    Args:
        model, decoder: as for ``withdraw``.
        hidden: for each decoder layer bool ``[B, tokens]``, counted from the start of the sequence (of the cache, not
            of the forward), or None. Later tokens are visible. Rows are repeated for beams.
        precise: whether attention is computed in fp32 at least, or in the model's dtype.

    Raises:
        TypeError, ValueError: here for an argument; later from the forward for a cache that evicts keys; at the end
            where the attention of a layer with hidden keys was not reached.
    """
    parts = find_parts(unwrapped(model), decoder)
    if len(hidden) != len(parts.layers):
        raise ValueError(f"hidden: expected one for each of {len(parts.layers)} layers, got {len(hidden)}")
    for i, tokens in enumerate(hidden):
        if tokens is not None and not (isinstance(tokens, Tensor) and tokens.dtype == torch.bool and tokens.ndim == 2):
            given = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"hidden: expected bool [B, tokens] or None, got {given} for layer {i}")
    if any(module in _hidden for module in parts.layers.modules()):
        raise ValueError("model: expected one whose keys are all visible, got one within hide_keys")

    def look_at_cache(module: nn.Module, args: tuple, kwargs: dict) -> None:
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache) and any(map(_evicts, cache.layers)):
                raise ValueError("cache: expected one that keeps all keys, got one with a sliding window")

    own = parts.decoder.config._attn_implementation
    layers = [HiddenKeys(tokens, own, precise) for tokens in hidden]
    configs = {id(x): x for x in _configs(parts, unwrapped(model))}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    hook = parts.decoder.register_forward_pre_hook(look_at_cache, with_kwargs=True)
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        for keys, layer in zip(layers, parts.layers):
            _hidden.update(dict.fromkeys(layer.modules(), keys))
        with torch.compiler.set_stance("force_eager"):  # compiled code would not see that keys are hidden
            yield
        for i, keys in enumerate(layers):
            if keys.tokens is not None and keys.tokens.any() and not keys.reached:
                raise ValueError(
                    f"model: expected attention that transformers' AttentionInterface hands out, got none in layer {i} "
                    f"of {type(parts.decoder).__name__}"
                )
    finally:
        hook.remove()
        for config, name in before:
            config._attn_implementation_internal = name
        for module in parts.layers.modules():
            _hidden.pop(module, None)


def _configs(parts: Parts, model: nn.Module) -> Iterator[Any]:
    """Those that say to the decoder which attention it has, and which masks are made for it."""
    yield model.config.get_text_config(decoder=True)
    for module in (parts.decoder, *parts.layers.modules()):
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            yield module.config


def _evicts(layer: Any) -> bool:
    return getattr(layer, "is_sliding", False)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    keys, dtype = _hidden[module], query.dtype
    keys.reached = True
    if keys.precise:
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    if attention_mask is None:
        attention_mask = query.new_zeros(1, 1, 1, key.shape[2])
    elif attention_mask.dtype == torch.bool:
        attention_mask = query.new_zeros(()).where(attention_mask, torch.finfo(query.dtype).min)
    mask = attention_mask[..., : key.shape[2]].to(query.dtype)  # of older static caches it is longer
    if keys.tokens is not None:
        columns = _columns(keys.tokens.to(mask.device), len(query), key.shape[2])
        # Not -inf: rows that see nothing at all, themselves hidden, are to stay finite.
        mask = mask.masked_fill(columns[:, None, None], torch.finfo(mask.dtype).min)
    attend = AttentionInterface()["sdpa"] if keys.own == "sdpa" else _eager_attention(module)
    output, weights = attend(module, query, key, value, mask, *args, **kwargs)
    return output.to(dtype), weights


def _columns(hidden: Tensor, batch: int, keys: int) -> Tensor:
    """bool ``[batch, keys]`` of ``[B, tokens]``."""
    if batch % len(hidden):
        raise ValueError(f"hidden: expected {batch} rows, or a divisor, as the inputs have, got {len(hidden)}")
    columns = hidden.new_zeros(len(hidden), keys)
    columns[:, : hidden.shape[1]] = hidden[:, :keys]
    return columns.repeat_interleave(batch // len(hidden), dim=0)


def _eager_attention(module: nn.Module) -> Callable:
    """A function of the file that the attention is in, where models of transformers have it."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"model: expected eager_attention_forward in the file of {type(module).__name__}, got none")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def without_effect(modules: Sequence[nn.Module]) -> Iterator[None]:
    """In this context, these modules run and cache as usual, but their results are discarded: decoder layers return
    their inputs, and attention modules return zeros."""

    def undo(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(output, Tensor):  # a layer
            return args[0] if args else kwargs["hidden_states"]
        return torch.zeros_like(output[0]), *output[1:]

    hooks = [module.register_forward_hook(undo, with_kwargs=True) for module in modules]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------------------- runs


class Answer(LogitsProcessor):
    """The same tokens in every run: in the first the most likely ones, but for placeholders and ends of text."""

    def __init__(self, model: nn.Module, placeholders: Sequence[int]):
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.avoided, self.tokens, self.step = [*placeholders, *ends], [], 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step == len(self.tokens):
            avoided = [token for token in self.avoided if token < scores.shape[1]]
            likely = scores.index_fill(1, torch.tensor(avoided, dtype=torch.long, device=scores.device), -torch.inf)
            self.tokens.append(likely.argmax(-1, keepdim=True))
        chosen = self.tokens[self.step].to(scores.device)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


@dataclass
class Rows:
    """Logits, or differences of them: ``[rows, V]`` in fp32, or fp64 in a model of that."""

    prefill: Tensor
    decode: Tensor

    @property
    def all(self) -> Tensor:
        return torch.cat([self.prefill, self.decode])

    @property
    def largest(self) -> float:
        return _largest(self.all)

    @property
    def sizes(self) -> Tensor:
        """Root mean squares over the vocabulary, ``[rows]`` on the CPU."""
        return self.all.square().mean(-1).sqrt().cpu()

    def minus(self, other: "Rows") -> "Rows":
        pairs = (self.prefill, other.prefill), (self.decode, other.decode)
        return Rows(*((a - b).masked_fill(a == b, 0) for a, b in pairs))  # which are infinite in some models


def exceeds(sizes: Tensor, noise: Tensor) -> list[Callable]:
    """Which of median and maximum over rows are above ``LIMIT`` times those of the noise, or NaN."""
    return [of for of in (torch.median, torch.max) if not of(sizes) <= LIMIT * of(noise)]


def _largest(rows: Tensor) -> float:
    return rows.abs().max().item() if rows.numel() else 0.0


def run_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    text: Tensor,
    decode: int,
    answer: Answer,
    cache: dict[str, Cache | None],
) -> Rows:
    """Logits of the prompts at the tokens ``text``, bool ``[B, S]``, and of so many steps of decoding after them.
    ``cache``: arguments of ``generate`` about it."""
    rows, options = text.shape[1], {}
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        options["logits_to_keep"] = rows = min(rows, PREFILL_ROWS)
    logits = model(**inputs, **options, use_cache=False).logits[:, -rows:]
    precision = torch.promote_types(logits.dtype, torch.float32)
    prefill = logits[text[:, -rows:].to(logits.device)].to(precision)
    if decode == 0:
        return Rows(prefill, prefill[:0])
    answer.step = 0
    output = unwrapped(model).generate(
        **inputs,
        **cache,
        max_new_tokens=decode + 1,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        logits_processor=[answer],
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = output.logits[1:]
    if len(steps) != decode:
        raise ValueError(
            f"decode: expected as many steps as generate takes, which ended after {len(steps)}, got {decode}"
        )
    return Rows(prefill, torch.cat(steps).to(prefill))


def full_cache(parts: Parts) -> DynamicCache:
    """Nothing is evicted from it: windows are the mask's alone."""
    cache = DynamicCache(config=parts.decoder.config)
    cache.layers = [DynamicLayer() if _evicts(x) else x for x in cache.layers]
    return cache


@contextmanager
def rounded_at_random(model: nn.Module, parts: Parts) -> Iterator[None]:
    """Moves results of the decoder's innermost modules and of the head by as much as they may be off by rounding."""
    generators: dict[torch.device, torch.Generator] = {}

    def nudge(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or isinstance(module, nn.Embedding):
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(0)
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        unit, unit_of_sums = (torch.finfo(x.dtype).eps / 2 for x in (output, exact))
        terms = args[0].shape[-1] if args and isinstance(args[0], Tensor) else output.shape[-1]
        size = exact.square().mean(-1, keepdim=True).sqrt()
        draw = torch.rand(exact.shape, dtype=exact.dtype, device=exact.device, generator=generators[output.device])
        return (exact + (2 * draw - 1) * (unit * exact.abs() + unit_of_sums * terms**0.5 * size)).to(output.dtype)

    modules = [*parts.decoder.modules(), *([head] if (head := model.get_output_embeddings()) is not None else [])]
    innermost = {module for module in modules if next(module.children(), None) is None}
    hooks = [module.register_forward_hook(nudge) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
