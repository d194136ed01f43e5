"""Where a stage's components go: the first strategy that fits, and why those before it do not.

    resident   all of them on the card with most room
    spread     whole components on different cards
    sharded    components too large for a card dealt over several, block by block
    streamed   as sharded, with some blocks waiting in host memory or on the disk; only where that is allowed
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.text import gib
from stages.errors import DoesNotFit, Fixes
from stages.machine import Device, Machine
from stages.models.weights import Weights
from stages.placement.balance import Blocks, partition
from stages.placement.placement import Placement, Resident
from stages.placement.sharded import Sharded
from stages.placement.streaming import Streamed

Rooms = dict[str, int]
Placements = dict[str, Placement]


@dataclass(frozen=True)
class Strategy:
    """A way to place a stage that was tried."""

    name: str
    """Its name in the ladder."""
    refused: str = ""
    """Why it does not fit; empty where it does."""


@dataclass(frozen=True)
class PlacementProblem:
    """What a stage asks of a machine."""

    stage: str
    """Its name."""
    weights: Mapping[str, Weights]
    """What each component weighs."""
    work: Mapping[str, Mapping[str, int]]
    """By component and block, its floating point operations."""
    reserve: Mapping[str, int]
    """Bytes that each device keeps for activations."""
    rest: Callable[[str], tuple[str, ...]]
    """The names of what is outside of a component's blocks."""
    fixed: Mapping[str, Placement] = field(default_factory=dict)
    """Components that are placed already."""
    lanes: int = 1
    """Requests in flight: so many cards are of use."""
    full_lanes: int = 1
    """Those of them whose activations are in `reserve`: there may be fewer requests."""
    split: bool = True
    """Whether components may be split."""
    offload: str | None = None
    """Whether blocks may wait in host memory ("cpu"), and those that do not fit there on the disk ("disk")."""
    pinned: frozenset[str] = frozenset()
    """Blocks that stay with what is outside of the blocks."""
    smaller: Mapping[str, float] = field(default_factory=dict)
    """Smaller pictures (WxH) with their part of the pixels."""
    tile: int = 0
    """Pixels along a side of the tiles with which a decoder fits; 0 where none are known to help."""

    @property
    def open(self) -> list[Weights]:
        """What is to be placed, the largest first."""
        return sorted((w for name, w in self.weights.items() if name not in self.fixed), key=lambda w: -w.total)


class NoStrategyFits(DoesNotFit):
    """A stage that no strategy places on a machine; `problem` is None where there was nothing to choose."""

    def __init__(
        self, text: str, tried: Sequence[Strategy] = (), fixes: Fixes = (), problem: PlacementProblem | None = None,
        machine: Machine | None = None, only: str | None = None,
    ) -> None:
        super().__init__(text, fixes)
        self.tried, self.problem, self.machine, self.only = tuple(tried), problem, machine, only


def choose(
    problem: PlacementProblem, machine: Machine, only: str | None = None
) -> tuple[Placements, tuple[Strategy, ...]]:
    """The placements of the first strategy that fits, and every one that was tried.

    `only` names the one strategy to try. Raises NoStrategyFits with the arithmetic of each.
    """
    placements, tried = attempt(problem, machine, only)
    if placements is not None:
        return placements, tried
    lines = "".join(f"\n  {strategy.name}: {strategy.refused}" for strategy in tried)
    raise NoStrategyFits(f"{problem.stage} does not fit.{lines}", tried, (), problem, machine, only)


