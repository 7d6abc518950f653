"""The search for the withdrawal layer: the first at which withdrawing changes the next tokens' distribution by little;
and the comparison of any policies, by that and by what they cost.

The criterion is that of VTW (arXiv 2405.05803, section 3.3): the mean over samples of KL(withdrawn‖full) at the last
position, and the first layer at or below a threshold. More positions, other divergences and statistics are for choice.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vtw_kernels.extras import require

require("vtw_kernels.layer_search", "search")

from tqdm import tqdm

from vtw_kernels.integration.exit_routers import check_threshold
from vtw_kernels.integration.families import Parts, find_parts
from vtw_kernels.integration.policies import Policy
from vtw_kernels.integration.policy_text import parse_policy, policy_text
from vtw_kernels.integration.skipping.adapters import SkipAdapters
from vtw_kernels.integration.skipping.skip_attention import SkipAttention
from vtw_kernels.integration.withdraw import unwrapped
from vtw_kernels.layer_search.comparison import Comparison
from vtw_kernels.layer_search.costs import measure_policies
from vtw_kernels.layer_search.exit_scorer import ExitScorer, ExitScores
from vtw_kernels.layer_search.exit_training import ExitTraining, Training, train_gates
from vtw_kernels.layer_search.policy_scorer import PolicyScorer, PolicyScores
from vtw_kernels.layer_search.result import PAPER_THRESHOLD, LayerSearch
from vtw_kernels.layer_search.scored import METRICS, STATISTICS, check_among, check_groups
from vtw_kernels.layer_search.scorer import Scorer, Scores
from vtw_kernels.layer_search.settings import is_function
from vtw_kernels.layer_search.skip_search import Bandit, SkipScorer, SkipScores, SkipSearch

COSTED = 4  # on how many batches a comparison measures costs


def find_layer(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    threshold: float = PAPER_THRESHOLD,
    metric: str = "kl",
    statistic: str = "mean",
    positions: int | str = "last",
    candidates: Sequence[int] | None = None,
    max_candidates_in_flight: int | None = None,
    groups: Sequence[str] | None = None,
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> LayerSearch:
    """Searches the first layer at which the visual tokens can be withdrawn. By default it is the paper's criterion.

    Args:
        model: as for ``withdraw``.
        batches: keyword arguments of the model's forward, as its processor makes them: ``input_ids`` ``[B, S]``,
            pixels, and ``attention_mask`` where there is padding, on either side; ``visual_mask``, bool ``[B, S]``, for
            models whose config names no visual token. Every sample must have a visual token, and end in text; or see an
            image, where these come in by cross-attention. Take them from data that you don't evaluate on.
        threshold: the largest acceptable value, in nats, or a share for "disagreement".
        metric: "kl", that is KL(withdrawn‖full); "reverse_kl", KL(full‖withdrawn); or "disagreement", the share of
            positions whose most likely token is another one.
        statistic: "mean" over samples, "worst_decile", the mean of the worst tenth of them, or "max".
        positions: which predictions count. "last": of the next token only. A number: of so many tokens of the model's
            own greedy answer, or fewer where it ends. "answer": of those tokens that ``labels`` ``[B, S]`` in the batch
            has, -100 elsewhere. A sample's value is the mean over its positions.
        candidates: layers to try; by default every layer from the first that the model allows.
        max_candidates_in_flight: how many run side by side; by default as many as fit in an eighth of the device's
            memory. Each further group of them runs the model once more; where it is their logits that don't fit, these
            are not made, and all is computed from hidden states and the head's weights.
        groups: of each sample the kind of task that it is of, by which tables and plots are split.
        decoder: as for ``withdraw``.
        progress: whether to show a progress bar.

    Returns:
        A ``LayerSearch``; its ``layer`` is None, and a warning says so, when no candidate qualifies.

    Raises:
        TypeError, ValueError: an unsupported model, a candidate out of range, no batches or one in place of several, a
            sample without visual tokens or with nothing after them, logits that are NaN, a threshold that is not a
            number of at least 0, a metric, statistic or positions that there are not.
    """
    scorer = Scorer(
        model,
        positions=positions,
        candidates=candidates,
        max_candidates_in_flight=max_candidates_in_flight,
        decoder=decoder,
    )
    check_among("metric", metric, METRICS)
    check_among("statistic", statistic, STATISTICS)
    if not threshold >= 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    scores = Scores.join(_score_all(scorer, batches, "search", progress))
    search = LayerSearch(
        type(scorer.model).__name__,
        len(scorer.parts.layers),
        scorer.candidates,
        *scores,
        threshold=float(threshold),
        metric=metric,
        statistic=statistic,
        positions=positions,
        groups=check_groups(groups, len(scores.tokens)),
        image_layers=scorer.image_layers,
    )
    if search.layer is None:
        warnings.warn(search.verdict(), stacklevel=2)
    return search


def compare(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    policies: Iterable[Any] | Mapping[str, Any],
    *,
    metric: str = "kl",
    statistic: str = "mean",
    positions: int | str = "last",
    groups: Sequence[str] | None = None,
    costed: int = COSTED,
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> Comparison:
    """Compares policies on your data: how much each changes the next tokens' distribution, and what it costs.

    Args:
        model, batches, metric, statistic, positions, groups, decoder, progress: as for ``find_layer``. Where an answer
            counts, each policy reads the prompt alone before it, as in ``generate``; it has to follow all visual
            tokens.
        policies: each is what ``withdraw`` takes (a layer, a policy, a list of policies that act together, or the path
            of a file); a ``SkipAttention``, alone or in such a list; or text that ``parse_policy`` takes. In a dict, by
            name; otherwise the name is this text, or the policy's ``repr``. Layers are all scored in one run, as by
            ``find_layer``. In a dict, a value may also be a function from the model to a context manager within which
            it runs, for methods that save other work than rows; these read answers together with their prompts.
        costed: on how many batches operations, bytes of the cache and seconds are measured (``measure_policies``): the
            first ones; 0 for none.

    Returns:
        A ``Comparison``, which draws the Pareto front and chooses.

    Raises:
        TypeError, ValueError: what ``find_layer`` raises; no policies, two of one name, or what ``withdraw`` does not
        take.
    """
    named = named_policies(policies)
    check_among("metric", metric, METRICS)
    check_among("statistic", statistic, STATISTICS)
    if isinstance(costed, bool) or not isinstance(costed, int) or costed < 0:
        raise ValueError(f"costed: expected a number of batches, 0 or more, got {costed!r}")
    scorer = PolicyScorer(model, named, positions=positions, decoder=decoder)
    kept: list[Mapping[str, Any]] = []
    scores = PolicyScores.join(_score_all(scorer, batches, "compare", progress, kept, costed))
    groups = check_groups(groups, len(scores.tokens))
    costs = measure_policies(scorer.model, kept, scorer.policies, decoder=decoder) if kept else None
    return Comparison(
        type(scorer.model).__name__,
        len(scorer.parts.layers),
        list(named),
        *scores,
        metric=metric,
        statistic=statistic,
        positions=positions,
        costs=costs,
        groups=groups,
    )


def train_exit(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    every: int = 1,
    first: int | None = None,
    last: int | None = None,
    threshold: float = 0.5,
    positions: int | str = "answer",
    width: int = Training().width,
    epochs: int = Training().epochs,
    learning_rate: float = Training().learning_rate,
    warm_up: float = Training().warm_up,
    held_out: float = Training().held_out,
    seed: int = Training().seed,
    groups: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> ExitTraining:
    """Trains the gates of ``ExitRouters`` for a model, which itself stays as it is (DyVTE, arXiv 2411.19628).

    A gate should fire if, when the visual tokens leave there, all tokens of the answer stay the most likely ones and
    their cross entropy grows by less than 3 %. The paper's code tests that for one layer in each step of training; here
    one run of the model over each sample tells it for all gates, and what they read is kept, ``[G, 2H]`` per sample.

    Args:
        model, batches, groups, decoder, progress: as for ``find_layer``; all visual tokens come before the answer.
        every: how many layers there are from one gate to the next.
        first, last: the layers of the first and the last gate; by default all that the model allows.
        threshold: of the routers.
        positions: which tokens are the answer: as for ``find_layer``.
        width, epochs, learning_rate, warm_up, held_out, seed: see ``Training``.
        device: where gates are trained; by default the model's.

    Returns:
        An ``ExitTraining``, with ``routers`` to withdraw with, and what they do to held-out samples.

    Raises:
        TypeError, ValueError: what ``find_layer`` raises, or an argument is out of range.
    """
    training = Training(width, epochs, learning_rate, warm_up, held_out, seed)
    training.check()
    check_threshold(threshold)
    gates = gate_layers(find_parts(unwrapped(model), decoder), every, first, last)
    scorer = ExitScorer(model, positions=positions, candidates=gates, decoder=decoder)
    scores = ExitScores.join(_score_all(scorer, batches, "train-exit", progress))
    return train_gates(
        (type(scorer.model).__name__, len(scorer.parts.layers), scorer.candidates),
        scores,
        training,
        threshold,
        scorer.model.device if device is None else device,
        positions=positions,
        groups=check_groups(groups, len(scores.tokens)),
    )


def find_skippable(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    skip: int = 12,
    *,
    candidates: Sequence[int] | None = None,
    metric: str = "kl",
    statistic: str = "mean",
    positions: int | str = "last",
    greedy: bool = True,
    bandit: Bandit | None = Bandit(),
    adapters: SkipAdapters | None = None,
    groups: Sequence[str] | None = None,
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> SkipSearch:
    """Searches decoder layers whose attention can be skipped, in several ways, and compares what they find.

    "alone": the layers without whose attention, one at a time, the next tokens' distribution changes least; that takes
    a forward a batch and candidate. "greedy": one more at a time, always the one that adds least to the mean KL, so
    that layers which stand in for one another are not skipped together; about ``skip`` times as many forwards.
    "bandit": the search of Efficient Attention Skipping (EAS, arXiv 2403.15226), which rates subsets drawn at random by
    ``exp(-loss)``; see ``Bandit``. Each choice is then measured by its mean KL on the same batches.

    Args:
        model, batches, metric, statistic, positions, groups, decoder, progress: as for ``find_layer``. All batches are
            held in memory.
        skip: how many layers.
        candidates: among which layers; by default all.
        greedy: whether to search that way, too.
        bandit: its settings, or None to leave it out. Its loss is that of the answer's tokens, with
            ``positions="answer"``, or else of those that the model as it is finds most likely.
        adapters: ``SkipAdapters`` of all candidates, which are trained as the bandit searches, as in the paper, and
            that what comes afterwards is measured with. By default there are none, and layers are left without
            attention, as by ``skip_attention`` without adapters.

    Returns:
        A ``SkipSearch``; its ``layers`` are the best choice, by mean KL.

    Raises:
        TypeError, ValueError: what ``find_layer`` and ``skip_attention`` raise, or an argument is out of range.
    """
    check_among("metric", metric, METRICS)
    check_among("statistic", statistic, STATISTICS)
    if bandit is not None:
        bandit.check()
    scorer = SkipScorer(model, skip, positions=positions, candidates=candidates, adapters=adapters, decoder=decoder)
    if isinstance(batches, Mapping):
        raise TypeError(f"batches: expected an iterable of batches, got one, a {type(batches).__name__}: pass [batch]")
    batches = list(batches)
    rated = scorer.search(batches, bandit, progress) if bandit is not None and batches else None
    scores = SkipScores.join(_score_all(scorer, batches, "skip", progress))
    search = SkipSearch(
        type(scorer.model).__name__,
        len(scorer.parts.layers),
        scorer.candidates,
        *scores,
        skip=skip,
        metric=metric,
        statistic=statistic,
        positions=positions,
        greedy=scorer.greedy(batches, progress) if greedy else None,
        bandit=rated,
        groups=check_groups(groups, len(scores.tokens)),
    )
    return replace(search, kl_of=scorer.kl_of(batches, search))


def gate_layers(parts: Parts, every: int, first: int | None, last: int | None) -> list[int]:
    """The layers before which there is a gate. Raises ValueError where there is none."""
    allowed = range(parts.min_layer, min(parts.max_layer, len(parts.layers) - 1) + 1)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    layers = range(allowed[0] if first is None else first, (allowed[-1] if last is None else last) + 1, every)
    if not layers or layers[0] not in allowed or layers[-1] not in allowed:
        raise ValueError(f"first, last: expected layers in {allowed[0]}..{allowed[-1]}, got {first} and {last}")
    return list(layers)


def named_policies(policies: Iterable[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """By name, as ``compare`` takes them.

    Raises:
        TypeError, ValueError: one in place of several, none, two of one name, or a text that is no policy.
    """
    if isinstance(policies, str | Policy | SkipAttention) or not isinstance(policies, Iterable):
        raise TypeError(f"policies: expected several of them, got one, a {type(policies).__name__}: pass [policy]")
    given = policies.items() if isinstance(policies, Mapping) else ((None, policy) for policy in policies)
    named: dict[str, Any] = {}
    for name, policy in given:
        policy = parse_policy(policy) if isinstance(policy, str) else policy
        if name is None and is_function(policy):
            raise TypeError(f"policies: expected functions by name, in a dict, got {policy!r} without one")
        name = policy_text(policy) if name is None else name
        if name in named:
            raise ValueError(f"policies: expected one of each name, got two of {name!r}")
        named[name] = policy
    if not named:
        raise ValueError("policies: expected at least one, got none")
    return named


def _score_all(
    scorer: Scorer | PolicyScorer,
    batches: Iterable[Mapping[str, Any]],
    doing: str,
    progress: bool,
    kept: list[Mapping[str, Any]] | None = None,
    most: int = 0,
) -> list[Any]:
    """Scores of each batch. The prompts of the first ``most`` batches are appended to ``kept``."""
    if isinstance(batches, Mapping):
        raise TypeError(f"batches: expected an iterable of batches, got one, a {type(batches).__name__}: pass [batch]")
    scores = []
    for batch in tqdm(batches, doing, disable=not progress):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches: expected keyword arguments of the model's forward in each, got a {type(batch).__name__}"
            )
        scores.append(scorer.score(batch))
        if len(scores) <= most:
            kept.append(scorer.prompt(batch))
    if not scores:
        raise ValueError("batches: expected at least one batch, got none")
    return scores
