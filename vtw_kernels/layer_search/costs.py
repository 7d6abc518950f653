"""What prefill and decoding cost when visual tokens are withdrawn: before each layer, or by policies."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, DynamicCache, LogitsProcessor

from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.attention import observed_attention
from vtw_kernels.integration.cross_attention import sees_images
from vtw_kernels.integration.families import Parts, find_parts
from vtw_kernels.integration.inputs import in_eval_mode, padded_left, prepare
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.integration.pruning.cache import stores_of
from vtw_kernels.integration.withdraw import unwrapped, withdraw
from vtw_kernels.layer_search.decisions import Replayed, recording
from vtw_kernels.layer_search.settings import Setting, settings_of

DECODED = 8  # tokens, whose steps are measured
TIMED = 5  # at how many layers prefill is timed: each takes a few whole forwards


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one prefill of one sample, if visual tokens are withdrawn before each of ``layers``; the last of these
    is the model's number of layers: nothing is withdrawn.

    tokens, visual_tokens: of the sample. flops: floating point operations of the decoder layers. kv_bytes: of the
    cache. prefill_seconds: the whole model's, the median as measured on ``device`` for ``timed_layers``, and between
    these by linear interpolation; prefill_iqr: likewise, how far the runs spread: their interquartile range.
    """

    layers: list[int]
    tokens: int
    visual_tokens: int
    flops: list[int]
    kv_bytes: list[int]
    prefill_seconds: list[float]
    prefill_iqr: list[float]
    timed_layers: list[int]
    device: str

    def differ(self, layer: int) -> bool:
        """Whether the prefill takes another time with withdrawal before a layer than without: the medians differ by
        more than their interquartile ranges combined, ``hypot``."""
        i = self.layers.index(layer)
        apart = abs(self.prefill_seconds[i] - self.prefill_seconds[-1])
        return apart > math.hypot(self.prefill_iqr[i], self.prefill_iqr[-1])


@dataclass(frozen=True)
class PolicyCosts:
    """Costs of a batch, the mean of so many ``batches``, under each of ``policies`` and, last in each list, of the
    model as it is.

    tokens, visual_tokens: of all these batches together, without padding. flops: floating point operations of the
    decoder layers in a prefill. kv_bytes: of the cache after it. prefill_seconds: of a whole prefill, the median of
    some runs, as measured on ``device``; decode_seconds: of one token more after it. prefill_iqr, decode_iqr: how far
    the runs spread: their interquartile range.
    """

    policies: list[str]
    batches: int
    tokens: int
    visual_tokens: int
    flops: list[float]
    kv_bytes: list[float]
    prefill_seconds: list[float]
    prefill_iqr: list[float]
    decode_seconds: list[float]
    decode_iqr: list[float]
    device: str

    def by_name(self, cost: str) -> list[float]:
        """ "flops", "kv_bytes", "prefill" or "decode"."""
        seconds = {"prefill": self.prefill_seconds, "decode": self.decode_seconds}
        return ({"flops": self.flops, "kv_bytes": self.kv_bytes} | seconds)[cost]


