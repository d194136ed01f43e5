"""What a call of a pipeline asks for, under diffusers' names, as requests."""

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from runner.inputs import INPUTS, SEED, check_whole
from runner.pipeline import keywords
from runner.request import COUNT, FilledRequest, Request, first_seed
from runner.text import shown
from stages.errors import InvalidInput
from stages.families import Family
from stages.wording import counted, kind_of

if TYPE_CHECKING:
    from torch import Generator

SEEDS = "generator=[torch.Generator().manual_seed(n) for n in ...], or seed=[...]"


class Asked(TypedDict, total=False):
    """The keywords of a call, all of which may be left out."""

    negative_prompt: str | Sequence[str] | None
    num_inference_steps: int | None
    guidance_scale: float | None
    true_cfg_scale: float | None
    height: int | None
    width: int | None
    num_images_per_prompt: int
    generator: "Generator | Sequence[Generator] | None"
    seed: int | Sequence[int] | None
    max_sequence_length: int | None


def requests_of(family: Family, prompt: Any, asked: Asked) -> tuple[FilledRequest, ...]:
    """The pictures that a call asks for: of each prompt so many, one after the other.

    Raises InvalidInput for keywords that there are not, and for what the family does not take.
    """
    given = keywords.asked_for(asked, keywords.CALL)
    keywords.refuse(given.keys() - Asked.__annotations__.keys(), Asked.__annotations__, keywords.CALL, "a call")
    prompts, each = _prompts(prompt), given.get("num_images_per_prompt", 1)
    each = 1 if each is None else _whole(each)
    check_whole("num_images_per_prompt", each, 1, COUNT)
    negatives = _negatives(given.get("negative_prompt"), len(prompts))
    seeds = _seeds(given.get("seed"), given.get("generator"), len(prompts) * each)
    more = {
        "width": _number("width", given.get("width")), "height": _number("height", given.get("height")),
        "steps": _number("steps", given.get("num_inference_steps")),
        "text_tokens": _number("text_tokens", given.get("max_sequence_length")),
        "guidance": _guidance(family, given.get("guidance_scale"), given.get("true_cfg_scale")),
    }
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(each)]
    return tuple(Request(words, index=at, negative_prompt=negative, **more).filled(family, seed)
                 for at, ((words, negative), seed) in enumerate(zip(pairs, seeds, strict=True)))


def spend(generator: Any) -> None:
    """Draw from the generators of a call, as the noise was: who draws from them next gets other numbers."""
    import torch

    for one in () if generator is None else [generator] if isinstance(generator, torch.Generator) else generator:
        torch.rand(1, generator=one)


def _prompts(prompt: Any) -> list[Any]:
    if prompt is None:
        raise InvalidInput('there is no prompt -> pipe("a red circle")')
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple):
        raise InvalidInput(f"prompt is {kind_of(prompt)} -> a text, or a list of texts")
    if not prompt:
        raise InvalidInput('the list of prompts is empty -> pipe(["a red circle"])')
    return list(prompt)


def _negatives(negative: Any, count: int) -> list[Any]:
    if negative is None or isinstance(negative, str):
        return [negative] * count
    if not isinstance(negative, list | tuple):
        raise InvalidInput(f"negative_prompt is {kind_of(negative)} -> a text, or a list of texts")
    if len(negative) != count:
        raise InvalidInput(f"{counted(count, 'prompt')} and {counted(len(negative), 'negative prompt')} -> one for "
                           f"each, or one text")
    return list(negative)


def _seeds(seed: Any, generator: Any, count: int) -> Iterable[int]:
    """A seed for each picture: those that are listed, those of generators, or counted up from the first."""
    if generator is not None:
        if seed is not None:
            raise InvalidInput("seed and generator both say the noise -> leave one of them out")
        return _seeds_of(generator, count)
    if isinstance(seed, list | tuple | range):
        if len(seed) != count:
            raise InvalidInput(f"{counted(len(seed), 'seed')} for {counted(count, 'picture')} -> one for each, or one "
                               f"that counts up")
        found = [_whole(one) for one in seed]
        for one in found:
            check_whole("seed", one, 0, SEED)
        return found
    first = -1 if seed is None else _whole(seed)
    check_whole("seed", first, -1, SEED - count + 1)
    return range(start := first_seed(count) if first == -1 else first, start + count)


def _seeds_of(generator: Any, count: int) -> list[int]:
    """The seeds of fresh generators on the CPU, one for each picture."""
    import torch

    given = [generator] if isinstance(generator, torch.Generator) else generator
    if isinstance(generator, torch.Generator) and count > 1:
        first = min(generator.initial_seed(), SEED - count + 1)
        raise InvalidInput(f"one generator for {count} pictures: each has noise of its own here, and does not go on "
                           f"where the one before it ended -> generator=[torch.Generator().manual_seed(n) for n in "
                           f"range({first}, {first + count})], or seed={first}, which counts up")
    given = given if isinstance(given, list | tuple) else [given]
    if wrong := [kind_of(one) for one in given if not isinstance(one, torch.Generator)]:
        raise InvalidInput(f"generator is {wrong[0]} -> torch.Generator().manual_seed(7), or a list of such")
    if len(given) != count:
        raise InvalidInput(f"{counted(len(given), 'generator')} for {counted(count, 'picture')}, each of "
                           f"which has noise of its own -> {SEEDS}")
    if len({id(one) for one in given}) < count:
        raise InvalidInput(f"a generator is listed twice, and gives other noise the second time -> {SEEDS}")
    for one in given:
        if one.device.type != "cpu":
            raise InvalidInput(f"the generator is on {one.device}, whose noise no other device has -> "
                               f"torch.Generator(\"cpu\").manual_seed({one.initial_seed()})")
        if not torch.equal(one.get_state(), torch.Generator().manual_seed(one.initial_seed()).get_state()):
            raise InvalidInput(f"the generator has been drawn from, and a seed says how one begins -> "
                               f"generator.manual_seed({one.initial_seed()}), or a new one")
    return [one.initial_seed() for one in given]


def _guidance(family: Family, scale: Any, true_scale: Any) -> Any:
    """The guidance of a request; None where none is asked for."""
    if true_scale is not None:
        if family.true_guidance and scale is None:
            return _number("guidance", true_scale, "true_cfg_scale")
        if family.true_guidance:
            raise InvalidInput("guidance_scale and true_cfg_scale are one thing here -> leave guidance_scale out")
        if _number("guidance", true_scale, "true_cfg_scale") > 1:
            raise InvalidInput(f"{family.name} has no true_cfg_scale -> "
                               f"{'leave it out' if family.guidance is None else 'guidance_scale='}")
    found = _number("guidance", scale)
    # What diffusers' examples write for models that take none.
    return None if found is not None and family.guidance is None and found <= 1 else found


def _number(name: str, value: Any, keyword: str = "") -> Any:
    """A checked value of a request, in the words of the call."""
    if value is None:
        return None
    each = INPUTS[name]
    keyword = keyword or each.pipeline_name
    try:
        value = _whole(value) if name != "guidance" or isinstance(value, bool | str) else float(value)
        each.check(value)
    except (InvalidInput, TypeError) as error:
        if not isinstance(error, InvalidInput):
            raise InvalidInput(f"{keyword} must be a number, got {shown(repr(value))}") from None
        raise InvalidInput(error.text.replace(name, keyword, 1) if keyword not in error.text else error.text) from None
    return value


def _whole(value: Any) -> Any:
    """A whole number of any library as Python's; anything else as it is, for a check to refuse."""
    if isinstance(value, bool | str):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value
