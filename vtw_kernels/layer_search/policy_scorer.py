"""What policies do to the model's next tokens: each runs as ``withdraw`` runs it, and is compared with the plain model.

Policies that are a layer are all scored in one run, as by a search. In use, a policy decides when the prompt is read,
before there is an answer. So if predictions within an answer count, the policy first decides in a forward of the prompt
alone, and that decision is replayed in a forward of prompt and answer.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.families import find_parts
from vtw_kernels.integration.hooks import generating
from vtw_kernels.integration.inputs import in_eval_mode, take_tokens
from vtw_kernels.integration.masks import attended_tokens
from vtw_kernels.integration.withdraw import unwrapped
from vtw_kernels.layer_search.decisions import Decisions, Replayed, recording
from vtw_kernels.layer_search.scorer import (
    Questions,
    Scorer,
    check_later_tokens,
    check_numbers,
    check_positions,
    compare_logits,
    read_questions,
)
from vtw_kernels.layer_search.settings import settings_of


class PolicyScores(NamedTuple):
    """Of ``B`` samples and ``C`` policies, on the CPU.

    kl, reverse_kl, disagreement, tokens, visual_tokens: as ``Scores``, the latter two of the prompts alone. rows_saved:
    fp32 ``[B, C]``, of the prompt's rows in all layers, the share that attention does not run on.
    """

    kl: Tensor
    reverse_kl: Tensor
    disagreement: Tensor
    rows_saved: Tensor
    tokens: Tensor
    visual_tokens: Tensor

    @staticmethod
    def join(scores: Iterable["PolicyScores"]) -> "PolicyScores":
        return PolicyScores(*map(torch.cat, zip(*scores)))


class PolicyScorer:
    """Scores batches of samples under policies. Arguments and errors are those of ``compare``; policies are by name."""

    def __init__(
        self,
        model: nn.Module,
        policies: Mapping[str, Any],
        *,
        positions: int | str = "last",
        decoder: nn.Module | None = None,
    ):
        self.model, self.decoder, self.positions = unwrapped(model), decoder, positions
        self.parts = find_parts(self.model, decoder)
        if hasattr(self.parts.decoder, "_vtw_withdrawal"):
            raise ValueError("model: expected one without withdrawal, got one inside withdraw")
        if self.parts.cross_attention:
            raise ValueError(
                f"model: expected images as tokens, of which policies choose, got {type(self.model).__name__}, whose "
                "images come in by cross-attention; find_layer compares its layers"
            )
        check_positions(positions)
        layers = len(self.parts.layers)
        self.policies = settings_of(self.model, policies, decoder)
        for name, setting in self.policies.items():
            if isinstance(setting.policy, Sequence) and isinstance(setting.policy[0], int):
                raise TypeError(
                    f"policies: expected one layer, or policies, got the layers {setting.policy} as {name!r}"
                )
        fixed = [x.policy for x in self.policies.values() if x.is_layer and x.skip is None and x.policy < layers]
        # In models whose layers share keys, candidates can't run side by side.
        in_one_run = fixed and self.parts.num_cached == layers
        self.fixed = Scorer(model, positions=positions, candidates=fixed, decoder=decoder) if in_one_run else None
        self.takes_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def score(self, batch: Mapping[str, Any]) -> PolicyScores:
        """One batch; see ``compare`` for what is in it, and what it raises."""
        with in_eval_mode(self.model), torch.inference_mode():
            return self._score(batch)

    def _score(self, batch: Mapping[str, Any]) -> PolicyScores:
        questions = read_questions(self.model, self.parts, batch, self.positions)
        known = {} if self.fixed is None else dict(zip(self.fixed.candidates, self._columns_of(questions)))
        reading, by_mask = Reading(questions), batch.get("visual_mask") is not None
        layers, full, columns = len(self.parts.layers), None, []
        for setting in self.policies.values():
            policy, skip = setting.policy, setting.skip
            decided: Decisions = {policy: None} if setting.is_layer else {}
            if skip is None and setting.is_layer and policy in known:
                columns.append((*known[policy], reading.rows_left(decided, layers)))
                continue
            full = self._full_logits(reading) if full is None else full
            asked = policy if setting.is_layer else recording(policy, decided)
            if not setting.is_layer and reading.has_answers:
                with setting.replaced(asked).under(
                    self.model, reading.prompt_visual if by_mask else None, self.decoder
                ):
                    self.model(**reading.prompt, **self._rows(1), use_cache=False)
                asked = Replayed(decided) if decided else layers
            with (
                setting.replaced(asked).under(self.model, reading.visual if by_mask else None, self.decoder),
                generating(reading.columns) if skip is not None and reading.has_answers else nullcontext(),
            ):
                scores = compare_logits(self.logits(reading)[None], full)
            means = (questions.mean_over_positions(x)[:, 0] for x in scores)
            columns.append((*means, reading.rows_left(decided, layers, setting.skipped)))
        kl, reverse_kl, disagreement, rows = (torch.stack(x, dim=1) for x in zip(*columns))
        check_numbers(kl, reverse_kl)
        tokens, visual_tokens = reading.counts()
        saved = 1 - rows / (tokens[:, None] * layers)
        return PolicyScores(kl, reverse_kl, disagreement, saved.float(), tokens, visual_tokens)

    def _columns_of(self, questions: Questions) -> list[tuple[Tensor, ...]]:
        """Scores of all fixed layers, ``[B]`` each."""
        scores = self.fixed.score_questions(questions)
        return list(zip(*(x.unbind(1) for x in (scores.kl, scores.reverse_kl, scores.disagreement))))

    def _full_logits(self, reading: "Reading") -> Tensor:
        """Of the model as it is, in which answers see no later tokens, as if they were generated one by one."""

        def check(module: nn.Module, args: tuple, kwargs: dict, arguments: Arguments) -> None:
            if (mask := arguments.named(args, kwargs).get(arguments.mask)) is not None:
                check_later_tokens(mask, reading.columns, reading.visual.shape[1])

        hooks = []
        try:
            for layer in self.parts.layers if isinstance(self.positions, int) else ():
                hook = partial(check, arguments=Arguments(layer))
                hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            return self.logits(reading)
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, reading: "Reading") -> Tensor:
        """``[P, V]``, of the rows that predict what counts."""
        rows = reading.visual.shape[1] - int(reading.predicting.int().argmax(1).min())
        logits = self.model(**reading.inputs, **self._rows(rows), use_cache=False).logits[:, -rows:]
        return logits[reading.predicting[:, -rows:]]

    def _rows(self, count: int) -> dict[str, int]:
        """Of how many rows, the last ones, logits are made, in models that can be told."""
        return {"logits_to_keep": count} if self.takes_rows else {}

    def prompt(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch without the answers."""
        positions = "answer" if self.positions == "answer" else "last"
        reading = Reading(read_questions(self.model, self.parts, batch, positions))
        by_mask = {"visual_mask": reading.prompt_visual} if batch.get("visual_mask") is not None else {}
        return reading.prompt | by_mask


