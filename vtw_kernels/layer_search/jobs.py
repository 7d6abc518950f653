"""What ``vtw-kernels search`` and its sisters do with records, each in its own way."""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtw_kernels.integration.exit_routers import check_threshold
from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.policy_text import parse_policy
from vtw_kernels.integration.skipping.adapters import WEIGHTS
from vtw_kernels.integration.skipping.skip_attention import SkipAttention
from vtw_kernels.layer_search import COSTED, gate_layers, named_policies
from vtw_kernels.layer_search.attention import attention_mass
from vtw_kernels.layer_search.comparison import Comparison
from vtw_kernels.layer_search.costs import measure_costs, measure_policies
from vtw_kernels.layer_search.exit_scorer import ExitScorer, ExitScores
from vtw_kernels.layer_search.exit_training import ExitTraining, Training, train_gates
from vtw_kernels.layer_search.policy_scorer import PolicyScorer, PolicyScores
from vtw_kernels.layer_search.result import LayerSearch
from vtw_kernels.layer_search.scored import Scored
from vtw_kernels.layer_search.scorer import Scorer, Scores
from vtw_kernels.layer_search.skip_search import Bandit, SkipScorer, SkipScores, SkipSearch

SHOWN = 8  # samples in a report, and those whose attention it shows


class Job:
    """What is found out about records.

    name: as messages have it. result: what is made of their scores. fields: the names of these, as a scorer returns
    them. measured: fields of the result that are measured afterwards, on some records. answered: whether these are read
    with their answers then. of_some: whether there is a result of some of the records, where it is stopped.
    """

    name: ClassVar[str]
    result: ClassVar[type[Scored]]
    fields: ClassVar[tuple[str, ...]]
    measured: ClassVar[tuple[str, ...]]
    of_some: ClassVar[bool] = True
    answered = False

    def __init__(self, options: Namespace):
        self.options = options

    def check(self) -> None:
        """Raises ValueError for options of its own."""

    def files(self) -> dict[str, Path]:
        """What it reads, by option, and what must not be overwritten."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Options of its own that decide scores."""
        raise NotImplementedError

    def wanted(self, earlier: Any) -> list[str]:
        """Which of ``measured`` were asked for. ``earlier``: a result, or None."""
        return ["costs"] if self.options.costs else []

    def scorer(self, model: nn.Module) -> Any:
        """With ``score``, and as ``columns`` takes it."""
        raise NotImplementedError

    def columns(self, source: Any) -> tuple[Any, ...]:
        """What the columns of scores are, as the result's field, of a scorer or of an earlier result."""
        raise NotImplementedError

    def further(self, source: Any) -> dict[str, Any]:
        """Other fields of the result, of a scorer or of an earlier result."""
        return {}

    def make(self, of_model: tuple[Any, ...], scores: list[Tensor], device: torch.device, **further: Any) -> Scored:
        """The result. ``device``: where what is left may be computed."""
        chosen = {name: getattr(self.options, name) for name in ("metric", "statistic", "positions")}
        return self.result(*of_model, *scores, **chosen, **further)

    def choose_records(self, result: Any) -> dict[str, list[str]]:
        """Names of the records that each of ``measured`` is measured on, and of the "worst" ones, to show."""
        raise NotImplementedError

    def measure(
        self, name: str, scorer: Any, inputs: Iterable[Mapping[str, Any]], keep: Callable[[str, Callable], list]
    ) -> Any:
        """One of ``measured``. ``keep``: of a key and what computes numbers, these numbers, which are computed once in
        all runs."""
        raise NotImplementedError


