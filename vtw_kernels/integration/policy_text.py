"""Policies in text, as commands and tables have them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtw_kernels.integration.policies import Policy, RandomVisual, TopAttention, Withdraw
from vtw_kernels.integration.skipping.adapters import CONFIG
from vtw_kernels.integration.skipping.skip_attention import SkipAttention

FORMS = "layer=LAYER, top-attention:LAYER:KEEP, random:LAYER:KEEP, random:LAYER:KEEP:SEED, skip:LAYERS or skip:FOLDER"
FILES = (".json", ".safetensors")


def parse_policy(text: str) -> Any:
    """What ``withdraw`` takes, or, with ``skip:`` in it, what ``compare`` takes, from text::

        policy = FILE | step {"+" step}
        step   = "layer=" LAYER | "top-attention:" LAYER ":" KEEP | "random:" LAYER ":" KEEP [":" SEED]
               | "skip:" LAYER {"," LAYER} | "skip:" FOLDER

    LAYER and SEED are numbers. KEEP is a share with a point, as ``0.5`` or ``1.0``, or a number of rows, as ``64``.
    Steps with a plus between them are a list of policies, as ``top-attention:8:0.5+top-attention:16:0.5+layer=24``.
    ``skip`` stands for attention that is skipped in some layers, or in those of the adapters in a folder.
    FILE ends in .json or .safetensors: what ``LayerSearch.save`` wrote, or another file that ``withdraw`` takes.

    Raises:
        ValueError: something else, or a file that is not there.
    """
    if text.endswith(FILES) and not text.startswith("skip:"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"policy: there is no file {text}")
        return path
    steps = [_parse_step(step, text) for step in text.split("+")]
    if len(steps) > 1:
        return [Withdraw(step) if isinstance(step, int) else step for step in steps]
    return steps[0]


def _parse_step(step: str, text: str) -> int | Policy | SkipAttention:
    try:
        if step.startswith("skip:"):
            what = step.removeprefix("skip:")
            if (Path(what) / CONFIG).is_file():
                return SkipAttention(adapters=Path(what))
            return SkipAttention(tuple(map(_number, what.split(","))))
        if step.startswith("layer="):
            return _number(step.removeprefix("layer="))
        method, layer, keep, *seed = step.split(":")
        if method == "top-attention" and not seed:
            return TopAttention(_number(layer), _amount(keep))
        if method == "random" and len(seed) <= 1:
            return RandomVisual(_number(layer), _amount(keep), *map(_number, seed))
    except ValueError as error:
        if str(error).startswith("keep: "):
            raise ValueError(f"policy: {error} in {text!r}") from None
    also = f" in {text!r}" if step != text else ""
    raise ValueError(
        f"policy: expected {FORMS}, several of them with + between, or a file that ends in {' or '.join(FILES)}, got "
        f"{step!r}{also}"
    )


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(text)
    return int(text)


def _amount(text: str) -> float | int:
    return float(text) if "." in text else _number(text)


def policy_text(policy: Any) -> str:
    """What ``parse_policy`` makes it of; of a policy that is not of this package, its ``repr``."""
    if isinstance(policy, SkipAttention) and policy.adapters is None and policy.layers is not None:
        return "skip:" + ",".join(map(str, policy.layers))
    if isinstance(policy, SkipAttention) and policy.layers is None and isinstance(policy.adapters, str | Path):
        return f"skip:{policy.adapters}"
    if isinstance(policy, int):
        return f"layer={policy}"
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        return "+".join(map(policy_text, policy))
    if type(policy) is Withdraw:
        return f"layer={policy.layer}"
    if type(policy) is TopAttention:
        return f"top-attention:{policy.boundaries[0]}:{policy.amount}"
    if type(policy) is RandomVisual:
        return f"random:{policy.boundaries[0]}:{policy.amount}" + (f":{policy.seed}" if policy.seed else "")
    return repr(policy) if isinstance(policy, Policy | SkipAttention) else str(policy)
