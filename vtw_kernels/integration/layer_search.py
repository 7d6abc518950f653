"""The search for the withdrawal layer: the first at which withdrawing changes the next token's distribution by little.

The criterion is that of VTW (arXiv 2405.05803, section 3.3): the mean over samples of KL(withdrawn‖full) at the last
position, and the first layer at or below a threshold. The paper's code runs the whole model anew for each candidate.
Here the rows that enter layer ``k`` are taken from the one full run: candidate ``k`` joins, at layer ``k``, a growing
batch of text-only continuations that each layer runs once, right after its full-length run.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtw_kernels.integration.families import Parts, find_parts, find_visual_tokens
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.integration.withdraw import LayerCompaction
from vtw_kernels.ops import kl_divergence, plan_compaction

PAPER_THRESHOLD = 0.003


@dataclass(frozen=True)
class LayerSearch:
    """What a search found.

    candidates: the layers that were tried, ascending. per_sample: fp32 ``[samples, candidates]``, KL(withdrawn‖full) of
    the next token in nats. num_layers: decoder layers of the model; withdrawing there is not withdrawing at all.
    """

    candidates: list[int]
    per_sample: Tensor
    threshold: float
    num_layers: int
    model: str

    @property
    def kl(self) -> Tensor:
        """fp32 ``[candidates]``: the mean over samples."""
        return self.per_sample.mean(dim=0)

    @property
    def layer(self) -> int | None:
        """The first candidate whose mean KL is at or below the threshold, or None."""
        below = (self.kl <= self.threshold).nonzero().flatten().tolist()
        return self.candidates[below[0]] if below else None

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One line per candidate: mean and largest KL, and which one was chosen; Markdown."""
        lines = ["| layer | mean KL (nats) | largest KL | |", "|--:|--:|--:|:--|"]
        for layer, mean, largest in zip(self.candidates, self.kl.tolist(), self.per_sample.amax(dim=0).tolist()):
            note = "chosen" if layer == self.layer else ""
            lines.append(f"| {layer} | {mean:.3g} | {largest:.3g} | {note} |")
        return "\n".join(lines) + "\n\n" + self.verdict()

    def verdict(self) -> str:
        """The result in one sentence."""
        samples = f"{len(self.per_sample)} samples, threshold {self.threshold:g} nats"
        if self.layer is None:
            lowest = self.kl.min().item()
            return (
                f"No layer of {self.candidates[0]}..{self.candidates[-1]} qualifies ({samples}): the lowest mean KL is "
                f"{lowest:.3g}. This model needs its visual tokens to the end; withdrawing would change its answers."
            )
        removed = self.num_layers - self.layer
        return (
            f"Withdraw before layer {self.layer} of {self.num_layers}: {removed} layers run on text alone ({samples})."
        )

    def plot(self, path: str | Path) -> None:
        """Writes mean KL per layer, its spread over samples, the threshold and the chosen layer, as PNG, SVG or PDF."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        floor = 1e-7  # log axis: what is exactly 0 is drawn here
        samples = self.per_sample.clamp(min=floor)
        low, high = samples.quantile(0.1, dim=0), samples.quantile(0.9, dim=0)
        axes.fill_between(self.candidates, low, high, alpha=0.2, label="10 % to 90 % of samples")
        axes.plot(self.candidates, self.kl.clamp(min=floor), marker="o", label="mean")
        axes.axhline(self.threshold, color="tab:red", linestyle="--", label=f"threshold {self.threshold:g}")
        if self.layer is not None:
            axes.axvline(self.layer, color="tab:green", linestyle=":", label=f"chosen: layer {self.layer}")
        axes.set(xlabel="visual tokens withdrawn before layer", ylabel="KL(withdrawn‖full), nats", yscale="log")
        axes.set_xticks(self.candidates[:: max(1, len(self.candidates) // 16)])
        axes.legend()
        figure.savefig(path, dpi=150)

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON, with the layer and the mean KL spelt out for other readers."""
        content = asdict(self) | {"layer": self.layer, "kl": self.kl.tolist(), "per_sample": self.per_sample.tolist()}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LayerSearch":
        """Reads what ``save`` wrote."""
        content = json.loads(Path(path).read_text())
        fields = {name: content[name] for name in ("candidates", "threshold", "num_layers", "model")}
        return cls(per_sample=torch.tensor(content["per_sample"], dtype=torch.float32), **fields)


