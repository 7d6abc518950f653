"""Scores of samples, with a column for each layer or policy: their statistics, tables and files."""

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

METRICS = {
    "kl": "KL(withdrawn‖full), nats",
    "reverse_kl": "KL(full‖withdrawn), nats",
    "disagreement": "share of other top tokens",
}
STATISTICS = {"mean": "mean", "worst_decile": "mean of the worst tenth", "max": "maximum"}
RESAMPLES = 1999
NO_GROUP = "none"  # the group of records that name none, if others do


class Scored:
    """Scores of ``N`` samples in ``C`` columns. What inherits from it is a dataclass with fields of these names:

    per_sample: fp32 ``[N, C]``, KL(withdrawn‖full) in nats, and per_sample_reverse, KL(full‖withdrawn), both the mean
    over the positions of a sample; disagreement: fp32 ``[N, C]``, the share of positions where the most likely token is
    another one. tokens, visual_tokens: int64 ``[N]``. metric, statistic: what is looked at first. groups: of each
    sample the kind of task that it is of, or None. costs: what was measured beside. settings: what else reproduces the
    scores.
    """

    # Of a class: which of its fields are tensors with a row for each sample, which are other tensors, and of what type
    # its costs are.
    SCORES: ClassVar[tuple[str, ...]] = ("per_sample", "per_sample_reverse", "disagreement")
    COUNTS: ClassVar[tuple[str, ...]] = ("tokens", "visual_tokens")
    TENSORS: ClassVar[tuple[str, ...]] = ()
    COSTS: ClassVar[type]

    @property
    def kl(self) -> Tensor:
        """fp32 ``[C]``: the mean over samples of KL(withdrawn‖full)."""
        return self.per_sample.mean(dim=0)

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
        columns = self.per_sample.shape[1]
        if len(self.per_sample) < fewest_samples(level):
            return torch.zeros(columns), torch.full((columns,), torch.inf)
        low, high = self._resampled.quantile(sides(level), dim=1, interpolation="nearest").float()
        return low, high

    @cached_property
    def _resampled(self) -> Tensor:
        """fp64 ``[C, resamples]``: the values of samples drawn with replacement, the same for all columns."""
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

    @property
    def criterion(self) -> str:
        """What is looked at first, in words."""
        return f"{STATISTICS[self.statistic]} of {METRICS[self.metric]}"

    def by_group(self) -> dict[str, Self]:
        """The same of the samples of each group, in the order in which groups come; empty without groups. Costs,
        measured on samples of any of them, are left out."""
        parts = {}
        for group in dict.fromkeys(self.groups or ()):
            rows = torch.tensor([i for i, own in enumerate(self.groups) if own == group])
            changes: dict[str, Any] = {name: getattr(self, name)[rows] for name in (*self.SCORES, *self.COUNTS)}
            settings = self.settings | {"bad": {}}
            if isinstance(records := self.settings.get("records"), dict) and len(records) == len(self.groups):
                named = list(records.items())
                settings["records"] = dict(named[row] for row in rows.tolist())
            parts[group] = replace(self, **changes, groups=None, costs=None, settings=settings)
        return parts

    def report(self, path: str | Path) -> None:
        """Writes a page of HTML about it, and its figures beside it; of samples it has the names, but not what was
        asked."""
        from vtw_kernels.layer_search.report import write_report  # with matplotlib and jinja2

        write_report(path, self)

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON, with what was found spelt out for other readers."""
        values = {x.name: getattr(self, x.name) for x in fields(self)} | {"costs": self.costs and asdict(self.costs)}
        content = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in values.items()}
        Path(path).write_text(json.dumps(self._found() | content, indent=1) + "\n")

    def _found(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``save`` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: something else.
        """
        try:
            content = json.loads(Path(path).read_text())
            needed = [x.name for x in fields(cls) if x.default is x.default_factory is MISSING]
            missing = [name for name in needed if name not in content]
            if missing:
                raise ValueError(f"nothing for {', '.join(missing)}")
            values = {x.name: content[x.name] for x in fields(cls) if x.name in content}
            for name in (*cls.SCORES, *cls.TENSORS):
                values[name] = None if values.get(name) is None else torch.tensor(values[name], dtype=torch.float32)
            for name in cls.COUNTS:
                values[name] = torch.tensor(values[name], dtype=torch.int64)
            found = cls(**values | {"costs": values.get("costs") and cls.COSTS(**values["costs"])})
            found._check()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected what {cls.__name__}.save wrote, got {error}") from error
        return found

    def _check_scores(self, columns: int) -> None:
        """Raises ValueError where fields do not fit each other."""
        samples = len(self.tokens)
        shapes = dict.fromkeys(self.SCORES, (samples, columns)) | dict.fromkeys(self.COUNTS, (samples,))
        for name, shape in shapes.items():
            if (given := getattr(self, name).shape) != shape:
                raise ValueError(f"{name} of shape {list(given)} for {samples} samples and {columns} columns")
        check_among("metric", self.metric, METRICS)
        check_among("statistic", self.statistic, STATISTICS)
        check_groups(self.groups, samples)
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings {type(self.settings).__name__}")

    def counted(self) -> str:
        """How many samples there are, in words."""
        count, skipped = len(self.per_sample), len(self.settings.get("bad", ()))
        samples = f"{count} sample{'s' if count > 1 else ''}"
        samples += "" if self.settings.get("finished", True) else " so far"
        return samples + (f", {skipped} bad record{'s' if skipped > 1 else ''} skipped" if skipped else "")

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        raise NotImplementedError

    def shown(self, metric: str | None = None, statistic: str | None = None) -> list[str]:
        """``values`` for people to read."""
        return [f"{x:.3g}" for x in self.values(metric, statistic).tolist()]

    def value_columns(self) -> dict[str, list[str]]:
        """What was scored for people to read, by headings: the criterion first, and with it how sure it is."""
        further = {
            "mean KL (nats)": ("kl", "mean"),
            "worst tenth": ("kl", "worst_decile"),
            "largest": ("kl", "max"),
            "mean reverse KL": ("reverse_kl", "mean"),
        }
        interval = zip(*(x.tolist() for x in self.interval()))
        return {
            self.criterion: self.shown(),
            "95 % interval": [f"{low:.3g} to {high:.3g}" for low, high in interval],
            **{name: self.shown(*which) for name, which in further.items() if which != (self.metric, self.statistic)},
            "other top token": [f"{x:.1%}" for x in self.values("disagreement", "mean").tolist()],
        }


