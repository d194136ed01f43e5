"""One picture asked for, checked before anything heavy is imported."""

import itertools
import math
import secrets
from dataclasses import dataclass

from runner.inputs import INPUTS, PIXELS, SEED, check_size, check_whole
from stages.errors import InvalidInput
from stages.families import Family

COUNT = 64
# The CPU generator of torch starts from the low 32 bits alone, so a larger random seed would add nothing.
SEED_BITS = 32


@dataclass(frozen=True)
class Request:
    """One picture. Raises InvalidInput, with the limit and the value, for whatever no model could make."""

    prompt: str
    """What to draw."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    steps: int
    """Denoise steps."""
    guidance: float | None
    """Guidance scale; None for a model that takes none."""
    seed: int
    """What the picture's own CPU generator starts from."""
    text_tokens: int
    """The longest prompt, in tokens of the text encoder."""
    index: int = 0
    """Its number among the pictures of the run, over all processes."""
    negative_prompt: str | None = None
    """What a guidance over 1 leads away from, in families that read one; "" is none."""

    def __post_init__(self) -> None:
        if self.negative_prompt == "":
            object.__setattr__(self, "negative_prompt", None)
        for each in INPUTS.values():
            each.check(getattr(self, each.name))
        check_size(self.width, self.height)
        check_whole("index", self.index, 0, SEED)
        if self.negative_prompt is not None and (self.guidance is None or self.guidance <= 1):
            raise InvalidInput(f"a negative prompt says what guidance leads away from, and guidance is "
                               f'{self.guidance} -> `guidance` over 1, or `negative_prompt=""` for none')

    @property
    def inputs(self) -> dict[str, str | int | float]:
        """What is asked for under diffusers' names; "seed" stands for the generator."""
        inputs = ((each.pipeline_name, getattr(self, each.name)) for each in INPUTS.values())
        return {name: value for name, value in inputs if value is not None}


def requests_for(
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

    A seed of -1 is drawn at random. Raises InvalidInput for what the family or any model cannot make.
    """
    if guidance is not None and family.guidance is None:
        raise InvalidInput(f"{family.name} takes no guidance -> leave `guidance` out")
    if negative_prompt and not family.negative:
        raise InvalidInput(f"{family.name} reads no negative prompt -> leave `negative_prompt` out, and say in the "
                           f"prompt what there should be")
    check_whole("count", count, 1, COUNT)
    check_whole("seed", seed, -1, SEED)
    first = secrets.randbelow(2**SEED_BITS - count + 1) if seed == -1 else seed
    if first + count - 1 > SEED:
        raise InvalidInput(f"{count} pictures from seed {first} pass the last seed {SEED} -> "
                           f"`seed={SEED - count + 1}`")
    width, height = size or family.size
    loops = family.steps if steps is None else steps
    scale = family.guidance if guidance is None else guidance
    tokens = family.text_tokens if text_tokens is None else text_tokens
    check_tokens(family, tokens)
    return [Request(prompt, width, height, loops, scale, first + at, tokens, index + at, negative_prompt)
            for at in range(count)]


def check_tokens(family: Family, tokens: int) -> None:
    """Raise InvalidInput for more text tokens than the family's text encoder takes."""
    if tokens > family.most_tokens:
        raise InvalidInput(f"{tokens} text tokens: the text encoder of {family.name} takes at most "
                           f"{family.most_tokens} -> ask for {family.most_tokens} or fewer")


def nearest_sizes(size: tuple[int, int], multiple: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two (width, height) nearest to `size` whose sides are multiples of `multiple` pixels, nearest first."""
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


def _around(side: int, multiple: int) -> list[int]:
    below = side // multiple * multiple
    return [near for near in (below - multiple, below, below + multiple, below + 2 * multiple) if near > 0]
