"""What withdrawing before each candidate layer does to the model's next tokens, from one run of the model.

The paper's code (VTW, arXiv 2405.05803) runs the whole model anew for each candidate. Here the rows that enter layer
``k`` are taken from the one full run: candidate ``k`` joins, at layer ``k``, a growing batch of text-only continuations
that each layer runs once, right after its full-length run. Rows in front of every visual token are the same in all
runs, so that continuations only read their keys and values. Where images come in by cross-attention, continuations are
the same text without it; candidates that leave out the same are one.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vtw_kernels.integration.arguments import Arguments
from vtw_kernels.integration.cross_attention import FIRST_WITHOUT, MASKS, CrossAttentionHooks, sees_images
from vtw_kernels.integration.families import Parts, find_parts
from vtw_kernels.integration.inputs import in_eval_mode, prepare
from vtw_kernels.integration.masks import attended_tokens, kind_of_masks
from vtw_kernels.integration.policies import Withdraw
from vtw_kernels.integration.stage import Stage
from vtw_kernels.integration.withdraw import unwrapped
from vtw_kernels.ops import compact, kl_divergence, linear_kl_divergence, plan_compaction

# The candidates of a group may take this fraction (1/8) of the device's memory: weights and the full run need some,
# too.
MEMORY_SHARE = 8
# How many bytes of logits are made at a time where only their top tokens or losses are needed.
LOGITS_BYTES = 64 * 2**20


class Scores(NamedTuple):
    """Of ``B`` samples and ``C`` candidates, on the CPU.

    kl, reverse_kl: fp32 ``[B, C]``, KL(withdrawn‖full) and KL(full‖withdrawn) in nats, mean over a sample's positions.
    disagreement: fp32 ``[B, C]``, the share of positions with another most likely token. tokens, visual_tokens: int64
    ``[B]``, of the prompt.
    """

    kl: Tensor
    reverse_kl: Tensor
    disagreement: Tensor
    tokens: Tensor
    visual_tokens: Tensor

    @staticmethod
    def join(scores: Iterable["Scores"]) -> "Scores":
        return Scores(*map(torch.cat, zip(*scores)))


class Questions(NamedTuple):
    """A batch as it is scored.

    inputs: keyword arguments of the model's forward, with the answers. attended, visual, predicting: bool ``[B, S]``,
    which tokens are no padding, which of them are visual, and which rows predict what counts. prompt: tokens before the
    model's own answers, which begin in one column.
    """

    inputs: dict[str, Any]
    attended: Tensor
    visual: Tensor
    predicting: Tensor
    prompt: int

    def counts(self) -> tuple[Tensor, Tensor]:
        """int64 ``[B]`` each, on the CPU: the prompt's tokens, and the visual ones among them."""
        tokens = self.attended[:, : self.prompt]
        return tokens.sum(1).cpu(), (tokens & self.visual[:, : self.prompt]).sum(1).cpu()

    def mean_over_positions(self, x: Tensor) -> Tensor:
        """``[C, P]`` of predicting rows, on the CPU, to ``[B, C]``."""
        sequence = self.predicting.nonzero()[:, 0].cpu()
        sums = torch.zeros(len(self.visual), len(x)).index_add_(0, sequence, x.T)
        return sums / sequence.bincount(minlength=len(sums))[:, None]


def read_questions(model: nn.Module, parts: Parts, batch: Mapping[str, Any], positions: int | str) -> Questions:
    """A batch as ``find_layer`` takes it; if asked for, with the answers that the model gives to it.

    Raises:
        ValueError: a sample without visual tokens, or with a prediction that counts from one; as ``find_layer``.
    """
    inputs, visual = prepare(model, parts, batch, None)
    prompt = visual.shape[1]
    if isinstance(positions, int):
        image_masks = MASKS if parts.cross_attention else ()  # elsewhere the same name may be of an image's patches
        inputs, visual, predicting = _with_answers(model, inputs, visual, positions, image_masks)
        attended = attended_tokens(inputs.get("attention_mask"), visual)
    else:
        attended = attended_tokens(inputs.get("attention_mask"), visual)
        predicting = _predicting(batch.get("labels"), attended, positions)
    parts.check_tokens(visual.shape[1])
    has_images, image = (attended & visual).any(1), "at least one visual token"
    if parts.cross_attention:
        has_images, image = sees_images(inputs, visual), "an image"
    for wrong, what in (
        (~has_images, f"{image} in each sample, got none"),
        ((predicting & visual).any(1), "predictions from text tokens alone, got one from a visual token"),
    ):
        if wrong.any():
            raise ValueError(f"batches: expected {what} in row {wrong.nonzero()[0].item()}")
    return Questions(inputs, attended, visual, predicting, prompt)


