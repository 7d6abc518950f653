"""The training of adapters that take the place of attention."""

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.optimization import get_cosine_schedule_with_warmup

from vtw_kernels.integration.skipping.adapters import CONFIG, KIND, SkipAdapters
from vtw_kernels.layer_search.exit_training import Training
from vtw_kernels.layer_search.records import Encoder, load_records
from vtw_kernels.layer_search.run import describe_device, find_device, fingerprint, load_model
from vtw_kernels.layer_search.scored import markdown
from vtw_kernels.layer_search.skip_search import SkipLoss, SkipSearch
from vtw_kernels.layer_search.state import State, differences


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
    is, "skipped" without adapters, and "adapters". batches: how many were trained with, and how many held out.
    """

    adapters: SkipAdapters
    losses: list[float]
    held_out: dict[str, tuple[float, float]]
    batches: tuple[int, int]

    def table(self) -> str:
        """The same for people to read; Markdown."""
        names = {"whole": "the model as it is", "skipped": "skipped, without adapters", "adapters": "with adapters"}
        losses, right = zip(*(self.held_out[name] for name in names)) if self.held_out else ((), ())
        rows = {
            "held out": list(names.values()) if self.held_out else [],
            "cross entropy": [f"{x:.4g}" for x in losses],
            "most likely token right": [f"{x:.1%}" for x in right],
        }
        return f"{markdown(rows)}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """The result in a few sentences."""
        trained, held_out = self.batches
        losses = ", ".join(f"{x:.4g}" for x in self.losses)
        return (
            f"Adapters for layers {list(self.adapters.layers)} ({self.adapters.nbytes / 2**20:.3g} MiB), trained on "
            f"{trained} batches, {held_out} held out; mean loss by epoch {losses}."
        )


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
        checkpoint: a file that is written after each epoch, and that a training with the same arguments goes on from.

    Returns:
        A ``SkipTraining``.

    Raises:
        TypeError, ValueError: what ``find_layer`` and ``skip_attention`` raise, or an argument is out of range.
    """
    training.check()
    batches = batches if isinstance(batches, Sequence) else list(batches)
    trained, held_out = training.split(len(batches))
    if adapters is None:
        sizes = {"dim": training.dim, "skipped_dim": training.skipped_dim, "dropout": training.dropout}
        adapters = SkipAdapters.for_model(model, sorted(layers), seed=training.seed, **sizes)
    loss = SkipLoss(model, positions, adapters, decoder)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=training.learning_rate, weight_decay=0.0)
    per_epoch = -(-len(trained) // training.accumulate)
    steps = training.epochs * per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warm_up * steps), steps)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        losses = state["losses"]
        for name, x in (("adapters", adapters), ("optimizer", optimizer), ("schedule", schedule)):
            x.load_state_dict(state[name])
    for epoch in range(len(losses), training.epochs):
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + epoch)
        order = torch.tensor(trained)[torch.randperm(len(trained), generator=generator)].split(training.accumulate)
        total = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(training.seed * 1_000_003 + epoch)  # of dropout
            for part in tqdm(order, f"epoch {epoch + 1} of {training.epochs}", disable=not progress):
                optimizer.zero_grad()
                for i in part.tolist():
                    total += loss.backward(batches[i], layers, 1 / len(part))
                optimizer.step()
                schedule.step()
        losses.append(total / len(trained))
        if checkpoint is not None:
            named = (("adapters", adapters), ("optimizer", optimizer), ("schedule", schedule))
            part_file = checkpoint.with_name(checkpoint.name + ".part")
            torch.save({"losses": losses} | {name: x.state_dict() for name, x in named}, part_file)
            os.replace(part_file, checkpoint)
    found: dict[str, tuple[float, float]] = {}
    if held_out:
        plain = SkipLoss(model, positions, None, decoder)
        rows = [
            [*plain.evaluate(batches[i], [(), layers]), *loss.evaluate(batches[i], [layers])]
            for i in tqdm(held_out, "held out", disable=not progress)
        ]
        means = torch.tensor(rows).mean(0).tolist()
        found = {name: (x[0], x[1]) for name, x in zip(("whole", "skipped", "adapters"), means)}
    return SkipTraining(adapters, losses, found, (len(trained), len(held_out)))


