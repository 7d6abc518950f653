"""The search for the withdrawal layer: the first at which withdrawing changes the next token's distribution by little.

The criterion is that of VTW (arXiv 2405.05803, section 3.3): the mean over samples of KL(withdrawn‖full) at the last
position, and the first layer at or below a threshold. The paper's code runs the whole model anew for each candidate.
Here the rows that enter layer ``k`` are taken from the one full run: candidate ``k`` joins, at layer ``k``, a growing
batch of text-only continuations that each layer runs once, right after its full-length run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vtw_kernels.ops import kl_divergence

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
        return f"Withdraw before layer {self.layer} of {self.num_layers}: {removed} layers run on text alone ({samples})."

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