def check_positions(positions: int | str) -> None:
    if positions not in ("last", "answer") and not (type(positions) is int and positions > 0):
        raise ValueError(f"positions: expected 'last', 'answer' or a number of at least 1, got {positions!r}")


def check_numbers(kl: Tensor, reverse_kl: Tensor) -> None:
    """Raises ValueError for divergences ``[B, C]`` that are NaN."""
    unknown = (kl.isnan() | reverse_kl.isnan()).any(1)
    if unknown.any():
        raise ValueError(f"model: expected logits that are numbers, got NaN in row {unknown.nonzero()[0].item()}")


class Scorer:
    """Scores batches of samples on a model. Arguments and errors are those of ``find_layer``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        positions: int | str = "last",
        candidates: Sequence[int] | None = None,
        max_candidates_in_flight: int | None = None,
        decoder: nn.Module | None = None,
    ):
        self.model = unwrapped(model)
        self.parts = find_parts(self.model, decoder)
        if self.parts.num_cached < len(self.parts.layers):
            raise ValueError(
                "model: expected layers with keys of their own, which runs side by side need, got shared ones"
            )
        if hasattr(self.parts.decoder, "_vtw_withdrawal"):
            raise ValueError("model: expected one without withdrawal, got one inside withdraw")
        check_positions(positions)
        if max_candidates_in_flight is not None and max_candidates_in_flight < 1:
            raise ValueError(f"max_candidates_in_flight: expected at least 1, got {max_candidates_in_flight}")
        self.positions, self.max_in_flight = positions, max_candidates_in_flight
        self.candidates = _check_candidates(candidates, self.parts)
        self.image_layers = list(self.parts.cross_attention) or None
        self.steps = list(_steps(self.parts))
        self.joins = [_join(self.parts, self.steps, layer) for layer in self.candidates]
        head = self.model.get_output_embeddings()
        self.head = head if type(head) is nn.Linear else None  # not one that is quantised, say

    def score(self, batch: Mapping[str, Any]) -> Scores:
        """One batch; see ``find_layer`` for what is in it, and what it raises."""
        with in_eval_mode(self.model), torch.inference_mode():
            return self._score(batch)

    def _score(self, batch: Mapping[str, Any]) -> Scores:
        return self.score_questions(read_questions(self.model, self.parts, batch, self.positions))

    def score_questions(self, questions: "Questions") -> Scores:
        return Scores(*self._means(questions, compare_runs), *questions.counts())

    def _means(self, questions: "Questions", compare: "Compare") -> list[Tensor]:
        """``[B, C]`` each, on the CPU: means over positions of what is compared, both divergences first."""
        samples = _Samples(self.parts, self.steps, questions)
        try:
            scores = self._compare_groups(samples, self.head if self._logits_are_large(samples) else None, compare)
        except _LogitsAreMore:
            self.head = None
            scores = self._compare_groups(samples, None, compare)
        means = [questions.mean_over_positions(torch.cat(x)) for x in zip(*scores)]
        if len(distinct := sorted(set(self.joins))) < len(self.joins):
            means = [x[:, [distinct.index(join) for join in self.joins]] for x in means]
        check_numbers(*means[:2])
        return means

    def _compare_groups(
        self, samples: "_Samples", head: nn.Linear | None, compare: "Compare"
    ) -> list[tuple[Tensor, ...]]:
        in_flight = self.max_in_flight or self._that_fit(samples, with_logits=head is None)
        joins = sorted(set(self.joins))
        groups = [joins[i : i + in_flight] for i in range(0, len(joins), in_flight)]
        return [compare(*_run_group(self.model, self.parts, samples, group, head), head) for group in groups]

    def _logits_are_large(self, samples: "_Samples") -> bool:
        """Whether logits of one candidate alone are too large, or those of all make so many groups that running the
        model for each takes longer than two more products with the head's weights."""
        one, memory = self._logits_bytes(samples), self._memory()
        more_runs = int(len(self.candidates) * one / memory)
        if self.head is None or not more_runs:
            return False
        again = more_runs * samples.visual.numel() * sum(x.numel() for x in self.parts.layers.parameters())
        products = 2 * len(self.candidates) * len(samples.sequence) * self.head.weight.numel()
        return one > memory or again > products

    def _that_fit(self, samples: "_Samples", with_logits: bool) -> int:
        """How many candidates may run side by side: a rough count of what each of them adds to the memory in use."""
        config = self.parts.config
        rows, item = samples.plan.source.numel(), self.model.dtype.itemsize
        width = max(6 * config.hidden_size, 3 * (getattr(config, "intermediate_size", None) or 0))
        scores = rows * (samples.shared + samples.plan.source.shape[1]) * config.num_attention_heads * 4
        logits = self._logits_bytes(samples) if with_logits else 0
        return max(1, int(self._memory() / (rows * width * item + scores + logits)))

    def _logits_bytes(self, samples: "_Samples") -> int:
        """Of one candidate, twice."""
        vocabulary = getattr(self.model.get_output_embeddings(), "out_features", None) or self.parts.config.vocab_size
        return 2 * len(samples.sequence) * vocabulary * self.model.dtype.itemsize

    def _memory(self) -> float:
        """Bytes for a group of candidates. They depend on the machine, but not on what else runs there, so that a
        search repeats itself to the bit."""
        if self.model.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.model.device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return memory / MEMORY_SHARE


