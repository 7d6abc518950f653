"""Answers of a demo's model, and what withdrawal before every layer does to them."""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from vtw_kernels.demo.data import MAX_NEW_TOKENS, Batch
from vtw_kernels.layer_search.settings import Setting


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, batches: list[Batch], layer: Any
) -> tuple[list[str], Tensor]:
    """Greedy answers with the visual tokens withdrawn before ``layer``, or under what else ``compare`` takes, and the
    log-probabilities of their first tokens, float32 [questions, vocabulary]."""
    answers, first = [], []
    with Setting.of(model, layer, None).under(model, None, None):
        for batch in batches:
            output = model.generate(
                **batch.inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = output.sequences[:, batch.inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            first.append(output.logits[0].float().log_softmax(-1))
    return answers, torch.cat(first)


def accuracy(answers: list[str], batches: list[Batch]) -> dict[str, float]:
    """Share of exact matches among all questions ("all") and those of each kind."""
    right = defaultdict(list)
    samples = [(kind, wanted) for batch in batches for kind, wanted in zip(batch.kinds, batch.answers)]
    for (kind, wanted), given in zip(samples, answers, strict=True):
        right["all"].append(given == wanted)
        right[kind].append(given == wanted)
    return {kind: round(sum(matches) / len(matches), 4) for kind, matches in right.items()}


def withdrawal_curve(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, batches: list[Batch]
) -> dict:
    """Accuracy, and mean KL(withdrawn || full) of the first answer token in nats, for withdrawal before every layer.

    For comparison: accuracy never withdrawn ("full"), with image features that are zero, and of always giving the most
    common answer to the kind of question.
    """
    layers = model.config.text_config.num_hidden_layers
    answers, full = answer(model, tokenizer, batches, layers)
    curve = {"questions": len(answers), "full": accuracy(answers, batches), "layers": {}}
    for layer in trange(1, layers, desc="withdrawn before every layer", mininterval=5):
        answers, withdrawn = answer(model, tokenizer, batches, layer)
        kl = F.kl_div(full, withdrawn, log_target=True, reduction="batchmean").item()
        curve["layers"][layer] = {"kl": round(kl, 6), "accuracy": accuracy(answers, batches)}

    hook = model.model.multi_modal_projector.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
    curve["image features zeroed"] = accuracy(answer(model, tokenizer, batches, layers)[0], batches)
    hook.remove()
    wanted = defaultdict(list)
    for batch in batches:
        for kind, text in zip(batch.kinds, batch.answers):
            wanted[kind].append(text)
    guesses = [max(sorted(set(wanted[kind])), key=wanted[kind].count) for batch in batches for kind in batch.kinds]
    curve["most common answer of each kind"] = accuracy(guesses, batches)
    return curve
