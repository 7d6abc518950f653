"""The training data of gates, from one run of the model: what each gate would read, and what leaving there changes."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.exit_routers import exit_features
from vtw_kernels.layer_search.scorer import LOGITS_BYTES, Questions, Scorer, compare_runs, read_questions, top_tokens


class ExitScores(NamedTuple):
    """Of ``B`` samples and ``G`` gates, on the CPU.

    kl, reverse_kl, disagreement, tokens, visual_tokens: as ``Scores``. loss: fp32 ``[B, G + 1]``, cross entropy in nats
    of the tokens that count, the mean over a sample's, withdrawn at each gate and, last, in full. features: ``[B, G,
    2H]``, what each gate reads of the prompt, as ``exit_features`` makes it.
    """

    kl: Tensor
    reverse_kl: Tensor
    disagreement: Tensor
    loss: Tensor
    features: Tensor
    tokens: Tensor
    visual_tokens: Tensor

    @staticmethod
    def join(scores: Iterable["ExitScores"]) -> "ExitScores":
        return ExitScores(*map(torch.cat, zip(*scores)))


class ExitScorer(Scorer):
    """Scores batches of samples, as ``train_exit`` describes them; ``candidates`` are the layers with a gate."""

    def _score(self, batch: Mapping[str, Any]) -> ExitScores:
        questions = read_questions(self.model, self.parts, batch, self.positions)
        asking, targets = _prompts(questions), None
        if self.positions == "answer":
            labels = batch["labels"].to(questions.predicting.device)
            targets = labels[:, 1:][questions.predicting[:, :-1]]
        features: dict[int, Tensor] = {}

        def read(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = Arguments(module)
            hidden = arguments.named(args, kwargs)[arguments.names[0]]
            visual, text = (x.to(hidden.device) for x in (questions.visual & questions.attended, asking))
            features[layer] = exit_features(hidden, visual, text)[0].cpu()

        with ExitStack() as hooks:
            for layer in self.candidates:
                hook = self.parts.layers[layer].register_forward_pre_hook(partial(read, layer), with_kwargs=True)
                hooks.callback(hook.remove)
            *scores, loss, full_loss = self._means(questions, partial(_with_losses, targets))
        features = torch.stack([features[layer] for layer in self.candidates], dim=1)
        return ExitScores(*scores, torch.cat((loss, full_loss[:, :1]), dim=1), features, *questions.counts())


def _prompts(questions: Questions) -> Tensor:
    """bool ``[B, S]``: the text tokens that a gate may read, up to the first one whose prediction counts.

    Raises:
        ValueError: visual tokens come later.
    """
    first = questions.predicting.int().argmax(1)
    is_prompt = torch.arange(questions.visual.shape[1], device=first.device) <= first[:, None]
    if (late := (questions.visual & questions.attended & ~is_prompt).any(1)).any():
        raise ValueError(
            "labels: expected those of an answer behind all visual tokens, as gates decide before it, got some in "
            f"front of one in row {late.nonzero()[0].item()}"
        )
    return is_prompt & questions.attended & ~questions.visual


def _with_losses(targets: Tensor | None, withdrawn: Tensor, full: Tensor, head: nn.Linear | None) -> tuple[Tensor, ...]:
    """What ``compare_runs`` returns, and both losses, each fp32 ``[C, P]``, on the CPU. ``targets``: int64 ``[P]``, the
    tokens of the answers, or None for those that the full run finds most likely."""
    if targets is None:
        targets = full.argmax(-1) if head is None else top_tokens(full, head)
    loss, full_loss = (_losses(run, targets, head).cpu() for run in (withdrawn, full))
    return *compare_runs(withdrawn, full, head), loss, full_loss.expand_as(loss)


def _losses(run: Tensor, targets: Tensor, head: nn.Linear | None) -> Tensor:
    """fp32 ``[..., P]``: cross entropy of tokens ``[P]``, computed for few rows at a time. ``run``: logits
    ``[..., P, V]`` or, with a head, the hidden states that it makes them from."""
    rows = max(1, LOGITS_BYTES // (4 * (run.shape[-1] if head is None else head.out_features)))
    wanted = targets.to(run.device).expand(run.shape[:-1]).flatten().split(rows)
    losses = [
        F.cross_entropy((x if head is None else head(x)).float(), tokens, reduction="none")
        for x, tokens in zip(run.flatten(0, -2).split(rows), wanted)
    ]
    return torch.cat(losses).view(run.shape[:-1])
