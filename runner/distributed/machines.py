"""Machines as other processes have them: the part of a host that is a rank's own, and a machine as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from runner.distributed.env import Rank, share
from stages.errors import InvalidInput
from stages.machine import Device, Machine


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


def machine_from_json(document: Mapping[str, Any]) -> Machine:
    """The machine that `machine_to_json` wrote."""
    return Machine(**{**document, "devices": tuple(Device(**device) for device in document["devices"])})
