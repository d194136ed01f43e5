"""One picture asked for, checked before anything heavy is imported."""

import itertools
import math
import re
import secrets
import unicodedata
from dataclasses import dataclass
from typing import Any

from runner.text import shown
from stages.families import Family

PROMPT_BYTES = 16 * 2**10
PIXELS = 4 * 2**20
SIDE = 16384
STEPS = 1000
GUIDANCE = 30.0
COUNT = 64
TOKENS = 4096
SEED = 2**64 - 1
# The CPU generator of torch starts from the low 32 bits alone, so a larger random seed would add nothing.
SEED_BITS = 32


@dataclass(frozen=True)
class Request:
    """One picture: a prompt, a size in pixels, a seed. `index` counts the pictures of a run.

    Guidance over 1 leads away from the `negative_prompt`, in families that read one.

    Raises ValueError, with the limit and the value, for whatever no model could make.
    """

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float | None
    seed: int
    text_tokens: int
    index: int = 0
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_size(self.width, self.height)
        _check_whole("steps", self.steps, 1, STEPS)
        _check_guidance(self.guidance)
        _check_whole("seed", self.seed, 0, SEED)
        _check_whole("text_tokens", self.text_tokens, 1, TOKENS)
        _check_whole("index", self.index, 0, SEED)
        if self.negative_prompt is not None:
            _check_prompt(self.negative_prompt, "negative prompt")
            _check_guided(self.guidance)


def ask(
    prompt: str,
    family: Family,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = -1,
    count: int = 1,
    text_tokens: int | None = None,
    index: int = 0,
    negative_prompt: str | None = None,
) -> list[Request]:
    """`count` requests, numbered from `index`; what is not said comes from the family, and seeds count up from `seed`.

    A seed of -1 is drawn at random. Raises ValueError for what the family or any model cannot make.
    """
    if guidance is not None and family.guidance is None:
        raise ValueError(f"{family.name} takes no guidance -> leave --guidance out")
    negative = None if negative_prompt == "" else negative_prompt
    if negative is not None and not family.negative:
        raise ValueError(f"{family.name} reads no negative prompt -> leave --negative-prompt out, and say in the "
                         f"prompt what there should be")
    _check_whole("count", count, 1, COUNT)
    _check_whole("seed", seed, -1, SEED)
    first = secrets.randbelow(2**SEED_BITS - count + 1) if seed == -1 else seed
    if first + count - 1 > SEED:
        raise ValueError(f"{count} pictures from seed {first} pass the last seed {SEED} -> --seed {SEED - count + 1}")
    width, height = size or family.size
    loops = family.steps if steps is None else steps
    scale = family.guidance if guidance is None else guidance
    tokens = family.text_tokens if text_tokens is None else text_tokens
    check_tokens(family, tokens)
    return [Request(prompt, width, height, loops, scale, first + i, tokens, index + i, negative)
            for i in range(count)]


def check_tokens(family: Family, tokens: int) -> None:
    """Raise ValueError for more text tokens than the family's text encoder takes."""
    if tokens > family.most_tokens:
        raise ValueError(f"{tokens} text tokens: the text encoder of {family.name} takes at most "
                         f"{family.most_tokens} -> ask for {family.most_tokens} or fewer")


def nearest(size: tuple[int, int], multiple: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two (width, height) nearest to `size` whose sides are multiples of `multiple`, nearest first."""
    width, height = size
    found = {
        (w, h)
        for w, h in itertools.product(_around(width, multiple), _around(height, multiple))
        if w * h <= PIXELS
    }
    shape = math.log(width / height)
    first, second, *_ = sorted(
        found,
        key=lambda s: (abs(s[0] - width) + abs(s[1] - height), round(abs(math.log(s[0] / s[1]) - shape), 9), s),
    )
    return first, second


def read_whole(name: str, text: str, low: int, high: int) -> int:
    """The whole number that `text` spells in plain digits; ValueError outside `low` to `high`."""
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else None
    if value is None:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {shown(text)}")
    _check_whole(name, value, low, high)
    return value


def read_guidance(text: str) -> float:
    """The guidance scale that `text` spells, such as 3.5; ValueError unless it is a number from 0 to 30."""
    if not re.fullmatch(r"[+-]?([0-9]{1,9}(\.[0-9]{0,18})?|\.[0-9]{1,18})(e[+-]?[0-9]{1,3})?", text):
        raise ValueError(f"guidance must be a number from 0 to {GUIDANCE:g}, got {shown(text)}")
    value = float(text)
    _check_guidance(value)
    return value


def read_size(text: str) -> tuple[int, int]:
    """(width, height) from WxH in pixels, such as 1024x768."""
    match = re.fullmatch(r"(-?[0-9]{1,9})[xX](-?[0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"size must be WxH in pixels, such as 1024x768, got {shown(text)}")
    size = int(match[1]), int(match[2])
    _check_size(*size)
    return size


def _around(side: int, multiple: int) -> list[int]:
    below = side // multiple * multiple
    return [near for near in (below - multiple, below, below + multiple, below + 2 * multiple) if near > 0]


def _check_prompt(prompt: Any, what: str = "prompt") -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"the {what} must be text, got {type(prompt).__name__}")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        at = len(prompt[: error.start].encode())
        raise ValueError(f"the {what} is not valid UTF-8 at byte {at} -> write it again in UTF-8") from None
    if size > PROMPT_BYTES:
        raise ValueError(f"the {what} has {size:,} bytes; the limit is {PROMPT_BYTES:,} -> shorten it")
    if not prompt.strip():
        advice = ('say what to draw, such as --prompt "a red circle"' if what == "prompt" else
                  'say what guidance leads away from, or --negative-prompt "" for nothing')
        raise ValueError(f"empty {what} -> {advice}")
    for at, character in enumerate(prompt):
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            point = f"U+{ord(character):04X}"
            raise ValueError(f"the {what} has the control character {point} at position {at} -> take it out")


def _check_size(width: Any, height: Any) -> None:
    for name, side in (("width", width), ("height", height)):
        _check_whole(name, side, 1, SIDE)
    if width * height > PIXELS:
        shrink = math.sqrt(PIXELS / (width * height))
        fits = "x".join(str(int(side * shrink) // 64 * 64) for side in (width, height))
        raise ValueError(f"{width}x{height} is {width * height:,} pixels; the limit is {PIXELS:,} -> --size {fits}")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _check_guided(guidance: float | None) -> None:
    if guidance is None or guidance <= 1:
        raise ValueError(f"a negative prompt says what guidance leads away from, and guidance is {guidance} -> "
                         f'--guidance over 1, or --negative-prompt "" for none')


def _check_guidance(value: Any) -> None:
    if value is None:
        return
    if type(value) not in (int, float) or not (math.isfinite(value) and 0 <= value <= GUIDANCE):
        raise ValueError(f"guidance must be a number from 0 to {GUIDANCE:g}, got {value!r}")
