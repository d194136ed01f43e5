"""A scheduler that is asked for in the place of the model's own. No torch, and nothing is loaded."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from stages.errors import InvalidInput, ModelError
from stages.models.config_check import check_scheduler
from stages.wording import kind_of

FORM = "NAME, NAME,key=value,... or key=value,..., such as UniPCMultistepScheduler,use_flow_sigmas=true"
LONGEST = 16 * 2**10
_NAME = re.compile(r"[A-Z][A-Za-z0-9]{1,79}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,79}")


@dataclass(frozen=True)
class SchedulerRequest:
    """A class of diffusers, made with the config of the model's own scheduler and what is to be changed in it."""

    name: str = ""
    """Its class; empty for that of the model's own."""
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What is changed of the config, as JSON."""

    def __post_init__(self) -> None:
        if self.name and not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise InvalidInput(f"`scheduler` {self.name!a:.80} is no name of a class -> {FORM}")
        if not isinstance(self.config, Mapping):
            raise InvalidInput(f"`scheduler` has a config of {type(self.config).__name__} -> a mapping")
        if not self.name and not self.config:
            raise InvalidInput(f"`scheduler` is empty -> {FORM}")
        try:
            text = json.dumps(dict(self.config), allow_nan=False)
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
        return ",".join([*([self.name] if self.name else []), *changes])

    @classmethod
    def read(cls, given: Any) -> "SchedulerRequest":
        """The request that a text spells, or that a config or a scheduler of diffusers stands for; else InvalidInput.

        A config may name its class under `_class_name`.
        """
        if isinstance(given, SchedulerRequest):
            return given
        if isinstance(given, str):
            name, *changes = given.split(",") if "=" not in given.partition(",")[0] else ("", *given.split(","))
            return cls(name.strip(), dict(map(_change, changes)))
        if isinstance(given, Mapping):
            return cls(str(given.get("_class_name", "")), {key: value for key, value in given.items()
                                                           if not str(key).startswith("_")})
        if isinstance(given, type) and given.__name__.endswith("Scheduler"):
            return cls(given.__name__)
        config = getattr(given, "config", None)
        if not isinstance(config, Mapping):
            raise InvalidInput(f"`scheduler` is {kind_of(given)} -> a name such as "
                               f"\"UniPCMultistepScheduler\", a config, or a scheduler of diffusers")
        # Made from the config of another class, it keeps what it has no use for.
        known = signature(type(given)).parameters
        return cls(type(given).__name__, {key: value for key, value in config.items() if key in known})

    def to_json(self) -> dict[str, Any]:
        """The request as a picture's metadata have it."""
        return {"name": self.name, "config": dict(sorted(self.config.items()))}


def _change(text: str) -> tuple[str, Any]:
    key, sign, value = (part.strip() for part in text.partition("="))
    if not sign or not value:
        raise InvalidInput(f"`scheduler` has {text!a:.80} -> {FORM}")
    try:
        return key, json.loads(value)
    except ValueError:
        # A word, such as sde-dpmsolver++.
        return key, {"True": True, "False": False, "None": None}.get(value, value)
