"""What ``digits.yaml`` asks about, and what is right."""

from functools import cache

from PIL import Image

from vtw_kernels.demo.data import load_images

all_images = cache(load_images)


def images(question: dict) -> list[Image.Image]:
    return [Image.fromarray(all_images("test")[question["image"]]).convert("RGB")]


def messages(question: dict, *_) -> list[dict]:
    content = [{"type": "image", "url": images(question)[0]}, {"type": "text", "text": question["question"]}]
    return [{"role": "user", "content": content}]


def score(question: dict, answers: list[str]) -> dict[str, float]:
    return {"accuracy": float(answers[0].strip() == question["answer"])}