class Reading:
    """A batch of questions, rearranged so that prompts end in one column if answers follow them.

    inputs: keyword arguments of the model's forward. visual, predicting: bool ``[B, S]``, as of ``Questions``. columns:
    of the prompts. has_answers: whether there is anything behind them. prompt, prompt_visual: inputs and visual tokens
    of the prompts alone.
    """

    def __init__(self, questions: Questions):
        self.inputs, attended, self.visual, self.predicting, _ = questions
        first = self.predicting.int().argmax(1)[:, None]
        is_prompt = torch.arange(attended.shape[1], device=attended.device) <= first
        answers = attended & ~is_prompt
        self.has_answers = bool(answers.any())
        if (early := (answers & self.visual).any(1)).any():
            raise ValueError(
                "labels: expected those of an answer behind all visual tokens, as policies decide before it, got "
                f"some in front of one in row {early.nonzero()[0].item()}"
            )
        if self.has_answers and not first.eq(first[0]).all():
            tensors = self.inputs | {"visual_mask": self.visual, "predicting": self.predicting}
            parts = []
            for keep, pad in ((attended & is_prompt, "left"), (answers, "right")):
                parts.append(take_tokens(tensors, keep, int(keep.sum(1).max()), pad))
            moved = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
            self.visual, self.predicting = moved.pop("visual_mask"), moved.pop("predicting")
            self.inputs, first = self.inputs | moved, self.predicting.int().argmax(1)[:, None]
        self.columns = int(first.max()) + 1
        self.prompt, self.prompt_visual = self.inputs, self.visual
        if self.has_answers:
            self.prompt_visual = self.visual[:, : self.columns]
            shown = attended_tokens(self.inputs.get("attention_mask"), self.visual)
            shown[:, self.columns :] = False
            self.prompt = self.inputs | take_tokens(self.inputs, shown, self.columns, "left")

    def counts(self) -> tuple[Tensor, Tensor]:
        """int64 ``[B]`` each, on the CPU: tokens of the prompts, and the visual ones among them."""
        attended = attended_tokens(self.prompt.get("attention_mask"), self.prompt_visual)
        return attended.sum(1).cpu(), (attended & self.prompt_visual).sum(1).cpu()

    def rows_left(self, decided: Decisions, layers: int, skipped: Sequence[int] = ()) -> Tensor:
        """int64 ``[B]``: on how many rows of the prompts attention runs, all layers together."""

        def attending(begin: int, end: int) -> int:
            return sum(i not in skipped for i in range(begin, end))

        ends = [*list(decided)[1:], layers]
        tokens, visual = self.counts()
        rows = (tokens - visual) * attending(0, layers) + visual * attending(0, next(iter(decided), layers))
        for (layer, stays), end in zip(decided.items(), ends):
            rows += 0 if stays is None else stays.sum(1).cpu() * attending(layer, end)
        return rows
