"""Which heads have to do with visual tokens: how much of their attention goes there, without any [heads, S, S] weights.

By the criterion of YOPO (arXiv 2410.06169, its code's gen_mask_llava.py): in a sample, a head's ratio is the attention
of all rows to visual tokens over that to all others; a head is kept if its ratio is above a threshold in more than 40 %
of the samples; the first two layers keep all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtw_kernels.integration.attention import observed_attention
from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.inputs import in_eval_mode, prepare
from vtw_kernels.integration.masks import attended_tokens, kind_of_masks
from vtw_kernels.integration.withdraw import unwrapped

MAJORITY, FIRST_LAYERS, ROWS = 0.4, 2, 128  # rows of attention at a time


@dataclass(frozen=True)
class VisualHeads:
    """What ``find_visual_heads`` found, of ``N`` samples.

    heads: bool ``[L, heads]``, as ``VisualPruning`` takes them. ratios: fp32 ``[N, L, heads]``, attention to visual
    tokens over attention to all others. threshold: what a ratio was to be above in a majority of samples.
    """

    heads: Tensor
    ratios: Tensor
    threshold: float

    def plot(self, path: str | Path) -> None:
        """Writes the map of heads as PNG, SVG or PDF: the median share of attention that goes to visual tokens, and
        which heads are kept."""
        from vtw_kernels.layer_search.plots import new_figure

        ratio = self.ratios.median(0).values
        figure, axes = new_figure(2 + 0.25 * ratio.shape[1], 1.5 + 0.25 * ratio.shape[0])
        image = axes.imshow(ratio / (1 + ratio), cmap="viridis", vmin=0, aspect="auto")
        for layer, head in (~self.heads).nonzero().tolist():
            axes.text(head, layer, "x", color="white", ha="center", va="center")
        kept = int(self.heads.sum())
        axes.set(xlabel="head", ylabel="layer", title=f"{kept} of {self.heads.numel()} heads kept, others crossed out")
        figure.colorbar(image, label="share of attention to visual tokens, median")
        figure.savefig(path, dpi=150)


@torch.inference_mode()
def find_visual_heads(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    keep: float | None = None,
    *,
    threshold: float | None = None,
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> VisualHeads:
    """Searches the heads that attend to visual tokens most.

    Their attention is computed again in fp32 beside the model's own, 128 rows at a time.

    Args:
        model: as for ``withdraw``, with attention "eager" or "sdpa".
        batches: as for ``find_layer``; samples without visual tokens do not count.
        keep: which share of the heads after the first two layers is kept, 0..1. The threshold follows from it.
        threshold: of the ratio, instead of ``keep``; the paper's are 0.2, 0.077 and 0.035, for 10, 20 and 30 of the 40
            heads of LLaVA-1.5-13B.
        decoder: as for ``withdraw``.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError: an unsupported model, neither or both of keep and threshold, or one out of range, no
            sample with visual tokens.
    """
    if (keep is None) == (threshold is None):
        raise ValueError(f"keep: expected it or threshold, got keep={keep!r} and threshold={threshold!r}")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep <= 1):
        raise ValueError(f"keep: expected a share from 0 to 1, got {keep!r}")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold!r}")
    if isinstance(batches, Mapping):
        raise TypeError(f"batches: expected an iterable of batches, got one, a {type(batches).__name__}: pass [batch]")
    model = unwrapped(model)
    parts = find_parts(model, decoder)
    if parts.cross_attention:
        raise ValueError(f"model: expected images as tokens, got cross-attention in {type(model).__name__}")
    if kind_of_masks(attends := parts.config._attn_implementation) != "dense":
        raise ValueError(f"model: expected attention 'eager' or 'sdpa', got {attends!r}")
    found = []
    with in_eval_mode(model):
        for batch in tqdm(batches, "heads", disable=not progress):
            inputs, visual = prepare(model, parts, batch, None)
            attended = attended_tokens(inputs.get("attention_mask"), visual)
            sums = Sums(visual & attended, attended & ~visual)
            with observed_attention(dict(enumerate(parts.layers)), sums.observe):
                model(**inputs, use_cache=False, logits_to_keep=1)
            found += sums.ratios(len(parts.layers))
    if not found:
        raise ValueError("batches: expected at least one sample with visual tokens, got none")
    ratios = torch.stack(found)
    if missing := [i for i, layer in enumerate(ratios.unbind(1)) if layer.isnan().any()]:
        raise ValueError(
            f"model: expected attention that transformers' AttentionInterface hands out, got none in layer {missing[0]}"
        )
    # If the ratio of this rank is above a threshold, more than a share of MAJORITY of the samples is.
    scores = ratios.sort(dim=0, descending=True).values[int(MAJORITY * len(ratios))]
    if threshold is None:
        ranked = scores[FIRST_LAYERS:].flatten().sort(descending=True).values
        kept = round(float(keep) * len(ranked))
        threshold = float(ranked[kept]) if kept < len(ranked) else -1.0
    heads = scores > threshold
    heads[:FIRST_LAYERS] = True
    return VisualHeads(heads, ratios, float(threshold))


class Sums:
    """The attention of a batch, summed up layer by layer. Arguments: bool ``[B, S]``."""

    def __init__(self, visual: Tensor, text: Tensor):
        self.visual, self.text, self.by_layer = visual, text, {}

    def observe(self, layer: int, attend: Callable, query: Tensor, key: Tensor, mask: Any, options: dict) -> Any:
        if options.get("softcap") is not None or options.get("s_aux") is not None:
            raise ValueError(f"model: expected a softmax of products alone, got more in layer {layer}")
        device, rows = key.device, query.shape[2]
        if key.shape[2] != rows or rows != self.visual.shape[1]:
            raise ValueError(f"inputs: expected one key for each of {self.visual.shape[1]} tokens, got {key.shape[2]}")
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT
        where = torch.stack((self.visual, self.text), dim=-1).to(device, torch.float32)  # [B, S, 2]
        counted = (self.visual | self.text).to(device, torch.float32)
        total: Any = 0
        for first in range(0, rows, ROWS):
            some = slice(first, min(first + ROWS, rows))
            scores = query[:, :, some].float() @ keys * scaling  # [B, heads, 128, S]
            if mask is None:
                hidden = torch.arange(rows, device=device) > torch.arange(rows, device=device)[some, None]
                scores = scores.masked_fill(hidden, -torch.inf)
            elif mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask[:, :, some, :rows], torch.finfo(torch.float32).min)
            else:
                scores = scores + mask[:, :, some, :rows].float()
            weights = scores.softmax(-1) * counted[:, None, some, None]
            total = total + (weights.sum(2) @ where)
        self.by_layer[layer] = total.cpu()  # [B, heads, 2]
        return attend()

    def ratios(self, layers: int) -> list[Tensor]:
        """Of each sample with visual tokens: fp32 ``[L, heads]``, NaN for layers that were not seen."""
        if not self.by_layer:
            return [torch.full((layers, 1), torch.nan) for has in self.visual.any(1).tolist() if has]
        blank = torch.full_like(next(iter(self.by_layer.values())), torch.nan)
        sums = torch.stack([self.by_layer.get(i, blank) for i in range(layers)], dim=1)
        return [x[..., 0] / x[..., 1] for x, has in zip(sums, self.visual.any(1).tolist()) if has]