class SearchJob(Job):
    name, result, fields, measured = "search", LayerSearch, Scores._fields, ("costs", "attention")

    def check(self) -> None:
        if not self.options.threshold >= 0:
            raise ValueError(f"threshold: expected a number of at least 0, got {self.options.threshold}")

    def settings(self) -> dict[str, Any]:
        return {"candidates": self.options.candidates}

    def wanted(self, earlier: LayerSearch | None) -> list[str]:
        by_cross_attention = earlier is not None and earlier.image_layers is not None
        is_wanted = self.options.report is not None and not by_cross_attention
        return super().wanted(earlier) + (["attention"] if is_wanted else [])

    def scorer(self, model: nn.Module) -> Scorer:
        return Scorer(model, positions=self.options.positions, candidates=self.options.candidates)

    def columns(self, source: Scorer | LayerSearch) -> tuple[list[int]]:
        return (source.candidates,)

    def further(self, source: Scorer | LayerSearch) -> dict[str, Any]:
        return {"image_layers": source.image_layers}

    def make(
        self, of_model: tuple[Any, ...], scores: list[Tensor], device: torch.device, **further: Any
    ) -> LayerSearch:
        return super().make(of_model, scores, device, threshold=self.options.threshold, **further)

    def choose_records(self, result: LayerSearch) -> dict[str, list[str]]:
        """For costs one of median length; for attention some that are spread over all; the worst at the chosen layer,
        or at the one with the lowest value."""
        names = list(result.settings["records"])
        values = result.by_sample()[:, result.candidates.index(result.shown_layer)]
        typical = result.tokens.argsort(stable=True)[len(names) // 2]
        worst = values.argsort(descending=True, stable=True)[:SHOWN].tolist()
        spread = names[:: -(-len(names) // SHOWN)]
        return {"costs": [names[typical]], "attention": spread, "worst": [names[row] for row in worst]}

    def measure(
        self, name: str, scorer: Scorer, inputs: Iterable[Mapping[str, Any]], keep: Callable[[str, Callable], list]
    ) -> Any:
        if name == "costs":
            return measure_costs(scorer.model, next(iter(inputs)), scorer.candidates)
        if scorer.image_layers is not None:
            return None  # attention to images is not shared out among tokens
        return torch.stack([attention_mass(scorer.model, x) for x in inputs]).mean(dim=0)


class CompareJob(Job):
    name, result, fields, measured = "comparison", Comparison, PolicyScores._fields, ("costs",)

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.policies = named_policies(map(parse_policy, options.policy))

    def files(self) -> dict[str, Path]:
        files = {}
        for name, policy in self.policies.items():
            for step in policy if isinstance(policy, list) else [policy]:
                if isinstance(step, Path):
                    files[f"policy {name}"] = step
                elif isinstance(step, SkipAttention) and isinstance(step.adapters, Path):
                    files[f"policy {name}"] = step.adapters / WEIGHTS
        return files

    def settings(self) -> dict[str, Any]:
        digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files().items()}
        return {"policies": list(self.policies)} | ({"policy_files": digests} if digests else {})

    def scorer(self, model: nn.Module) -> PolicyScorer:
        return PolicyScorer(model, self.policies, positions=self.options.positions)

    def columns(self, source: PolicyScorer | Comparison) -> tuple[list[str]]:
        return (list(source.policies),)

    def choose_records(self, result: Comparison) -> dict[str, list[str]]:
        """For costs some whose lengths are spread over those of all; the worst under any policy."""
        names, count = list(result.settings["records"]), min(COSTED, len(result.tokens))
        by_length = result.tokens.argsort(stable=True).tolist()
        costed = [by_length[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]
        worst = result.by_sample().amax(dim=1).argsort(descending=True, stable=True)[:SHOWN].tolist()
        return {"costs": [names[row] for row in costed], "worst": [names[row] for row in worst]}

    def measure(
        self,
        name: str,
        scorer: PolicyScorer,
        inputs: Iterable[Mapping[str, Any]],
        keep: Callable[[str, Callable], list],
    ) -> Any:
        return measure_policies(scorer.model, inputs, scorer.policies)


class ExitJob(Job):
    """Another threshold, or gates of another width, are made of what was found out about the records before."""

    name, result, fields, measured = "training", ExitTraining, ExitScores._fields, ()
    of_some = False

    def __init__(self, options: Namespace):
        super().__init__(options)
        of_training = {name: getattr(options, name) for name in Training._fields if name != "seed"}
        self.training = Training(**of_training, seed=options.training_seed)  # the other seed draws records

    def check(self) -> None:
        self.training.check()
        check_threshold(self.options.threshold)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("every", "first", "last")}

    def scorer(self, model: nn.Module) -> ExitScorer:
        gates = gate_layers(find_parts(model), **self.settings())
        return ExitScorer(model, positions=self.options.positions, candidates=gates)

    def columns(self, source: ExitScorer | ExitTraining) -> tuple[list[int]]:
        return (source.candidates,)

    def make(
        self, of_model: tuple[Any, ...], scores: list[Tensor], device: torch.device, **further: Any
    ) -> ExitTraining:
        options = self.options
        return train_gates(
            of_model, scores, self.training, options.threshold, device, positions=options.positions, **further
        )

    def choose_records(self, result: ExitTraining) -> dict[str, list[str]]:
        """Of those held out, the worst at the layer where they leave."""
        names, rows = list(result.settings["records"]), result.held_out()
        worst = rows[result.at_exit().argsort(descending=True, stable=True)[:SHOWN]]
        return {"worst": [names[row] for row in worst.tolist()]}


class SkipJob(Job):
    """The layers one at a time by record; what looks at all records together is measured last."""

    name, result, fields, measured = "skip search", SkipSearch, SkipScores._fields, ("greedy", "bandit", "kl_of")

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.answered = options.positions == "answer"
        self.bandit = None
        if options.bandit != "none":
            names = ("steps", "warm_up", "every", "subsets", "learning_rate")
            of_bandit = {name: getattr(options, name) for name in names}
            self.bandit = Bandit(chances=options.bandit, seed=options.bandit_seed, **of_bandit)
        self.together: dict[str, Any] = {}  # what has been measured

    def check(self) -> None:
        if self.bandit is not None:
            self.bandit.check()
        if self.options.tp:
            raise ValueError("tp: expected a model on each rank, as records are searched together in the end, got --tp")

    def settings(self) -> dict[str, Any]:
        bandit = None if self.bandit is None else self.bandit._asdict()
        return {name: getattr(self.options, name) for name in ("candidates", "skip", "greedy")} | {"bandit": bandit}

    def wanted(self, earlier: SkipSearch | None) -> list[str]:
        return ["greedy"] * self.options.greedy + ["bandit"] * (self.bandit is not None) + ["kl_of"]

    def scorer(self, model: nn.Module) -> SkipScorer:
        return SkipScorer(
            model, self.options.skip, positions=self.options.positions, candidates=self.options.candidates
        )

    def columns(self, source: SkipScorer | SkipSearch) -> tuple[list[int]]:
        return (source.candidates,)

    def make(self, of_model: tuple[Any, ...], scores: list[Tensor], device: torch.device, **further: Any) -> SkipSearch:
        return super().make(of_model, scores, device, skip=self.options.skip, **further)

    def choose_records(self, result: SkipSearch) -> dict[str, list[str]]:
        """All of them; the worst if one of the layers is skipped that are chosen one at a time."""
        self.found, names = result, list(result.settings["records"])
        columns = [result.candidates.index(layer) for layer in result.choices["alone"]]
        worst = result.by_sample()[:, columns].amax(dim=1).argsort(descending=True, stable=True)[:SHOWN].tolist()
        return dict.fromkeys(self.measured, names) | {"worst": [names[row] for row in worst]}

    def measure(
        self, name: str, scorer: SkipScorer, inputs: Iterable[Mapping[str, Any]], keep: Callable[[str, Callable], list]
    ) -> Any:
        batches, progress = list(inputs), not self.options.quiet
        digests = list(self.found.settings["records"].values())

        def keep_of_record(number: int, key: str, compute: Callable[[], list]) -> list:
            return keep(f"{key} of {digests[number]}", compute)

        if name == "greedy":
            self.together[name] = scorer.greedy(batches, progress, keep_of_record)
        elif name == "bandit":
            self.together[name] = scorer.search(batches, self.bandit, progress, keep_of_record)
        else:
            self.together[name] = scorer.kl_of(batches, replace(self.found, **self.together), keep_of_record)
        return self.together[name]
