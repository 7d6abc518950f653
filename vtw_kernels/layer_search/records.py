"""Questions about images and videos, from a JSON file or a data set, and what a model's processor makes of them."""

import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin
from transformers.image_utils import load_image

# What one calls who speaks, and what chat templates call them.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}
PLACES = re.compile("(<image>|<video>)")  # in a text, where an image or a video is to stand
SHOWN_CHARACTERS = 80


class BadRecord(ValueError):
    """One record can't be used."""


class Record(NamedTuple):
    """A question. name: where it is from, as "photos.jsonl:3". chat: what was said up to the question, with it, as chat
    templates take it: text, and places for images and videos. images: in the order of their places, files, what is in a
    file, or PIL images of a data set. videos: likewise, files, or lists of the files of their frames. group: the kind
    of task that it is of."""

    name: str
    chat: list[dict[str, Any]]
    images: list[Path | bytes | Image.Image]
    videos: list[Path | list[Path]]
    answer: str | None
    group: str | None

    @property
    def question(self) -> str:
        return text_of(self.chat[-1])

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that decides its scores: text, and the bytes of its images and videos."""
        shape = [len(self.images), [len(x) if isinstance(x, list) else None for x in self.videos]]
        state = hashlib.sha256(json.dumps([self.chat, self.answer, shape]).encode())
        frames = [frame for video in self.videos for frame in (video if isinstance(video, list) else [video])]
        for part in (*self.images, *frames):
            if isinstance(part, Image.Image):
                part = f"{part.mode} {part.size} ".encode() + part.tobytes()
            state.update(hashlib.sha256(part.read_bytes() if isinstance(part, Path) else part).digest())
        return state.hexdigest()

    def image_bytes(self) -> list[bytes]:
        """The images as files, for a report."""
        return [
            png(x) if isinstance(x, Image.Image) else x.read_bytes() if isinstance(x, Path) else x for x in self.images
        ]


class JsonFile:
    """The records of a file with one JSON object a line, where empty lines don't count, or of a JSON array of objects.

    Args:
        path: the file.
        folder: what names of images and videos are relative to; by default the file's folder.
        limit, seed: as for ``load_records``.

    Raises:
        OSError: it can't be read.
        ValueError: an array that is no JSON.
        BadRecord: on access, of a record that is not as README.md says, or whose files are not there.
    """

    def __init__(self, path: Path, folder: Path | None = None, limit: int | None = None, seed: int | None = None):
        self.folder = path.parent if folder is None else folder
        entries = _read_entries(path)
        self.entries = [entries[i] for i in _choose(len(entries), limit, seed)]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index][0]

    def __getitem__(self, index: int) -> Record:
        name, fields = self.entries[index]
        if isinstance(fields, bytes):
            try:
                fields = json.loads(fields)
            except (ValueError, RecursionError) as error:
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
        BadRecord: on access, as of ``JsonFile``.
    """

    def __init__(
        self,
        name: str,
        subset: str | None,
        split: str,
        folder: Path | None,
        limit: int | None = None,
        seed: int | None = None,
    ):
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"data: expected a JSON file, or a data set and the package datasets installed, got {name}"
            ) from error
        self.source, self.folder = f"{name}[{split}]", folder or Path()
        self.rows = load_dataset(name, subset, split=split)
        self.chosen = _choose(len(self.rows), limit, seed)

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        return f"{self.source}:{self.chosen[index]}"

    def __getitem__(self, index: int) -> Record:
        try:
            row = self.rows[self.chosen[index]]
        except Exception as error:  # whatever a decoder of images raises
            raise BadRecord(f"{self.name(index)}: can't be read: {error}") from error
        return make_record(self.name(index), row, self.folder)

    def check(self) -> None:
        """Nothing: reading a row decodes its images."""


