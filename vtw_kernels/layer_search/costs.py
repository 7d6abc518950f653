"""What a prefill costs when the visual tokens are withdrawn before each layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one prefill of one sample, if visual tokens are withdrawn before each of ``layers``; the last of these is
    the model's number of layers: nothing is withdrawn.

    tokens, visual_tokens: of the sample. flops: floating point operations of the decoder layers. kv_bytes: of the cache.
    prefill_seconds: the whole model's, as measured on ``device``.
    """

    layers: list[int]
    tokens: int
    visual_tokens: int
    flops: list[int]
    kv_bytes: list[int]
    prefill_seconds: list[float]
    device: str