def measure_costs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    candidates: Sequence[int],
    *,
    visual_mask: Tensor | None = None,
    decoder: nn.Module | None = None,
    repeats: int = 5,
) -> LayerCosts:
    """What one prefill costs if the visual tokens are withdrawn before each candidate, and if they are not.

    Floating point operations (a multiplication and an addition are two) are those of matrix multiplications in the
    decoder layers; attention counts every key of every query, hidden or not, whatever computes it. They and the bytes
    of the cache come from two forwards: layers add up, so that before layer ``k`` they are those of the full prefill,
    and from there on those of the prefill withdrawn before the first candidate. With tensor parallelism, those of this
    rank.

    Seconds are measured, vision tower and logits included, at up to five layers: the first and the last candidate,
    evenly spread ones between them, and no withdrawal. Each is the median of ``repeats`` runs, which take turns, after
    one to warm up; the other layers' are linear interpolations, as all layers cost about the same.

    Args:
        model, decoder: as for ``withdraw``.
        inputs: keyword arguments of the model's forward for one sample, which has visual tokens and ends in text.
        candidates: layers.
        visual_mask: bool ``[1, S]``, as for ``withdraw``; by default that in ``inputs``, or the placeholder tokens.

    Raises:
        TypeError, ValueError: an unsupported model, a candidate out of range or none, more than one sample or one
            without visual tokens, no repeats.
    """
    model = unwrapped(model)
    parts = find_parts(model, decoder)
    last = len(parts.layers)
    candidates = sorted(set(candidates) - {last})
    if not candidates:
        raise ValueError(f"candidates: expected layers before which something is withdrawn, {parts.allowed}, got none")
    for layer in candidates:
        parts.check_layer(layer)
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if visual_mask is None:
        visual_mask = inputs.get("visual_mask")
    inputs, visual = prepare(model, parts, inputs, visual_mask)
    attended = attended_tokens(inputs.get("attention_mask"), visual)
    if len(visual) != 1:
        raise ValueError(f"inputs: expected one sample, got {len(visual)}")
    if not (sees_images(inputs, visual) if parts.cross_attention else attended & visual).any():
        what = "that sees an image" if parts.cross_attention else "with visual tokens"
        raise ValueError(f"inputs: expected a sample {what}, got none")

    prefill = partial(_prefill, model, parts, inputs)

    def withdrawn_before(layer: int):
        return withdraw(model, layer, visual_mask=visual_mask, decoder=decoder) if layer < last else nullcontext()

    timed = sorted({candidates[round(i)] for i in np.linspace(0, len(candidates) - 1, TIMED - 1)}) + [last]
    devices = {x.device for x in model.parameters()}
    seconds: dict[int, list[float]] = {layer: [] for layer in timed}
    with in_eval_mode(model), torch.inference_mode():
        counts = []
        for layer in (last, candidates[0]):
            with withdrawn_before(layer):
                counts.append(_count(parts, prefill))
        for _ in range(1 + repeats):
            for layer in timed:
                with withdrawn_before(layer):
                    seconds[layer].append(_seconds(prefill, devices))
    low, medians, high = np.quantile([seconds[layer][1:] for layer in timed], [0.25, 0.5, 0.75], axis=1)
    layers = [*candidates, last]
    flops, kv_bytes = ([_joined(*pair, layer) for layer in layers] for pair in zip(*counts))
    return LayerCosts(
        layers,
        tokens=int(attended.sum()),
        visual_tokens=int((attended & visual).sum()),
        flops=flops,
        kv_bytes=kv_bytes,
        prefill_seconds=np.interp(layers, timed, medians).tolist(),
        prefill_iqr=np.interp(layers, timed, high - low).tolist(),
        timed_layers=timed,
        device=_name_of(model.device),
    )


def measure_policies(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    policies: Mapping[str, Any],
    *,
    decoder: nn.Module | None = None,
    repeats: int = 5,
) -> PolicyCosts:
    """What batches cost under each policy, and with the model as it is.

    Floating point operations and bytes of the cache are counted as ``measure_costs`` does; what a policy itself
    computes to decide is not among the operations, but it is in the seconds. These are of ``repeats`` runs that take
    turns, after one to warm up: of a forward, vision tower and logits included, and of the steps of ``generate``,
    greedy and eight tokens, a step's median.

    Args:
        model, decoder: as for ``withdraw``.
        batches: keyword arguments of the model's forward for prompts, as ``find_layer`` takes them.
        policies: by name, what ``compare`` takes.

    Raises:
        TypeError, ValueError: what ``withdraw`` does not take, no batches, no repeats.
    """
    model = unwrapped(model)
    parts = find_parts(model, decoder)
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    settings = settings_of(model, policies, decoder)
    devices = {x.device for x in model.parameters()}
    runs, tokens, visual_tokens = [], 0, 0
    for batch in batches:
        by_mask = batch.get("visual_mask") is not None
        inputs, visual = padded_left(*prepare(model, parts, batch, None))
        attended = attended_tokens(inputs.get("attention_mask"), visual)
        tokens, visual_tokens = tokens + int(attended.sum()), visual_tokens + int((attended & visual).sum())

        def under(setting: Setting | None, mask: Tensor | None = visual if by_mask else None):
            return nullcontext() if setting is None else setting.under(model, mask, decoder)

        prefill = partial(_prefill, model, parts, inputs)
        rows: dict[str | None, list[list[float]]] = {name: [] for name in (*settings, None)}
        counts = []
        with in_eval_mode(model), torch.inference_mode():
            for setting in (*settings.values(), None):
                with under(setting if setting is None else _replayed(setting, prefill, under)):
                    counts.append([sum(x) for x in _count(parts, prefill)])
            for _ in range(1 + repeats):
                for name, seconds in rows.items():
                    with under(settings.get(name)):
                        seconds.append([_seconds(prefill, devices), _decode_seconds(model, inputs, devices)])
        quartiles = np.quantile([seconds[1:] for seconds in rows.values()], [0.25, 0.5, 0.75], axis=1)  # [3, C + 1, 2]
        runs.append(np.concatenate([counts, quartiles[1], quartiles[2] - quartiles[0]], axis=1))
    if not runs:
        raise ValueError("batches: expected at least one batch, got none")
    flops, kv_bytes, prefill_seconds, decode_seconds, prefill_iqr, decode_iqr = np.mean(runs, axis=0).T.tolist()
    return PolicyCosts(
        list(policies),
        batches=len(runs),
        tokens=tokens,
        visual_tokens=visual_tokens,
        flops=flops,
        kv_bytes=kv_bytes,
        prefill_seconds=prefill_seconds,
        prefill_iqr=prefill_iqr,
        decode_seconds=decode_seconds,
        decode_iqr=decode_iqr,
        device=_name_of(model.device),
    )


