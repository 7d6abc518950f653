"""Dynamic Visual-Token Exit: trained routers say, prompt by prompt, before which layer all visual tokens leave."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtw_kernels.integration.policies import Boundary, Policy
from vtw_kernels.integration.tensor_files import open_tensors, write_tensors

WIDTH = 2048  # of the paper's routers
FORMAT = "exit routers, 1"
RECORDS = "records."  # the prefix of tensors, in a file of routers, with what these were trained on


class ExitRouters(Policy):
    """Dynamic Visual-Token Exit (DyVTE, arXiv 2411.19628): before some layers stands a gate, and at the first one that
    fires all visual rows of a sequence leave. Where none does, they stay.

    A gate is ``Linear(2H, width)``, GELU, ``Linear(width, 2)``, without biases, in fp32. It reads what
    ``exit_features`` makes of the rows that come to its layer, and fires where the probability of its second output is
    above the threshold. The gate before layer ``k`` is the paper's behind layer ``k - 1``.

    Each sequence of a batch is asked for itself, with any number of images. Visual tokens that no text follows in their
    forward, as in a chunk of a prompt, stay: what is asked is not yet known.

    Weights begin as in the paper, by Xavier's rule, and mean nothing before ``train_exit``. They move to the device of
    the layer where they are used.

    Args:
        layers: those that have a gate before them, ascending, each within what ``withdraw`` allows.
        hidden_size: ``H``, of the decoder's hidden states.
        num_layers: decoder layers of the model.
        width: of the gates. They have ``2 * (H + 1) * width`` parameters each.
        threshold: a probability, 0..1. It may be changed at any time. 0.5 is the paper's.
        seed: of the weights.
        model: the name of the model's class.
        settings: further facts to save with them; JSON.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int,
        num_layers: int,
        *,
        width: int = WIDTH,
        threshold: float = 0.5,
        seed: int = 0,
        model: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        layers = tuple(layers)
        if not layers or any(type(x) is not int for x in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers: expected at least one, in ascending order, got {list(layers)}")
        if not 1 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(f"layers: expected 1..{num_layers - 1}, got {list(layers)}")
        for name, value in (("hidden_size", hidden_size), ("width", width)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {value!r}")
        self.boundaries, self.num_layers, self.hidden_size, self.width = layers, num_layers, hidden_size, width
        self.threshold, self.model, self.settings = threshold, model, dict(settings or {})
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):  # layers begin with other weights than these, drawn from torch's own
            self.gates = {layer: _gate(hidden_size, width, generator) for layer in layers}

    @property
    def threshold(self) -> float:
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._threshold = check_threshold(threshold)

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(x.nbytes for gate in self.gates.values() for x in gate.parameters())

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.boundaries))
        return f"ExitRouters(layers=[{layers}], width={self.width}, threshold={self.threshold})"

    def check_model(self, model: nn.Module, config: Any, num_layers: int) -> None:
        """Raises ValueError for a model of other sizes than those were made for; warns of one of another class."""
        wanted = f"{self.num_layers} decoder layers and hidden states of {self.hidden_size}"
        if num_layers != self.num_layers or config.hidden_size != self.hidden_size:
            raise ValueError(
                f"model: expected {wanted}, as {self!r} was made for, got {type(model).__name__} with {num_layers} and "
                f"{config.hidden_size}"
            )
        if self.model and self.model != type(model).__name__:
            warnings.warn(f"{self!r} was made for {self.model}, and this model is {type(model).__name__}", stacklevel=4)

    def probabilities(self, layer: int, features: Tensor) -> Tensor:
        """fp32 ``[B]``: how sure the gate before a layer is that the visual rows may leave there, by ``[B, 2H]``."""
        gate = self.gates[layer].to(features.device)
        return gate(features.float()).softmax(-1)[:, 1]

    def keep(self, boundary: Boundary) -> Tensor:
        features, asked = exit_features(boundary.hidden_states, boundary.visual, boundary.asking)
        leaves = asked & (self.probabilities(boundary.layer, features) > self.threshold)
        return ~leaves[:, None].expand_as(boundary.visual)

    def save(self, path: str | Path) -> None:
        """Writes weights, in fp32, and what they were made for, as safetensors. Readers see the old file or the new."""
        write_tensors(path, self.state(), FORMAT, routers=self.made_for())

    def made_for(self) -> dict[str, Any]:
        """The arguments that make gates of these sizes."""
        return {"layers": self.boundaries} | {name: getattr(self, name) for name in _ARGUMENTS}

    def state(self) -> dict[str, Tensor]:
        """The weights by name, "LAYER.0.weight" ``[width, 2H]`` and "LAYER.2.weight" ``[2, width]``, on the CPU."""
        gates = nn.ModuleDict({str(layer): gate for layer, gate in self.gates.items()})
        return {name: x.detach().cpu().contiguous() for name, x in gates.state_dict().items()}

    @classmethod
    def load(cls, path: str | Path, threshold: float | None = None) -> "ExitRouters":
        """Reads what ``save`` wrote.

        Args:
            threshold: another one than was saved.

        Raises:
            OSError: it can't be read.
            ValueError: something else.
        """
        with open_tensors(path, FORMAT, "ExitRouters.save") as (file, metadata):
            routers = cls(**metadata["routers"])
            state = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(RECORDS)}
            wanted = {name: (x.dtype, x.shape) for name, x in routers.state().items()}
            if {name: (x.dtype, x.shape) for name, x in state.items()} != wanted:
                raise ValueError("weights that are not those of its gates")
        for layer, gate in routers.gates.items():
            gate.load_state_dict({name: state[f"{layer}.{name}"] for name in ("0.weight", "2.weight")})
        if threshold is not None:
            routers.threshold = threshold
        return routers


_ARGUMENTS = ("hidden_size", "num_layers", "width", "threshold", "model", "settings")


def _gate(hidden_size: int, width: int, generator: torch.Generator) -> nn.Sequential:
    gate = nn.Sequential(nn.Linear(2 * hidden_size, width, bias=False), nn.GELU(), nn.Linear(width, 2, bias=False))
    for weight in gate.parameters():
        nn.init.xavier_uniform_(weight, generator=generator)
    return gate.requires_grad_(False)


def check_threshold(threshold: Any) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a probability from 0 to 1, got {threshold!r}")
    return float(threshold)


def exit_features(hidden: Tensor, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What a gate reads of the rows that come to its layer.

    Args:
        hidden: ``[..., B, rows, H]``; of several streams, the first.
        visual, text: bool ``[B, rows]``; other rows are not looked at.

    Returns:
        ``[B, 2H]`` of the dtype of ``hidden``: the mean, in fp32, of the text rows behind the first visual one but for
        the last row, 0 if that is all there is; and the last text row.
        bool ``[B]``: whether text follows the last visual row, so that there is something to read.
    """
    hidden = hidden.flatten(0, -4)[0] if hidden.ndim > 3 else hidden
    rows = torch.arange(visual.shape[1], device=visual.device)
    last = torch.where(text, rows, -1).amax(1)
    behind = text & (visual.cumsum(1) > 0) & (rows < last[:, None])
    total = torch.where(behind[..., None], hidden, 0).sum(1, dtype=torch.float32)
    mean = total / behind.sum(1, keepdim=True).clamp(min=1)
    end = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return torch.cat((mean.to(hidden.dtype), end), dim=-1), last > torch.where(visual, rows, -1).amax(1)
