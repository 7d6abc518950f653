"""Visual pruning by definition: the plain model at full length, whose attention weights and activations are masked.

Attention and MLP are written out; of the package, only what is to be simulated is taken.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vtw_kernels.integration.families import find_parts

NAME = "pruning_oracle"
_simulation: "Simulation | None" = None


class Simulation:
    """``visual``: bool [B, tokens], from the start of the sequence; later tokens are text. ``places``: int64
    [B, tokens, 3], the image of each visual token, its row and its column. ``hidden``: of each layer bool
    [B, tokens], which keys nothing sees there."""

    def __init__(self, pruning, visual: Tensor, places: Tensor | None, hidden: list | None):
        self.pruning, self.visual, self.places, self.hidden = pruning, visual, places, hidden
        self.past = 0

    def visual_at(self, batch: int, begin: int, end: int) -> Tensor:
        visual = torch.zeros(batch, end, dtype=torch.bool)
        repeated = self.visual.repeat_interleave(batch // len(self.visual), 0)[:, :end]
        visual[:, : repeated.shape[1]] = repeated
        return visual[:, begin:]

    def places_at(self, batch: int, begin: int, end: int) -> Tensor:
        places = torch.full((batch, end, 3), -1)
        repeated = self.places.repeat_interleave(batch // len(self.places), 0)[:, :end]
        places[:, : repeated.shape[1]] = repeated
        return places[:, begin:]


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_):
    simulation, index = _simulation, module.layer_idx
    pruning, batch, rows, columns = simulation.pruning, len(q), q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT) * scaling
    mask = mask[..., :columns].expand(batch, 1, rows, columns).clone()
    keys = simulation.visual_at(batch, 0, columns)
    queries = simulation.visual_at(batch, simulation.past, simulation.past + rows)
    low = torch.finfo(q.dtype).min
    if pruning.window is not None:
        radius = (pruning.window - 1) // 2
        here = simulation.places_at(batch, simulation.past, simulation.past + rows)[:, :, None]
        there = simulation.places_at(batch, 0, columns)[:, None]
        near = (here[..., 0] == there[..., 0]) & ((here - there)[..., 1:].abs() <= radius).all(-1)
        both = queries[:, :, None] & keys[:, None]
        mask[:, 0] = torch.where(both, torch.zeros_like(mask[:, 0]).masked_fill(~near, low), mask[:, 0])
    if simulation.hidden is not None and simulation.hidden[index] is not None:
        mask = mask.masked_fill(simulation.hidden[index][:, None, None, :columns], low)
    unseen = torch.zeros(q.shape[1], dtype=torch.bool) if pruning.heads is None else ~pruning.heads[index]
    cut = pruning.layer_cut is not None and index >= pruning.layer_cut
    dead = (unseen | cut)[None, :, None, None] & keys[:, None, None, :]
    if pruning.renormalize:
        weights = (scores + mask).masked_fill(dead, low).softmax(-1)
    else:
        weights = (scores + mask).softmax(-1).masked_fill(dead, 0.0)
    output = (weights @ v).masked_fill(unseen[None, :, None, None] & queries[:, None, :, None], 0.0)
    return output.transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def simulated(
    model: nn.Module, pruning, visual: Tensor, places: Tensor | None = None, hidden: list[Tensor | None] | None = None
):
    """Changes a model for good: take a copy. With caches that hold whatever they are given."""
    global _simulation
    decoder = find_parts(model).decoder
    model.set_attn_implementation({"text_config": NAME} if hasattr(model.config, "text_config") else NAME)
    decoder.config._attn_implementation = NAME
    _simulation = Simulation(pruning, visual, places, hidden)

    def begin(module, args, kwargs):
        cache = next((x for x in kwargs.values() if hasattr(x, "get_seq_length")), None)
        _simulation.past = 0 if cache is None else int(cache.get_seq_length())

    def masked_mlp(mlp):
        def forward(x):
            inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            visual = _simulation.visual_at(len(x), _simulation.past, _simulation.past + x.shape[1])
            columns = torch.arange(inner.shape[-1]) >= int(inner.shape[-1] / (pruning.ffn_ratio or 1))
            return mlp.down_proj(inner.masked_fill(visual[..., None] & columns, 0.0))

        return forward

    hook = decoder.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in decoder.layers:
        layer.mlp.forward = masked_mlp(layer.mlp)
    try:
        yield
    finally:
        hook.remove()
        _simulation = None
