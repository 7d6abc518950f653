"""The training of gates, and its result: the gates, what they were trained on, and how they do on held-out samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.optimization import get_cosine_schedule_with_warmup

from vtw_kernels.integration.exit_routers import (
    FORMAT,
    RECORDS,
    WIDTH,
    ExitRouters,
    check_threshold,
)
from vtw_kernels.integration.tensor_files import open_tensors, write_tensors
from vtw_kernels.layer_search.scored import Scored, check_groups, markdown

SAME_TOKENS, LOSS_GROWTH = 0.99, 1.03  # as in the paper's code: gates should fire above the first and below the second
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BATCH = 128  # samples, the paper's


class Training(NamedTuple):
    """How gates are trained: AdamW without weight decay, a cosine schedule, cross entropy, as in the paper. There, each
    sample is seen once, by one gate; here by all of them, ``epochs`` times.

    width: of the gates. warm_up: share of the steps. held_out: share of the samples that gates are measured on, and not
    trained with. They are drawn by the seed from all samples, the same ones whenever the samples are as many: of
    questions about one image, some may be held out and others not. seed: of the weights, of what is held out, and of
    the order of samples.
    """

    width: int = WIDTH
    epochs: int = 30
    learning_rate: float = 6e-5
    warm_up: float = 0.03
    held_out: float = 0.2
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what is out of range."""
        for name in ("width", "epochs"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {getattr(self, name)!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        for name in ("held_out", "warm_up"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share of at least 0 and below 1, got {getattr(self, name)}")
        if not self.held_out:
            raise ValueError("held_out: expected a share above 0, got 0")

    def split(self, samples: int) -> tuple[Tensor, Tensor]:
        """int64, ascending: which samples are trained with, and which are held out, at least one of each.

        Raises:
            ValueError: fewer than two samples.
        """
        if samples < 2:
            raise ValueError(f"batches: expected at least 2 samples, one of them to be held out, got {samples}")
        count = min(max(1, round(self.held_out * samples)), samples - 1)
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(self.seed))
        return order[count:].sort().values, order[:count].sort().values


class Outcome(NamedTuple):
    """What gates with a threshold do to held-out samples.

    layers: int64 ``[N]``, before which the visual tokens of each leave; the number of layers for never. agreement: the
    share of positions whose most likely token stays. kl: KL(withdrawn‖full) in nats. Both are means over samples.
    """

    threshold: float
    layers: Tensor
    agreement: float
    kl: float

    @property
    def mean_layer(self) -> float:
        return self.layers.double().mean().item()


@dataclass(frozen=True)
class ExitTraining(Scored):
    """Gates, trained on ``N`` samples at ``G`` layers.

    routers: the gates. candidates: their layers, ascending. num_layers: decoder layers of the model. per_sample: fp32
    ``[N, G]``, KL(withdrawn‖full) in nats, withdrawn at each gate, per_sample_reverse, KL(full‖withdrawn), and
    disagreement, the share of positions where the most likely token is another one: means over the positions of a
    sample. loss: fp32 ``[N, G + 1]``, cross entropy of the tokens that count, withdrawn at each gate and, last, in
    full. features: ``[N, G, 2H]``, what the gates read. tokens, visual_tokens: int64 ``[N]``. positions: which
    predictions count, as ``train_exit`` takes it. training: how. groups: of each sample the kind of task that it is of,
    or None. settings: what else reproduces it.
    """

    model: str
    num_layers: int
    candidates: list[int]
    per_sample: Tensor
    per_sample_reverse: Tensor
    disagreement: Tensor
    loss: Tensor
    features: Tensor
    tokens: Tensor
    visual_tokens: Tensor
    routers: ExitRouters
    training: Training
    metric: str = "kl"
    statistic: str = "mean"
    positions: int | str = "answer"
    costs: None = None
    groups: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    SCORES = (*Scored.SCORES, "loss", "features")

    @property
    def labels(self) -> Tensor:
        """bool ``[N, G]``: whether the visual tokens of a sample may leave at a gate."""
        return exit_labels(self.disagreement, self.loss)

    @property
    def split(self) -> tuple[Tensor, Tensor]:
        """int64: which samples were trained with, and which held out."""
        return self.training.split(len(self.tokens))

    @cached_property
    def probabilities(self) -> Tensor:
        """fp32 ``[N, G]``, on the CPU: what the gates say of all samples."""
        columns = zip(self.candidates, self.features.unbind(1))
        return torch.stack([self.routers.probabilities(layer, x.contiguous()) for layer, x in columns], dim=1)

    def held_out(self, group: str | None = None) -> Tensor:
        """int64: which samples were held out; of one group, or of all."""
        rows = self.split[1]
        return rows if group is None else rows[torch.tensor([self.groups[i] == group for i in rows.tolist()])]

    def outcome(self, threshold: float | None = None, group: str | None = None) -> Outcome:
        """On the held-out samples, with a threshold; by default that of the routers."""
        threshold = self.routers.threshold if threshold is None else check_threshold(threshold)
        rows = self.held_out(group)
        fires = self.probabilities[rows] > threshold
        gate = torch.where(fires.any(1), fires.int().argmax(1), len(self.candidates))
        layers = torch.tensor([*self.candidates, self.num_layers])[gate]
        agreement, kl = (x[rows, gate].mean().item() for x in self._with_never())
        return Outcome(threshold, layers, agreement, kl)

    def at_exit(self) -> Tensor:
        """fp32: KL of each held-out sample where it leaves, by the threshold of the routers."""
        layers = [*self.candidates, self.num_layers]
        columns = torch.tensor([layers.index(layer) for layer in self.outcome().layers.tolist()])
        return self._with_never()[1][self.held_out(), columns]

    def fixed(self, mean_layer: float, group: str | None = None) -> tuple[float, float]:
        """Agreement and KL of the held-out samples if all of them leave before one layer. It is measured at the gates,
        and where nothing leaves; between two of these, some leave at one and some at the other, drawn by lot.

        Raises:
            ValueError: a layer before the first gate.
        """
        layers = [*self.candidates, self.num_layers]
        if not layers[0] <= mean_layer <= layers[-1]:
            raise ValueError(f"mean_layer: expected {layers[0]}..{layers[-1]}, got {mean_layer}")
        above = next(i for i, layer in enumerate(layers) if layer >= mean_layer)
        below = max(0, above - 1)
        share = 1.0 if above == 0 else (mean_layer - layers[below]) / (layers[above] - layers[below])
        agreement, kl = (x[self.held_out(group)].double().mean(0) for x in self._with_never())
        return tuple(((1 - share) * x[below] + share * x[above]).item() for x in (agreement, kl))

    def _with_never(self) -> tuple[Tensor, Tensor]:
        """fp32 ``[N, G + 1]``: agreement and KL at each gate and, last, if nothing leaves."""
        return F.pad(1 - self.disagreement, (0, 1), value=1.0), F.pad(self.per_sample, (0, 1))

    def columns(self, group: str | None = None) -> dict[str, list[str]]:
        """The numbers of some thresholds for people to read, by headings."""
        thresholds = sorted({*THRESHOLDS, self.routers.threshold})
        outcomes = [self.outcome(x, group) for x in thresholds]
        fixed = [self.fixed(x.mean_layer, group) for x in outcomes]
        return {
            "threshold": [f"{x:g}" for x in thresholds],
            "mean exit layer": [f"{x.mean_layer:.1f}" for x in outcomes],
            "never": [f"{(x.layers == self.num_layers).double().mean():.0%}" for x in outcomes],
            "rows saved": [f"{self._saved(x, group):.0%}" for x in outcomes],
            "same top token": [f"{x.agreement:.1%}" for x in outcomes],
            "at a fixed layer": [f"{x:.1%}" for x, _ in fixed],
            "mean KL (nats)": [f"{x.kl:.3g}" for x in outcomes],
            "KL at a fixed layer": [f"{x:.3g}" for _, x in fixed],
            "": ["chosen" if x == self.routers.threshold else "" for x in thresholds],
        }

    def _saved(self, outcome: Outcome, group: str | None) -> float:
        """The share of all rows of all layers that are not computed: the mean over held-out samples."""
        visual, tokens = (x[self.held_out(group)].double() for x in (self.visual_tokens, self.tokens))
        return (visual / tokens * (1 - outcome.layers / self.num_layers)).mean().item()

    @property
    def held_out_groups(self) -> list[str]:
        """Those of which samples were held out."""
        return list(dict.fromkeys(self.groups[i] for i in self.held_out().tolist())) if self.groups else []

    def table(self) -> str:
        """One line per threshold, of the held-out samples; Markdown. With groups, the same for each of them."""
        parts = [markdown(self.columns()), self.verdict()]
        for group in self.held_out_groups:
            parts += [f"{group}:", markdown(self.columns(group))]
        return "\n\n".join(parts)

    def verdict(self) -> str:
        """The result in a few sentences."""
        trained, held_out = self.split
        outcome = self.outcome()
        agreement, kl = self.fixed(outcome.mean_layer)
        never = int((outcome.layers == self.num_layers).sum())
        right, leave = (self.probabilities > 0.5) == self.labels, self.labels.double()
        same_answer = leave[held_out].mean().item()
        return (
            f"{len(self.candidates)} gates ({self.routers.nbytes / 2**20:.3g} MiB), trained on {len(trained)} samples. "
            f"Of {len(held_out)} held-out ones, the visual tokens leave before layer {outcome.mean_layer:.1f} of "
            f"{self.num_layers} in the mean and never in {never}, at a threshold of {outcome.threshold:g}; "
            f"{outcome.agreement:.1%} of the most likely tokens stay, and mean KL is {outcome.kl:.3g} nats; with one "
            f"layer for all, at equal cost, {agreement:.1%} and {kl:.3g}. The gates are right in "
            f"{right[trained].double().mean():.1%} of what they were trained on and in "
            f"{right[held_out].double().mean():.1%} of what was held out, where always the same answer would be in "
            f"{max(same_answer, 1 - same_answer):.1%}."
        )

    def plot(self, path: str | Path) -> None:
        """Writes agreement over the mean exit layer, of gates and of fixed layers, as PNG, SVG or PDF."""
        from vtw_kernels.layer_search.plots import draw_exit_curve, new_figure

        figure, axes = new_figure()
        draw_exit_curve(axes, *self.curve("agreement"), self.outcome().mean_layer, "same most likely token")
        figure.savefig(path, dpi=150)

    def curve(self, name: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Points of mean exit layer and "agreement" or "kl", of the held-out samples: of gates at ever higher
        thresholds, and of each layer for all."""
        layers = [*self.candidates, self.num_layers]
        outcomes = map(self.outcome, np.linspace(0, 1, 101).tolist())
        fixed = [(float(layer), self.fixed(layer)[name == "kl"]) for layer in layers]
        return [(x.mean_layer, getattr(x, name)) for x in outcomes], fixed

    def save(self, path: str | Path) -> None:
        """Writes the gates, as ``ExitRouters.save`` does, and beside them, in the same file, what they were trained
        with, which ``withdraw`` and ``ExitRouters.load`` leave alone. Readers see the old file or the new one."""
        further = {name: getattr(self, name) for name in _FURTHER} | {"training": self.training._asdict()}
        tensors = {f"{RECORDS}{name}": getattr(self, name).contiguous() for name in (*self.SCORES, *self.COUNTS)}
        tensors |= self.routers.state()
        write_tensors(path, tensors, FORMAT, routers=self.routers.made_for(), records=further)

    @classmethod
    def load(cls, path: str | Path) -> "ExitTraining":
        """Reads what ``save`` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: something else; also a file of gates alone.
        """
        routers = ExitRouters.load(path)
        with open_tensors(path, FORMAT, "ExitTraining.save") as (file, metadata):
            further = metadata["records"]
            scores = {name: file.get_tensor(f"{RECORDS}{name}") for name in (*cls.SCORES, *cls.COUNTS)}
            further["training"] = Training(**further["training"])
            found = cls(model=routers.model, num_layers=routers.num_layers, routers=routers, **further | scores)
            found._check()
            return found

    def _check(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        samples, gates = len(self.tokens), len(self.candidates)
        shapes = dict.fromkeys(Scored.SCORES, (samples, gates)) | dict.fromkeys(self.COUNTS, (samples,))
        shapes |= {"loss": (samples, gates + 1), "features": (samples, gates, 2 * self.routers.hidden_size)}
        for name, shape in shapes.items():
            if (given := getattr(self, name).shape) != shape:
                raise ValueError(f"{name} of shape {list(given)} for {samples} samples and {gates} gates")
        if tuple(self.candidates) != self.routers.boundaries:
            raise ValueError(f"gates before {self.candidates} and {list(self.routers.boundaries)}")
        check_groups(self.groups, samples)
        self.training.check()


def train_gates(
    of_model: tuple[str, int, list[int]],
    scores: Sequence[Tensor],
    training: Training,
    threshold: float,
    device: torch.device | str,
    **further: Any,
) -> ExitTraining:
    """Trains gates on what ``ExitScorer`` found.

    Args:
        of_model: the name of its class, its decoder layers, and the gates.
        scores: the fields of ``ExitScores``.
        training, threshold, device: how, for what, and where.
        further: other fields of ``ExitTraining``.

    Raises:
        ValueError: fewer than two samples, or something of ``training`` is out of range.
    """
    training.check()
    model, num_layers, layers = of_model
    *_, features, _, _ = scores
    rows, _ = training.split(len(features))
    routers = ExitRouters(
        layers,
        features.shape[-1] // 2,
        num_layers,
        width=training.width,
        threshold=threshold,
        seed=training.seed,
        model=model,
        settings={"samples": len(rows)} | training._asdict(),
    )
    found = ExitTraining(*of_model, *scores, routers, training, **further)
    train_routers(features[rows], found.labels[rows], routers, training, device)
    return found


_FURTHER = ("candidates", "metric", "statistic", "positions", "groups", "settings")


def exit_labels(disagreement: Tensor, loss: Tensor) -> Tensor:
    """bool ``[N, G]``: whether visual tokens may leave at a gate: as good as all tokens of the answer stay the most
    likely ones, and its cross entropy grows by less than 3 %. Arguments: as of ``ExitTraining``."""
    return (1 - disagreement > SAME_TOKENS) & (loss[:, :-1] < LOSS_GROWTH * loss[:, -1:])


def train_routers(
    features: Tensor,
    labels: Tensor,
    routers: ExitRouters,
    training: Training,
    device: torch.device | str = "cpu",
) -> None:
    """Trains each gate for itself.

    Args:
        features: ``[N, G, 2H]``, of those samples alone that are to be trained with.
        labels: bool ``[N, G]``.
        routers: whose weights are changed; then they are on the CPU.
        device: where to.
    """
    steps = training.epochs * -(-len(features) // BATCH)
    for column, layer in enumerate(routers.boundaries):
        gate = routers.gates[layer].to(device).requires_grad_(True)
        read, wanted = features[:, column].to(device).float(), labels[:, column].to(device).long()
        optimizer = torch.optim.AdamW(gate.parameters(), lr=training.learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warm_up * steps), steps)
        generator = torch.Generator().manual_seed(training.seed)
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(training.epochs):
                for rows in torch.randperm(len(read), generator=generator).to(device).split(BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(gate(read[rows]), wanted[rows]).backward()
                    optimizer.step()
                    schedule.step()
        gate.requires_grad_(False).cpu()
