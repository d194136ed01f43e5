"""Placements that the user asks for: `denoise=sharded`, `encode.text_encoder_2=1`, `denoise=0:9,1:28,0:20`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from runner.planning.ladder import LADDER
from runner.planning.parallel import processes
from stages.machine import Machine
from stages.models.weights import Weights
from stages.pipeline.stage import Stage
from stages.placement.placement import Placement, Resident
from stages.placement.sharded import Sharded

_RUNS = re.compile(r"[\w:]+:[0-9]+(,[\w:]+:[0-9]+)*")


@dataclass(frozen=True)
class PlaceRequest:
    """What is asked for a stage: one rung of the ladder, or the places of some of its components.

    `tensor_parallel` is no rung that is climbed to unasked: it takes a process for each card.
    """

    rung: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)


def read_wishes(texts: Sequence[str], stages: Sequence[Stage]) -> dict[str, PlaceRequest]:
    """The wishes by stage; ValueError for a stage, component or word that there is not."""
    rungs: dict[str, str] = {}
    places: dict[str, dict[str, str]] = {stage.name: {} for stage in stages}
    for text in texts:
        key, sign, value = text.partition("=")
        name, _, component = key.partition(".")
        stage = next((stage for stage in stages if stage.name == name), None)
        if not sign or stage is None:
            raise ValueError(f"--place {text!r}: write STAGE=WHERE or STAGE.COMPONENT=WHERE with a stage of "
                             f"{', '.join(places)}")
        names = [part.name for part in stage.components]
        if component and component not in names:
            raise ValueError(f"--place {text!r}: {name} has no component {component}: choose from {', '.join(names)}")
        if processes(value) is not None and (component or name != "denoise"):
            raise ValueError(f"--place {text!r}: it is the whole denoise that can be cut over cards: write "
                             f"denoise={value}")
        if not component and (value in LADDER or processes(value) is not None):
            rungs[name] = value
        else:
            places[name].update(dict.fromkeys([component] if component else names, value))
    return {name: PlaceRequest(rungs.get(name), places[name]) for name in places}


def granted(
    value: str, weights: Weights, machine: Machine, rest: Callable[[str], tuple[str, ...]]
) -> Placement:
    """The placement that `value` spells: a device, or runs of blocks as DEVICE:COUNT from the first block on.

    Raises ValueError for a device that is not used, or runs that do not add up to the component's blocks.
    """
    names = [device.name for device in machine.devices]
    if _RUNS.fullmatch(value) and value not in names:
        return _runs(value, weights, machine, rest)
    return Resident(_device(value, names, weights.component))


def _runs(value: str, weights: Weights, machine: Machine, rest: Callable[[str], tuple[str, ...]]) -> Sharded:
    names = [device.name for device in machine.devices]
    cards: list[str] = []
    for run in value.split(","):
        device, _, count = run.rpartition(":")
        cards += [_device(device, names, weights.component)] * int(count)
    if len(cards) != len(weights.blocks) or "" in weights.blocks:
        raise ValueError(f"--place {value!r} places {len(cards)} blocks; {weights.component} has "
                         f"{0 if '' in weights.blocks else len(weights.blocks)} that can be placed")
    return Sharded(cards[0], dict(zip(weights.blocks, cards, strict=True)), rest(weights.component))


def _device(name: str, names: Sequence[str], component: str) -> str:
    full = next((known for known in names if known.rpartition(":")[2] == name), name)
    if full not in names:
        raise ValueError(f"--place: {component} cannot go to {name!r}: write a device of {', '.join(names)}, runs "
                         f"such as 0:9,1:28,0:20, or for a whole stage {', '.join(LADDER)}")
    return full
