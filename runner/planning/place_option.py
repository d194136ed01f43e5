"""Places that a job asks for, held against the stages, the machine and the blocks that there are."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from runner.placement_options import PlaceRequest
from runner.planning.ladder import LADDER
from stages.errors import InvalidInput
from stages.machine import Machine
from stages.models.weights import Weights
from stages.pipeline.stage import Stage
from stages.placement.placement import Placement, Resident
from stages.placement.sharded import Sharded

_RUNS = re.compile(r"[\w:]+:[0-9]+(,[\w:]+:[0-9]+)*")


@dataclass(frozen=True)
class StagePlaces:
    """What is asked for one stage."""

    strategy: str | None = None
    """The one strategy of the ladder to try."""
    processes: int | None = None
    """The processes to denoise together, 0: one for each card."""
    components: Mapping[str, str] = field(default_factory=dict)
    """By component, a device or runs of blocks."""


def places_asked_for(places: Sequence[PlaceRequest], stages: Sequence[Stage]) -> dict[str, StagePlaces]:
    """What is asked for by stage; InvalidInput for a component or word that there is not."""
    strategies: dict[str, str] = {}
    processes: dict[str, int] = {}
    components: dict[str, dict[str, str]] = {stage.name: {} for stage in stages}
    for place in places:
        names = next([part.name for part in stage.components] for stage in stages if stage.name == place.stage)
        if place.component and place.component not in names:
            raise InvalidInput(f"`place` {str(place)!r}: {place.stage} has no component {place.component}: choose "
                               f"from {', '.join(names)}")
        if place.processes is not None:
            if place.component or place.stage != "denoise":
                raise InvalidInput(f"`place` {str(place)!r}: it is the whole denoise that can be cut over cards: "
                                   f"write denoise={place.where}")
            strategies.pop(place.stage, None)
            processes[place.stage] = place.processes
        elif not place.component and place.where in LADDER:
            processes.pop(place.stage, None)
            strategies[place.stage] = place.where
        else:
            chosen = [place.component] if place.component else names
            components[place.stage].update(dict.fromkeys(chosen, place.where))
    return {name: StagePlaces(strategies.get(name), processes.get(name), components[name]) for name in components}


def resolve(
    where: str, weights: Weights, machine: Machine, rest: Callable[[str], tuple[str, ...]]
) -> Placement:
    """The placement that `where` spells: a device, or runs of blocks as DEVICE:COUNT from the first block on.

    `rest` gives the names of what is outside of a component's blocks. Raises InvalidInput for a device that is not
    used, or runs that do not add up to the component's blocks.
    """
    names = [device.name for device in machine.devices]
    if not _RUNS.fullmatch(where) or where in names:
        return Resident(_device(where, names, weights.component))
    devices: list[str] = []
    for run in where.split(","):
        device, _, count = run.rpartition(":")
        devices += [_device(device, names, weights.component)] * int(count)
    if len(devices) != len(weights.blocks) or "" in weights.blocks:
        raise InvalidInput(f"`place` {where!r} places {len(devices)} blocks; {weights.component} has "
                           f"{0 if '' in weights.blocks else len(weights.blocks)} that can be placed")
    return Sharded(devices[0], dict(zip(weights.blocks, devices, strict=True)), rest(weights.component))


def _device(name: str, names: Sequence[str], component: str) -> str:
    full = next((known for known in names if known.rpartition(":")[2] == name), name)
    if full not in names:
        raise InvalidInput(f"`place`: {component} cannot go to {name!r}: write a device of {', '.join(names)}, runs "
                           f"such as 0:9,1:28,0:20, or for a whole stage {', '.join(LADDER)}")
    return full


def process_devices(machine: Machine, count: int) -> tuple[str, ...]:
    """The devices of `count` processes: the first cards, or all for 0; on a host without cards, that several times.

    Raises InvalidInput where it is fewer than two, or than there are cards.
    """
    cards = tuple(card.name for card in machine.cards)
    if not cards and count > 1:
        return (machine.devices[0].name,) * count
    found = cards[:count] if count else cards
    if len(found) < max(2, count):
        there = f"{len(cards)} cards ({', '.join(cards)})" if len(cards) > 1 else cards[0] if cards else "no card"
        raise InvalidInput(f"denoise=tensor_parallel needs {max(2, count)} cards, and there is {there} -> leave it "
                           f"out; on a CPU, `ranks=2` says how many processes")
    return found
