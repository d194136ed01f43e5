"""What may be said about where things go, as text and as types: memory limits, and places of stages and components."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from stages.errors import InvalidInput

UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}
FORMS = "write 14GiB, 16GB, 14 (GiB), 80%, -2GiB (to leave free), or 0=14GiB,1=14GiB,cpu=24GiB"
PROCESSES = 64
_BYTES = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?) ?(?P<unit>[A-Za-z]*)")
_PERCENT = re.compile(r"([0-9]{1,3}(\.[0-9]{1,3})?) ?%")
_TENSOR_PARALLEL = re.compile("tensor_parallel(:(?P<count>[1-9][0-9]?))?")


def read_bytes(text: str) -> int:
    """The bytes that `text` means: `14GiB`, `16gb` (16e9), or a plain number of GiB; InvalidInput for another."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(f"`max_memory`: {text!r} is no amount of memory: {FORMS}")
    unit = match["unit"].lower() or "gib"
    if unit not in UNITS:
        near = f"{match['unit'][:1].upper()}iB" if unit in ("k", "m", "g", "t") else "GiB"
        raise InvalidInput(f"`max_memory`: {text!r} has the unit {match['unit']!r}: write {match['number']}{near} or, "
                           f"for powers of ten, {match['number']}{near.replace('i', '')}")
    size = int(float(match["number"]) * UNITS[unit])
    if size == 0:
        raise InvalidInput(f"`max_memory`: {text!r} is no memory at all: {FORMS}")
    return size


@dataclass(frozen=True)
class MemoryLimit:
    """How much of one device may be used."""

    text: str
    """As it was written."""
    kind: Literal["bytes", "percent", "free"]
    """At most so many bytes, so much of the device, or all but so many bytes that are to stay free."""
    amount: float
    """Bytes, or percent of all."""

    @classmethod
    def read(cls, text: str) -> "MemoryLimit":
        """The limit that `14GiB`, `80%` or `-2GiB` spells; InvalidInput for another text."""
        if percent := _PERCENT.fullmatch(text):
            if not 0 < float(percent[1]) <= 100:
                raise InvalidInput(f"`max_memory` {text}: write more than 0% and no more than 100%")
            return cls(text, "percent", float(percent[1]))
        if text.startswith("-"):
            return cls(text, "free", read_bytes(text[1:]))
        return cls(text, "bytes", read_bytes(text))


@dataclass(frozen=True)
class MemoryLimits:
    """The limits of devices."""

    by_device: Mapping[str, MemoryLimit] = field(default_factory=dict, hash=False)
    """By device as it was named ("0", "cuda:1", "cpu"); "" stands for every card."""

    def __post_init__(self) -> None:
        for limit in self.by_device.values():
            if MemoryLimit.read(limit.text) != limit:
                raise InvalidInput(f"`max_memory` {limit.text!r} is not {limit.amount:g} ({limit.kind})")

    @classmethod
    def read(cls, text: str) -> "MemoryLimits":
        """The limits that `14GiB` (each card) or `0=14GiB,1=80%,cpu=24GiB` spells; InvalidInput for another text."""
        if "=" not in text:
            return cls({"": MemoryLimit.read(text.strip())})
        found: dict[str, MemoryLimit] = {}
        for part in text.split(","):
            name, sign, amount = (piece.strip() for piece in part.partition("="))
            if not sign or not name or not amount:
                raise InvalidInput(f"`max_memory` {text!r}: {part!r} is no device=amount: {FORMS}")
            if name in found:
                raise InvalidInput(f"`max_memory` {text!r} names {name} twice")
            if amount.startswith("-"):
                raise InvalidInput(f"`max_memory` {part!r}: a limit cannot be negative; to leave memory free on every "
                                   f"card write `max_memory={amount}`")
            found[name] = MemoryLimit.read(amount)
        return cls(found)

    def __str__(self) -> str:
        return ",".join(f"{name}={limit.text}" if name else limit.text for name, limit in self.by_device.items())

    def without(self, device: str) -> "MemoryLimits":
        """The limits that are said of other devices by name."""
        return MemoryLimits({name: limit for name, limit in self.by_device.items() if name not in ("", device)})


@dataclass(frozen=True)
class PlaceRequest:
    """Where a stage, or one component of it, is asked to go."""

    stage: str
    """encode, denoise or decode."""
    where: str
    """A strategy of the ladder, a device, runs of blocks such as 0:9,1:28,0:20, or tensor_parallel[:N]."""
    component: str = ""
    """The component that is meant; empty for all of the stage."""

    @classmethod
    def read(cls, text: str) -> "PlaceRequest":
        """The request that `denoise=sharded` or `encode.text_encoder_2=1` spells; InvalidInput for another text."""
        key, sign, where = text.partition("=")
        stage, _, component = key.partition(".")
        if not sign:
            raise InvalidInput(f"`place` {text!r}: write STAGE=WHERE or STAGE.COMPONENT=WHERE with a stage of encode, "
                               f"denoise, decode")
        return cls(stage, where, component)

    def __str__(self) -> str:
        return f"{self.stage}{f'.{self.component}' if self.component else ''}={self.where}"

    @property
    def processes(self) -> int | None:
        """The processes that `tensor_parallel` or `tensor_parallel:2` asks for, 0: one a card; None otherwise."""
        match = _TENSOR_PARALLEL.fullmatch(self.where)
        return None if match is None else int(match["count"] or 0)


def tensor_parallel_processes(places: Iterable[PlaceRequest]) -> int | None:
    """How many processes the last request about the whole denoise asks for, as `PlaceRequest.processes` has it."""
    asked = [place for place in places if place.stage == "denoise" and not place.component]
    return asked[-1].processes if asked else None
