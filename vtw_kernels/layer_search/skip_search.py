"""Which attention can be skipped: by what the next tokens say, and by the paper's bandit."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.hooks import generating
from vtw_kernels.integration.inputs import in_eval_mode
from vtw_kernels.integration.skipping.adapters import SkipAdapters
from vtw_kernels.integration.skipping.skip_attention import SkipAttention, check_skipped, skip_attention
from vtw_kernels.integration.withdraw import unwrapped
from vtw_kernels.layer_search.policy_scorer import PolicyScorer, Reading
from vtw_kernels.layer_search.scored import Scored, check_among, markdown
from vtw_kernels.layer_search.scorer import read_questions

DRAWS = 100  # for different subsets, at the most: once chances are near 0 and 1, there are hardly any
CHANCES = {"softmax": 10.0, "sigmoid": 1.0}  # how the paper's codes make probabilities of scores, and their factors
Keep = Callable[[int, str, Callable[[], list]], list]


class Bandit(NamedTuple):
    """How the paper's codes find layers, each with a score that begins as 0.

    chances: "softmax" of ten times the scores, as for LaVIN, or "sigmoid" of them, as for LLaVA. steps: of the search,
    each with one batch, which come in turn. warm_up: share of them before scores are learnt; in its first half, the
    number of layers that are drawn grows from 1 to all that are to be skipped. every: a rating of subsets after so many
    steps. subsets: different ones, drawn by the chances, that are rated together. learning_rate: of the scores; 2 for
    LaVIN, 1 for LLaVA. train_rate: of adapters that are trained meanwhile, each step with layers that are drawn, by
    AdamW. seed: of the draws.
    """

    chances: str = "softmax"
    steps: int = 300
    warm_up: float = 0.2
    every: int = 3
    subsets: int = 5
    learning_rate: float = 2.0
    train_rate: float = 1e-3
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what is out of range."""
        check_among("chances", self.chances, CHANCES)
        for name, least in (("steps", 0), ("every", 1), ("subsets", 2)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {getattr(self, name)!r}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up: expected a share of at least 0 and below 1, got {self.warm_up}")
        for name in ("learning_rate", "train_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    def probabilities(self, scores: Tensor) -> Tensor:
        scores = CHANCES[self.chances] * scores
        return scores.softmax(0) if self.chances == "softmax" else scores.sigmoid()

    def drawn(self, step: int, skip: int) -> int:
        """How many layers are drawn in a step."""
        ramp = self.warm_up * self.steps / 2
        return skip if step >= ramp else min(skip, int(skip * step / ramp) + 1)


@dataclass(frozen=True)
class SkipSearch(Scored):
    """What was found about ``N`` samples and ``C`` decoder layers.

    candidates: the layers, ascending. skip: how many were asked for. per_sample: fp32 ``[N, C]``, KL(skipped‖full) in
    nats if the attention of a single layer is skipped, per_sample_reverse, KL(full‖skipped), and disagreement, the
    share of positions where the most likely token is another one: means over the positions of a sample. tokens,
    visual_tokens: int64 ``[N]``. positions: which predictions count. greedy: layers in the order in which they were
    skipped, each the one that adds least to the mean KL, and greedy_kl: that KL, of so many of them; None if it was not
    searched. bandit: scores of the candidates, chances: their probabilities in the end, None likewise; kl_of: the mean
    KL of the choices by name, "alone", "greedy" and "bandit". groups, settings: as of a ``LayerSearch``.
    """

    model: str
    num_layers: int
    candidates: list[int]
    per_sample: Tensor
    per_sample_reverse: Tensor
    disagreement: Tensor
    tokens: Tensor
    visual_tokens: Tensor
    skip: int
    metric: str = "kl"
    statistic: str = "mean"
    positions: int | str = "last"
    greedy: dict[str, list] | None = None
    bandit: dict[str, Any] | None = None
    kl_of: dict[str, float] | None = None
    costs: None = None
    groups: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, list[int]]:
        """Layers to skip, ascending, by how they were found: "alone", those that matter least one at a time; "greedy";
        and "bandit", those with the highest scores."""
        values = self.values()
        found = {"alone": _best(-values, self.candidates, self.skip)}
        if self.greedy is not None:
            found["greedy"] = sorted(self.greedy["layers"])
        if self.bandit is not None:
            found["bandit"] = _best(torch.tensor(self.bandit["scores"]), self.candidates, self.skip)
        return found

    @property
    def layers(self) -> list[int]:
        """The choice with the lowest mean KL on these samples."""
        choices = self.choices
        return choices[min(choices, key=lambda name: (self.kl_of or {}).get(name, math.inf))]

    def columns(self) -> dict[str, list[str]]:
        """The numbers of all candidates for people to read, by headings."""
        choices = self.choices
        chosen = {
            name: ["skipped" if layer in layers else "" for layer in self.candidates]
            for name, layers in choices.items()
        }
        columns = {"layer": [str(x) for x in self.candidates]} | self.value_columns()
        if self.greedy is not None:
            order = self.greedy["layers"]
            chosen["greedy"] = [str(order.index(x) + 1) if x in order else "" for x in self.candidates]
        if self.bandit is not None:
            columns["bandit's score"] = [f"{x:.3g}" for x in self.bandit["scores"]]
            columns["chance"] = [f"{x:.3g}" for x in self.bandit["probabilities"]]
        return columns | chosen

    def table(self) -> str:
        """One line per layer, and the choices; Markdown."""
        return f"{markdown(self.columns())}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """The result in a few sentences."""
        said = [f"Attention of {self.skip} of {self.num_layers} layers skipped ({self.counted()}):"]
        for name, layers in self.choices.items():
            kl = (self.kl_of or {}).get(name)
            said.append(f"{name} {layers}" + ("" if kl is None else f", mean KL {kl:.3g} nats") + ";")
        return " ".join(said)[:-1] + "."

    @staticmethod
    def wrote(path: str | Path) -> bool:
        """Whether ``save`` of such a search wrote a file, as far as its fields tell."""
        try:
            content = json.loads(Path(path).read_text())
        except (ValueError, RecursionError):
            return False
        return isinstance(content, dict) and {"skip", "candidates", "choices"} <= content.keys()

    def _found(self) -> dict[str, Any]:
        return {"choices": self.choices, "kl": self.kl.tolist()}

    def _check(self) -> None:
        """Raises ValueError where fields do not fit each other."""
        self._check_scores(len(self.candidates))
        if not 1 <= self.skip <= len(self.candidates):
            raise ValueError(f"{self.skip} of {len(self.candidates)} candidates")


def _best(scores: Tensor, candidates: Sequence[int], count: int) -> list[int]:
    return sorted(candidates[i] for i in scores.argsort(descending=True, stable=True)[:count].tolist())


class SkipLoss:
    """Cross entropy of the tokens that count, if the attention of some layers is skipped.

    These are the tokens of the answer, as ``labels`` has it; or, where ``positions`` says so, those that the model as
    it is finds most likely.

    Args: as those of ``find_skippable``.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: int | str,
        adapters: SkipAdapters | None = None,
        decoder: nn.Module | None = None,
    ):
        self.positions, self.adapters, self.decoder = positions, adapters, decoder
        count = len(find_parts(unwrapped(model), decoder).layers)
        self.whole = PolicyScorer(model, {"": count}, positions=positions, decoder=decoder)  # the model as it is
        self.model, self.parts = self.whole.model, self.whole.parts

    def losses(self, batch: Mapping[str, Any], subsets: Sequence[Sequence[int]]) -> list[float]:
        """Of each of some subsets of layers."""
        return [loss for loss, _ in self.evaluate(batch, subsets)]

    def evaluate(self, batch: Mapping[str, Any], subsets: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """The loss of each of some subsets of layers, the empty one for the model as it is, and the share of tokens
        that are the most likely ones."""
        with in_eval_mode(self.model), torch.no_grad():
            reading, wanted = self._read(batch)
            found = [(self._logits(reading, subset), wanted) for subset in subsets]
            return [(F.cross_entropy(*x).item(), (x[0].argmax(-1) == x[1]).float().mean().item()) for x in found]

    def backward(self, batch: Mapping[str, Any], subset: Sequence[int], scale: float = 1.0) -> float:
        """The loss of a subset of layers; its gradient, times ``scale``, is added to that of the adapters, in training
        mode, and to no other."""
        self.adapters.train()
        try:
            with in_eval_mode(self.model), torch.inference_mode(False), torch.enable_grad():
                with torch.no_grad():
                    reading, wanted = self._read(batch)
                loss = F.cross_entropy(self._logits(reading, subset), wanted)
                (loss * scale).backward(inputs=list(self.adapters.parameters()))
        finally:
            self.adapters.eval()
        return loss.item()

    def _read(self, batch: Mapping[str, Any]) -> tuple[Reading, Tensor]:
        """A batch as it is scored, and what each row that counts is to predict, int64 ``[P]``."""
        reading = Reading(read_questions(self.model, self.parts, batch, self.positions))
        if self.positions != "answer":
            return reading, self.whole.logits(reading).argmax(-1)
        labels, ids = (batch[name].to(self.model.device) for name in ("labels", "input_ids"))
        if not torch.where(labels == -100, ids, labels).equal(ids):
            raise ValueError(
                "labels: expected those tokens of input_ids that are the answer, got others in their place"
            )
        return reading, torch.roll(reading.inputs["input_ids"], -1, dims=1)[reading.predicting]

    def _logits(self, reading: Reading, subset: Sequence[int]) -> Tensor:
        if not subset:
            return self.whole.logits(reading).float()
        with (
            skip_attention(self.model, subset, self.adapters, decoder=self.decoder),
            generating(reading.columns if reading.has_answers else 0),
        ):
            return self.whole.logits(reading).float()


def computed(number: int, key: str, compute: Callable[[], list]) -> list:
    """Numbers about the batch ``number``, by a key that says what they are. In its place, a search that may be stopped
    has what writes them down, and computes none that it finds there."""
    return compute()


class SkipScorer(SkipLoss):
    """Scores batches if the attention of single layers is skipped, and of any subsets.

    Args: as those of ``find_skippable``, which says what they are and what they raise.
    """

    def __init__(
        self,
        model: nn.Module,
        skip: int,
        *,
        positions: int | str = "last",
        candidates: Sequence[int] | None = None,
        adapters: SkipAdapters | None = None,
        decoder: nn.Module | None = None,
    ):
        super().__init__(model, positions, adapters, decoder)
        layers = len(self.parts.layers)
        self.candidates, self.skip = sorted(set(range(layers) if candidates is None else candidates)), skip
        most = min(len(self.candidates), layers - 1)
        if type(skip) is not int or not 1 <= skip <= most:
            raise ValueError(f"skip: expected a number of layers in 1..{most}, got {skip!r}")
        for layer in self.candidates:
            check_skipped([layer], self.parts)
        if adapters is not None and not {*self.candidates} <= {*adapters.layers}:
            raise ValueError(f"adapters: expected some for each of {self.candidates}, got {list(adapters.layers)}")
        singles = {str(i): SkipAttention((i,), adapters) for i in self.candidates}
        self.singles = PolicyScorer(self.model, singles, positions=positions, decoder=decoder)

    def score(self, batch: Mapping[str, Any]) -> Any:
        """KL and the rest if the attention of each candidate is skipped alone."""
        scores = self.singles.score(batch)
        return SkipScores(*(getattr(scores, name) for name in SkipScores._fields))

    def mean_kl(
        self,
        batches: Iterable[Mapping[str, Any]],
        subsets: Sequence[Sequence[int]],
        keep: Keep = computed,
    ) -> Tensor:
        """fp32 ``[subsets]``: KL(skipped‖full) of skipping each of them, the mean over samples."""
        settings = {str(i): SkipAttention(tuple(x), self.adapters) for i, x in enumerate(subsets)}
        scorer = PolicyScorer(self.model, settings, positions=self.positions, decoder=self.decoder)

        def kls(batch: Mapping[str, Any]) -> list[list[float]]:
            return scorer.score(batch).kl.tolist()

        rows = [keep(number, f"KL {subsets}", partial(kls, batch)) for number, batch in enumerate(batches)]
        return torch.tensor([row for rows_of_batch in rows for row in rows_of_batch], dtype=torch.float32).mean(0)

    def greedy(
        self,
        batches: Sequence[Mapping[str, Any]],
        progress: bool = False,
        keep: Keep = computed,
    ) -> dict[str, list]:
        """Skips one layer more at a time, always that which makes the mean KL least."""
        chosen: list[int] = []
        kls = []
        for count in range(1, self.skip + 1):
            rest = [x for x in self.candidates if x not in chosen]
            shown = tqdm(batches, f"greedy, {count} of {self.skip} layers", disable=not progress)
            values = self.mean_kl(shown, [sorted([*chosen, x]) for x in rest], keep)
            best = int(values.argmin())
            chosen.append(rest[best])
            kls.append(values[best].item())
        return {"layers": chosen, "kl": kls}

    def kl_of(
        self,
        batches: Sequence[Mapping[str, Any]],
        search: SkipSearch,
        keep: Keep = computed,
    ) -> dict[str, float]:
        """The mean KL of each of its choices."""
        choices = search.choices
        return dict(zip(choices, self.mean_kl(batches, list(choices.values()), keep).tolist()))

    def search(
        self,
        batches: Sequence[Mapping[str, Any]],
        bandit: Bandit,
        progress: bool = False,
        keep: Keep = computed,
    ) -> dict[str, Any]:
        """The bandit's scores and probabilities, by candidate."""
        generator = torch.Generator().manual_seed(bandit.seed)
        scores = torch.zeros(len(self.candidates), dtype=torch.float64)
        optimizer = None
        if self.adapters is not None:
            optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=bandit.train_rate)
        possible = math.comb(len(self.candidates), self.skip)

        def draw(count: int) -> list[int]:
            chances = bandit.probabilities(scores).clamp(min=1e-30)
            return sorted(torch.multinomial(chances, count, generator=generator).tolist())

        for step in tqdm(range(bandit.steps), "bandit", disable=not progress):
            number, count = step % len(batches), bandit.drawn(step, self.skip)
            if optimizer is not None:
                optimizer.zero_grad()
                self.backward(batches[number], [self.candidates[i] for i in draw(count)])
                optimizer.step()
            if step < bandit.warm_up * bandit.steps or (step + 1) % bandit.every:
                continue
            subsets: list[list[int]] = []
            for _ in range(DRAWS):
                if len(subsets) < min(bandit.subsets, possible) and (subset := draw(self.skip)) not in subsets:
                    subsets.append(subset)
            layers = [[self.candidates[i] for i in subset] for subset in subsets]
            losses = keep(number, f"loss {layers}", partial(self.losses, batches[number], layers))
            learn(scores, bandit, subsets, losses)
        return {
            "scores": scores.tolist(),
            "probabilities": bandit.probabilities(scores).tolist(),
            **bandit._asdict(),
        }


class SkipScores(NamedTuple):
    """Of ``B`` samples and ``C`` candidates, on the CPU: as ``Scores``."""

    kl: Tensor
    reverse_kl: Tensor
    disagreement: Tensor
    tokens: Tensor
    visual_tokens: Tensor

    @staticmethod
    def join(scores: Iterable["SkipScores"]) -> "SkipScores":
        return SkipScores(*map(torch.cat, zip(*scores)))


def learn(scores: Tensor, bandit: Bandit, subsets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
    """One update of the bandit, in place: ``score += (r - mean of r) p (1 - p) lr`` for each layer of each subset, with
    the reward ``r = exp(-loss)`` and the probabilities ``p`` that subsets were drawn by."""
    chances = bandit.probabilities(scores)
    rewards = torch.tensor(losses, dtype=scores.dtype).neg().exp()
    for subset, advantage in zip(subsets, rewards - rewards.mean()):
        scores[subset] += advantage * (chances * (1 - chances))[subset] * bandit.learning_rate
