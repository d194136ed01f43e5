"""What may be given for the fields of a job, and the form in which they are kept."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from inspect import signature
from operator import index
from typing import Any, TypeVar

from runner.inputs import PIXELS, SIDE, check_whole, read_whole
from runner.placement_options import MemoryLimits, PlaceRequest
from runner.request import FilledRequest, Request, first_seed
from runner.text import choices, shown
from stages.errors import InvalidInput
from stages.families import FAMILIES, Family
from stages.signatures import takes_so_many, unknown_name
from stages.wording import kind_of

DTYPES = ("float32", "bfloat16", "float16")
# What people call them.
_CALLED = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
LANES = 16
LONGEST = 24 * 3600.0
AUTO = "auto"
# Overlaps of tiles are whole latents of every VAE then.
MULTIPLE = 64
DEVICE = re.compile("[0-9]{1,4}|cpu|[a-z]{2,16}:[0-9]{1,4}")
RUN = re.compile("[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")

Kind = TypeVar("Kind")


def text(name: str, value: Any) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InvalidInput(f"`{name}` must be text, got {shown(repr(value))}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidInput(f"`{name}` is not valid UTF-8: {shown(value)} -> rename it")
    return value


def family(value: Any) -> str:
    """The name of a family that there is."""
    name = text("family", value)
    if name not in FAMILIES:
        raise InvalidInput(f"there is no family {shown(name)} -> {choices(name, FAMILIES)}")
    return name


def path(name: str, value: Any, *, optional: bool = False) -> str | None:
    """A path or a name as text."""
    if value is None and optional:
        return None
    return text(name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def several(name: str, values: Any, alone: Any = ()) -> tuple[Any, ...]:
    """The values of a field that has any number of them; one of the kind `alone` may stand for itself."""
    if isinstance(values, alone):
        return (values,)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidInput(f"`{name}` is {shown(values if isinstance(values, str) else repr(values))} -> give a list")
    # Once: what gives its values one at a time has none left for a second look.
    return tuple(values)


def function(name: str, value: Any, of: str) -> None:
    """InvalidInput for what cannot be called with these arguments."""
    if not callable(value):
        raise InvalidInput(f"`{name}` is {kind_of(value)} -> a function of ({of}), or leave it out")
    if not takes_so_many(value, len(of.split(",")) if of else 0):
        raise InvalidInput(f"`{name}` cannot be called with ({of}) -> def {name}({of}), whatever it does with them")


def all_of(name: str, values: Any, kind: type[Kind]) -> tuple[Kind, ...]:
    """The values of a field that are all of this type."""
    return tuple(of_type(name, value, kind) for value in several(name, values))


def of_type(name: str, value: Any, kind: type[Kind]) -> Kind:
    """A value of this type."""
    if not isinstance(value, kind):
        raise InvalidInput(f"`{name}` must be {kind.__name__}, got {shown(repr(value))}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    return of_type(name, value, bool)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """One of these."""
    if value not in choices:
        raise InvalidInput(f"`{name}` is {shown(str(value))} -> choose from {', '.join(map(str, choices))}")
    return value


def seconds(name: str, value: Any) -> float:
    """Seconds, from 0 on."""
    if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
        raise InvalidInput(f"`{name}` must be seconds from 0 on, got {shown(repr(value))}")
    return float(value)


def numbered(values: Any) -> tuple[Request, ...]:
    """Requests, each with a number that no other has: those that say none are counted."""
    requests = tuple(map(Request.read, several("requests", values, Request | str | Mapping)))
    if len(requests) > 1 and not any(request.index for request in requests):
        return tuple(replace(request, index=at) for at, request in enumerate(requests))
    indices = [request.index for request in requests]
    if len({*indices}) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise InvalidInput(f"two of the `requests` have the index {twice} -> give each its own, or none")
    return requests


def filled(requests: tuple[Request, ...], family: Family) -> tuple[FilledRequest, ...]:
    """The requests with the family's values for what they do not say; seeds that none says count up from a random one.
    """
    first = first_seed(len(requests)) if any(request.seed is None for request in requests) else 0
    return tuple(request.filled(family, first + at) for at, request in enumerate(requests))


def type_name(value: Any) -> str:
    """The name of a type as torch has it: `bf16` and `torch.bfloat16` are `bfloat16`."""
    name = str(value).removeprefix("torch.").lower()
    return _CALLED.get(name, name)


def types(dtype: Any) -> dict[str, str]:
    """The names of types by component, from one for all, a mapping, or texts such as "vae=float32"."""
    if isinstance(dtype, Mapping):
        named = dtype
    else:
        parts = () if dtype is None else dtype if isinstance(dtype, list | tuple) else (dtype,)
        spelled = [str(part).rpartition("=") for part in parts]
        named = {component: value for component, _, value in spelled}
        if len(named) < len(spelled):
            raise InvalidInput(f"`dtype` {shown(str(dtype))} says the type of a component twice")
    found = {text("dtype", name): type_name(value) for name, value in named.items()}
    for name, value in found.items():
        if value not in DTYPES:
            raise InvalidInput(f"`dtype` {shown(value)}{f' of {name}' if name else ''}: choose one of "
                               f"{', '.join(DTYPES)}")
    return found


def devices(values: Any) -> tuple[str, ...]:
    """The names of devices, from a list, or from a text such as "0,1"."""
    given = values.split(",") if isinstance(values, str) and values else several(
        "devices", () if values is None or values == "" else values, int)
    for value in given:
        # A torch.device, by its name: torch is not imported before a job is checked.
        if (not isinstance(value, str | int) and type(value).__name__ != "device") or isinstance(value, bool):
            raise InvalidInput(f"`devices` has {shown(repr(value))} -> such as \"cpu\", \"cuda:0\" or 0")
    return tuple(text("devices", str(value)) for value in given)


def limits(given: Any) -> MemoryLimits:
    """Memory limits from themselves, a text, bytes, or a mapping of devices to bytes or texts."""
    if isinstance(given, MemoryLimits):
        return given
    if isinstance(given, Mapping):
        given = ",".join(f"{_limited(name)}={_amount(amount, f' of {name}')}" for name, amount in given.items())
    return MemoryLimits() if given is None or given == "" else MemoryLimits.read(_amount(given))


def _amount(value: Any, of: str = "") -> str:
    """Bytes as text, or the text of an amount."""
    if isinstance(value, str):
        return value
    with suppress(TypeError):
        # A whole number of any library.
        value = value if isinstance(value, bool) else index(value)
    if value is None:
        raise InvalidInput(f"`max_memory`{of} is None -> leave {of.removeprefix(' of ')} out where there is no limit")
    if type(value) is not int or value < 0:
        example = "" if of else ', or {0: "14GiB", "cpu": "24GiB"}'
        raise InvalidInput(f"`max_memory`{of} is {shown(repr(value))} -> bytes as a whole number from 1 on, or text "
                           f"such as \"14GiB\"{example}")
    return f"{value}B"


def _limited(name: Any) -> str:
    """The name of a device that has a limit."""
    if isinstance(name, bool) or not DEVICE.fullmatch(str(name)):
        raise InvalidInput(f"`max_memory` names the device {shown(str(name))} -> a card's number such as 0, its name "
                           f"such as \"cuda:0\", or \"cpu\" for the host")
    return str(name)


def places(values: Any, stages: tuple[str, ...]) -> tuple[PlaceRequest, ...]:
    """Places that were asked for, also as a mapping of stages to where; `STAGE=auto` asks for none."""
    found = []
    if isinstance(values, Mapping):
        values = [f"{stage}={_where(stage, where)}" for stage, where in values.items()]
    for value in several("place", values, str | PlaceRequest):
        place = value if isinstance(value, PlaceRequest) else PlaceRequest.read(text("place", value))
        if place.stage not in stages:
            raise InvalidInput(f"`place` {str(place)!r}: there is no stage {shown(place.stage)} -> write STAGE=WHERE "
                               f"or STAGE.COMPONENT=WHERE with a stage of {', '.join(stages)}")
        found += [] if place.where == AUTO else [place]
    return tuple(found)


def _where(stage: Any, where: Any) -> Any:
    """Where a stage is to go, by a name or a number."""
    # Of a torch.device, the name.
    if (not isinstance(where, str | int) and type(where).__name__ != "device") or isinstance(where, bool):
        raise InvalidInput(f"`place` of {shown(str(stage))} is {shown(repr(where))} -> such as \"sharded\", "
                           f"\"cuda:0\" or 0, or leave it out")
    return where


def lanes(value: Any) -> int | None:
    """How many lanes, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        return read_whole("lanes", value, 1, LANES)
    check_whole("lanes", value, 1, LANES)
    return int(value)


