"""Ranks: processes that share one run, each with cards of its own and a share of the pictures by global index.

A rank needs nothing of another to do its work: names and seeds follow from the global index, and finished stages are
in the store that all of them use. Ranks on several hosts therefore need one store that all hosts see.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from stages.errors import InvalidInput
from stages.machine import Device, Machine


@dataclass(frozen=True)
class Rank:
    """One of several processes."""

    rank: int
    """Its number among all."""
    size: int
    """How many there are."""
    local: int
    """Its number among those of its host."""
    local_size: int
    """How many are on its host."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank that torchrun, accelerate launch or `spawn` made of this process; None where it is alone.

    Raises InvalidInput where RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE do not go together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not environment.get("RANK") or not environment.get("WORLD_SIZE"):
        return None
    said = {name: environment.get(name, "") for name in names}
    said["LOCAL_RANK"] = said["LOCAL_RANK"] or said["RANK"]
    said["LOCAL_WORLD_SIZE"] = said["LOCAL_WORLD_SIZE"] or said["WORLD_SIZE"]
    told = " ".join(f"{name}={value}" for name, value in said.items())
    if not all(value.isdecimal() for value in said.values()):
        raise InvalidInput(f"{told} are not whole numbers -> start ranks with torchrun, accelerate launch or `ranks`")
    found = Rank(*(int(said[name]) for name in names))
    if not (found.rank < found.size and found.local < found.local_size <= found.size):
        raise InvalidInput(f"{told} do not go together -> start ranks with torchrun, accelerate launch or `ranks`")
    return found if found.size > 1 else None


def share(count: int, part: int, parts: int) -> range:
    """The indices, of `count`, of part `part`: neighbors together, the first parts one longer where it is uneven.

    Neighbors often have one prompt and several seeds: a rank that has them all encodes it once.
    """
    least, more = divmod(count, parts)
    start = part * least + min(part, more)
    return range(start, start + least + (part < more))


def part(machine: Machine, rank: Rank) -> Machine:
    """The rank's part of its host: its own cards, in their order, or a part of the memory where there are no cards.

    Raises InvalidInput where there are fewer cards than ranks.
    """
    parts, cards = rank.local_size, machine.cards
    if not cards:
        devices = tuple(replace(device, free=device.free // parts) for device in machine.devices)
        return replace(machine, devices=devices, host_free=machine.host_free // parts)
    if len(cards) < parts:
        raise InvalidInput(
            f"{parts} ranks on this host, and {len(cards)} cards for them: {', '.join(card.name for card in cards)} "
            f"-> start {len(cards)} ranks, or choose `devices=cpu`"
        )
    mine = tuple(cards[index] for index in share(len(cards), rank.local, parts))
    return replace(machine, devices=mine, host_free=machine.host_free // parts)


def machine_to_json(machine: Machine) -> dict[str, Any]:
    """A machine as JSON, for a process that is to plan for it."""
    return asdict(machine)


def machine_from_json(said: Mapping[str, Any]) -> Machine:
    """The machine that `machine_to_json` wrote."""
    return Machine(**{**said, "devices": tuple(Device(**device) for device in said["devices"])})
