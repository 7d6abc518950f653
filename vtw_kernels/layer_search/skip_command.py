"""``vtw-kernels skip-attention train``: from records on disk to adapters, stopped and resumed at will."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoProcessor
from transformers.utils.logging import disable_progress_bar

from vtw_kernels.integration.families import describe
from vtw_kernels.integration.skipping.adapters import CONFIG, WEIGHTS
from vtw_kernels.layer_search.records import Encoder, load_records
from vtw_kernels.layer_search.run import (
    Progress,
    Ranks,
    Records,
    check_different,
    check_loading,
    check_report,
    describe_device,
    find_device,
    find_settings,
    load_model,
    read_known,
    score,
    stop_on_signals,
    tell_of_bad,
)
from vtw_kernels.layer_search.skip_search import SkipLoss, SkipSearch
from vtw_kernels.layer_search.skip_training import AdapterTraining, SkipTraining, train_skip
from vtw_kernels.layer_search.state import State, append_line, differences


def run_training(options: Namespace, command: str) -> int:
    """Trains adapters for a model on records, writes them to the folder ``options.out``, and prints their worth.

    First each record goes through the model once, without attention in the layers, so that a bad one is named, or
    skipped, before the training begins. If the folder has what the same training of the same records gave, the model is
    not run.

    Args:
        options: as ``vtw-kernels skip-attention train --help`` says.
        command: what the user typed, for the report.

    Returns:
        0, or 128 and the number of the signal that stopped it.

    Raises:
        ValueError, OSError, ImportError: about the options, the data, the model or the state of an earlier run.
    """
    training = AdapterTraining(**{name: getattr(options, name) for name in AdapterTraining._fields if name != "seed"})
    training = training._replace(seed=options.training_seed)
    training.check()
    ranks = Ranks(options.tp)
    check_loading(options, ranks)
    if ranks.world > 1:
        raise ValueError(f"skip-attention train: expected one process, got {ranks.world} ranks")
    layers = chosen_layers(options.layers, options.search)
    check_different({"data": options.data, "search": options.search, "report": options.report})
    check_report(options.report)
    state = State(options.out.with_name(options.out.name + ".partial"))
    found = find_trained(options.out, state)
    records = load_records(options.data, options.images, options.subset, options.split, options.limit, options.seed)
    describe(options.model)  # refuses a model before its weights are loaded
    if not options.skip_bad:
        records.check()
    device = find_device(options.device)
    settings = {"layers": layers, "training": training._asdict()}
    settings = find_settings(options, settings, describe_device(device), ranks)
    digests = {name: digest for name, (digest, _) in read_known(records).items()}
    if found is not None and not options.restart:
        check_same(found, settings, digests, options.out)
        print(f"{options.out}: these adapters were trained before; the model is not run", file=sys.stderr)
        if state.folder.is_dir():  # that run was killed at its very end
            with state.open(settings, restart=False):
                state.remove()
        return conclude(found, options)
    with state.open(settings, options.restart) as lines:
        done = [name for name, digest in digests.items() if digest in lines]
        if done:
            begun = "; the training has begun, and goes on" if state.checkpoint.exists() else ""
            print(f"{options.out}: {len(done)} of {len(records)} records were looked at before{begun}", file=sys.stderr)
        if options.quiet:
            disable_progress_bar()
        encoder = Encoder(AutoProcessor.from_pretrained(options.model), options.prompt_template)
        model = load_model(options, device)
        encoder.dtype = model.dtype
        bad, stopped_by = look_at(records, done, Look(model, layers, options.positions), encoder, state, options)
        if stopped_by:
            return 128 + stopped_by
        good = [index for index in range(len(records)) if records.name(index) not in bad]
        settings |= {"records": {name: digest for name, digest in digests.items() if name not in bad}}
        found = train_skip(
            model,
            Batches(records, good, encoder, options.positions == "answer"),
            layers,
            training,
            positions=options.positions,
            adapters=training.new_adapters(model, layers, settings),
            checkpoint=state.checkpoint,
            progress=not options.quiet,
        )
        found.adapters.settings |= {"data": options.data, "bad": bad, "command": command}
        (options.out / CONFIG).unlink(missing_ok=True)  # an earlier one, and then weights that it does not belong to
        found.adapters.save_pretrained(options.out)
        state.remove()
    return conclude(found, options)


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


def find_trained(folder: Path, state: State) -> SkipTraining | None:
    """What an earlier training gave, if there is something. Raises ValueError for something else."""
    files = {x.name for x in folder.iterdir()} if folder.is_dir() else set()
    in_the_middle = files <= {WEIGHTS, f"{WEIGHTS}.part", f"{CONFIG}.part"} and state.checkpoint.exists()
    if not folder.exists() or (folder.is_dir() and (not files or in_the_middle)):
        return None
    try:
        return SkipTraining.load(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"out: expected a new folder or that of earlier adapters, got something else: {error}"
        ) from error


def check_same(found: SkipTraining, settings: dict[str, Any], digests: dict[str, str], out: Path) -> None:
    """Raises ValueError for adapters of another training, or of other records."""
    known, bad = (found.settings.get(name) or {} for name in ("records", "bad"))
    asked = {name: digest for name, digest in digests.items() if name not in bad}
    changed = differences({name: found.settings.get(name) for name in settings}, settings)
    if changed := changed or differences({"records": known}, {"records": asked}):
        raise ValueError(
            f"out: expected a new folder or earlier adapters of this training, got {out}, which are of another one: "
            f"{changed} (--restart discards them)"
        )


class Looked(NamedTuple):
    """Of ``B`` samples, ``[B]``: cross entropy of the answer, and the share of its tokens that are the likeliest."""

    loss: Tensor
    right: Tensor


class Look(SkipLoss):
    """Has a batch of one sample run as it will be trained with, for what that raises."""

    def __init__(self, model: nn.Module, layers: Sequence[int], positions: int | str):
        super().__init__(model, positions)
        self.layers = layers

    def score(self, batch: Mapping[str, Any]) -> Looked:
        ((loss, right),) = self.evaluate(batch, [self.layers])
        return Looked(torch.tensor([loss]), torch.tensor([right]))


def look_at(
    records: Records, done: list[str], look: Look, encoder: Encoder, state: State, options: Namespace
) -> tuple[dict[str, str], int]:
    """Looks at the records that this was not done with before.

    Returns:
        What is bad about which, if these are skipped; and the number of the signal that stopped it, or 0.
    """
    known, bad, number = set(done), {}, len(done)
    todo = [i for i in range(len(records)) if records.name(i) not in known]
    run, _ = state.begin([records.name(i) for i in todo], 1)
    path = state.rank_file(run, 0)
    progress = Progress("records", [path], len(done), len(records), 0, options.quiet)
    with stop_on_signals() as stop, path.open("ab") as file:
        for i in todo:
            if stop:
                break
            line = score(records, i, encoder, look, options.skip_bad)
            append_line(file, line)
            bad |= {line["name"]: line["bad"]} if "bad" in line else {}
            number += 1
            progress.update()
        progress.bar.close()
    if stop:
        print(
            f"stopped: {number} of {len(records)} records were looked at; the same command goes on from there",
            file=sys.stderr,
        )
        return bad, stop[0]
    tell_of_bad(bad)
    return bad, 0


class Batches(Sequence):
    """Some of the records as batches of one, encoded when they are asked for."""

    def __init__(self, records: Records, indices: list[int], encoder: Encoder, with_answer: bool):
        self.records, self.indices, self.encoder, self.with_answer = records, indices, encoder, with_answer

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self.encoder(self.records[self.indices[number]], with_answer=self.with_answer)


def conclude(found: SkipTraining, options: Namespace) -> int:
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        found.report(options.report)
    if not options.quiet:
        print(found.table())
        print(f"written: {options.out}" + (f", {options.report}" if options.report else ""))
    return 0