def tile(value: Any) -> int | None:
    """The side of tiles in pixels, 0 for none; None where the plan decides, which is also called auto."""
    if value is None or value == AUTO:
        return None
    if isinstance(value, str):
        value = read_whole("tile", value, 0, SIDE)
    check_whole("tile", value, 0, SIDE)
    if value % MULTIPLE:
        near = max(MULTIPLE, value // MULTIPLE * MULTIPLE)
        raise InvalidInput(f"`tile` must be a multiple of {MULTIPLE} pixels, 0 for whole pictures or auto, got "
                           f"{value} -> `tile={near}`")
    return int(value)


def pixels(name: str, value: Any) -> int:
    """A number of pixels, from 0 on."""
    check_whole(name, value, 0, PIXELS)
    return int(value)


def run(name: Any) -> str:
    """The name of a run that a shell can say, or none."""
    if text("run", name) and (not RUN.fullmatch(name) or name == "last"):
        raise InvalidInput(f"`run` {shown(name)} is no name of a run: 1 to 64 of A-Z a-z 0-9 . _ - with no dot or "
                           f"dash in front, and not last")
    return str(name)


def made(kind: Callable[..., Kind], options: Mapping[str, Any], **more: Any) -> Kind:
    """What `kind` makes of keyword arguments that somebody wrote; InvalidInput for one that it does not have."""
    names = [name for name in signature(kind).parameters if name not in more]
    for name in options:
        if name not in names:
            if name == "prompt":
                raise InvalidInput("a job takes no 'prompt' -> `requests` says it, such as [\"a red circle\"]")
            if name in signature(Request).parameters:
                raise InvalidInput(f"a job takes no {shown(name)} -> a request says it: Request(\"a red circle\", "
                                   f"{name}=...)")
            raise InvalidInput(unknown_name("a job", name, names))
    return kind(**more, **options)


def unknown(given: Any, kept: Any, where: str = "") -> str | None:
    """Where a JSON document has a name that is not in what was made of it; None where it has none."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                return f"{where}{name}"
            if (found := unknown(value, kept[name], f"{where}{name}.")) is not None:
                return found
    elif isinstance(given, list) and isinstance(kept, list):
        for at, (value, other) in enumerate(zip(given, kept, strict=False)):
            if (found := unknown(value, other, f"{where}{at}.")) is not None:
                return found
    return None
