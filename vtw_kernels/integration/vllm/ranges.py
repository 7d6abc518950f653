"""Where the visual tokens of a request are: as vLLM's first model runner finds them, for the scheduler and the second
runner. If the two came apart, there would be other slots than blocks; python_tests/vllm_plugin compares them."""

from collections.abc import Iterable
from typing import Any


def visual_ranges(features: Iterable[Any]) -> list[tuple[int, int]]:
    """The first visual token and the one behind the last, of each stretch of them, ascending.

    Args:
        features: ``mm_features`` of a request. What is not embedded by an encoder, such as the tokens that begin and
            end an image, is text.
    """
    ranges = [
        (start, last + 1)
        for feature in features
        if feature.modality != "audio"
        for start, last in feature.mm_position.extract_embeds_range()
    ]
    return sorted(ranges)


def text_tokens(ranges: Iterable[tuple[int, int]], tokens: int) -> int:
    """How many of the first so many tokens are text."""
    return tokens - sum(max(0, min(stop, tokens) - start) for start, stop in ranges)
