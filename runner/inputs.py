"""What a request may say: every input declared once, with how it is read, checked, handed to diffusers and shown."""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.text import shown
from stages.errors import InvalidInput

PROMPT_BYTES = 16 * 2**10
PIXELS = 4 * 2**20
SIDE = 16384
STEPS = 1000
GUIDANCE = 30.0
TOKENS = 4096
SEED = 2**64 - 1
# What is drawn in messages: whole enough for the demo checkpoint as well.
EXAMPLE = "a large red circle on the left on a blue background"


@dataclass(frozen=True)
class Input:
    """One thing that a request says."""

    name: str
    """The field of a request that has it."""
    pipeline_name: str
    """What diffusers' pipelines call it; "seed" stands for their generator."""
    check: Callable[[Any], None]
    """Raises InvalidInput for a value that no model could take."""
    read: Callable[[str], Any]
    """The value that a text spells, as on a command line; InvalidInput for another text."""
    label: str = ""
    """How a picture's `parameters` text names it; empty where it has a place of its own there."""
    optional: bool = False
    """Whether it may be None, which is then neither handed on nor told."""
    default: Any = None
    """What is shown of it needs no word where it is this."""


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """InvalidInput unless the value is a whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidInput(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def read_whole(name: str, text: str, low: int, high: int) -> int:
    """The whole number that `text` spells in plain digits; InvalidInput outside `low` to `high`."""
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else None
    if value is None:
        raise InvalidInput(f"{name} must be a whole number from {low} to {high}, got {shown(text)}")
    check_whole(name, value, low, high)
    return value


def read_guidance(text: str) -> float:
    """The guidance scale that `text` spells, such as 3.5; InvalidInput unless it is a number from 0 to 30."""
    if not re.fullmatch(r"[+-]?([0-9]{1,9}(\.[0-9]{0,18})?|\.[0-9]{1,18})(e[+-]?[0-9]{1,3})?", text):
        raise InvalidInput(f"guidance must be a number from 0 to {GUIDANCE:g}, got {shown(text)}")
    value = float(text)
    check_guidance(value)
    return value


def read_size(text: str) -> tuple[int, int]:
    """(width, height) from WxH in pixels, such as 1024x768, or from the side of a square, such as 512."""
    match = re.fullmatch(r"(-?[0-9]{1,9})([xX](-?[0-9]{1,9}))?", text)
    if match is None:
        raise InvalidInput(f"size must be WxH in pixels, such as 1024x768, or a side such as 512, got {shown(text)}")
    size = int(match[1]), int(match[3] or match[1])
    check_size(*size)
    return size


def check_size(width: Any, height: Any) -> None:
    """InvalidInput for sides or an area in pixels that no model could make."""
    for name, side in (("width", width), ("height", height)):
        check_whole(name, side, 1, SIDE)
    if width * height > PIXELS:
        shrink = math.sqrt(PIXELS / (width * height))
        fits = "x".join(str(int(side * shrink) // 64 * 64) for side in (width, height))
        raise InvalidInput(f"{width}x{height} is {width * height:,} pixels; the limit is {PIXELS:,} -> `size={fits}`")


def check_guidance(value: Any) -> None:
    """InvalidInput unless the value is a number from 0 to 30, or None for a model that takes no guidance."""
    if value is None:
        return
    if type(value) not in (int, float) or not (math.isfinite(value) and 0 <= value <= GUIDANCE):
        raise InvalidInput(f"guidance must be a number from 0 to {GUIDANCE:g}, got {value!r}")


def check_prompt(prompt: Any, what: str = "prompt") -> None:
    """InvalidInput for a prompt that is no text, too long, empty, or holds control characters."""
    if not isinstance(prompt, str):
        raise InvalidInput(f"the {what} must be text, got {type(prompt).__name__}")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        at = len(prompt[: error.start].encode())
        raise InvalidInput(f"the {what} is not valid UTF-8 at byte {at} -> write it again in UTF-8") from None
    if size > PROMPT_BYTES:
        raise InvalidInput(f"the {what} has {size:,} bytes; the limit is {PROMPT_BYTES:,} -> shorten it")
    if not prompt.strip():
        advice = (f'say what to draw, such as `prompt="{EXAMPLE}"`' if what == "prompt" else
                  'say what guidance leads away from, or `negative_prompt=""` for nothing')
        raise InvalidInput(f"empty {what} -> {advice}")
    for at, character in enumerate(prompt):
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            point = f"U+{ord(character):04X}"
            raise InvalidInput(f"the {what} has the control character {point} at position {at} -> take it out")


def _check_negative_prompt(prompt: Any) -> None:
    if prompt is not None:
        check_prompt(prompt, "negative prompt")


INPUTS: Mapping[str, Input] = {each.name: each for each in (
    Input("prompt", "prompt", check_prompt, str),
    Input("width", "width", lambda value: check_whole("width", value, 1, SIDE),
          lambda text: read_whole("width", text, 1, SIDE)),
    Input("height", "height", lambda value: check_whole("height", value, 1, SIDE),
          lambda text: read_whole("height", text, 1, SIDE)),
    Input("steps", "num_inference_steps", lambda value: check_whole("steps", value, 1, STEPS),
          lambda text: read_whole("steps", text, 1, STEPS), "Steps"),
    Input("guidance", "guidance_scale", check_guidance, read_guidance, "CFG scale"),
    Input("seed", "seed", lambda value: check_whole("seed", value, 0, SEED),
          lambda text: read_whole("seed", text, -1, SEED), "Seed"),
    Input("text_tokens", "max_sequence_length", lambda value: check_whole("text_tokens", value, 1, TOKENS),
          lambda text: read_whole("text_tokens", text, 1, TOKENS)),
    Input("negative_prompt", "negative_prompt", _check_negative_prompt, str, optional=True),
)}
