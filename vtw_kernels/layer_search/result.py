"""What a layer search found: divergence by sample and layer, how sure it is, and the choice."""

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtw_kernels.layer_search.costs import LayerCosts

PAPER_THRESHOLD = 0.003  # nats, for LLaVA-1.5-7B; the authors took 0.0005 for 13B and 0.0001 for NeXT
METRICS = {
    "kl": "KL(withdrawn‖full), nats",
    "reverse_kl": "KL(full‖withdrawn), nats",
    "disagreement": "share of other top tokens",
}
STATISTICS = {"mean": "mean", "worst_decile": "mean of the worst tenth", "max": "maximum"}
RESAMPLES = 1999


@dataclass(frozen=True)
class LayerSearch:
    """What a search found, of ``N`` samples and ``C`` candidates.

    candidates: the layers that were tried, ascending. num_layers: decoder layers of the model; withdrawing there is not
    withdrawing at all. per_sample: fp32 ``[N, C]``, KL(withdrawn‖full) in nats, and per_sample_reverse,
    KL(full‖withdrawn), both the mean over the positions of a sample; disagreement: fp32 ``[N, C]``, the share of
    positions where the most likely token is another one. positions: which those are, as ``find_layer`` takes it.
    tokens, visual_tokens: int64 ``[N]``. metric, statistic, threshold: what a layer has to stay at or below to be
    chosen. costs: what was measured of one prefill, if it was. attention: fp32 ``[L, 3]``, as ``attention_mass``
    returns it, likewise. settings: what else reproduces the search.

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
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kl(self) -> Tensor:
        """fp32 ``[C]``: the mean over samples of KL(withdrawn‖full)."""
        return self.per_sample.mean(dim=0)

    @property
    def layer(self) -> int | None:
        """The first candidate whose value is at or below the threshold, or None."""
        below = (self.values() <= self.threshold).nonzero().flatten().tolist()
        return self.candidates[below[0]] if below else None

    @property
    def shown_layer(self) -> int:
        """The layer to look at closely: the one that was chosen, else that with the lowest value; of NaN alone, the
        last."""
        if self.layer is not None:
            return self.layer
        lowest = self.choose(min_saving=0)
        return self.candidates[-1] if lowest is None else lowest

    @property
    def saving(self) -> Tensor:
        """fp32 ``[C]``: the share of all rows of all layers that are not computed, which is that of the KV cache, if
        visual tokens are withdrawn before each candidate; the mean over samples."""
        layers_without = 1 - torch.tensor(self.candidates) / self.num_layers
        return (self.visual_tokens / self.tokens).mean() * layers_without

    def by_sample(self, metric: str | None = None) -> Tensor:
        """fp32 ``[N, C]``: "kl", "reverse_kl" or "disagreement"; by default the metric of the search."""
        tensors = (self.per_sample, self.per_sample_reverse, self.disagreement)
        return dict(zip(METRICS, tensors))[check_among("metric", metric or self.metric, METRICS)]

    def values(self, metric: str | None = None, statistic: str | None = None) -> Tensor:
        """fp32 ``[C]``: a metric's "mean", "worst_decile" (the mean of the worst tenth of the samples, rounded up) or
        "max" over samples; by default what the search chooses by."""
        statistic = check_among("statistic", statistic or self.statistic, STATISTICS)
        x = self.by_sample(metric)
        return x.sort(dim=0, descending=True).values[: _how_many(statistic, len(x))].mean(dim=0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Between what fp32 ``[C]`` the values lie: percentile bootstrap over samples, at a level of confidence. Of few
        samples, at 95 % fewer than 6, nothing is known: 0 and infinity."""
        if len(self.per_sample) < fewest_samples(level):
            return torch.zeros(len(self.candidates)), torch.full((len(self.candidates),), torch.inf)
        low, high = self._resampled.quantile(_sides(level), dim=1, interpolation="nearest").float()
        return low, high

    def plausible_layers(self, level: float = 0.95) -> tuple[int, int]:
        """The first and the last layer that this search would choose from other samples of the same kind, each side
        at a level of confidence: the choice is made anew for every bootstrap resample. ``num_layers`` stands for none.
        Of few samples, as in ``interval``, any."""
        if len(self.per_sample) < fewest_samples(level):
            return self.candidates[0], self.num_layers
        below = self._resampled <= self.threshold
        layers = torch.tensor([*self.candidates, self.num_layers], dtype=torch.float64)
        chosen = layers[torch.where(below.any(dim=0), below.int().argmax(dim=0), len(self.candidates))]
        first, last = chosen.quantile(_sides(level), interpolation="nearest").int().tolist()
        return first, last

    @cached_property
    def _resampled(self) -> Tensor:
        """fp64 ``[C, resamples]``: the values of samples drawn with replacement, the same for all candidates."""
        from scipy.stats import bootstrap  # takes half a second

        x = self.by_sample().double()
        # Where one is NaN nothing is known, whichever are drawn.
        x = x.masked_fill(self.per_sample.isnan().any(dim=0), math.inf).numpy()
        largest = _how_many(self.statistic, len(x))

        def statistic(samples: np.ndarray, axis: int) -> np.ndarray:
            descending = -np.partition(-samples, largest - 1, axis=axis)
            return descending.take(range(largest), axis=axis).mean(axis=axis)

        # 64 at a time: SciPy holds that many copies of all samples.
        drawn = bootstrap((x,), statistic, vectorized=True, method="percentile", n_resamples=RESAMPLES, batch=64, rng=0)
        return torch.from_numpy(drawn.bootstrap_distribution)

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
        if max_kl is None and min_saving is None:
            raise ValueError("choose: expected max_kl, min_saving or both, got neither")
        if max_kl is not None and not max_kl >= 0:
            raise ValueError(f"max_kl: expected a number of at least 0, got {max_kl}")
        if min_saving is not None and not 0 <= min_saving <= 1:
            raise ValueError(f"min_saving: expected a share from 0 to 1, got {min_saving}")
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
        """The numbers of all candidates for people to read, by headings; the first is that of the choice."""
        interval = zip(*(x.tolist() for x in self.interval()))
        further = {
            "mean KL (nats)": ("kl", "mean"),
            "worst tenth": ("kl", "worst_decile"),
            "largest": ("kl", "max"),
            "mean reverse KL": ("reverse_kl", "mean"),
        }
        return {
            "layer": [str(layer) for layer in self.candidates],
            self.criterion: [f"{x:.3g}" for x in self.values().tolist()],
            "95 % interval": [f"{low:.3g} to {high:.3g}" for low, high in interval],
            **{
                name: [f"{x:.3g}" for x in self.values(*which).tolist()]
                for name, which in further.items()
                if which != (self.metric, self.statistic)
            },
            "other top token": [f"{x:.1%}" for x in self.values("disagreement", "mean").tolist()],
            "rows saved": [f"{x:.0%}" for x in self.saving.tolist()],
        }

    def table(self) -> str:
        """One line per candidate and which one was chosen; Markdown."""
        columns = self.columns() | {"": ["chosen" if layer == self.layer else "" for layer in self.candidates]}
        lines = [" | ".join(columns), " | ".join(["--:"] * (len(columns) - 1) + [":--"])]
        lines += [" | ".join(row) for row in zip(*columns.values())]
        return "\n".join(f"| {line} |" for line in lines) + "\n\n" + self.verdict()

    @property
    def criterion(self) -> str:
        """What the threshold is compared with, in words."""
        return f"{STATISTICS[self.statistic]} of {METRICS[self.metric]}"

    def verdict(self) -> str:
        """The result, and how much the samples tell, in a few sentences."""
        count, skipped = len(self.per_sample), len(self.settings.get("bad", ()))
        unknown = int(self.per_sample.isnan().any(dim=1).sum())
        samples = f"{count} sample{'s' if count > 1 else ''}" + (
            "" if self.settings.get("finished", True) else " so far"
        )
        samples += f", {skipped} bad record{'s' if skipped > 1 else ''} skipped" if skipped else ""
        samples += f", threshold {self.threshold:g} on the {self.criterion}"
        if self.layer is None:
            lowest = self.values()[self.candidates.index(self.shown_layer)].item()
            said = (
                f"No layer of {self.candidates[0]}..{self.candidates[-1]} qualifies ({samples}): the lowest value is "
                f"{lowest:.3g}."
            )
            if not unknown:
                said += " This model needs its visual tokens to the end; withdrawing would change its answers."
        else:
            removed = self.num_layers - self.layer
            said = (
                f"Withdraw before layer {self.layer} of {self.num_layers}: {removed} layers run on text alone "
                f"({samples})."
            )
        if unknown:
            return f"{said} At some layers {unknown} of the samples are NaN: how sure this is can't be told."
        if count < fewest_samples():
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
        from vtw_kernels.layer_search.plots import draw_values, new_figure

        figure, axes = new_figure()
        draw_values(axes, self)
        figure.savefig(path, dpi=150)

    def report(self, path: str | Path) -> None:
        """Writes the page of ``write_report`` about it; of samples it knows the names, but not what was asked."""
        from vtw_kernels.layer_search.report import write_report

        write_report(path, self)

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON, with the layer and the mean KL spelt out for other readers."""
        values = {name: getattr(self, name) for name in _FIELDS} | {"costs": self.costs and asdict(self.costs)}
        content = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in values.items()}
        Path(path).write_text(json.dumps({"layer": self.layer, "kl": self.kl.tolist()} | content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LayerSearch":
        """Reads what ``save`` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            missing = [name for name in _NEEDED if name not in content]
            if missing:
                raise ValueError(f"nothing for {', '.join(missing)}")
            values = {name: content[name] for name in _FIELDS if name in content}
            for name in ("per_sample", "per_sample_reverse", "disagreement", "attention"):
                values[name] = None if values.get(name) is None else torch.tensor(values[name], dtype=torch.float32)
            for name in ("tokens", "visual_tokens"):
                values[name] = torch.tensor(values[name], dtype=torch.int64)
            search = cls(**values | {"costs": values.get("costs") and LayerCosts(**values["costs"])})
            search._check()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected what LayerSearch.save wrote, got {error}") from error
        return search

    def _check(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        samples, candidates = len(self.tokens), len(self.candidates)
        if (
            not samples
            or self.candidates != sorted(set(self.candidates) & set(range(self.num_layers)))
            or not candidates
        ):
            raise ValueError(f"{samples} samples at layers {self.candidates} of {self.num_layers}")
        for name, shape in {
            "per_sample": (samples, candidates),
            "per_sample_reverse": (samples, candidates),
            "disagreement": (samples, candidates),
            "visual_tokens": (samples,),
        }.items():
            given = getattr(self, name).shape
            if given != shape:
                raise ValueError(f"{name} of shape {list(given)} for {samples} samples and {candidates} layers")
        check_among("metric", self.metric, METRICS)
        check_among("statistic", self.statistic, STATISTICS)
        if not self.threshold >= 0 or not isinstance(self.settings, dict):
            raise ValueError(f"threshold {self.threshold} and settings {type(self.settings).__name__}")


_FIELDS = [field.name for field in fields(LayerSearch)]
_NEEDED = [field.name for field in fields(LayerSearch) if field.default is field.default_factory is MISSING]


def check_among(name: str, value: str, choices: Iterable[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def fewest_samples(level: float = 0.95) -> int:
    """With fewer, not even the range of all of them holds the median of their kind at a level of confidence: each lies
    below it, or above, with probability 1/2, so that all do with 2^(1-n)."""
    return 1 + math.ceil(-math.log2(1 - level))


def _sides(level: float) -> Tensor:
    """The two quantiles between which lies a share of ``level``."""
    return torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)


def _how_many(statistic: str, samples: int) -> int:
    """Of how many of the largest values a statistic is the mean."""
    return {"mean": samples, "worst_decile": -(-samples // 10), "max": 1}[statistic]
