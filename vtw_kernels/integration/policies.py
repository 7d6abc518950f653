"""Policies: which rows leave before which layers; and all that ``withdraw`` accepts as its layer."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Boundary:
    """What a policy may look at where rows may leave: the rows of a forward that are still there, in their order.

    Attributes:
        layer: the decoder layer that the rows come to.
        visual, text: bool ``[B, rows]``. Rows that are neither are padding, and what stands there means nothing.
        image: int64 ``[B, rows]``, of visual rows: which of the sequence's images they are of, counted from 0. An image
            is a stretch of visual tokens of this forward that no other token interrupts.
        token: int64 ``[B, rows]``, counted from the start of the sequence (of the cache, not of the forward), padding
            included.
        hidden_states: ``[..., B, rows, H]``, what the layer is given. None for a policy with ``from_inputs``.
        attention: fp32 ``[B, rows]``, the weights with which the last row of ``asking`` attends to each row in the
            layer before, means over its heads. None for a policy without ``attention``.
        prompt: how many tokens of the sequence ``generate`` was given. What comes after was generated, or is guessed
            by assisted decoding. None outside of ``generate``.
    """

    layer: int
    visual: Tensor
    text: Tensor
    image: Tensor
    token: Tensor
    hidden_states: Tensor | None = None
    attention: Tensor | None = None
    prompt: int | None = None

    @property
    def asking(self) -> Tensor:
        """bool ``[B, rows]``: the text rows of the prompt. A decision by these alone is the same one in each step that
        is made without a cache, and in assisted decoding."""
        return self.text if self.prompt is None else self.text & (self.token < self.prompt)


class Policy:
    """Says which visual rows leave before which decoder layers. A method is a subclass that sets ``boundaries`` and
    defines ``keep``.

    In each forward with visual tokens, ``keep`` is called at each of the boundaries in turn, until no visual row is
    left. It decides about the visual tokens of this forward alone: decisions of earlier forwards on the same cache,
    such as earlier turns or chunks, hold. Without a cache, every step decides again (see ``Boundary.asking``). ``keep``
    is given a whole batch, and may let other rows leave at other layers in each sequence. Gradients do not go through a
    decision.

    Attributes:
        boundaries: the layers before which rows may leave, in ascending order, each within what ``withdraw`` allows as
            a layer; the number of layers is allowed, and withdraws nothing.
        attention: whether ``keep`` looks at ``Boundary.attention``. Then the layers before the boundaries have to
            attend through transformers' ``AttentionInterface`` (eager, sdpa, flex, flash), and visual tokens have to be
            followed by text in the same forward.
        from_inputs: whether ``keep`` looks at neither attention nor hidden states. Then, at the first boundary, it is
            asked before the model computes anything, and the host does not have to wait for the device there. At any
            other boundary it reads back, once, how many rows are left.
    """

    boundaries: tuple[int, ...]
    attention: bool = False
    from_inputs: bool = False

    def keep(self, boundary: Boundary) -> Tensor:
        """Which rows go on: bool ``[B, rows]``. Only visual ones are looked at; text goes on whatever this says."""
        raise NotImplementedError

    def check_model(self, model: nn.Module, config: Any, num_layers: int) -> None:
        """Raises ValueError, before anything is changed, for a model that the policy is not made for. By default any
        will do.

        Args:
            model: of transformers, without wrappers.
            config: of its decoder.
            num_layers: of its decoder.
        """


@dataclass(frozen=True)
class Withdraw(Policy):
    """Visual Tokens Withdrawal (arXiv 2405.05803): all visual rows leave before a layer, as by ``withdraw(model,
    layer)``."""

    layer: int
    from_inputs = True

    @property
    def boundaries(self) -> tuple[int, ...]:
        return (self.layer,)

    def keep(self, boundary: Boundary) -> Tensor:
        return boundary.text


class _SomeOfEach(Policy):
    """Of the rows of each image that are still there, a share (rounded) or a number stays, by a score for each row."""

    def __init__(self, layer: int, keep: float | int):
        is_number = isinstance(keep, int | float) and not isinstance(keep, bool)
        if not is_number or not 0 <= keep <= (1 if isinstance(keep, float) else float("inf")):
            raise ValueError(f"keep: expected a share from 0.0 to 1.0 or a number of rows, an int, got {keep!r}")
        self.boundaries, self.amount = (layer,), keep

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.boundaries[0]}, keep={self.amount})"

    def best(self, scores: Tensor, boundary: Boundary) -> Tensor:
        """The visual rows with the highest scores ``[B, rows]``, the first ones of equals."""
        image = boundary.image.where(boundary.visual, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, image.gather(1, order).argsort(dim=1, stable=True))  # image by image, best ones first
        image = image.gather(1, order)
        first = torch.searchsorted(image, image)
        rank = torch.arange(image.shape[1], device=image.device) - first
        amount = self.amount
        if isinstance(amount, float):
            amount = (amount * (torch.searchsorted(image, image, right=True) - first) + 0.5).floor()
        return boundary.visual & torch.zeros_like(boundary.visual).scatter(1, order, rank < amount)


class TopAttention(_SomeOfEach):
    """Before ``layer``, the visual rows stay that the last text row attends to most in the layer before.

    For a prompt with one image this is FastV (arXiv 2403.06764), with its layer K as ``layer``. (For several images,
    FastV keeps one number of all their rows together; here it is a number for each.) A list ``[TopAttention(k, 0.5) for
    k in (8, 16, 24)]`` is PyramidDrop (arXiv 2410.17247), except for two things: PyramidDrop computes the attention of
    the last row again at each of its layers, where this looks at the attention of the layer before; and it renumbers
    positions, where here the rows that are left keep theirs.

    Chunks of a prompt and further turns are forwards of their own, each with its own last text row: see ``Policy``. In
    ``generate``, it is the last row of the prompt in all steps, also without a cache.

    Args:
        layer: 1..number of decoder layers, as for ``withdraw``.
        keep: how much of each image stays, of what is still there: a share (a float) or a number of rows (an int).
    """

    attention = True

    def keep(self, boundary: Boundary) -> Tensor:
        return self.best(boundary.attention, boundary)


class RandomVisual(_SomeOfEach):
    """Before ``layer``, visual rows drawn at random stay: the baseline for methods that select rows.

    Forwards of the same length draw the same rows, and so do all sequences of a batch, so that beams agree.

    Args:
        layer, keep: as for ``TopAttention``.
        seed: of torch's generator of the CPU.
    """

    from_inputs = True

    def __init__(self, layer: int, keep: float | int, seed: int = 0):
        super().__init__(layer, keep)
        self.seed = seed

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, seed={self.seed})"

    def keep(self, boundary: Boundary) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(boundary.visual.shape[1], generator=generator).to(boundary.visual.device)
        return self.best(scores.expand_as(boundary.visual), boundary)


# What ``withdraw`` takes as its layer, made of what it is given: a list of ints is one to draw from in each forward.
Chosen = int | Sequence[int] | Policy | Sequence[Policy]


def boundaries_of(chosen: Chosen) -> list[int]:
    """All the layers before which rows may leave.

    Raises:
        TypeError, ValueError: of a policy that does not say so in the way of its interface, or of two at one layer.
    """
    if isinstance(chosen, int):
        return [chosen]
    layers = []
    for candidate in [chosen] if isinstance(chosen, Policy) else chosen:
        if isinstance(candidate, int):
            layers.append(candidate)
            continue
        given, name = getattr(candidate, "boundaries", None), type(candidate).__name__
        if not isinstance(given, tuple) or not all(type(x) is int for x in given) or list(given) != sorted(set(given)):
            raise TypeError(f"boundaries: expected a tuple of layers in ascending order, got {given} of {name}")
        for layer in given:
            if layer in layers:
                raise ValueError(f"layer: expected policies at different layers, got two at {layer}")
            layers.append(layer)
    if not layers:
        raise ValueError(f"layer: expected at least one, got {chosen!r}")
    return layers


def policies_of(chosen: Chosen, training: bool) -> dict[int, Policy]:
    """Which policy is asked before which layer in one forward; of several layers, one is drawn."""
    if isinstance(chosen, Sequence) and isinstance(chosen[0], int):
        if not training:
            raise ValueError(f"layer: expected an int where a model is not in training mode, got {chosen}")
        chosen = chosen[int(torch.randint(len(chosen), ()))]
    if isinstance(chosen, int):
        chosen = Withdraw(chosen)
    policies = [chosen] if isinstance(chosen, Policy) else chosen
    asked = ((layer, policy) for policy in policies for layer in policy.boundaries)
    return dict(sorted(asked, key=lambda x: x[0]))


def saved_in_config(chosen: Chosen) -> dict[str, Any]:
    """What ``save_pretrained`` is to write: layers, or a policy in words."""
    if isinstance(chosen, int):
        return {"layer": chosen}
    if isinstance(chosen, Sequence) and isinstance(chosen[0], int):
        return {"layer": list(chosen)}
    return {"policy": repr(chosen)}


def chosen_layer(layer: Any, model: nn.Module, num_layers: int) -> Chosen:
    """``layer`` as ``withdraw`` takes it, without paths and None.

    Raises:
        TypeError, ValueError: something else; a file or a config that names none, or was made for another model.
    """
    if layer is None:
        layer = _from_config(model.config)
    elif isinstance(layer, str | Path) and Path(layer).suffix == ".safetensors":
        from vtw_kernels.integration.exit_routers import ExitRouters  # which is made of what is here

        layer = ExitRouters.load(layer)
    elif isinstance(layer, str | Path):
        layer = _from_search(Path(layer), model, num_layers)
    several = isinstance(layer, Sequence) and len(layer) > 0
    if several and all(isinstance(x, Policy) for x in layer):
        return list(layer)
    if isinstance(layer, Policy):
        return layer.layer if isinstance(layer, Withdraw) else layer
    for candidate in layer if several else [layer]:
        if isinstance(candidate, bool) or not isinstance(candidate, int):
            raise TypeError(
                f"layer: expected an int, or some, got {type(candidate).__name__}, which is no policy either"
            )
    return layer


def _from_config(config: Any) -> int:
    saved = getattr(config, "vtw", None) or {}
    layer = saved.get("layer") if isinstance(saved, dict) else None
    if isinstance(saved, dict) and "policy" in saved:
        raise ValueError(
            f"layer: expected one, as the model was saved under {saved['policy']}, says its config, which holds no "
            "policies, got None"
        )
    if layer is None:
        raise ValueError(
            "layer: expected one, as the model's config has none under vtw (the files of an adapter hold no config), "
            "got None"
        )
    if not isinstance(layer, int):
        raise ValueError(
            f"layer: expected one, as the model was trained with one of {layer} drawn for each step, says its config, "
            "got None"
        )
    return layer


def _from_search(path: Path, model: nn.Module, num_layers: int) -> int:
    """What ``LayerSearch.save`` wrote."""
    try:
        search = json.loads(path.read_text())
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(
            f"layer: expected a file that LayerSearch.save wrote, got {path}, which is no JSON: {error}"
        ) from None
    if not isinstance(search, dict) or not {"layer", "num_layers", "model"} <= search.keys():
        raise ValueError(f"layer: expected a file that LayerSearch.save wrote, got {path}, which is something else")
    if search["num_layers"] != num_layers:
        raise ValueError(
            f"layer: expected a search on a model of {num_layers} decoder layers, got {path}, on {search['model']} of "
            f"{search['num_layers']}"
        )
    name = getattr(model, "name_or_path", "") or ""
    if name and search["model"] not in (name, type(model).__name__):
        warnings.warn(f"layer: {path} is of a search on {search['model']}, and this model is {name}", stacklevel=5)
    if not search.get("settings", {}).get("finished", True):
        warnings.warn(f"layer: {path} is of a search that was stopped before its end", stacklevel=5)
    if search["layer"] is None:
        raise ValueError(f"layer: expected a search that found one, got {path}, in which none is below its threshold")
    return search["layer"]
