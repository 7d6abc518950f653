"""Questions about images and videos, from a JSONL file or a data set, and what a model's processor makes of them."""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.image_utils import load_image


class BadRecord(ValueError):
    """One record can't be used."""


class Record(NamedTuple):
    """A question. name: where it is from, as "photos.jsonl:3". images: files, or PIL images of a data set. videos: files,
    or lists of the files of their frames."""

    name: str
    question: str
    images: list[Path | Image.Image]
    videos: list[Path | list[Path]]
    answer: str | None

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that decides its scores: text, and the bytes of its images and videos."""
        shape = [len(self.images), [len(x) if isinstance(x, list) else None for x in self.videos]]
        state = hashlib.sha256(json.dumps([self.question, self.answer, shape]).encode())
        frames = [frame for video in self.videos for frame in (video if isinstance(video, list) else [video])]
        for part in (*self.images, *frames):
            if isinstance(part, Image.Image):
                content = f"{part.mode} {part.size} ".encode() + part.tobytes()
            else:
                content = part.read_bytes()
            state.update(hashlib.sha256(content).digest())
        return state.hexdigest()

    def image_bytes(self) -> list[bytes]:
        """The images as files, for a report."""
        return [png(image) if isinstance(image, Image.Image) else image.read_bytes() for image in self.images]


class JsonLines:
    """The records of a file with one JSON object a line; empty lines don't count.

    Args:
        path: the file.
        folder: what names of images and videos are relative to; by default the file's folder.
        limit: only so many of the first.

    Raises:
        OSError: it can't be read.
        BadRecord: on access, of a record that is not as README.md says, or whose files are not there.
    """

    def __init__(self, path: Path, folder: Path | None = None, limit: int | None = None):
        self.path, self.folder = path, path.parent if folder is None else folder
        lines = enumerate(path.read_bytes().split(b"\n"), 1)
        self.lines = [(number, line) for number, line in lines if line.strip()][:limit]

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        return f"{self.path}:{self.lines[index][0]}"

    def __getitem__(self, index: int) -> Record:
        name = self.name(index)
        try:
            fields = json.loads(self.lines[index][1])
        except ValueError as error:
            raise BadRecord(f"{name}: expected a JSON object, got {error}") from error
        return make_record(name, fields, self.folder)

    def check(self) -> None:
        """Raises BadRecord that names the first few records that can be seen to be bad without opening an image."""
        bad = []
        for index in range(len(self)):
            try:
                self[index]
            except BadRecord as error:
                bad.append(str(error))
        if bad:
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise BadRecord(f"{len(bad)} of {len(self)} records are bad (--skip-bad): {'; '.join(bad[:5])}{more}")


class DataSet:
    """The records of a data set that the package datasets loads: from the Hub, or from a folder.

    Raises:
        ValueError, OSError: there is no such package, data set or split.
        BadRecord: on access, as of ``JsonLines``.
    """

    def __init__(self, name: str, subset: str | None, split: str, folder: Path | None, limit: int | None = None):
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"data: expected a JSONL file, or a data set and the package datasets installed, got {name}"
            ) from error
        self.source, self.folder = f"{name}[{split}]", folder or Path()
        self.rows = load_dataset(name, subset, split=split)
        self.length = len(self.rows) if limit is None else min(limit, len(self.rows))

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{self.source}:{index}"

    def __getitem__(self, index: int) -> Record:
        try:
            row = self.rows[index]
        except Exception as error:  # whatever a decoder of images raises
            raise BadRecord(f"{self.name(index)}: can't be read: {error}") from error
        return make_record(self.name(index), row, self.folder)

    def check(self) -> None:
        """Nothing: reading a row decodes its images."""


def load_records(
    data: str, folder: Path | None = None, subset: str | None = None, split: str = "train", limit: int | None = None
) -> JsonLines | DataSet:
    """A JSONL file, or else a data set by its id or folder; see there. ValueError for no records."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"images: expected a folder, got {folder}")
    is_file = Path(data).is_file()
    records = JsonLines(Path(data), folder, limit) if is_file else DataSet(data, subset, split, folder, limit)
    if not len(records):
        raise ValueError(f"data: expected at least one record, got none in {data}")
    return records


