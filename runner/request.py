"""One picture asked for, checked before anything heavy is imported."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from runner.inputs import INPUTS, SEED, check_size, check_whole
from runner.text import shown
from stages.errors import InvalidInput
from stages.families import Family
from stages.signatures import checked_class
from stages.wording import counted

COUNT = 64
# The CPU generator of torch starts from the low 32 bits alone, so a larger random seed would add nothing.
SEED_BITS = 32


@checked_class
@dataclass(frozen=True)
class Request:
    """One picture. `Request("a fox")` is enough: what is None comes from the family, as soon as a `Job` names one.

    Raises InvalidInput, with the limit and the value, for whatever no model could make.
    """

    prompt: str
    """What to draw."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    steps: int | None = None
    """Denoise steps."""
    guidance: float | None = None
    """Guidance scale; it stays None for a family that takes none."""
    seed: int | None = None
    """What the picture's own CPU generator starts from; None is drawn at random by the job."""
    text_tokens: int | None = None
    """The longest prompt, in tokens of the text encoder."""
    index: int = 0
    """Its number among the pictures of the run, over all processes."""
    negative_prompt: str | None = None
    """What a guidance over 1 leads away from, in families that read one; "" is none."""

    def __post_init__(self) -> None:
        if self.negative_prompt == "":
            object.__setattr__(self, "negative_prompt", None)
        guidance: Any = self.guidance
        if type(guidance) is int:
            # As a record of it has it, which is to lead to the same keys.
            object.__setattr__(self, "guidance", float(guidance))
        for each in INPUTS.values():
            value = getattr(self, each.name)
            if value is not None or each.name == "prompt":
                each.check(value)
        if self.width is not None and self.height is not None:
            check_size(self.width, self.height)
        check_whole("index", self.index, 0, SEED)
        if self.guidance is not None:
            self._check_negative()

    @classmethod
    def read(cls, given: Any) -> "Request":
        """The request that a prompt, a mapping of a request's names, or a request is; InvalidInput for another."""
        if isinstance(given, Request):
            return given
        if isinstance(given, str):
            return cls(given)
        if not isinstance(given, Mapping):
            raise InvalidInput(f"`requests` has {shown(repr(given))} -> a prompt, or Request(\"a red circle\")")
        names = [field.name for field in fields(cls)]
        if (unknown := next((name for name in given if name not in names), None)) is not None:
            close = get_close_matches(str(unknown), names, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise InvalidInput(f"`requests`: a request has no {shown(str(unknown))} -> {hint}")
        if "prompt" not in given:
            raise InvalidInput('`requests` has one without a prompt -> {"prompt": "a red circle"}')
        return cls(**given)

    @property
    def inputs(self) -> dict[str, str | int | float]:
        """What is asked for under diffusers' names; "seed" stands for the generator."""
        inputs = ((each.pipeline_name, getattr(self, each.name)) for each in INPUTS.values())
        return {name: value for name, value in inputs if value is not None}

    def filled(self, family: Family, seed: int) -> "FilledRequest":
        """The request with the family's values, and this seed, for what it does not say.

        Raises InvalidInput for what the family does not take.
        """
        if self.guidance is not None and family.guidance is None:
            raise InvalidInput(f"{family.name} takes no guidance -> leave `guidance` out")
        if self.negative_prompt and not family.negative:
            raise InvalidInput(f"{family.name} reads no negative prompt -> leave `negative_prompt` out, and say in "
                               f"the prompt what there should be")
        usual = {"width": family.size[0], "height": family.size[1], "steps": family.steps, "seed": seed,
                 "guidance": family.guidance, "text_tokens": family.text_tokens}
        missing: dict[str, Any] = {name: value for name, value in usual.items()
                                   if getattr(self, name) is None and value is not None}
        # A request that says all of it stays the object that it is.
        whole = cast("FilledRequest", replace(self, **missing) if missing else self)
        whole._check_negative()
        check_tokens(family, whole.text_tokens)
        return whole

    def _check_negative(self) -> None:
        if self.negative_prompt is not None and (self.guidance is None or self.guidance <= 1):
            raise InvalidInput(f"a negative prompt says what guidance leads away from, and guidance is "
                               f'{self.guidance} -> `guidance` over 1, or `negative_prompt=""` for none')


if TYPE_CHECKING:

    class FilledRequest(Request):
        """A request to which a job filled in what its family says: nothing but the guidance may be None."""

        width: int
        height: int
        steps: int
        seed: int
        text_tokens: int
else:
    FilledRequest = Request


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
) -> list[FilledRequest]:
    """`count` requests, numbered from `index`; what is not said comes from the family, and seeds count up from `seed`.

    A seed of -1 is drawn at random. Raises InvalidInput for what the family or any model cannot make.
    """
    check_whole("count", count, 1, COUNT)
    check_whole("seed", seed, -1, SEED)
    first = first_seed(count) if seed == -1 else seed
    if first + count - 1 > SEED:
        raise InvalidInput(f"{counted(count, 'picture')} from seed {first} pass the last seed {SEED} -> "
                           f"`seed={SEED - count + 1}`")
    width, height = size or family.size
    asked = Request(prompt, width, height, steps, guidance, first, text_tokens, index, negative_prompt)
    return [replace(asked.filled(family, first), seed=first + at, index=index + at) for at in range(count)]


def first_seed(count: int) -> int:
    """A random seed, from which so many count up."""
    return secrets.randbelow(2**SEED_BITS - count + 1)


def check_tokens(family: Family, tokens: int) -> None:
    """Raise InvalidInput for more text tokens than the family's text encoder takes."""
    if tokens > family.most_tokens:
        raise InvalidInput(f"{tokens} text tokens: the text encoder of {family.name} takes at most "
                           f"{family.most_tokens} -> ask for {family.most_tokens} or fewer")
