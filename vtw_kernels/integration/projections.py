"""The parts of a decoder layer of Llama's shape, by the names of its projections: Llama, Qwen2, 2.5 and 3, Mistral."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

ATTENTION, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
# What the code of such attention speaks of, in any release: more would be a step of its own, as queries that are scaled
# by their positions in Ministral 3, or layers without rotary positions in SmolLM3.
WORDS = {
    *("ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "attention_dropout", "config", "contiguous"),
    *("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb", "eager_attention_forward", "get_interface", "getattr"),
    *("head_dim", "k_norm", "k_proj", "layer_idx", "o_proj", "q_norm", "q_proj", "reshape", "rope_scaling", "scaling"),
    *("shape", "size", "sliding_window", "training", "transpose", "update", "v_proj", "view"),
}


@dataclass(frozen=True)
class Projections:
    """``h + o(attend(q, k, v))``, then ``h + down(activation(gate) * up)``, each behind a norm of its own.

    ``q`` has ``heads * head_dim`` outputs, ``k`` and ``v`` have ``kv_heads * head_dim``; each head's queries and keys
    go through ``q_norm`` and ``k_norm``, where there are any. Rotary positions come after that.
    """

    attention: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    mlp: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: Any
    input_norm: nn.Module
    post_norm: nn.Module
    heads: int
    kv_heads: int
    head_dim: int


def projections(layer: nn.Module, where: str) -> Projections:
    """Those of a decoder layer.

    Args:
        where: what an error calls the layer, as "decoder layer 3".

    Raises:
        NotImplementedError: a layer of another shape, which the message says what is missing in, or what it has more.
    """
    refuse, name = check_shape(layer, where), type(layer).__name__
    attention, mlp = layer.self_attn, layer.mlp
    code = inspect.unwrap(type(attention).forward).__code__
    if more := sorted(set(code.co_names) - WORDS):
        raise refuse(f"({name}) whose {type(attention).__name__} also looks at {', '.join(more)}")
    for part, names in ((attention, ATTENTION), (mlp, MLP)):
        for projection in names:
            kind = type(getattr(part, projection))
            if kind is not nn.Linear:
                raise refuse(f"({name}) whose {projection} is a {kind.__module__}.{kind.__name__}, not a Linear")
    dim = getattr(attention, "head_dim", None)
    if not isinstance(dim, int) or attention.q_proj.out_features % dim or attention.k_proj.out_features % dim:
        raise refuse(f"({name}) whose attention has no head_dim that its projections are a multiple of")
    norms = [getattr(attention, norm, None) for norm in NORMS]
    for norm in norms:
        if norm is not None and getattr(norm, "weight", attention.q_proj.weight).shape != (dim,):
            raise refuse(f"({name}) whose {type(norm).__name__} of queries or keys is not one of each head by itself")
    return Projections(
        attention=attention,
        **{x.removesuffix("_proj"): getattr(attention, x) for x in ATTENTION},
        q_norm=norms[0],
        k_norm=norms[1],
        mlp=mlp,
        **{x.removesuffix("_proj"): getattr(mlp, x) for x in MLP},
        activation=mlp.act_fn,
        input_norm=layer.input_layernorm,
        post_norm=layer.post_attention_layernorm,
        heads=attention.q_proj.out_features // dim,
        kv_heads=attention.k_proj.out_features // dim,
        head_dim=dim,
    )


def check_shape(layer: nn.Module, where: str) -> Callable[[str], NotImplementedError]:
    """Whether a decoder layer has the parts of Llama's, whatever these are: projections may be quantized, or wrapped.

    Returns:
        What makes the error for one that has them and is still another one, of words.

    Raises:
        NotImplementedError: as ``projections``.
    """

    def refuse(what: str) -> NotImplementedError:
        return NotImplementedError(f"model: expected decoder layers of Llama's shape, got {where} {what}")

    name = type(layer).__name__
    _check_children(layer, LAYER, (), f"({name})", refuse)
    _check_children(layer.self_attn, ATTENTION, (*NORMS, "rotary_emb"), f"({name}) whose attention", refuse)
    _check_children(layer.mlp, MLP, ("act_fn",), f"({name}) whose MLP", refuse)
    if getattr(layer.mlp, "act_fn", None) is None:
        raise refuse(f"({name}) whose MLP has no act_fn")
    return refuse


def _check_children(module: nn.Module, needed: tuple, allowed: tuple, whose: str, refuse: Any) -> None:
    has = {name for name, _ in module.named_children()}
    if missing := [name for name in needed if name not in has]:
        raise refuse(f"{whose} has no {', '.join(missing)}")
    if more := sorted(has - {*needed, *allowed}):
        raise refuse(f"{whose} has {', '.join(more)} beside them")