def markdown(columns: dict[str, list[str]]) -> str:
    """A table of cells by headings. What has no heading stands to the left."""
    lines = [list(columns), ["--:" if name else ":--" for name in columns], *map(list, zip(*columns.values()))]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def check_among(name: str, value: str, choices: Iterable[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_groups(groups: Any, samples: int) -> list[str] | None:
    """As a list. Raises TypeError or ValueError for something else than a text for each sample, or None."""
    if groups is None:
        return None
    groups = [groups] if isinstance(groups, str) else list(groups)
    if wrong := [x for x in groups if not isinstance(x, str)]:
        raise TypeError(f"groups: expected texts, got {type(wrong[0]).__name__}")
    if len(groups) != samples:
        raise ValueError(f"groups: expected one for each of {samples} samples, got {len(groups)}")
    return groups


def check_limits(max_kl: float | None, min_saving: float | None) -> None:
    """Raises ValueError for limits of ``choose`` that are none, or out of range."""
    if max_kl is None and min_saving is None:
        raise ValueError("choose: expected max_kl, min_saving or both, got neither")
    if max_kl is not None and not max_kl >= 0:
        raise ValueError(f"max_kl: expected a number of at least 0, got {max_kl}")
    if min_saving is not None and not 0 <= min_saving <= 1:
        raise ValueError(f"min_saving: expected a share from 0 to 1, got {min_saving}")


def fewest_samples(level: float = 0.95) -> int:
    """With fewer, not even the range of all of them holds the median of their kind at a level of confidence: each lies
    below it, or above, with probability 1/2, so that all do with 2^(1-n)."""
    return 1 + math.ceil(-math.log2(1 - level))


def sides(level: float) -> Tensor:
    """The two quantiles between which lies a share of ``level``."""
    return torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)


def _how_many(statistic: str, samples: int) -> int:
    """Of how many of the largest values a statistic is the mean."""
    return {"mean": samples, "worst_decile": -(-samples // 10), "max": 1}[statistic]