def load_records(
    data: str,
    folder: Path | None = None,
    subset: str | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
) -> JsonFile | DataSet:
    """A JSON file, or else a data set by its id or folder; see there.

    Args:
        limit: only so many records: the first.
        seed: or, drawn with it, any; in the order of the file.

    Raises:
        ValueError: no records, a limit below 1, a seed without a limit; or as of the classes.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if seed is not None and limit is None:
        raise ValueError("seed: expected a limit with it, which says how many records to draw, got none")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"images: expected a folder, got {folder}")
    is_file = Path(data).is_file()
    records = (
        JsonFile(Path(data), folder, limit, seed) if is_file else DataSet(data, subset, split, folder, limit, seed)
    )
    if not len(records):
        raise ValueError(f"data: expected at least one record, got none in {data}")
    return records


def _choose(total: int, limit: int | None, seed: int | None) -> list[int]:
    if seed is None or limit >= total:
        return list(range(total))[:limit]
    return sorted(random.Random(seed).sample(range(total), limit))


def _read_entries(path: Path) -> list[tuple[str, Any]]:
    """Names and records: lines not yet read, or the values of an array."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = [(f"{path}:{number}", line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not content.lstrip().startswith(b"["):
        return lines
    try:
        return [(f"{path}[{index}]", value) for index, value in enumerate(json.loads(content))]
    except (ValueError, RecursionError) as error:
        if _is_json(lines[0][1]):  # a line that is an array: bad, but alone
            return lines
        raise ValueError(f"data: expected a JSON array, or one JSON object a line, got {error} in {path}") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def make_record(name: str, fields: Any, folder: Path) -> Record:
    """A record from its fields; files are looked for in ``folder``. Raises BadRecord."""
    try:
        return Record(name, *_read_fields(fields, folder))
    except BadRecord as error:
        raise BadRecord(f"{name}: {error}") from error
    except Exception as error:  # records are whatever people write
        raise BadRecord(f"{name}: can't be read: {type(error).__name__}: {brief(str(error))}") from error


def _read_fields(fields: Any, folder: Path) -> tuple:
    """``chat`` to ``group`` of a record."""
    if not isinstance(fields, Mapping):
        raise BadRecord(f"expected a JSON object, got {type(fields).__name__}")
    said = [name for name in ("question", "messages", "conversations") if fields.get(name) is not None]
    if len(said) != 1:
        given = " and ".join(said) or ", ".join(map(brief, fields)) or "no field"
        raise BadRecord(f"expected question, messages or conversations, got {given}")
    (field,) = said
    chat, answer = _split_chat(
        field, [("user", fields[field])] if field == "question" else _turns(field, fields[field])
    )
    if fields.get("answer") is not None:
        if answer is not None:
            raise BadRecord(f"answer: expected one, got another one at the end of {field}")
        answer = _text("answer", fields["answer"])

    files = {"image": [], "video": []}
    beside = {  # the text, in the order of its places for them
        "image": [*_listed(fields.get("image")), *_listed(fields.get("images"))],
        "video": [fields["video"]] if fields.get("video") else _listed(fields.get("videos")),
    }
    left = {kind: iter(values) for kind, values in beside.items()}
    for turn in chat:
        for part in turn["content"]:
            if part["type"] == "text":
                continue
            value = part.pop("file")
            if value is None:
                if beside["video"] and not beside["image"]:
                    part["type"] = "video"  # LLaVA's data have <image> for both
                value = next(left[part["type"]], None)
            if value is None:
                raise BadRecord(
                    f"{part['type']}: expected one for each place in {field}, got {len(beside[part['type']])}"
                )
            files[part["type"]].append(_find(part["type"], value, folder))
    first = next(turn for turn in chat if turn["role"] == "user")
    for kind in ("video", "image"):  # those that have no place in the text go to its front
        rest, given = list(left[kind]), len(beside[kind])
        if 0 < len(rest) < given:
            raise BadRecord(f"{kind}: expected {given - len(rest)}, as there are places in {field}, got {given}")
        first["content"][:0] = [{"type": kind} for _ in rest]
        files[kind][:0] = [_find(kind, value, folder) for value in rest]
    if not files["image"] and not files["video"]:
        raise BadRecord(f"expected image, images, video or videos, got {', '.join(map(brief, fields))}")
    return chat, files["image"], files["video"], answer, _read_group(fields)


def _read_group(fields: Mapping[str, Any]) -> str | None:
    """Its field ``group``, or ``task``: text, or the number of a class."""
    field = next((name for name in ("group", "task") if fields.get(name) is not None), None)
    if field is None:
        return None
    value = fields[field]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return " ".join(_text(field, value).split())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _split_chat(field: str, turns: list[tuple[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """The chat up to the last question, and the answer to it, if there is one."""
    chat = [{"role": role, "content": list(_parts(field, content))} for role, content in turns]
    answer = None
    if chat[-1]["role"] == "assistant":
        last = chat.pop()
        answer = text_of(last)
        if any(part["type"] != "text" for part in last["content"]):
            raise BadRecord(f"{field}: expected an answer of text, got one with images or videos")
    if not chat or chat[-1]["role"] != "user" or not text_of(chat[-1]):
        raise BadRecord(f"{field}: expected a question of the user's at the end, with or without an answer, got none")
    return chat, answer


def _turns(field: str, turns: Any) -> list[tuple[str, Any]]:
    """Who says what, of OpenAI's ``{"role": ..., "content": ...}`` or LLaVA's ``{"from": ..., "value": ...}``."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"{field}: expected a list of what was said, got {brief(repr(turns))}")
    result = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadRecord(f"{field}: expected JSON objects, got {type(turn).__name__}")
        role = turn.get("role", turn.get("from"))
        if role not in ROLES:
            raise BadRecord(f"{field}: expected a role of {', '.join(ROLES)}, got {brief(repr(role))}")
        result.append((ROLES[role], turn.get("content", turn.get("value"))))
    return result


def _parts(field: str, content: Any) -> Iterator[dict[str, Any]]:
    """What somebody says, as parts of a chat template's content, in order; images and videos with their file, or with
    None if that is in a field of the record."""
    for part in content if isinstance(content, list) else [content]:
        part = part if isinstance(part, Mapping) else {"type": "text", "text": part}
        kind = part.get("type")
        if kind == "text":
            text = _text(field, part.get("text"))
            pieces = PLACES.split(text)
            for piece in filter(None, map(str.strip, pieces)) if len(pieces) > 1 else pieces:
                is_place = PLACES.fullmatch(piece)
                yield {"type": piece[1:-1], "file": None} if is_place else {"type": "text", "text": piece}
        elif kind in ("image", "image_url", "video", "video_url"):
            file = next((part[name] for name in (kind, "url", "path") if part.get(name) is not None), None)
            yield {
                "type": kind.removesuffix("_url"),
                "file": file.get("url") if isinstance(file, Mapping) else file,
            }
        else:
            expected = "parts of type text, image, image_url, video or video_url"
            raise BadRecord(f"{field}: expected {expected}, got {brief(repr(kind))}")


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{field}: expected text, got {brief(repr(value))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{field}: expected text, got half of a surrogate pair in {brief(repr(value))}") from error
    return value


def _find(field: str, value: Any, folder: Path) -> Any:
    """An image or a video: a file, or what is in a data URI."""
    if isinstance(value, Image.Image):
        return value
    if field == "video" and isinstance(value, list):
        return [_find(field, frame, folder) for frame in value]
    if not isinstance(value, str):
        raise BadRecord(f"{field}: expected the name of a file, got {type(value).__name__}")
    if field == "image" and value.startswith("data:"):
        try:
            with urlopen(value) as file:
                return file.read()
        except ValueError as error:
            raise BadRecord(f"{field}: {brief(value)} can't be decoded: {error}") from error
    path = folder / value
    if "://" in value:
        address = urlsplit(value)
        if address.scheme != "file" or address.netloc not in ("", "localhost"):
            raise BadRecord(
                f"{field}: expected a file, or its file:// or data: URI, got {brief(value)}: download it first"
            )
        path = Path(url2pathname(address.path))
    if not os.path.isfile(path):
        raise BadRecord(f"{field}: there is no file {brief(str(path))}")
    return path


def text_of(turn: dict[str, Any]) -> str:
    """What is said in a turn of a chat."""
    return "\n".join(part["text"] for part in turn["content"] if part["type"] == "text")


def brief(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """For a message: of a data URI, say, only its beginning; and so that it can be printed."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


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
        images = [_open(image) for image in record.images]
        prompt = self._text(record, with_answer=False)
        if not with_answer:
            return self._inputs(prompt, images, record)
        if record.answer is None:
            raise BadRecord("answer: expected text, got none")
        full = self._text(record, with_answer=True)
        if record.answer.strip() not in full[len(os.path.commonprefix([prompt, full])) :]:
            raise BadRecord(f"answer: the chat template does not end with it, but in {full[-80:]!r}")
        inputs = self._inputs(full, images, record)
        prompt_ids, ids = self._inputs(prompt, images, record)["input_ids"][0], inputs["input_ids"][0]
        # Not all of the prompt need come before an answer: some templates ask for one that thinks first.
        shared = len(os.path.commonprefix([prompt_ids.tolist(), ids.tolist()]))
        labels = inputs["input_ids"].clone()
        labels[:, :shared] = -100
        return inputs | {"labels": labels}

    def _text(self, record: Record, with_answer: bool) -> str:
        if self.prompt_template is not None:
            if len(record.chat) > 1:
                raise BadRecord(
                    f"expected one question alone, as a prompt template has no place for what was said before it, got "
                    f"{len(record.chat)} turns"
                )
            prompt = self.prompt_template.replace("{question}", record.question)
            space = "" if prompt[-1:].isspace() else " "
            return f"{prompt}{space}{record.answer}" if with_answer else prompt
        if not with_answer:
            return self._apply_template(record.chat, add_generation_prompt=True)
        answer = {"role": "assistant", "content": [{"type": "text", "text": record.answer}]}
        # What comes behind the end of the turn is no part of the answer.
        return self._apply_template([*record.chat, answer]).rstrip()

    def _apply_template(self, chat: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.processor.apply_chat_template(chat, **options)
        except Exception as error:  # templates are programs
            raise BadRecord(
                f"the chat template of {type(self.processor).__name__} raises {type(error).__name__}: {error} "
                "(--prompt-template takes its place)"
            ) from error

    def _inputs(self, text: str, images: list[Image.Image], record: Record) -> dict[str, Tensor]:
        options: dict[str, Any] = {}
        if images:
            options["images"] = [images]  # of one text; some processors take no flat list
        if record.videos:
            # Names of frames would be taken for videos of their own. Frames are a choice that was made.
            are_frames = any(isinstance(video, list) for video in record.videos)
            options["videos"] = [
                [_open(frame) for frame in video] if isinstance(video, list) else str(video) for video in record.videos
            ]
            options |= {"do_sample_frames": False} if are_frames else {}
        start = self.processor.tokenizer.bos_token
        if start is not None and text.startswith(start):
            options["add_special_tokens"] = False
        inputs = self.processor(text=text, return_tensors="pt", **options)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _open(image: Path | bytes | Image.Image) -> Image.Image:
    """In RGB and upright."""
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        return load_image(image if isinstance(image, Image.Image) else str(image))
    except Exception as error:  # a broken file makes Pillow raise about anything
        name = f"{len(image)} bytes" if isinstance(image, bytes) else image
        raise BadRecord(f"image: {name} can't be read: {error}") from error


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