def _replayed(setting: Setting, prefill: Callable[[], Cache], under: Callable[[Any], Any]) -> Setting:
    """One that decides the same in a prefill."""
    if setting.is_layer:
        return setting
    with under(setting.replaced(recording(setting.policy, decided := {}))):
        prefill()
    return setting.replaced(Replayed(decided)) if decided else setting


def _prefill(model: nn.Module, parts: Parts, inputs: Mapping[str, Any]) -> Cache:
    cache = DynamicCache(config=parts.config)
    model(**inputs, **{Arguments(parts.decoder).cache: cache}, use_cache=True, logits_to_keep=1)
    return cache


class _Clock(LogitsProcessor):
    """Notes when logits come, which it leaves alone."""

    def __init__(self, devices: Iterable[torch.device]):
        self.devices, self.seconds = devices, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        _synchronize(self.devices)
        self.seconds.append(time.perf_counter())
        return scores


def _decode_seconds(model: nn.Module, inputs: Mapping[str, Any], devices: Iterable[torch.device]) -> float:
    """Of one step of ``generate`` after the prefill, the median."""
    clock = _Clock(devices)
    model.generate(
        **inputs,
        min_new_tokens=DECODED + 1,
        max_new_tokens=DECODED + 1,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        logits_processor=[clock],
    )
    return float(np.median(np.diff(clock.seconds)))


def _joined(full: list[int], withdrawn: list[int], layer: int) -> int:
    return sum(full[:layer]) + sum(withdrawn[layer:])


def _count(parts: Parts, prefill: Callable[[], Cache]) -> tuple[list[int], list[int]]:
    """Floating point operations and bytes of the cache, by layer."""
    flops, attention = [0] * len(parts.layers), [0] * len(parts.layers)
    grouped = {torch.ops.aten._grouped_mm: _grouped_flops}  # of experts, which the counter does not know
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        grouped[torch.ops.transformers.grouped_mm_fallback] = _grouped_flops
    counter = FlopCounterMode(display=False, custom_mapping=grouped)

    def enter(layer: int, *_) -> None:
        counting.enter_context(counter)

    def leave(layer: int, *_) -> None:
        flops[layer] += counter.get_total_flops()
        counting.close()

    def observe(layer: int, attend: Callable, query: Tensor, key: Tensor, mask: Any, options: dict) -> Any:
        # The counter knows few kernels of attention, and compiled ones don't run under it.
        leave(layer)
        result = attend()
        enter(layer)
        attention[layer] += 2 * query[..., 0].numel() * key.shape[2] * (query.shape[3] + options["value"].shape[3])
        return result

    observe.in_parts = True
    # A layer, and the block that looks at images in front of it, where there is one.
    blocks = {i: nn.ModuleList(dict.fromkeys([x.block, parts.layers[i]])) for i, x in parts.cross_attention.items()}
    counted = {i: blocks.get(i, [layer]) for i, layer in enumerate(parts.layers)}
    hooks, learned = [], [x for x in parts.decoder.parameters() if x.requires_grad]
    try:
        for x in learned:  # of one that a module is called with, as in Idefics, the counter would look for the gradient
            x.requires_grad_(False)
        for i, modules in counted.items():
            for module in modules:
                hooks.append(module.register_forward_pre_hook(partial(enter, i)))
                hooks.append(module.register_forward_hook(partial(leave, i)))
        with observed_attention(dict(enumerate(parts.layers)) | blocks, observe), ExitStack() as counting:
            cache = prefill()
    finally:
        for x in learned:
            x.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    none = [i for i, x in enumerate(flops) if not x and i not in parts.cross_attention]  # which may be left out
    if none:
        warnings.warn(
            f"flops: expected matrix multiplications that torch's FlopCounterMode knows, got none in layer "
            f"{none[0]}: the numbers are too low",
            stacklevel=3,
        )
    kv_bytes = [0] * len(flops)  # of layers that read those of others
    for i, layer in stores_of(cache):
        kv_bytes[i] += sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor) and x.ndim > 1)
    return [a + b for a, b in zip(flops, attention)], kv_bytes


def _grouped_flops(rows: Sequence[int], weights: Sequence[int], *args, **kwargs) -> int:
    """Of ``[rows, in]`` and ``[experts, in, out]``, each row with one of the experts."""
    return 2 * rows[0] * weights[-2] * weights[-1]


def _seconds(prefill: Callable[[], Cache], devices: Iterable[torch.device]) -> float:
    _synchronize(devices)
    begin = time.perf_counter()
    prefill()
    _synchronize(devices)
    return time.perf_counter() - begin


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type
