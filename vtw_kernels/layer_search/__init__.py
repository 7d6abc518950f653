"""The search for the withdrawal layer: the first at which withdrawing changes the next tokens' distribution by little.

The criterion is that of VTW (arXiv 2405.05803, section 3.3): the mean over samples of KL(withdrawn‖full) at the last
position, and the first layer at or below a threshold. More positions, other divergences and statistics are for choice.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from vtw_kernels.layer_search.result import METRICS, PAPER_THRESHOLD, STATISTICS, LayerSearch, check_among
from vtw_kernels.layer_search.scorer import Scorer, Scores


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
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> LayerSearch:
    """Searches the first layer at which the visual tokens can be withdrawn. By default it is the paper's criterion.

    Args:
        model: as for ``withdraw``.
        batches: keyword arguments of the model's forward, as its processor makes them: ``input_ids`` ``[B, S]``,
            pixels, and ``attention_mask`` where there is padding, on either side; ``visual_mask``, bool ``[B, S]``, for
            models whose config names no visual token. Every sample must have a visual token, and end in text. Take them
            from data that you don't evaluate on.
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
    if isinstance(batches, Mapping):
        raise TypeError(f"batches: expected an iterable of batches, got one, a {type(batches).__name__}: pass [batch]")
    scores = []
    for batch in tqdm(batches, "search", disable=not progress):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches: expected keyword arguments of the model's forward in each, got a {type(batch).__name__}"
            )
        scores.append(scorer.score(batch))
    if not scores:
        raise ValueError("batches: expected at least one batch, got none")
    search = LayerSearch(
        type(scorer.model).__name__,
        len(scorer.parts.layers),
        scorer.candidates,
        *Scores.join(scores),
        threshold=float(threshold),
        metric=metric,
        statistic=statistic,
        positions=positions,
    )
    if search.layer is None:
        warnings.warn(search.verdict(), stacklevel=2)
    return search
