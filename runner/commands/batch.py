"""The pictures that a command line and its prompt file ask for, each with its number in the whole.

The number, and with it the seed, of a picture depends on the lines before it and not on whether they are good.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.commands.prompts import Entry
from runner.inputs import SEED, check_size, read_size
from runner.job import RefusedLine
from runner.request import COUNT, FilledRequest, first_seed, requests_for
from runner.text import shown
from stages.errors import InvalidInput
from stages.families import Family

PICTURES = 10_000
PROMPT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Item:
    """One picture that is asked for."""

    request: FilledRequest
    """What to make."""
    line: int = 0
    """The line that asks for it; 0: the command line."""
    id: str | None = None
    """The id that the line gave it."""
    out: str | None = None
    """The name that the line gave it."""


@dataclass(frozen=True)
class Defaults:
    """What holds for every line that does not say otherwise."""

    options: Mapping[str, Any]
    """Arguments of `requests_for`."""
    seeds: tuple[int, ...]
    """One seed is that of picture 0 of all, and -1 draws it; several make a picture each, of every prompt."""
    count: int
    """Pictures of a line, where there is one seed."""

    @property
    def pictures(self) -> int:
        """Pictures of a line that says nothing."""
        return len(self.seeds) if len(self.seeds) > 1 else self.count


@dataclass(frozen=True)
class Batch:
    """The pictures that a command line asks for."""

    items: tuple[Item, ...]
    """Those that can be made."""
    refused: tuple[RefusedLine, ...]
    """The lines that cannot."""
    total: int
    """How many pictures there would be with those."""


def batch(entries: Sequence[Entry], family: Family, defaults: Defaults) -> Batch:
    """Every picture of the entries; InvalidInput for a bad entry of the command line, or far too many pictures."""
    total = sum(pictures(entry, defaults) for entry in entries)
    if total > PICTURES:
        raise InvalidInput(f"that is {total:,} pictures; the limit is {PICTURES:,} -> split the file")
    first = first_seed(total) if defaults.seeds == (-1,) else defaults.seeds[0]
    index, items, refused, ids = 0, list[Item](), list[RefusedLine](), dict[str, int]()
    for entry in entries:
        try:
            items += _items(entry, family, defaults, index, first, ids)
        except InvalidInput as error:
            if not entry.line:
                raise
            refused.append(RefusedLine(entry.line, error.text[:400]))
        index += pictures(entry, defaults)
    size = sum(len(f"{item.request.prompt}{item.request.negative_prompt or ''}".encode()) for item in items)
    if size > PROMPT_BYTES:
        raise InvalidInput(f"the prompts of {len(items):,} pictures have {size:,} bytes; the limit is "
                           f"{PROMPT_BYTES:,} -> split the file")
    return Batch(tuple(items), tuple(refused), total)


def pictures(entry: Entry, defaults: Defaults) -> int:
    """How many pictures an entry stands for, whatever else is wrong with it."""
    seed, count = entry.options.get("seed"), entry.options.get("count")
    if isinstance(seed, list):
        return min(max(len(seed), 1), COUNT)
    if type(count) is int and 1 <= count <= COUNT:
        return count
    return defaults.count if seed is not None else defaults.pictures


def _items(
    entry: Entry, family: Family, defaults: Defaults, index: int, first: int, ids: dict[str, int]
) -> list[Item]:
    if entry.fault:
        raise InvalidInput(entry.fault)
    options = {name: value for name, value in entry.options.items() if value is not None}
    if "prompt" not in options:
        raise InvalidInput('there is no prompt -> {"prompt": "a red fox"}')
    name, out = _identifier(options.pop("id", None), entry.line, ids), options.pop("out", None)
    if not isinstance(out, str | None):
        raise InvalidInput(f"out must be text, got {type(out).__name__}")
    seeds = _seeds(options, defaults, index, first)
    usual = defaults.options.get("size", family.size)
    options = {**defaults.options, **_read(options, usual)}
    prompt = options.pop("prompt")
    requests = [request for at, seed, count in seeds
                for request in requests_for(prompt, family, seed=seed, count=count, index=index + at, **options)]
    return [Item(request, entry.line, name, out) for request in requests]


def _seeds(options: dict[str, Any], defaults: Defaults, index: int, first: int) -> list[tuple[int, int, int]]:
    """Takes seed and count out of what is said: for each row of seeds its first picture, first seed and length."""
    seed, count = options.pop("seed", None), options.pop("count", None)
    if isinstance(seed, list) or (seed is None and len(defaults.seeds) > 1):
        listed = seed or defaults.seeds
        if count is not None:
            raise InvalidInput("count and several seeds contradict each other -> leave one of them out")
        if seed == [] or len(listed) > COUNT or not all(type(one) is int and 0 <= one <= SEED for one in listed):
            raise InvalidInput(f"seed must list 1 to {COUNT} whole numbers from 0 to {SEED}")
        return [(at, one, 1) for at, one in enumerate(listed)]
    return [(0, first + index if seed is None else seed, defaults.count if count is None else count)]


def _read(options: Mapping[str, Any], usual: tuple[int, int]) -> dict[str, Any]:
    """The options of a line as `requests_for` takes them; what those must be is checked there.

    `usual` are the sides that a line says nothing of.
    """
    options = dict(options)
    sides = options.pop("width", None), options.pop("height", None)
    if "size" in options:
        if sides != (None, None):
            raise InvalidInput("size and width or height both say the size -> leave one of them out")
        # A number is the side of a square, as it is on the command line.
        text = str(options["size"]) if type(options["size"]) is int else options["size"]
        if not isinstance(text, str):
            raise InvalidInput(f'size must be text, such as "1024x768", or a number, got {type(text).__name__}')
        options["size"] = read_size(text)
    elif sides != (None, None):
        width, height = (before if side is None else side for side, before in zip(sides, usual, strict=True))
        check_size(width, height)
        options["size"] = width, height
    if type(options.get("guidance")) is int:
        options["guidance"] = float(options["guidance"])
    return options


def _identifier(value: Any, line: int, ids: dict[str, int]) -> str | None:
    if value is None:
        return None
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", text):
        raise InvalidInput(f"id must be 1 to 64 of A-Z a-z 0-9 . _ - with neither . nor - in front, got "
                         f"{shown(repr(value))}")
    if ids.setdefault(text, line) != line:
        raise InvalidInput(f"id {text} is that of line {ids[text]} -> ids are unique")
    return text