def _with_answers(
    model: nn.Module, inputs: dict[str, Any], visual: Tensor, count: int, image_masks: Sequence[str]
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs that the model's own greedy answer follows, without its last token, which predicts nothing more that is
    looked at; which tokens are visual then, and which predict a token of the answer. ``image_masks``: names of inputs
    that say which images each token sees."""
    if inputs.get("input_ids") is None:
        raise ValueError("positions: expected 'last' or 'answer' with inputs_embeds, got a number")
    ids, attended = inputs["input_ids"], attended_tokens(inputs.get("attention_mask"), visual)
    tokens = ids.shape[1]
    # Answers start in one column: padding goes to the left.
    sequences = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.shape == ids.shape}
    sequences |= {name: inputs[name] for name in image_masks if inputs.get(name) is not None}
    sequences |= {"attention_mask": attended.long(), "visual_mask": visual}
    if "position_ids" in sequences:
        raise ValueError("positions: expected 'last' or 'answer' with position_ids, got a number")
    moved = compact(list(sequences.values()), plan_compaction(attended, tokens, pad="left"), token_dims=1)
    sequences = dict(zip(sequences, moved))
    visual = sequences.pop("visual_mask")
    inputs = inputs | sequences
    config = model.generation_config
    answers = model.generate(
        **inputs, max_new_tokens=count, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
        return_dict_in_generate=False,
    )[:, tokens:]  # fmt: skip
    ends = torch.zeros_like(answers, dtype=torch.bool)
    if config.eos_token_id is not None:
        ends = torch.isin(answers, torch.as_tensor(config.eos_token_id, device=answers.device))
    said = ends.cumsum(1) - ends.long() == 0  # up to the first end token, and with it
    follows = said[:, 1:]
    zeros = torch.zeros_like(follows, dtype=torch.long)
    tails = {"input_ids": answers[:, :-1], "attention_mask": follows.long()}
    for name in sequences.keys() & image_masks:  # an answer sees what the end of its question does
        tails[name] = inputs[name][:, -1:].repeat_interleave(zeros.shape[1], dim=1)
    for name, x in sequences.items():
        inputs[name] = torch.cat((x, tails.get(name, zeros).to(x.dtype)), dim=1)
    predicting = F.pad(said, (tokens - 1, 0))
    return inputs, F.pad(visual, (0, follows.shape[1])), predicting


def _check_candidates(candidates: Sequence[int] | None, parts: Parts) -> list[int]:
    first, last = parts.min_layer, min(parts.max_layer, len(parts.layers) - 1)
    chosen = sorted(set(range(first, last + 1) if candidates is None else candidates))
    if not chosen or not first <= chosen[0] <= chosen[-1] <= last:
        raise ValueError("; ".join([f"candidates: expected layers in {first}..{last}, got {chosen}", *parts.limits]))
    return chosen


def _steps(parts: Parts) -> Iterator[nn.Module]:
    """Decoder layers, and blocks that look at images in front of them, as a forward runs them."""
    for i, layer in enumerate(parts.layers):
        if i in parts.cross_attention and parts.cross_attention[i].block is not layer:
            yield parts.cross_attention[i].block
        yield layer


def _join(parts: Parts, steps: list[nn.Module], candidate: int) -> int:
    """The first step that withdrawal before a candidate changes."""
    looks = [steps.index(x.block) for i, x in parts.cross_attention.items() if i >= candidate]
    return min(looks, default=candidate)


def _predicting(labels: Tensor | None, attended: Tensor, positions: str) -> Tensor:
    """bool ``[B, S]``: which rows predict what counts."""
    if positions == "last":
        last = attended.long().cumsum(1).argmax(1)
        return F.one_hot(last, attended.shape[1]).bool()
    if labels is None or labels.shape != attended.shape:
        given = "none" if labels is None else f"shape {list(labels.shape)}"
        raise ValueError(
            f"labels: expected {list(attended.shape)}, -100 but for the tokens of the answer, with positions='answer', "
            f"got {given}"
        )
    predicting = F.pad(labels[:, 1:] != -100, (0, 1)).to(attended.device) & attended
    if not predicting.any(1).all():
        row = (~predicting.any(1)).nonzero()[0].item()
        raise ValueError(f"labels: expected at least one that is not -100 in each sample, got none in row {row}")
    return predicting


class _SharedRowsSeeMore(Exception):
    """A mask lets rows before the visual tokens see these or later tokens, so that the rows can't be shared."""


class _LogitsAreMore(Exception):
    """Logits are not just a product with the head's weights, but capped or scaled; or the weights are on another
    device. So they can't be computed from hidden states and weights."""


class _Samples:
    """A batch, with what all groups of candidates need to know about it.

    shared: how many of the first rows are the same in all runs. plan: the other rows of a continuation. columns: int
    ``[B, shared + T]``, the token of each of its keys, or -1. sequence, row, kept_row: int ``[P]``, of each predicting
    row its sequence, its row in the full run and that among the ``T`` of a continuation. prompt: tokens before the
    model's own answer.
    """

    def __init__(self, parts: Parts, steps: list[nn.Module], questions: Questions):
        self.inputs, self.attended, self.visual, predicting, self.prompt = questions
        self.sequence, self.row = predicting.nonzero().unbind(1)
        differs = (self.attended & self.visual) | predicting  # from the first of these on
        masks = kind_of_masks(parts.config._attn_implementation)
        self.arguments = [Arguments(step) for step in steps]
        # Where images come in by cross-attention, they change the first rows as well.
        may_share = masks == "dense" and all(x.cache is not None for x in self.arguments) and not parts.cross_attention
        self.share(int(differs.int().argmax(1).min()) if may_share else 0)

    def share(self, rows: int) -> None:
        self.shared, batch, device = rows, len(self.visual), self.visual.device
        keep = self.attended & ~self.visual
        keep[:, :rows] = False
        counts = keep.sum(1)
        length = int(counts.max())
        self.plan = plan_compaction(keep, length, pad="left")
        self.padded = int(counts.min()) < length
        before = torch.arange(rows, dtype=torch.int32, device=device).expand(batch, rows)
        self.columns = torch.cat((before, self.plan.source), dim=1)
        self.kept_row = (keep.cumsum(1) + (length - 1 - counts[:, None]))[self.sequence, self.row]


def _run_group(
    model: nn.Module, parts: Parts, samples: _Samples, candidates: list[int], head: nn.Linear | None
) -> tuple[Tensor, Tensor]:
    """``[C, P, V]`` of the continuations and ``[P, V]`` of the full run; see ``_run``."""
    try:
        full, withdrawn = _run(model, parts, samples, candidates, head)
    except _SharedRowsSeeMore:
        samples.share(0)
        full, withdrawn = _run(model, parts, samples, candidates, head)
    return withdrawn, full


# From what ``_run_group`` returns, and the head, to numbers on the CPU: fp32 [C, P].
Compare = Callable[[Tensor, Tensor, nn.Linear | None], tuple[Tensor, ...]]


def compare_runs(withdrawn: Tensor, full: Tensor, head: nn.Linear | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both divergences and whether the top tokens differ, each fp32 ``[C, P]``, on the CPU.

    ``head``: given where logits are large. They are then never made all at once, at the cost of three products with the
    head's weights instead of one.
    """
    if head is None:
        return compare_logits(withdrawn, full)
    weight, biases = head.weight, {"p_bias": head.bias, "q_bias": head.bias}
    kl = linear_kl_divergence(withdrawn, weight, full, weight, **biases)
    reverse_kl = linear_kl_divergence(full, weight, withdrawn, weight, **biases)
    differ = torch.ne(top_tokens(withdrawn, head), top_tokens(full, head)).float()
    return kl.cpu(), reverse_kl.cpu(), differ.cpu()


def compare_logits(withdrawn: Tensor, full: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both divergences and whether the top tokens differ, each fp32 ``[C, P]`` on the CPU, of ``[C, P, V]`` and
    ``[P, V]``."""
    differ = (withdrawn.argmax(-1) != full.argmax(-1)).float()
    return kl_divergence(withdrawn, full).cpu(), kl_divergence(full, withdrawn).cpu(), differ.cpu()


def top_tokens(hidden: Tensor, head: nn.Linear) -> Tensor:
    """int64 ``[..., P]`` from ``[..., P, H]``."""
    rows = max(1, LOGITS_BYTES // (head.out_features * hidden.itemsize))
    tops = [head(x).argmax(-1) for x in hidden.flatten(0, -2).split(rows)]
    return torch.cat(tops).view(hidden.shape[:-1])


def _run(
    model: nn.Module, parts: Parts, samples: _Samples, candidates: list[int], head: nn.Linear | None
) -> tuple[Tensor, Tensor]:
    """Logits of the predicting rows: ``[P, V]`` of the full run and ``[C, P, V]`` of the continuations. If there is a
    ``head``, what it would be given instead: ``[P, H]`` and ``[C, P, H]``."""
    rows = _Continuations(samples, candidates)
    hooks, ends = [], []

    def keep_one_row(module: nn.Module, args: tuple) -> tuple:
        ends.append(args[0][:, -1])
        return (args[0][:1], *args[1:])

    try:
        if parts.cross_attention:
            end = len(parts.layers)  # the full run leaves out nothing
            hooks.append(CrossAttentionHooks(parts, lambda training: {end: Withdraw(end)}, end))
            hooks[0].place()
        for i, step in enumerate(_steps(parts)):
            hooks.append(step.register_forward_pre_hook(partial(rows.before_step, i), with_kwargs=True))
            hooks.append(step.register_forward_hook(partial(rows.after_step, i)))
        hooks.append(parts.layers[-1].register_forward_hook(rows.after_last_layer))
        if head is not None:
            hooks.append(head.register_forward_pre_hook(keep_one_row))
        result = model(**samples.inputs | {"use_cache": False, "logits_to_keep": 1}).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    if head is not None:
        weight = head.weight
        is_whole = type(weight) is nn.Parameter and len(weight) == result.shape[-1]
        if len(ends) != 1 or not is_whole or weight.device != ends[0].device:
            raise _LogitsAreMore
        if not result.equal(head(ends[0][:1]).to(result.dtype)):
            raise _LogitsAreMore
        (result,) = ends
    runs = result.unflatten(0, (1 + len(candidates), -1))
    return runs[0], runs[1:]


class _SharedKeys:
    """Takes the place of a cache: hands the keys and values of shared rows from the full run of a layer to the run of
    the continuations right after it."""

    def __init__(self, length: int):
        self.length, self.copies = length, 0  # 0: the full run

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.copies:
            self.keys, self.values = keys[..., : self.length, :], values[..., : self.length, :]
            return keys, values
        before = (x.repeat(self.copies, 1, 1, 1) for x in (self.keys, self.values))
        return tuple(torch.cat(pair, dim=-2) for pair in zip(before, (keys, values)))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length if self.copies else 0


class _Continuations:
    """The text-only continuations of one batch, candidate by candidate: ``[joined * B, T, H]``."""

    def __init__(self, samples: _Samples, candidates: list[int]):
        self.samples, self.candidates = samples, candidates
        written = samples.padded or samples.shared > 0  # then the plain causal mask has to be written out
        self.stage = Stage(samples.visual.shape[1], samples.plan, samples.columns, padded=written)
        self.keys = _SharedKeys(samples.shared) if samples.shared else None
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        self.checked: list[Any] = []  # masks

    def before_step(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A candidate joins with the text rows that enter its layer in the full run."""
        arguments = self.samples.arguments[index]
        args, kwargs = args[:1], dict(zip(arguments.names[1:], args[1:])) | kwargs
        if index in self.candidates:
            hidden = args[0] if args else kwargs[arguments.names[0]]
            self.kwargs, joining = self.stage(kwargs, hidden)
            self.hidden = joining if self.hidden is None else torch.cat((self.hidden.to(joining.device), joining))
        elif self.hidden is not None:
            self.kwargs, _ = self.stage(kwargs)
        if self.hidden is None:
            return None
        self._check(kwargs.get(arguments.mask))
        self.kwargs.pop(arguments.names[0], None)
        if self.keys is None:
            return args, kwargs
        self.keys.copies = 0
        return args, kwargs | {arguments.cache: self.keys}

    def after_step(self, index: int, module: nn.Module, args: tuple, output: Any) -> None:
        if self.hidden is None:
            return
        batch = len(self.samples.visual)
        copies = len(self.hidden) // batch
        kwargs = {name: _repeat(name, x, batch, copies) for name, x in self.kwargs.items()}
        if self.keys is not None:
            self.keys.copies, kwargs[self.samples.arguments[index].cache] = copies, self.keys
        if FIRST_WITHOUT in kwargs:
            kwargs[FIRST_WITHOUT] = 0
        with _whole(module):
            result = module.forward(self.hidden, **kwargs)  # not module(...), which would run these hooks again
        self.hidden = result[0] if isinstance(result, tuple) else result

    def after_last_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hands the predicting rows of all runs to the rest of the model, which makes logits of them as of any."""
        hidden, samples = output[0] if isinstance(output, tuple) else output, self.samples
        runs = self.hidden.unflatten(0, (-1, len(samples.visual)))
        withdrawn = runs[:, samples.sequence, samples.kept_row].flatten(0, 1)
        ends = torch.cat((hidden[samples.sequence, samples.row], withdrawn))[:, None]
        return (ends, *output[1:]) if isinstance(output, tuple) else ends

    def _check(self, mask: Any) -> None:
        """Raises if a mask lets shared rows, or tokens of an answer, see tokens that come after them."""
        shared, prompt = self.samples.shared, self.samples.prompt
        if mask is None or any(mask is x for x in self.checked):
            return
        self.checked.append(mask)
        if shared and bool(_visible(mask, slice(0, shared), slice(shared, None)).any()):
            raise _SharedRowsSeeMore
        check_later_tokens(mask, prompt, self.samples.visual.shape[1])


def check_later_tokens(mask: Any, prompt: int, tokens: int) -> None:
    """Raises ValueError where a mask lets an answer, after ``prompt`` of the ``tokens``, see later tokens."""
    if prompt < tokens and _visible(mask, slice(prompt - 1, tokens), slice(prompt, tokens)).triu(1).any():
        raise ValueError(
            "positions: expected a model whose answers see no later tokens, as with a prefix of them they do; "
            "got one that needs to be told where its answer begins: make samples with its processor and labels, "
            "and take positions='answer'"
        )


def _visible(mask: Tensor | BlockMask, rows: slice, columns: slice) -> Tensor:
    """bool ``[B, heads, rows, columns]`` of a mask of transformers."""
    if isinstance(mask, BlockMask):
        batch, heads, q, keys = mask.shape
        device = mask.kv_indices.device
        at = [torch.arange(n, device=device) for n in (batch, heads)]
        at += [torch.arange(n, device=device)[part] for n, part in ((q, rows), (keys, columns))]
        grid = torch.meshgrid(*at, indexing="ij")
        return mask.mask_mod(*grid)
    if mask.ndim == 2:  # flash attention is causal by itself
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    part = mask[..., rows, columns]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """In this context, all weights of a module are on this rank: FSDP2 shards them again as soon as it has run."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _repeat(name: str, value: Any, batch: int, copies: int) -> Any:
    """A compacted keyword argument of a decoder layer, for ``copies`` batches one after another."""
    if isinstance(value, (tuple, list)):
        return type(value)(_repeat(name, x, batch, copies) for x in value)
    if not isinstance(value, Tensor):
        return value
    dim = -3 if name.startswith("position_embeddings") else -2 if name == "position_ids" else 0
    return torch.cat([value] * copies, dim) if value.dim() > 1 and value.shape[dim] == batch else value
