"""``lmms-eval --model vtw_hf``: any vision-language model of transformers with a chat template, under withdrawal."""

from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtw_kernels.integration import TopAttention, apply

LLAVA_ONLY = ("image_aspect_ratio",)  # what some tasks tell LLaVA's own code of 2024


class VtwHf(lmms):
    """``--model_args pretrained=llava-hf/llava-1.5-7b-hf,layer=16``; under ``accelerate launch``, ranks share the
    questions.

    Args:
        pretrained: name or folder of a model with its processor, whose chat template makes the prompts.
        layer: as ``withdraw`` takes it: the layer before which visual tokens leave, the path of a search, or nothing
            for what the model's config says. The model's number of layers withdraws nothing: the plain model.
        keep: what share, or number, of each image's tokens stays, those that the last text token attends to most. By
            default none.
        dtype, attn_implementation, device_map: as ``from_pretrained`` takes them. device: by default the rank's.
        batch_size: questions at a time.

    Raises:
        TypeError, ValueError: what ``withdraw`` refuses.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        layer: int | str | None = None,
        keep: float | int | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device_map: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.batch_size = torch.device(device or self.accelerator.device), int(batch_size)
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map
        )
        self.model = model.eval() if device_map else model.eval().to(self.device)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.withdrawal = apply(self.model, layer if keep is None else TopAttention(layer, keep))

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; those that follow one another and are generated alike go in batches."""
        answers = []
        with tqdm(total=len(requests), desc="vtw_hf", disable=self.rank != 0) as progress:
            for settings, alike in groupby((request.args for request in requests), key=lambda args: args[2]):
                alike = list(alike)
                for begin in range(0, len(alike), self.batch_size):
                    batch = alike[begin : begin + self.batch_size]
                    answers += self._answer([self._messages(*args) for args in batch], dict(settings))
                    progress.update(len(batch))
        return answers

    def _messages(self, context: str, make_messages: Any, settings: dict, doc_id: int, task: str, split: str) -> Any:
        return ChatMessages(messages=make_messages(self.task_dict[task][split][doc_id]))

    def _answer(self, batch: list[ChatMessages], settings: dict[str, Any]) -> list[str]:
        until = settings.pop("until", [])
        settings = {name: value for name, value in settings.items() if name not in LLAVA_ONLY}
        if not settings.setdefault("do_sample", settings.get("temperature", 0) > 0):
            settings |= {"temperature": None, "top_p": None}
        media = [messages.extract_media() for messages in batch]
        if any(audios for _, _, audios in media):
            raise ValueError("vtw_hf: expected questions about images and videos, got one about sound")
        texts = self.processor.apply_chat_template(
            [messages.to_hf_messages() for messages in batch], tokenize=False, add_generation_prompt=True
        )
        shown = {
            "images": [image for images, _, _ in media for image in images],
            "videos": [video for _, videos, _ in media for video in videos],
        }
        inputs = self.processor(
            text=texts, padding=True, padding_side="left", return_tensors="pt",
            **{name: seen for name, seen in shown.items() if seen},
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        generated = self.model.generate(**inputs, **settings)
        answers = self.processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [first_part(answer, [until] if isinstance(until, str) else until) for answer in answers]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("vtw_hf: expected a task with output_type generate_until, got loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("vtw_hf: expected a task with output_type generate_until, got one of several rounds")


def first_part(answer: str, ends: list[str]) -> str:
    """What comes before the first of ``ends``."""
    for end in filter(None, ends):
        answer = answer.partition(end)[0]
    return answer
