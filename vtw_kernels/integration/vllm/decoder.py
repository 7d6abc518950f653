"""The decoder in two stages: layers that see all rows, and layers that see text rows.

Each stage is compiled on its own, with a number of rows of its own; between them, and behind them, rows move by the
ops."""

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import AttentionType

from vtw_kernels.integration.vllm.attention import text_backend
from vtw_kernels.integration.vllm.cache import TextOnlySpec
from vtw_kernels.ops import CompactionPlan, compact, expand

LAYER_ARGUMENTS = ["positions", "hidden_states", "residual"]
# What a decoder's forward may look at of itself, for then it does what _Forward does in its place: embed, run layers
# one after another, and norm. The rest is of pipeline parallelism and speculative decoding, which are refused.
OF_A_DECODER = {"embed_input_ids", "layers", "norm", "start_layer", "end_layer"}
OF_A_DECODER |= {"_maybe_add_hidden_state", "collect_remote_aux_hidden_states", "pack_local_aux_hidden_states"}


# vLLM's decorator compiles a module for any number of rows, under the tag that install sets: two modules with one tag
# would share what is compiled. What it asks of a class, it checks when it decorates.
@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden_states": 0, "deepstack": 0})
class AllRows(nn.Module):
    """The layers before withdrawal. deepstack: what some models add to the rows after each of their first layers."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layers: Any):
        super().__init__()
        self.layers = layers

    def forward(
        self, positions: Tensor, hidden_states: Tensor, deepstack: IntermediateTensors | None
    ) -> tuple[Tensor, Tensor]:
        residual = None
        for i, layer in enumerate(self.layers):
            hidden_states, residual = layer(positions, hidden_states, residual)
            if deepstack is not None and i < len(deepstack):
                hidden_states = hidden_states + deepstack[f"deepstack_input_embeds_{i}"]
        return hidden_states, residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden_states": 0, "residual": 0})
class TextRowsOnly(nn.Module):
    """The layers from withdrawal on, and the norm behind them."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layers: Any, norm: nn.Module):
        super().__init__()
        self.layers, self.norm = layers, norm

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]


def install(model: nn.Module, vllm_config: Any) -> None:
    """Has the decoder of a model, just made and without weights, withdraw visual rows.

    Raises:
        ValueError: no decoder of the common shape, or one that needs its visual rows.
    """
    layer = vllm_config.model_config.hf_config.vtw["layer"]
    decoder = find_decoder(model, vllm_config.model_config.hf_text_config.num_hidden_layers)
    # Where a decoder takes such features, its model says for how many layers, or the next line raises.
    deepstack = model.deepstack_num_level if "deepstack_input_embeds" in parameters_of(decoder) else 0
    if layer < deepstack:
        raise ValueError(
            f"vtw: layer: expected at least {deepstack}, as the model adds image features to the rows of its first "
            f"{deepstack} layers, got {layer}"
        )
    attentions = [attention_of(x) for x in decoder.layers]  # all are looked at before any is changed
    for attention in attentions[layer:]:
        # The runner takes the builder of metadata from a layer's backend, the layer calls its impl, and the runner asks
        # the layer for its spec. Were one of them taken from elsewhere: no text_rows in the metadata, a cache that is
        # written in other slots (answers differ), or no group of its own (scheduler.py looks).
        backend = text_backend(attention.attn_backend)
        attention.attn_backend = backend
        attention.impl.__class__ = backend.get_impl_cls()
        attention.get_kv_cache_spec = _TextOnlySpecOf(attention)
    # Not as submodules: weights are loaded by the names that the decoder has for its layers.
    with set_model_tag("vtw_all_rows"):
        before = AllRows(vllm_config=vllm_config, layers=decoder.layers[:layer])
    with set_model_tag("vtw_text_rows"):
        after = TextRowsOnly(vllm_config=vllm_config, layers=decoder.layers[layer:], norm=decoder.norm)
    decoder.__dict__["forward"] = _Forward(decoder, before, after, attentions[layer].layer_name)
    # As a whole: its call then goes straight to forward. If it went to what is compiled of its class, all rows would
    # come to the later layers, where attention.py raises.
    decoder.do_not_compile = True


class _TextOnlySpecOf:
    def __init__(self, attention: Attention):
        self.attention = attention

    def __call__(self, vllm_config: Any) -> TextOnlySpec:
        return TextOnlySpec.of(type(self.attention).get_kv_cache_spec(self.attention, vllm_config))


class _Forward:
    """The decoder's forward. layer_name: of the first attention that sees text rows alone.

    Models call it as they call the one that it replaces: an argument that a release adds is a TypeError, in the
    first step at the latest."""

    def __init__(self, decoder: nn.Module, before: AllRows, after: TextRowsOnly, layer_name: str):
        self.decoder, self.before, self.after, self.layer_name = decoder, before, after, layer_name

    def __call__(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> Tensor:
        hidden_states = self.decoder.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states, residual = self.before(positions, hidden_states, deepstack_input_embeds)
        metadata = get_forward_context().attn_metadata  # by the names of layers
        if metadata is None:  # a run for its memory or to compile alone
            return self.after(positions, hidden_states, residual)
        source = metadata[self.layer_name].text_rows.source
        rows = len(hidden_states)
        if source.shape[1] == rows:
            return self.after(positions, hidden_states, residual)
        if source.shape[1] == 0:
            return torch.zeros_like(hidden_states)
        # A batch of one; only the last dimension of positions is always that of rows.
        plan = CompactionPlan(source, source.new_empty(1))
        packed = [hidden_states[None], residual[None], positions[None]]
        hidden_states, residual, positions = compact(packed, plan, [1, 1, positions.dim()])
        output = self.after(positions[0], hidden_states[0], residual[0])
        return expand([output[None]], plan, rows, 1)[0][0]  # the rows of the last text token are sampled from


def find_decoder(model: nn.Module, layers: int) -> nn.Module:
    """The module that has the decoder's layers and what stands before and behind them."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and len(module.layers) == layers
        and hasattr(module, "norm")
        and hasattr(module, "embed_input_ids")
        and all(parameters_of(x)[:3] == LAYER_ARGUMENTS for x in module.layers)
    ]
    if len(found) != 1:
        raise ValueError(
            f"vtw: expected a model with one decoder of {layers} layers that are called with "
            f"{', '.join(LAYER_ARGUMENTS)}, got {type(model).__name__} with {len(found)}"
        )
    if others := looked_at(type(found[0])) - OF_A_DECODER:
        raise ValueError(
            "vtw: expected a decoder that embeds, runs its layers one after another, and norms, got "
            f"{type(found[0]).__name__}, whose forward looks at {', '.join(sorted(others))}"
        )
    return found[0]


def looked_at(decoder: type) -> set[str]:
    """The attributes of itself that its forward looks at, and those of the classes that it calls with super()."""
    written = [vars(cls)["forward"] for cls in decoder.__mro__ if cls is not nn.Module and "forward" in vars(cls)]
    nodes = [node for forward in written for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward))))]
    attributes = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return {node.attr for node in attributes if node.value.id == "self"}


def parameters_of(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def attention_of(layer: nn.Module) -> Attention:
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    usual = len(found) == 1 and found[0].attn_type == AttentionType.DECODER
    if not usual or found[0].sliding_window is not None or found[0].kv_sharing_target_layer_name is not None:
        raise ValueError(
            "vtw: expected layers with one attention each, which looks at all tokens before and has keys of its own, "
            f"got {type(layer).__name__} with {[x.extra_repr() for x in found]}"
        )
    return found[0]
