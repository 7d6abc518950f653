"""The training of adapters that take the place of attention."""

import io
import pickle
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.optimization import get_cosine_schedule_with_warmup

from vtw_kernels.integration.skipping.adapters import SkipAdapters
from vtw_kernels.layer_search.exit_training import Training
from vtw_kernels.layer_search.scored import markdown
from vtw_kernels.layer_search.skip_search import SkipLoss
from vtw_kernels.layer_search.state import differences, write_whole

KEPT_SECONDS = 30  # so often, what a training has done is written down


class AdapterTraining(NamedTuple):
    """How adapters are trained: AdamW without weight decay, a cosine schedule, cross entropy of the answers.

    dim, skipped_dim, dropout: of the adapters. epochs: over all batches that are not held out. accumulate: so many
    batches a step. learning_rate: at its highest. warm_up: share of the steps. held_out: share of the batches that
    adapters are measured on, drawn by the seed; 0 for none. seed: of weights, dropout, and the order of batches.
    """

    dim: int = 8
    skipped_dim: int | None = None
    dropout: float = 0.1
    epochs: int = 3
    accumulate: int = 8
    learning_rate: float = 1e-3
    warm_up: float = 0.03
    held_out: float = 0.2
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what is out of range."""
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise ValueError(f"accumulate: expected a number of at least 1, got {self.accumulate!r}")
        shared = {name: getattr(self, name) for name in ("epochs", "learning_rate", "warm_up", "held_out")}
        Training(**shared | {"held_out": self.held_out or 0.5}).check()

    def new_adapters(
        self, model: nn.Module, layers: Sequence[int], settings: Mapping[str, Any] | None = None
    ) -> SkipAdapters:
        """To begin with. ``settings``: of the adapters."""
        sizes = {"dim": self.dim, "skipped_dim": self.skipped_dim, "dropout": self.dropout}
        return SkipAdapters.for_model(model, sorted(layers), seed=self.seed, settings=settings, **sizes)

    def split(self, batches: int) -> tuple[list[int], list[int]]:
        """Which batches are trained with, and which held out. Raises ValueError for too few."""
        if batches < 1 + (self.held_out > 0):
            raise ValueError(f"batches: expected at least {1 + (self.held_out > 0)}, got {batches}")
        if not self.held_out:
            return list(range(batches)), []
        trained, held_out = Training(held_out=self.held_out, seed=self.seed).split(batches)
        return trained.tolist(), held_out.tolist()


@dataclass(frozen=True)
class SkipTraining:
    """Adapters, trained for some layers, and what they are worth.

    losses: the mean over the batches of each epoch, as adapters were then. held_out: cross entropy and the share of
    tokens that are the most likely ones, means over the batches that were held out, by name: "whole" of the model as it
    is, "skipped" without adapters, and "adapters". batches: how many were trained with, and how many held out. All of
    that, and how they were trained, is in the ``settings`` of the adapters, too, and so saved with them.
    """

    adapters: SkipAdapters
    losses: list[float]
    held_out: dict[str, tuple[float, float]]
    batches: tuple[int, int]

    FIGURES: ClassVar[tuple[str, ...]] = ("losses", "held_out", "batches")  # of the settings

    @property
    def model(self) -> str:
        """The name of its class."""
        return self.adapters.model

    @property
    def settings(self) -> dict[str, Any]:
        return self.adapters.settings

    def columns(self) -> dict[str, list[str]]:
        """What was held out for people to read, by headings."""
        names = {"whole": "the model as it is", "skipped": "skipped, without adapters", "adapters": "with adapters"}
        losses, right = zip(*(self.held_out[name] for name in names)) if self.held_out else ((), ())
        return {
            "held out": list(names.values()) if self.held_out else [],
            "cross entropy": [f"{x:.4g}" for x in losses],
            "most likely token right": [f"{x:.1%}" for x in right],
        }

    def table(self) -> str:
        """The same, and the verdict; Markdown."""
        return f"{markdown(self.columns())}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """The result in a few sentences."""
        trained, held_out = self.batches
        losses = ", ".join(f"{x:.4g}" for x in self.losses)
        bad = len(self.settings.get("bad", ()))
        skipped = f" ({bad} bad record{'s' if bad > 1 else ''} skipped)" if bad else ""
        return (
            f"Adapters for layers {list(self.adapters.layers)} ({self.adapters.nbytes / 2**20:.3g} MiB), trained on "
            f"{trained} batches, {held_out} held out{skipped}; mean loss by epoch {losses}."
        )

    def report(self, path: str | Path) -> None:
        """Writes a page of HTML about it, and its figure beside it."""
        from vtw_kernels.layer_search.report import write_report  # with matplotlib and jinja2

        write_report(path, self, command=self.settings.get("command", ""))

    @classmethod
    def load(cls, folder: str | Path) -> "SkipTraining":
        """Reads what ``adapters.save_pretrained`` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: something else, or adapters that were not trained by ``train_skip``.
        """
        adapters = SkipAdapters.from_pretrained(folder)
        try:
            losses, held_out, batches = (adapters.settings[name] for name in cls.FIGURES)
            found = cls(adapters, losses, {name: tuple(x) for name, x in held_out.items()}, tuple(batches))
            found.table()
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: expected adapters that train_skip has trained, got {error!r}") from error
        return found


def train_skip(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Sequence[int],
    training: AdapterTraining = AdapterTraining(),
    *,
    positions: int | str = "answer",
    adapters: SkipAdapters | None = None,
    checkpoint: Path | None = None,
    decoder: nn.Module | None = None,
    progress: bool = True,
) -> SkipTraining:
    """Trains the adapters of Efficient Attention Skipping (EAS, arXiv 2403.15226) for a model, which stays as it is.

    Args:
        model, batches, decoder, progress: as for ``find_layer``. All batches are held in memory, unless they can be
            indexed.
        layers: whose attention is to be skipped, as ``find_skippable`` finds them.
        training: how.
        positions: "answer": of the tokens that ``labels`` have; a number: of so many tokens of the model's own greedy
            answer, which the adapters then learn to give; or "last", of its next token.
        adapters: to go on from, which are changed; by default new ones, for all layers.
        checkpoint: a file that is written twice a minute and after each epoch, and that a training with the same
            arguments and batches goes on from, to the same bits.

    Returns:
        A ``SkipTraining``.

    Raises:
        TypeError, ValueError: what ``find_layer`` and ``skip_attention`` raise, an argument is out of range, or the
            checkpoint is of a training with other arguments, or none.
    """
    training.check()
    batches = batches if isinstance(batches, Sequence) else list(batches)
    trained, held_out = training.split(len(batches))
    adapters = training.new_adapters(model, layers) if adapters is None else adapters
    loss = SkipLoss(model, positions, adapters, decoder)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=training.learning_rate, weight_decay=0.0)
    per_epoch = -(-len(trained) // training.accumulate)
    steps = training.epochs * per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warm_up * steps), steps)
    settings = {name: x for name, x in adapters.settings.items() if name not in SkipTraining.FIGURES}  # of another one
    settings |= {"layers": list(layers), "positions": positions, "training": training._asdict()}
    settings |= {"batches": [len(trained), len(held_out)]}
    named = {"adapters": adapters, "optimizer": optimizer, "schedule": schedule}
    losses, total, step, random = [], 0.0, 0, None
    if checkpoint is not None and checkpoint.exists():
        losses, total, step, random = _read_checkpoint(checkpoint, settings, named)

    def keep() -> None:
        content = {"settings": settings, "done": (losses, total, step, random_states())}
        file = io.BytesIO()
        torch.save(content | {name: x.state_dict() for name, x in named.items()}, file)
        write_whole(checkpoint, _checksum(file.getvalue()) + file.getvalue())

    kept = time.monotonic()
    while len(losses) < training.epochs:
        seed = training.seed * 1_000_003 + len(losses)
        order = torch.tensor(trained)[torch.randperm(len(trained), generator=torch.Generator().manual_seed(seed))]
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of dropout
            if step:
                set_random_states(random)
            epoch = f"epoch {len(losses) + 1} of {training.epochs}"
            parts = order.split(training.accumulate)[step:]
            for part in tqdm(parts, epoch, initial=step, total=per_epoch, disable=not progress):
                optimizer.zero_grad()
                for i in part.tolist():
                    total += loss.backward(batches[i], layers, 1 / len(part))
                optimizer.step()
                schedule.step()
                step += 1
                if checkpoint is not None and time.monotonic() - kept >= KEPT_SECONDS:
                    keep()
                    kept = time.monotonic()
        losses.append(total / len(trained))
        total, step = 0.0, 0
        if checkpoint is not None:
            keep()
    found: dict[str, tuple[float, float]] = {}
    if held_out:
        plain = SkipLoss(model, positions, None, decoder)
        rows = [
            [*plain.evaluate(batches[i], [(), layers]), *loss.evaluate(batches[i], [layers])]
            for i in tqdm(held_out, "held out", disable=not progress)
        ]
        means = torch.tensor(rows).mean(0).tolist()
        found = {name: (x[0], x[1]) for name, x in zip(("whole", "skipped", "adapters"), means)}
    adapters.settings = settings | {"losses": losses, "held_out": found}
    return SkipTraining(adapters, losses, found, (len(trained), len(held_out)))


def _read_checkpoint(
    path: Path, settings: Mapping[str, Any], named: Mapping[str, Any]
) -> tuple[list[float], float, int, list[Tensor]]:
    """How far a training was: the losses of its epochs, the sum of those in the epoch that it was in, how many steps of
    this were done, and the states of random numbers. Those of adapters and the like are loaded into ``named``."""
    content = path.read_bytes()
    try:
        if content[:4] != _checksum(content[4:]):  # torch reads whatever the weights have become
            raise ValueError("a damaged file")
        state = torch.load(io.BytesIO(content[4:]), weights_only=True)
        if changed := differences(state["settings"], settings):
            raise ValueError(f"one where {changed}")
        losses, total, step, random = state["done"]
        for name, x in named.items():
            x.load_state_dict(state[name])
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"checkpoint: expected what a training with the same arguments and batches wrote to {path}, got {said}; "
            "remove it to begin anew"
        ) from error
    return losses, total, step, random


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "big")


def random_states() -> list[Tensor]:
    """Of the generators that dropout takes its numbers from, on the CPU and on GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def set_random_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
