"""Withdrawal by definition: the plain model at full length, whose layers from ``layer`` on cannot see visual keys.

Shares nothing with ``vtw_kernels``: an attention function with one extra mask, registered in transformers.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_active: dict = {}


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.double() @ key.double().transpose(-1, -2)) * scaling + attention_mask.double()
    if module.layer_idx >= _active["layer"]:
        visual, (batch, keys) = _active["visual"], (len(query), key.shape[2])
        hidden = torch.zeros(len(visual), keys, dtype=torch.bool)
        hidden[:, : visual.shape[1]] = visual[:, :keys]
        hidden = hidden.repeat_interleave(batch // len(visual), dim=0)
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        _active["hidden"] += int(hidden.sum())
    probabilities = scores.softmax(-1)
    return (probabilities @ value.double()).to(query.dtype).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register("visual_keys_hidden", _attention)
AttentionMaskInterface.register("visual_keys_hidden", eager_mask)


@contextmanager
def visual_keys_hidden(model, layer: int, visual: Tensor):
    """``visual``: bool [B, S], counted from the start of the sequence; a batch repeated for beams is understood."""
    config = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, "visual_keys_hidden"
    _active.update(layer=layer, visual=visual, hidden=0)
    try:
        yield
        last = layer == config.num_hidden_layers
        assert bool(_active["hidden"]) == bool(visual.any() and not last), "the oracle did not run"
    finally:
        config._attn_implementation = before