def chosen_layers(layers: str | None, search: Path | None) -> list[int]:
    """Those that a command names, as ``3,5``, or the best choice that a search has found.

    Raises:
        ValueError, OSError: neither or both, or not what they should be.
    """
    if (layers is None) == (search is None):
        raise ValueError("layers: expected --layers or --search, got " + ("neither" if layers is None else "both"))
    if search is not None:
        return SkipSearch.load(search).layers
    if not all(x.isascii() and x.isdecimal() for x in layers.split(",")):
        raise ValueError(f"layers: expected numbers with commas between, as 3,5, got {layers!r}")
    return sorted(map(int, layers.split(",")))


def earlier(folder: Path) -> bool:
    """Whether there are adapters."""
    return (folder / CONFIG).is_file() and json.loads((folder / CONFIG).read_text()).get("peft_type") == KIND


class _Records(Sequence):
    """Records as batches, encoded when they are asked for."""

    def __init__(self, records: Any, encoder: Encoder, with_answer: bool):
        self.records, self.encoder, self.with_answer = records, encoder, with_answer

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.encoder(self.records[index], with_answer=self.with_answer)


def run_training(options: Namespace, command: str) -> int:
    """``vtw-kernels skip-attention train``: adapters for a model, trained on records, written to ``options.out``.

    What was done is kept after each epoch, and the same command goes on from there.

    Raises:
        ValueError, OSError, ImportError: about the options, the data, the model or the state of an earlier run.
    """
    training = AdapterTraining(**{name: getattr(options, name) for name in AdapterTraining._fields if name != "seed"})
    training = training._replace(seed=options.training_seed)
    training.check()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("skip-attention train: expected one process, got several ranks")
    layers = chosen_layers(options.layers, options.search)
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir()) and not earlier(options.out)):
        raise ValueError(f"out: expected a new folder or that of earlier adapters, got something else in {options.out}")
    records = load_records(options.data, options.images, options.subset, options.split, options.limit, options.seed)
    records.check()
    device = find_device(options.device)
    settings = {
        name: getattr(options, name) for name in ("model", "dtype", "attention", "device_map", "positions", "data")
    }
    digests = {records.name(i): records[i].digest() for i in range(len(records))}
    settings |= {"layers": layers, "model_files": fingerprint(options.model), "device": describe_device(device)}
    settings |= {"prompt_template": options.prompt_template, "training": training._asdict(), "records": digests}
    state = State(options.out.with_name(options.out.name + ".partial"))
    checkpoint, known = state.folder / "training.pt", state.folder / "settings.json"
    changed = differences(json.loads(known.read_text()), settings) if checkpoint.exists() and known.exists() else ""
    if changed and not options.restart:
        raise ValueError(
            f"settings: expected those of the training in {state.folder}, but {changed} (--restart discards it)"
        )
    with state.open(settings, options.restart):
        if options.restart:
            checkpoint.unlink(missing_ok=True)
        encoder = Encoder(AutoProcessor.from_pretrained(options.model), options.prompt_template)
        model = load_model(options, device)
        encoder.dtype = model.dtype
        batches = _Records(records, encoder, options.positions == "answer")
        found = train_skip(
            model,
            batches,
            layers,
            training,
            positions=options.positions,
            checkpoint=checkpoint,
            progress=not options.quiet,
        )
        found.adapters.settings = settings | {"losses": found.losses, "held_out": found.held_out, "command": command}
        found.adapters.save_pretrained(options.out)
        checkpoint.unlink()
        state.remove()
    if not options.quiet:
        print(found.table())
        print(f"written: {options.out}")
    return 0