def make_record(name: str, fields: Any, folder: Path) -> Record:
    """A record from its fields; files are looked for in ``folder``. Raises BadRecord."""
    if not isinstance(fields, Mapping):
        raise BadRecord(f"{name}: expected a JSON object, got {type(fields).__name__}")

    def text(field: str) -> str:
        if not isinstance(fields[field], str) or not fields[field].strip():
            raise BadRecord(f"{name}: {field}: expected text, got {fields[field]!r}")
        return fields[field]

    def find(field: str, value: Any) -> Any:
        if isinstance(value, Image.Image):
            return value
        if not isinstance(value, str):
            raise BadRecord(f"{name}: {field}: expected the name of a file, got {type(value).__name__}")
        if not (folder / value).is_file():
            raise BadRecord(f"{name}: {field}: there is no file {folder / value}")
        return folder / value

    if fields.get("question") is None:
        raise BadRecord(f"{name}: question: expected text, got none")
    images, videos = [], []
    for field in ("image", "images"):
        given = fields.get(field)
        images += [find(field, x) for x in (given if isinstance(given, list) else [given] if given is not None else [])]
    if video := fields.get("video"):
        videos.append([find("video", x) for x in video] if isinstance(video, list) else find("video", video))
    if not images and not videos:
        raise BadRecord(f"{name}: expected image, images or video, got {', '.join(fields) or 'no field'}")
    return Record(name, text("question"), images, videos, None if fields.get("answer") is None else text("answer"))


class Encoder:
    """Makes a model's inputs of a record.

    Args:
        processor: the model's.
        prompt_template: the prompt, with ``{question}`` and the model's placeholders in it. None: the processor's chat
            template.

    Raises:
        ValueError: a processor that takes no images, or has no chat template and no prompt template is given.
    """

    def __init__(self, processor: Any, prompt_template: str | None = None):
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"model: expected a processor of images and text beside it, got {type(processor).__name__}"
            )
        if prompt_template is None and not processor.chat_template:
            raise ValueError(
                f"prompt_template: expected one, as {type(processor).__name__} has no chat template; for example "
                "'USER: <image>\\n{question} ASSISTANT:', with the image token that the model knows"
            )
        if prompt_template is not None and "{question}" not in prompt_template:
            raise ValueError(f"prompt_template: expected {{question}} in it, got {prompt_template!r}")
        self.processor, self.prompt_template = processor, prompt_template
        self.dtype = torch.float32  # of pixels, as the model computes: not every vision tower converts them

    def __call__(self, record: Record, with_answer: bool = False) -> dict[str, Tensor]:
        """The prompt; or the prompt and the record's answer, with ``labels``, -100 but for the tokens of the answer.

        Raises:
            BadRecord: an image can't be read, there is no answer, or the chat template does not show it.
            ValueError, OSError: of the processor.
        """
        images = [_open(record, image) for image in record.images]
        prompt = self._text(record, with_answer=False)
        if not with_answer:
            return self._inputs(prompt, images, record)
        if record.answer is None:
            raise BadRecord(f"{record.name}: answer: expected text, got none")
        full = self._text(record, with_answer=True)
        if record.answer.strip() not in full[len(os.path.commonprefix([prompt, full])) :]:
            raise BadRecord(f"{record.name}: answer: the chat template does not end with it, but in {full[-80:]!r}")
        inputs = self._inputs(full, images, record)
        prompt_ids, ids = self._inputs(prompt, images, record)["input_ids"][0], inputs["input_ids"][0]
        # Not all of the prompt need come before an answer: some templates ask for one that thinks first.
        shared = len(os.path.commonprefix([prompt_ids.tolist(), ids.tolist()]))
        labels = inputs["input_ids"].clone()
        labels[:, :shared] = -100
        return inputs | {"labels": labels}

    def _text(self, record: Record, with_answer: bool) -> str:
        if self.prompt_template is not None:
            prompt = self.prompt_template.replace("{question}", record.question)
            space = "" if prompt[-1:].isspace() else " "
            return f"{prompt}{space}{record.answer}" if with_answer else prompt
        content = [{"type": "image"} for _ in record.images] + [{"type": "video"} for _ in record.videos]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": record.question}]}]
        if not with_answer:
            return self.processor.apply_chat_template(chat, add_generation_prompt=True)
        chat.append({"role": "assistant", "content": [{"type": "text", "text": record.answer}]})
        # What comes behind the end of the turn is no part of the answer.
        return self.processor.apply_chat_template(chat).rstrip()

    def _inputs(self, text: str, images: list[Image.Image], record: Record) -> dict[str, Tensor]:
        options: dict[str, Any] = {}
        if images:
            options["images"] = [images]  # of one text; some processors take no flat list
        if record.videos:
            # Names of frames would be taken for videos of their own. Frames are a choice that was made.
            are_frames = any(isinstance(video, list) for video in record.videos)
            options["videos"] = [
                [_open(record, frame) for frame in video] if isinstance(video, list) else str(video)
                for video in record.videos
            ]
            options |= {"do_sample_frames": False} if are_frames else {}
        start = self.processor.tokenizer.bos_token
        if start is not None and text.startswith(start):
            options["add_special_tokens"] = False
        inputs = self.processor(text=text, return_tensors="pt", **options)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _open(record: Record, image: Path | Image.Image) -> Image.Image:
    """In RGB and upright."""
    try:
        return load_image(image if isinstance(image, Image.Image) else str(image))
    except Exception as error:  # a broken file makes Pillow raise about anything
        raise BadRecord(f"{record.name}: image: {image} can't be read: {error}") from error


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
