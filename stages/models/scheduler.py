"""A scheduler that is asked for in the place of the model's own. No torch, and nothing is loaded."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from stages.errors import InvalidInput, ModelError
from stages.models.config_check import check_scheduler
from stages.wording import kind_of

FORM = "NAME, NAME,key=value,... or key=value,..., such as UniPCMultistepScheduler,use_flow_sigmas=true"
LONGEST = 16 * 2**10
# Behind the name of a class whose config is all of it.
WHOLE = "whole"
# Of a config that diffusers wrote, or made.
_MARKS = ("_diffusers_version", "_use_default_values")
_NAME = re.compile(r"[A-Z][A-Za-z0-9]{1,79}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,79}")


@dataclass(frozen=True)
class SchedulerRequest:
    """A class of diffusers, made with the config of the model's own scheduler and what is to be changed in it.

    Infinities are the texts `inf` and `-inf`, as JSON has no other way to say them.
    """

    name: str = ""
    """Its class; empty for that of the model's own."""
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What is changed of the config, as JSON."""
    whole: bool = False
    """Whether that is all of the config: nothing of the model's own is in it."""

    def __post_init__(self) -> None:
        if self.name and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise InvalidInput(f"`scheduler` {self.name!a:.80} is no name of a class -> {FORM}")
        if not isinstance(self.config, Mapping):
            raise InvalidInput(f"`scheduler` has a config of {type(self.config).__name__} -> a mapping")
        if not self.name and not self.config:
            raise InvalidInput(f"`scheduler` is empty -> {FORM}")
        if self.whole and not self.name:
            raise InvalidInput(f"`scheduler` has a whole config and no class for it -> {FORM}")
        try:
            text = json.dumps(_finite(dict(self.config)), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"`scheduler` has a config that is no JSON: {error} -> {FORM}") from None
        if len(text) > LONGEST:
            raise InvalidInput(f"`scheduler` has a config of {len(text):,} letters; the limit is {LONGEST:,}")
        for key in self.config:
            if not _KEY.fullmatch(str(key)):
                raise InvalidInput(f"`scheduler` has the key {key!a:.80} -> {FORM}")
        try:
            check_scheduler(self.config, "`scheduler`")
        except ModelError as error:
            raise InvalidInput(error.text.partition(";")[0]) from None
        # As JSON has it: no tuples.
        object.__setattr__(self, "config", json.loads(text))

    def __str__(self) -> str:
        changes = (f"{key}={json.dumps(value)}" for key, value in self.config.items())
        return ",".join([*([self.name] if self.name else []), *([WHOLE] if self.whole else []), *changes])

    @classmethod
    def read(cls, given: Any) -> "SchedulerRequest":
        """The request that a text spells, or that a config or a scheduler of diffusers stands for; else InvalidInput.

        A config may name its class under `_class_name`.
        """
        if isinstance(given, SchedulerRequest):
            return given
        if isinstance(given, str):
            name, *changes = _parts(given)
            name, changes = (name, changes) if "=" not in name else ("", [name, *changes])
            whole = bool(changes) and changes[0].strip() == WHOLE
            return cls(name.strip(), dict(map(_change, changes[whole:])), whole)
        if isinstance(given, Mapping):
            # One that diffusers wrote is whole, and has what its class has no use for, for the sake of others.
            whole = "_class_name" in given and not given.keys().isdisjoint(_MARKS)
            return cls(str(given.get("_class_name", "")), {key: value for key, value in given.items()
                                                           if not str(key).startswith("_")}, whole)
        if isinstance(given, type) and given.__name__.endswith("Scheduler"):
            return cls(given.__name__)
        if not isinstance(getattr(given, "config", None), Mapping) or not hasattr(given, "to_json_string"):
            raise InvalidInput(f"`scheduler` is {kind_of(given)} -> a name such as "
                               f"\"UniPCMultistepScheduler\", a config, or a scheduler of diffusers")
        return cls.read(_config_of(given) | {"_class_name": type(given).__name__})

    def to_json(self) -> dict[str, Any]:
        """The request as a picture's metadata have it."""
        whole = {WHOLE: True} if self.whole else {}
        return {"name": self.name, "config": dict(sorted(self.config.items())), **whole}


def _config_of(scheduler: Any) -> dict[str, Any]:
    """All of a scheduler's config, as diffusers writes it; InvalidInput where a step would use something else."""
    try:
        config: dict[str, Any] = json.loads(scheduler.to_json_string())
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"`scheduler` has a config that is no JSON: {error} -> {FORM}") from None
    told = config.get("shift")
    shift = scheduler.shift if isinstance(getattr(type(scheduler), "shift", None), property) else told
    if isinstance(shift, int | float) and isinstance(told, int | float) and shift != told:
        raise InvalidInput(f"`scheduler` was given a shift of {shift:g} by set_shift, and its config says {told:g} "
                           f"-> make it with shift={shift:g}")
    return config


def _finite(value: Any) -> Any:
    """A config with text for its infinities, which diffusers has among its defaults."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _parts(text: str) -> list[str]:
    """What is between commas, but for those inside of a JSON value."""
    if len(text) > LONGEST:
        raise InvalidInput(f"`scheduler` has {len(text):,} letters; the limit is {LONGEST:,}")
    found: list[str] = []
    for part in text.split(","):
        if found and _is_open(found[-1]):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _is_open(part: str) -> bool:
    value = part.partition("=")[2].strip()
    with suppress(ValueError, RecursionError):
        json.loads(value)
        return False
    return value[:1] in ("[", "{", '"')


def _change(text: str) -> tuple[str, Any]:
    key, sign, value = (part.strip() for part in text.partition("="))
    if not sign or not value:
        raise InvalidInput(f"`scheduler` has {text!a:.80} -> {FORM}")
    try:
        return key, json.loads(value)
    except ValueError:
        # A word, such as sde-dpmsolver++.
        return key, {"True": True, "False": False, "None": None}.get(value, value)
