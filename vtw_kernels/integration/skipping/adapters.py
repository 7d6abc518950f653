"""Adapters of Efficient Attention Skipping (EAS, arXiv 2403.15226): what stands in for attention that is skipped, and
in front of attention that is not."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

GROUPS = 2  # of the matrices back to H, which are block diagonal
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT names them
KIND = "SKIP_ATTENTION"
PREFIX = "base_model.model."  # of names in PEFT's files


class BlockAdapter(nn.Module):
    """``x + U z + b``, in front of attention that is kept: ``z = A x + a``, with A ``[d, H]``.

    ``U`` and ``b`` are mixtures of two, ``w0 up[0] + w1 up[1]``, each of them block diagonal with two blocks
    ``[H / 2, d / 2]``; ``w = softmax(router(mean of x over the prompt) / t)``, by sequence. ``up`` begins as zero.

    Args:
        hidden_size: ``H``. dim: ``d``. temperature: ``t``. dropout: of ``z``, in training.
    """

    def __init__(self, hidden_size: int, dim: int, temperature: float, dropout: float):
        super().__init__()
        self.temperature = temperature
        self.down = nn.Linear(hidden_size, dim)
        self.up = nn.Parameter(torch.zeros(2, hidden_size, dim // GROUPS))
        self.up_bias = nn.Parameter(torch.zeros(2, hidden_size))
        self.router = nn.Linear(hidden_size, 2)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def read(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """What is known of prompts, whose rows are marked: of ``[B, q, H]`` and bool ``[B, q]``, ``w`` ``[B, 2]``."""
        return (self._weights(self._mean(hidden, rows)),)

    def _mean(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """``[B, H]``; 0 where no row is marked."""
        rows = rows[..., None].to(self.up.dtype)
        return (hidden.to(self.up.dtype) * rows).sum(1) / rows.sum(1).clamp(min=1)

    def _weights(self, mean: Tensor) -> Tensor:
        return (self.router(mean) / self.temperature).softmax(-1)

    def inner(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """``z``, ``[B, q, d]``."""
        return self.dropout(self.down(x))

    def forward(self, hidden: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """``[B, q, H]``, of as much. Computes in the adapter's dtype, and adds in that of ``hidden``."""
        z = self.inner(hidden.to(self.up.dtype), state)
        up, bias = self._mixed(state[0])
        batch, rows, dim = z.shape
        z = z.view(batch, rows, GROUPS, dim // GROUPS).transpose(1, 2)
        up = up.view(batch, GROUPS, -1, dim // GROUPS)
        change = (z @ up.mT).transpose(1, 2).reshape(batch, rows, -1) + bias[:, None]
        return hidden + change.to(hidden.dtype)

    def _mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """``U`` without its zeros, ``[B, H, d / 2]``, and ``b`` ``[B, H]``."""
        weights = weights.to(self.up.dtype)
        return torch.einsum("be,ehd->bhd", weights, self.up), weights @ self.up_bias

    def linear(self, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """``M1`` ``[d, H]`` and ``m1`` ``[d]`` of ``z = M1 x + m1``, of one sequence."""
        return self.down.weight, self.down.bias

    def fold(
        self, weight: Tensor, bias: Tensor | None, state: tuple[Tensor, ...], gain: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The adapter of one sequence, and what its result is multiplied by, folded into the linear map behind:
        ``W (g * (M x + m)) + c = W' x + c'``, with ``M = 1 + U M1``, ``m = U m1 + b``, ``W' = W diag(g) M`` and
        ``c' = W (g * m) + c``. The paper's code takes ``W'`` for ``W`` in the latter, which is not the same.

        Args:
            weight: ``W`` ``[out, H]``. bias: ``c`` ``[out]``, or None for 0. state: of a single sequence. gain: ``g``
                ``[H]``, or None for 1.

        Returns:
            ``W'`` and ``c'``, of the dtype of ``weight``.
        """
        up, b = (x[0] for x in self._mixed(state[0]))
        up = torch.block_diag(*up.view(GROUPS, -1, up.shape[-1])).to(weight)
        down, down_bias = (x.to(weight) for x in self.linear(state))
        scaled = weight if gain is None else weight * gain.to(weight)
        folded = torch.addmm(scaled, scaled @ up, down)
        moved = scaled @ (up @ down_bias + b.to(weight))
        return folded, moved if bias is None else moved + bias


class SkippedAdapter(BlockAdapter):
    """``x + U z + b`` in the place of attention: ``z = (C x + c + mean over the prompt of (A x + a)) / 2``, with A and
    C ``[d, H]``; the rest as in ``BlockAdapter``. The mean is what tokens know of one another without attention."""

    def __init__(self, hidden_size: int, dim: int, temperature: float, dropout: float):
        super().__init__(hidden_size, dim, temperature, dropout)
        self.pooled = nn.Linear(hidden_size, dim)
        nn.init.xavier_uniform_(self.pooled.weight)
        nn.init.zeros_(self.pooled.bias)

    def read(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """``w`` ``[B, 2]`` and the mean of ``A x + a``, ``[B, d]``."""
        mean = self._mean(hidden, rows)
        return self._weights(mean), self.pooled(mean)

    def inner(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return 0.5 * self.dropout(self.down(x) + state[1][:, None])

    def linear(self, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return 0.5 * self.down.weight, 0.5 * (self.down.bias + state[1][0])


class SkipAdapters(nn.Module):
    """Adapters of a model whose attention is skipped in some layers: a ``SkippedAdapter`` for each of these, and a
    ``BlockAdapter`` in front of the attention of each other layer.

    They are no part of the model: ``skip_attention`` puts them into effect, and ``train_skip`` trains them, with the
    model as it is. LoRA, as PEFT puts it into the model's own matrices, goes together with them. Weights are fp32 and
    on the CPU until they are moved; they have to be where their layers are, and may be of another dtype.

    Args:
        layers: those to be skipped, ascending; all of them to search among.
        hidden_size: ``H``, even, of the decoder's hidden states.
        num_layers: decoder layers of the model.
        kept: layers that have an adapter while they are not skipped; by default the others.
        dim: inner dimension of the adapters in front of attention, even. The paper has 8, or 128 for LLaVA.
        skipped_dim: of those in the place of attention, even; by default ``4 * dim``.
        temperature: ``t`` of the softmax. dropout: in training. seed: of the weights.
        model: the name of the model's class.
        settings: what else is to be known about them; JSON.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int,
        num_layers: int,
        *,
        kept: Sequence[int] | None = None,
        dim: int = 8,
        skipped_dim: int | None = None,
        temperature: float = 10.0,
        dropout: float = 0.1,
        seed: int = 0,
        model: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        layers = tuple(layers)
        kept = tuple(i for i in range(num_layers) if i not in layers) if kept is None else tuple(kept)
        skipped_dim = 4 * dim if skipped_dim is None else skipped_dim
        for name, given in (("layers", layers), ("kept", kept)):
            wrong = any(type(x) is not int or not 0 <= x < num_layers for x in given)
            if wrong or list(given) != sorted(set(given)) or not layers:
                raise ValueError(f"{name}: expected layers in 0..{num_layers - 1}, ascending, got {list(given)}")
        for name, value in (("hidden_size", hidden_size), ("dim", dim), ("skipped_dim", skipped_dim)):
            if type(value) is not int or value < 1 or value % GROUPS:
                raise ValueError(f"{name}: expected an even number of at least 2, got {value!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a share of at least 0 and below 1, got {dropout!r}")
        self.layers, self.kept, self.hidden_size, self.num_layers = layers, kept, hidden_size, num_layers
        self.dim, self.skipped_dim, self.temperature, self.dropout = dim, skipped_dim, temperature, dropout
        self.model, self.settings = model, dict(settings or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.skipped = nn.ModuleDict(
                {str(i): SkippedAdapter(hidden_size, skipped_dim, temperature, dropout) for i in layers}
            )
            self.before = nn.ModuleDict({str(i): BlockAdapter(hidden_size, dim, temperature, dropout) for i in kept})
        self.eval()

    @classmethod
    def for_model(cls, model: nn.Module, layers: Sequence[int], **options: Any) -> "SkipAdapters":
        """Those for a model of transformers, on its device. ``options``: see the class."""
        from vtw_kernels.integration.families import find_parts
        from vtw_kernels.integration.withdraw import unwrapped

        model = unwrapped(model)
        parts = find_parts(model)
        options = {"model": type(model).__name__} | options
        return cls(layers, parts.config.hidden_size, len(parts.layers), **options).to(model.device)

    def __repr__(self) -> str:
        return f"SkipAdapters(layers={list(self.layers)}, dim={self.dim}, skipped_dim={self.skipped_dim})"

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(x.nbytes for x in self.parameters())

    def adapter(self, layer: int, skipped: bool) -> BlockAdapter:
        return (self.skipped if skipped else self.before)[str(layer)]

    def layers_of(self, skipped: Sequence[int]) -> list[int]:
        """Which layers have an adapter in effect, if these are skipped."""
        return sorted({*skipped, *self.kept})

    def check_model(self, model: nn.Module, config: Any, num_layers: int) -> None:
        """Raises ValueError for a model of other sizes than those were made for; warns of one of another class."""
        if num_layers != self.num_layers or config.hidden_size != self.hidden_size:
            raise ValueError(
                f"model: expected {self.num_layers} decoder layers and hidden states of {self.hidden_size}, as these "
                f"adapters were made for, got {type(model).__name__} with {num_layers} and {config.hidden_size}"
            )
        if self.model and self.model != type(model).__name__:
            warnings.warn(f"{self!r} was made for {self.model}, and this model is {type(model).__name__}", stacklevel=4)

    def made_for(self) -> dict[str, Any]:
        """The arguments that make adapters of these sizes."""
        names = ("layers", "hidden_size", "num_layers", "kept", "dim", "skipped_dim", "temperature", "dropout", "model")
        return {name: getattr(self, name) for name in (*names, "settings")}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes, as PEFT does, a folder with adapter_config.json and the weights, adapter_model.safetensors; readers
        of either see the old file or the new one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {PREFIX + name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        config = {"peft_type": KIND, "base_model_class": self.model, "inference_mode": True} | self.made_for()
        for name, content in ((WEIGHTS, save(state)), (CONFIG, (json.dumps(config, indent=1) + "\n").encode())):
            part = folder / f"{name}.part"
            part.write_bytes(content)
            os.replace(part, folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SkipAdapters":
        """Reads what ``save_pretrained`` wrote, of the dtype that was saved.

        Raises:
            OSError: it can't be read.
            ValueError: something else, as another kind of adapter.
        """
        folder = Path(folder)
        text = (folder / CONFIG).read_text()
        (folder / WEIGHTS).open("rb").close()  # safetensors names no file that it can't read
        try:
            config = json.loads(text)
            if config.get("peft_type") != KIND:
                raise ValueError(f"adapters of the type {config.get('peft_type')!r}")
            adapters = cls(**{name: x for name, x in config.items() if name not in _OF_PEFT})
            with safe_open(folder / WEIGHTS, "pt") as file:
                state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}
            wanted = {name: x.shape for name, x in adapters.state_dict().items()}
            if {name: x.shape for name, x in state.items()} != wanted:
                raise ValueError("weights that are not those of its adapters")
        except (SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: expected what SkipAdapters.save_pretrained wrote, got {error}") from error
        adapters.load_state_dict(state, assign=True)
        return adapters


_OF_PEFT = ("peft_type", "base_model_class", "inference_mode")