def attempt(
    problem: PlacementProblem, machine: Machine, only: str | None = None
) -> tuple[Placements | None, tuple[Strategy, ...]]:
    """As `choose`; None for the placements where no strategy fits."""
    rooms = {device.name: device.room - problem.reserve.get(device.name, 0) for device in usable(machine)}
    # The host holds what is placed there by hand, and is no choice for the others.
    left = {"cpu": machine.host_room} | rooms
    for name, placement in problem.fixed.items():
        for device, size in placement.share(problem.weights[name]).items():
            left[device] -= size
    if short := [name for name, room in left.items() if room < 0 and problem.fixed]:
        return None, (Strategy("as placed", f"{short[0]} lacks {gib(-left[short[0]])}"),)
    rooms = {name: left[name] for name in rooms}
    tried: list[Strategy] = []
    for name in LADDER if only is None else [only]:
        found = LADDER[name](problem, machine, dict(rooms))
        if isinstance(found, dict):
            return {**problem.fixed, **found}, (*tried, Strategy(name))
        if found or only:
            tried.append(Strategy(name, found or NEEDS[name]))
    return None, tuple(tried)


def _resident(problem: PlacementProblem, machine: Machine, rooms: Rooms) -> Placements | str:
    best = max(rooms, key=lambda name: rooms[name])
    need = sum(weights.total for weights in problem.open)
    if need <= rooms[best]:
        return {weights.component: Resident(best) for weights in problem.open}
    return f"{gib(need)} of weights on one device; {_room(machine, rooms, best, problem)}"


def _spread(problem: PlacementProblem, machine: Machine, rooms: Rooms) -> Placements | str:
    if len(problem.open) < 2 or len(rooms) < 2:
        return ""
    found: Placements = {}
    for weights in problem.open:
        best = max(rooms, key=lambda name: rooms[name])
        if weights.total > rooms[best]:
            return f"{weights.component} has {gib(weights.total)} of weights; {_room(machine, rooms, best, problem)}"
        rooms[best] -= weights.total
        found[weights.component] = Resident(best)
    return found


def _sharded(problem: PlacementProblem, machine: Machine, rooms: Rooms) -> Placements | str:
    if len(rooms) < 2 or not problem.split:
        return ""
    found: Placements = {}
    for weights in problem.open:
        best = max(rooms, key=lambda name: rooms[name])
        whole = weights.total <= rooms[best] and len(problem.open) > 1
        placement = Resident(best) if whole else _dealt(problem, weights, rooms)
        if placement is None:
            return _short(problem, machine, weights, rooms)
        found[weights.component] = placement
        for device, size in placement.share(weights).items():
            rooms[device] -= size
    return found


def _streamed(problem: PlacementProblem, machine: Machine, rooms: Rooms) -> Placements | str:
    if not problem.split or not (machine.cards or problem.offload == "disk"):
        return ""
    if problem.offload is None:
        return "what does not fit would wait in host memory, which nobody allowed"
    found: Placements = {}
    # Where the host is the device that computes, all that waits is on the disk.
    host = machine.host_room if machine.cards else 0
    for weights in problem.open:
        best = max(rooms, key=lambda name: rooms[name])
        placement: Placement = Resident(best)
        if weights.total > rooms[best]:
            streamed = _with_hosted(problem, weights, rooms)
            if streamed is None:
                return f"not even one block of {weights.component} at a time; {_room(machine, rooms, best, problem)}"
            waiting = sum(weights.blocks[name] for name in streamed.cpu_blocks)
            if waiting > host and problem.offload != "disk":
                return (f"{gib(waiting)} of {weights.component} would wait in host memory, which has "
                        f"{gib(host)} for it")
            placement = streamed = _shelved(streamed, weights, host)
            host -= sum(weights.blocks[name] for name in streamed.cpu_blocks)
        found[weights.component] = placement
        for device, size in placement.share(weights).items():
            if device in rooms:
                rooms[device] -= size
    return found


LADDER: dict[str, Callable[[PlacementProblem, Machine, Rooms], Placements | str]] = {
    "resident": _resident, "spread": _spread, "sharded": _sharded, "streamed": _streamed,
}
# What is said of a strategy that was asked for where it is none.
NEEDS = {
    "spread": "that takes two components and two devices", "sharded": "that takes two devices, and no decode",
    "streamed": "that takes a card, or `allow_offload=disk`, and no decode",
}


