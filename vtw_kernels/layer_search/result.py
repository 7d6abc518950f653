"""What a layer search found: divergence by sample and layer, how sure it is, and the choice."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtw_kernels.layer_search.costs import LayerCosts
from vtw_kernels.layer_search.scored import Scored, check_limits, fewest_samples, markdown, sides

PAPER_THRESHOLD = 0.003  # nats, for LLaVA-1.5-7B; the authors took 0.0005 for 13B and 0.0001 for NeXT


@dataclass(frozen=True)
class LayerSearch(Scored):
    """What a search found, of ``N`` samples and ``C`` candidates.

    candidates: the layers that were tried, ascending. num_layers: decoder layers of the model; withdrawing there is not
    withdrawing at all. per_sample: fp32 ``[N, C]``, KL(withdrawn‖full) in nats, and per_sample_reverse,
    KL(full‖withdrawn), both the mean over the positions of a sample; disagreement: fp32 ``[N, C]``, the share of
    positions where the most likely token is another one. positions: which those are, as ``find_layer`` takes it.
    tokens, visual_tokens: int64 ``[N]``. metric, statistic, threshold: what a layer has to stay at or below to be
    chosen. costs: what was measured of one prefill, if it was. attention: fp32 ``[L, 3]``, as ``attention_mass``
    returns it, likewise. groups: of each sample the kind of task that it is of, or None. settings: what else reproduces
    the search. image_layers: those that look at images, where these come in by cross-attention and no token is visual;
    else None.

    A NaN is never at or below a threshold, nor the lowest value.
    """

    model: str
    num_layers: int
    candidates: list[int]
    per_sample: Tensor
    per_sample_reverse: Tensor
    disagreement: Tensor
    tokens: Tensor
    visual_tokens: Tensor
    threshold: float = PAPER_THRESHOLD
    metric: str = "kl"
    statistic: str = "mean"
    positions: int | str = "last"
    costs: LayerCosts | None = None
    attention: Tensor | None = None
    groups: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    image_layers: list[int] | None = None

    TENSORS = ("attention",)
    COSTS = LayerCosts

    @property
    def layer(self) -> int | None:
        """The first candidate whose value is at or below the threshold, or None."""
        return self.layer_at(self.threshold)

    def layer_at(self, threshold: float) -> int | None:
        """The same by another threshold."""
        below = (self.values() <= threshold).nonzero().flatten().tolist()
        return self.candidates[below[0]] if below else None

    @property
    def shown_layer(self) -> int:
        """The layer to look at closely, which is the one that was chosen, else that with the lowest value; of NaN
        alone, the last."""
        if self.layer is not None:
            return self.layer
        lowest = self.choose(min_saving=0)
        return self.candidates[-1] if lowest is None else lowest

    @property
    def saving(self) -> Tensor:
        """fp32 ``[C]``: the share of all rows of all layers that are not computed, which is that of the KV cache, if
        visual tokens are withdrawn before each candidate; the mean over samples. Where images come in by
        cross-attention, the share of ``image_layers`` that do not look at them."""
        if self.image_layers is not None:
            layers = torch.tensor(self.image_layers)
            return (layers >= torch.tensor(self.candidates)[:, None]).float().mean(dim=1)
        layers_without = 1 - torch.tensor(self.candidates) / self.num_layers
        return (self.visual_tokens / self.tokens).mean() * layers_without

    @property
    def what_is_saved(self) -> str:
        return "rows of all layers" if self.image_layers is None else "layers that look at images"

    def plausible_layers(self, level: float = 0.95, threshold: float | None = None) -> tuple[int, int]:
        """The first and the last layer that this search would choose from other samples of the same kind, each side
        at a level of confidence: the choice is made anew for every bootstrap resample. ``num_layers`` stands for none.
        Of few samples, as in ``interval``, any. ``threshold``: another one than that of the search."""
        if len(self.per_sample) < fewest_samples(level):
            return self.candidates[0], self.num_layers
        below = self._resampled <= (self.threshold if threshold is None else threshold)
        layers = torch.tensor([*self.candidates, self.num_layers], dtype=torch.float64)
        chosen = layers[torch.where(below.any(dim=0), below.int().argmax(dim=0), len(self.candidates))]
        first, last = chosen.quantile(sides(level), interpolation="nearest").int().tolist()
        return first, last

    def choose(
        self,
        max_kl: float | None = None,
        min_saving: float | None = None,
        metric: str | None = None,
        statistic: str | None = None,
    ) -> int | None:
        """Another choice than that of the threshold.

        Args:
            max_kl: the first layer whose value is at most this, as it saves most. None: the layer with the lowest
                value.
            min_saving: among the layers with at least this ``saving``, a share of 1.
            metric, statistic: which value; as ``values``. By default those of the search.

        Returns:
            A candidate, or None where none qualifies.

        Raises:
            ValueError: neither limit is given, or one is out of range.
        """
        check_limits(max_kl, min_saving)
        values = self.values(metric, statistic)
        allowed = ~values.isnan()
        if min_saving is not None:
            allowed &= self.saving >= min_saving
        if max_kl is not None:
            allowed &= values <= max_kl
        if not allowed.any():
            return None
        layers = allowed.nonzero().flatten()
        best = layers[0 if max_kl is not None else values[layers].argmin()]
        return self.candidates[int(best)]

    def __str__(self) -> str:
        return self.table()

    def columns(self) -> dict[str, list[str]]:
        """The numbers of all candidates for people to read, by headings; the first is that of the choice. Each group
        has a column of its own with the same number of its samples."""
        groups = {f"{group}: {len(part.tokens)} samples": part.shown() for group, part in self.by_group().items()}
        heading = "rows saved" if self.image_layers is None else "image layers saved"
        saved = {heading: [f"{x:.0%}" for x in self.saving.tolist()]}
        return {"layer": [str(layer) for layer in self.candidates]} | self.value_columns() | groups | saved

    def table(self) -> str:
        """One line per candidate and which one was chosen; Markdown. With groups, also which one each would choose."""
        columns = self.columns() | {"": ["chosen" if layer == self.layer else "" for layer in self.candidates]}
        said = [f"{group}: {part.verdict()}" for group, part in self.by_group().items()]
        return "\n\n".join([markdown(columns), self.verdict(), *said])

    def verdict(self) -> str:
        """The result, and how much the samples tell, in a few sentences."""
        unknown = int(self.per_sample.isnan().any(dim=1).sum())
        samples = f"{self.counted()}, threshold {self.threshold:g} on the {self.criterion}"
        if self.layer is None:
            lowest = self.values()[self.candidates.index(self.shown_layer)].item()
            said = (
                f"No layer of {self.candidates[0]}..{self.candidates[-1]} qualifies ({samples}): the lowest value is "
                f"{lowest:.3g}."
            )
            if not unknown:
                what = "visual tokens" if self.image_layers is None else "images"
                said += f" This model needs its {what} to the end; withdrawing would change its answers."
        else:
            removed = self.num_layers - self.layer
            said = (
                f"Withdraw before layer {self.layer} of {self.num_layers}: {removed} layers run on text alone "
                f"({samples})."
            )
        if unknown:
            return f"{said} At some layers {unknown} of the samples are NaN: how sure this is can't be told."
        if len(self.per_sample) < fewest_samples():
            return f"{said} Fewer than {fewest_samples()} samples do not tell how far others would move the choice."
        first, last = self.plausible_layers()
        if first == last:
            return f"{said} Resampling the samples does not move the choice."
        end = "none" if last == self.num_layers else last
        return (
            f"{said} These samples are too few to tell the layers {first} to {end} apart: resampling them moves the "
            "choice within that range (95 %)."
        )

    def plot(self, path: str | Path) -> None:
        """Writes the value per layer with its interval, the spread over samples, the threshold and the chosen layer, as
        PNG, SVG or PDF."""
        from vtw_kernels.layer_search.plots import Layers, draw_values, new_figure

        figure, axes = new_figure()
        draw_values(axes, Layers(self.candidates, self.num_layers, self.layer), self, self.threshold)
        figure.savefig(path, dpi=150)

    def _found(self) -> dict[str, Any]:
        return {"layer": self.layer, "kl": self.kl.tolist()}

    def _check(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        samples, candidates = len(self.tokens), self.candidates
        if not samples or candidates != sorted(set(candidates) & set(range(self.num_layers))) or not candidates:
            raise ValueError(f"{samples} samples at layers {candidates} of {self.num_layers}")
        self._check_scores(len(candidates))
        if not self.threshold >= 0:
            raise ValueError(f"threshold {self.threshold}")
