"""What a comparison of policies found: divergence by sample and policy, what each costs, and the choice among them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtw_kernels.layer_search.costs import PolicyCosts
from vtw_kernels.layer_search.scored import Scored, check_among, check_limits, markdown

# What may be saved: in all samples, or in those that costs were measured on.
SAVED = {
    "rows": "rows of all layers",
    "flops": "FLOPs of the decoder",
    "kv_bytes": "KV cache",
    "prefill": "prefill time",
    "decode": "time of a decoded token",
}


@dataclass(frozen=True)
class Comparison(Scored):
    """What a comparison found, of ``N`` samples and ``C`` policies.

    policies: their names; those of this package's as ``parse_policy`` takes them. per_sample: fp32 ``[N, C]``,
    KL(withdrawn‖full) in nats, and per_sample_reverse, KL(full‖withdrawn), both the mean over the positions of a
    sample; disagreement: fp32 ``[N, C]``, the share of positions where the most likely token is another one.
    rows_saved: fp32 ``[N, C]``, of all rows of a prompt in all layers, the share that attention does not have, which is
    that of the KV cache. Rows that have left have no MLP either; those of a layer whose attention is skipped have.
    tokens, visual_tokens: int64 ``[N]``, of the prompts. num_layers: decoder layers of the model. positions: which
    predictions count, as ``compare`` takes it. metric, statistic: what policies are chosen by. groups: of each sample
    the kind of task that it is of, or None. costs: what was measured of some samples, if it was. settings: what else
    reproduces the comparison.

    A NaN is no value to choose by.
    """

    model: str
    num_layers: int
    policies: list[str]
    per_sample: Tensor
    per_sample_reverse: Tensor
    disagreement: Tensor
    rows_saved: Tensor
    tokens: Tensor
    visual_tokens: Tensor
    metric: str = "kl"
    statistic: str = "mean"
    positions: int | str = "last"
    costs: PolicyCosts | None = None
    groups: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    SCORES = (*Scored.SCORES, "rows_saved")
    COSTS = PolicyCosts

    def saving(self, cost: str = "rows") -> Tensor:
        """fp32 ``[C]``: the share that each policy saves, or with a minus what it takes more: of "rows", the mean over
        samples; of "flops", "kv_bytes", "prefill" or "decode", as measured.

        Raises:
            ValueError: another cost, or one that was not measured.
        """
        if check_among("cost", cost, SAVED) == "rows":
            return self.rows_saved.mean(dim=0)
        if self.costs is None:
            raise ValueError(f"cost: expected 'rows', as no others were measured, got {cost!r}")
        *own, full = self.costs.by_name(cost)
        return 1 - torch.tensor(own) / full

    def pareto(self, cost: str = "rows", metric: str | None = None, statistic: str | None = None) -> list[str]:
        """The policies that no other one is better than, nor is the model as it is: none has a value as low that saves
        more, nor a lower value and saves as much. Those that save least come first. Arguments: as of ``choose``."""
        values, saved = self.values(metric, statistic).tolist(), self.saving(cost).tolist()
        points = [*zip(values, saved), (0.0, 0.0)]

        def is_on_front(value: float, saving: float) -> bool:
            better = (v <= value and s >= saving and (v, s) != (value, saving) for v, s in points)
            return not math.isnan(value) and not any(better)

        front = [i for i, point in enumerate(points[:-1]) if is_on_front(*point)]
        return [self.policies[i] for i in sorted(front, key=lambda i: (saved[i], values[i]))]

    def choose(
        self,
        max_kl: float | None = None,
        min_saving: float | None = None,
        metric: str | None = None,
        statistic: str | None = None,
        cost: str = "rows",
    ) -> str | None:
        """The policy for a limit.

        Args:
            max_kl: of those whose value is at most this, the policy that saves most. None: that with the lowest value.
            min_saving: among those that save at least this share of the cost.
            metric, statistic: which value; as ``values``. By default those of the comparison.
            cost: what is saved: "rows", "flops", "kv_bytes", "prefill" or "decode"; as ``saving``.

        Returns:
            The name of a policy, which ``parse_policy`` takes if it is one of this package; or None where none
            qualifies.

        Raises:
            ValueError: neither limit is given, one is out of range, or the cost was not measured.
        """
        check_limits(max_kl, min_saving)
        values, saved = self.values(metric, statistic).tolist(), self.saving(cost).tolist()
        allowed = [
            i
            for i, (value, saving) in enumerate(zip(values, saved))
            if value <= (float("inf") if max_kl is None else max_kl) and (min_saving is None or saving >= min_saving)
        ]
        if not allowed:
            return None
        by_value, by_saving = (lambda i: (values[i], -saved[i])), (lambda i: (-saved[i], values[i]))
        return self.policies[min(allowed, key=by_value if max_kl is None else by_saving)]

    def columns(self) -> dict[str, list[str]]:
        """The numbers of all policies for people to read, by headings."""
        saved = {f"{SAVED[cost]} saved": [f"{x:.0%}" for x in self.saving(cost).tolist()] for cost in self.measured}
        front = self.pareto()
        return (
            {"policy": self.policies}
            | self.value_columns()
            | saved
            | {"": ["front" if policy in front else "" for policy in self.policies]}
        )

    @property
    def measured(self) -> list[str]:
        """What ``saving`` can be asked for."""
        return list(SAVED) if self.costs is not None else ["rows"]

    def table(self) -> str:
        """One line per policy, and which ones are on the Pareto front of value and rows saved; Markdown. With groups,
        the same for each of them."""
        parts = [markdown(self.columns()), self.verdict()]
        for group, part in self.by_group().items():
            parts += [f"{group}:", markdown(part.columns()), part.verdict()]
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """The result in a few sentences."""
        front, samples = self.pareto(), f"{self.counted()}, {self.criterion} against rows saved"
        unknown = int(self.per_sample.isnan().any(dim=1).sum())
        said = f"None of {len(self.policies)} policies is on the Pareto front ({samples})."
        if front:
            said = f"On the Pareto front ({samples}): {', '.join(front)}."
        return f"{said} {unknown} of the samples are NaN under some policies." if unknown else said

    def plot(self, path: str | Path) -> None:
        """Writes the value over the rows saved, of each policy, with the Pareto front, as PNG, SVG or PDF."""
        from vtw_kernels.layer_search.plots import draw_front, new_figure

        figure, axes = new_figure()
        draw_front(axes, self.policies, self, self.saving(), self.pareto(), SAVED["rows"])
        figure.savefig(path, dpi=150)

    @staticmethod
    def wrote(path: str | Path) -> bool:
        """Whether ``save`` of a comparison, and not of a search, wrote a file, as far as its fields tell."""
        try:
            content = json.loads(Path(path).read_text())
        except (ValueError, RecursionError):
            return False
        return isinstance(content, dict) and "policies" in content

    def _found(self) -> dict[str, Any]:
        return {"pareto": self.pareto(), "kl": self.kl.tolist()}

    def _check(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        if not len(self.tokens) or not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"{len(self.tokens)} samples of the policies {self.policies}")
        self._check_scores(len(self.policies))
        if self.costs is not None and self.costs.policies != self.policies:
            raise ValueError(f"costs of the policies {self.costs.policies}")