def find_layer(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    threshold: float = PAPER_THRESHOLD,
    candidates: Sequence[int] | None = None,
    progress: bool = True,
) -> LayerSearch:
    """Searches the first layer at which the visual tokens can be withdrawn.

    Args:
        model: as for ``withdraw``.
        batches: keyword arguments of the model's forward, as its processor makes them: ``input_ids`` ``[B, S]``,
            pixels, and ``attention_mask`` where there is padding, on either side. Every sample must have a visual
            token, and end in text. Take them from data that you don't evaluate on.
        threshold: the largest acceptable mean KL(withdrawn‖full) of the next token, in nats.
        candidates: layers to try; by default every layer from the first that the model allows.
        progress: whether to show a progress bar.

    Returns:
        A ``LayerSearch``; its ``layer`` is None, and a warning says so, when no candidate qualifies.

    Raises:
        TypeError, ValueError: an unsupported model, a candidate out of range, no batches, a sample without visual
            tokens or with nothing after them, a threshold that is not a number of at least 0.
    """
    parts = find_parts(model)
    if parts.num_cached < len(parts.layers):
        raise ValueError("model: expected layers with keys of their own, which runs side by side need, got shared ones")
    candidates = check_candidates(candidates, parts)
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number of nats, at least 0, got {threshold}")
    if hasattr(parts.decoder, "_vtw_withdrawal"):
        raise ValueError("model: expected one without withdrawal, got one inside withdraw")

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            results = [
                _search_batch(model, parts, batch, candidates)
                for batch in tqdm(batches, "search", disable=not progress)
            ]
    finally:
        model.train(was_training)
    if not results:
        raise ValueError("batches: expected at least one batch, got none")
    search = LayerSearch(candidates, torch.cat(results), float(threshold), len(parts.layers), type(model).__name__)
    if search.layer is None:
        warnings.warn(search.verdict(), stacklevel=2)
    return search


def check_candidates(candidates: Sequence[int] | None, parts: Parts) -> list[int]:
    first, last = parts.min_layer, len(parts.layers) - 1
    chosen = sorted(set(range(first, last + 1) if candidates is None else candidates))
    if not chosen or not first <= chosen[0] <= chosen[-1] <= last:
        raise ValueError("; ".join([f"candidates: expected layers in {first}..{last}, got {chosen}", *parts.limits]))
    return chosen


def _search_batch(model: nn.Module, parts: Parts, batch: Mapping[str, Any], candidates: list[int]) -> Tensor:
    """KL(withdrawn‖full) at the last position: fp32 ``[B, candidates]``, on the CPU."""
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items() if name != "labels"}
    visual = find_visual_tokens(parts, inputs)
    attended = attended_tokens(inputs.get("attention_mask"), visual)
    last = attended.long().cumsum(1).argmax(1)
    kept = (attended & ~visual).sum(1)
    for wrong, what in (
        (~visual.any(1), "at least one visual token in each sample, got none"),
        (visual.gather(1, last[:, None])[:, 0], "samples that end in text, got a visual token at the end"),
    ):
        if wrong.any():
            raise ValueError(f"batches: expected {what} in row {wrong.nonzero()[0].item()}")

    plan = plan_compaction(attended & ~visual, int(kept.max()), pad="left")
    padded = int(kept.min()) < int(kept.max())
    rows = _Continuations(LayerCompaction(visual.shape[1], plan, padded=padded), candidates, last)
    hooks = []
    try:
        for i, layer in enumerate(parts.layers):
            hooks.append(layer.register_forward_pre_hook(partial(rows.before_layer, i), with_kwargs=True))
            hooks.append(layer.register_forward_hook(rows.after_layer))
        hooks.append(parts.layers[-1].register_forward_hook(rows.after_last_layer))
        logits = model(**inputs | {"use_cache": False, "logits_to_keep": 1}).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    # Row 0 of the leading dimension is the full run, the others are the candidates.
    runs = logits.unflatten(0, (1 + len(candidates), -1))
    return kl_divergence(runs[1:], runs[0]).T.cpu()


class _Continuations:
    """The text-only continuations of one batch, candidate by candidate: ``[joined * B, T, H]``."""

    def __init__(self, compaction: LayerCompaction, candidates: list[int], last: Tensor):
        self.compaction, self.candidates, self.last = compaction, candidates, last
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A candidate joins with the text rows that enter its layer in the full run."""
        if len(args) > 1:
            args, kwargs = args[:1], dict(zip(list(signature(module.forward).parameters)[1:], args[1:])) | kwargs
        if index in self.candidates:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.kwargs, joining = self.compaction(kwargs, hidden)
            self.hidden = joining if self.hidden is None else torch.cat((self.hidden, joining))
        elif self.hidden is not None:
            self.kwargs, _ = self.compaction(kwargs)
        self.kwargs.pop("hidden_states", None)

    def after_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.hidden is None:
            return
        batch = len(self.last)
        kwargs = {name: _repeat(name, x, batch, len(self.hidden) // batch) for name, x in self.kwargs.items()}
        result = module.forward(self.hidden, **kwargs)  # not module(...), which would run these hooks again
        self.hidden = result[0] if isinstance(result, tuple) else result

    def after_last_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hands the last rows of all runs to the rest of the model, which makes logits of them as it does of any."""
        hidden = output[0] if isinstance(output, tuple) else output
        full = hidden[torch.arange(len(self.last), device=hidden.device), self.last]
        ends = torch.cat((full, self.hidden[:, -1]))[:, None]
        return (ends, *output[1:]) if isinstance(output, tuple) else ends


def _repeat(name: str, value: Any, batch: int, copies: int) -> Any:
    """A compacted keyword argument of a decoder layer, for ``copies`` batches one after another."""
    if isinstance(value, (tuple, list)):
        return type(value)(_repeat(name, x, batch, copies) for x in value)
    if not isinstance(value, Tensor):
        return value
    dim = -3 if name.startswith("position_embeddings") else -2 if name == "position_ids" else 0
    return torch.cat([value] * copies, dim) if value.dim() > 1 and value.shape[dim] == batch else value