def _dealt(
    problem: PlacementProblem, weights: Weights, rooms: Rooms, cpu_blocks: frozenset[str] = frozenset()
) -> Sharded | None:
    """The blocks of one component over as few cards as fit, or as many as there are lanes."""
    if "" in weights.blocks:
        return None
    passing = max((weights.blocks[name] for name in cpu_blocks), default=0)
    loose = {name: 0 if name in cpu_blocks else size
             for name, size in weights.blocks.items() if name not in problem.pinned}
    held = sum(weights.rest.values()) + sum(size for name, size in weights.blocks.items() if name in problem.pinned)
    hand = Blocks(list(loose.values()), [problem.work[weights.component].get(name, 0) for name in loose])
    order = sorted(rooms, key=lambda name: -rooms[name])
    for count in range(min(len(order), max(2, problem.lanes)), len(order) + 1):
        left = [rooms[name] - passing for name in order[:count]]
        left[0] -= held
        cards = partition(hand, left)
        if cards is not None:
            at = {name: order[card] for name, card in zip(loose, cards, strict=True)}
            devices = {name: at.get(name, order[0]) for name in weights.blocks}
            return Sharded(order[0], devices, problem.rest(weights.component))
    return None


def _with_hosted(problem: PlacementProblem, weights: Weights, rooms: Rooms) -> Streamed | None:
    """With as few blocks in host memory as fit, spread evenly between the others."""
    names = [name for name in weights.blocks if name not in problem.pinned]
    for count in range(1, len(names) + 1):
        cpu_blocks = _evenly(names, count)
        dealt = _dealt(problem, weights, rooms, cpu_blocks)
        if dealt is not None:
            return Streamed(dealt.device, dealt.devices, dealt.rest, cpu_blocks=cpu_blocks)
    return None


def _shelved(placement: Streamed, weights: Weights, room: int) -> Streamed:
    """With as few of the blocks that wait on the disk as leave the others `room` bytes of host memory."""
    names = [name for name in weights.blocks if name in placement.cpu_blocks]
    for count in range(len(names) + 1):
        disk_blocks = _evenly(names, count)
        if sum(weights.blocks[name] for name in placement.cpu_blocks - disk_blocks) <= room:
            break
    return replace(placement, cpu_blocks=placement.cpu_blocks - disk_blocks, disk_blocks=disk_blocks)


def _evenly(names: Sequence[str], count: int) -> frozenset[str]:
    """So many of the names, evenly between the others."""
    return frozenset(names[(2 * at + 1) * len(names) // (2 * count)] for at in range(count))


def usable(machine: Machine) -> Sequence[Device]:
    """The devices that stages are placed on: the cards, or the host where there is none."""
    return machine.cards or machine.devices


def _room(machine: Machine, rooms: Rooms, name: str, problem: PlacementProblem) -> str:
    """Such as `cuda:0 has 12.9 GiB for them (14.4 free, 0.5 left to the runtime, 1.0 for activations)`."""
    device = machine[name]
    free = f"{gib(device.free)} free" if device.limit is None else f"limited to {gib(device.limit)}"
    parts = [free, f"{gib(device.spare)} left to the runtime" if device.limit is None and device.spare else "",
             f"{gib(problem.reserve.get(name, 0))} for activations"]
    return f"{name} has {gib(max(0, rooms[name]))} for them ({', '.join(filter(None, parts))})"


def _short(problem: PlacementProblem, machine: Machine, weights: Weights, rooms: Rooms) -> str:
    if "" in weights.blocks:
        return f"{weights.component} cannot be split"
    together = sum(max(0, room) for room in rooms.values())
    each = " + ".join(gib(max(0, room)) for room in rooms.values())
    largest = gib(max(weights.blocks.values()))
    return (f"{weights.component} has {gib(weights.total)} of weights in blocks of up to {largest}; "
            f"{', '.join(rooms)} have {each} = {gib(together)} for them")
