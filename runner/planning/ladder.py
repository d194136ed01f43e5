"""Where a stage's components go: the first rung that fits, and why those before it do not.

    resident   all of them on the card with most room
    apart      whole components on different cards
    sharded    components too large for a card dealt over several, block by block
    streamed   as sharded, with some blocks waiting in host memory or on the disk; only where that is allowed
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.text import gib
from stages.errors import DoesNotFit, Fix, Fixes
from stages.machine import Device, Machine
from stages.models.weights import Weights
from stages.placement.balance import Blocks, partition
from stages.placement.placement import DISK, Placement, Resident
from stages.placement.sharded import Sharded
from stages.placement.streaming import Streamed

Rooms = dict[str, int]
Placements = dict[str, Placement]

OFFLOADS = (None, "cpu", "disk")


@dataclass(frozen=True)
class Strategy:
    """A way to place a stage that was tried; `refused` says why it does not fit, and is empty where it does."""

    name: str
    refused: str = ""


@dataclass(frozen=True)
class Ask:
    """What a stage asks of a machine.

    `work` are the operations in each block of a component, `reserve` the bytes that each device keeps for
    activations, `rest` gives the names outside the blocks of a component. `fixed` components are placed already. With
    `lanes` requests in flight as many cards are of use; `split` says whether components may be split, and `offload`
    whether blocks may wait in host memory ("cpu"), and those that do not fit there on the disk ("disk"). `pinned`
    blocks stay with what is outside the blocks. `smaller` are smaller pictures with their part of the pixels.
    """

    stage: str
    weights: Mapping[str, Weights]
    work: Mapping[str, Mapping[str, int]]
    reserve: Mapping[str, int]
    rest: Callable[[str], tuple[str, ...]]
    fixed: Mapping[str, Placement] = field(default_factory=dict)
    lanes: int = 1
    split: bool = True
    offload: str | None = None
    pinned: frozenset[str] = frozenset()
    smaller: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(weights.total for weights in self.weights.values())

    @property
    def open(self) -> list[Weights]:
        """What is to be placed, the largest first."""
        return sorted((w for name, w in self.weights.items() if name not in self.fixed), key=lambda w: -w.total)


class NoStrategyFits(DoesNotFit):
    """A stage that fits on no rung."""

    def __init__(self, text: str, rungs: Sequence[Strategy] = (), fixes: Fixes = ()) -> None:
        super().__init__(text, fixes)
        self.rungs = tuple(rungs)


def choose(ask: Ask, machine: Machine, only: str | None = None) -> tuple[Placements, tuple[Strategy, ...]]:
    """The placements of the first rung that fits, and every rung that was tried.

    `only` names the one rung to try. Raises NoStrategyFits with the arithmetic of each and the least change that
    would fit.
    """
    placements, rungs = _climbed(ask, machine, only)
    if placements is not None:
        return placements, rungs
    words, fixes = change(ask, machine, only)
    tried = "".join(f"\n  {rung.name}: {rung.refused}" for rung in rungs)
    raise NoStrategyFits(f"{ask.stage} does not fit.{tried}\n-> {words}", rungs, fixes)


def change(ask: Ask, machine: Machine, only: str | None = None) -> tuple[str, Fixes]:
    """The least change that makes a stage fit: in words, and as changes of the job."""
    if (only or ask.fixed) and _climbed(replace(ask, fixed={}), machine)[0] is not None:
        return f"it fits without `place={ask.stage}`", (Fix("place", None, ask.stage),)
    ask = replace(ask, fixed={})
    if machine.unlimited != machine and _climbed(ask, machine.unlimited)[0] is not None:
        return "it fits without `max_memory`", (Fix("max_memory"),)
    for offload in OFFLOADS[OFFLOADS.index(ask.offload) + 1 :]:
        streamed = _climbed(replace(ask, offload=offload), machine)[0]
        if streamed is not None:
            return f"`allow_offload={offload}`: {_waiting(ask, streamed)}", (Fix("allow_offload", offload),)
    for size, part in ask.smaller.items():
        # What does not shrink with the picture, such as the prompt, is a small part.
        reserve = {name: int(held * min(1, part + 0.1)) for name, held in ask.reserve.items()}
        if _climbed(replace(ask, reserve=reserve), machine)[0] is not None:
            return f"`size={size}`: a smaller picture needs less for activations", (Fix("size", size),)
    return f"it would fit with {gib(lacking(ask, machine))} more on {_usable(machine)[0].name}", ()


def _waiting(ask: Ask, streamed: Placements) -> str:
    waiting = Counter[str]()
    for name, weights in ask.weights.items():
        waiting.update(streamed[name].share(weights))
    disk = f"{gib(waiting[DISK])} would be read from the disk" if waiting[DISK] else ""
    host = f"{gib(waiting['cpu'])} would wait in host memory and be copied to the card" if waiting["cpu"] else ""
    return f"{' and '.join(filter(None, (host, disk)))} for every pass"


def lacking(ask: Ask, machine: Machine) -> int:
    """The bytes that the first device lacks for the stage to fit, to a sixteenth."""
    first = _usable(machine)[0]

    def fits(more: int) -> bool:
        grown = replace(first, total=first.total + more, free=first.free + more, limit=None)
        devices = (grown, *(device for device in machine.devices if device.name != first.name))
        return _climbed(ask, replace(machine, devices=devices))[0] is not None

    more = 1
    while not fits(more):
        more *= 2
    low, high = more // 2, more
    while high - low > more // 32:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _climbed(
    ask: Ask, machine: Machine, only: str | None = None
) -> tuple[Placements | None, tuple[Strategy, ...]]:
    rooms = {device.name: device.room - ask.reserve.get(device.name, 0) for device in _usable(machine)}
    # The host holds what is placed there by hand, and is no choice for the others.
    left = {"cpu": machine.host_room} | rooms
    for name, placement in ask.fixed.items():
        for device, size in placement.share(ask.weights[name]).items():
            left[device] -= size
    if short := [name for name, room in left.items() if room < 0 and ask.fixed]:
        return None, (Strategy("as placed", f"{short[0]} lacks {gib(-left[short[0]])}"),)
    rooms = {name: left[name] for name in rooms}
    rungs: list[Strategy] = []
    for name in LADDER if only is None else [only]:
        found = LADDER[name](ask, machine, dict(rooms))
        if isinstance(found, dict):
            return {**ask.fixed, **found}, (*rungs, Strategy(name))
        if found:
            rungs.append(Strategy(name, found))
    return None, tuple(rungs)


def _resident(ask: Ask, machine: Machine, rooms: Rooms) -> Placements | str:
    best = max(rooms, key=lambda name: rooms[name])
    need = sum(weights.total for weights in ask.open)
    if need <= rooms[best]:
        return {weights.component: Resident(best) for weights in ask.open}
    return f"{gib(need)} of weights on one device; {_room(machine, rooms, best, ask)}"


def _apart(ask: Ask, machine: Machine, rooms: Rooms) -> Placements | str:
    if len(ask.open) < 2 or len(rooms) < 2:
        return ""
    found: Placements = {}
    for weights in ask.open:
        best = max(rooms, key=lambda name: rooms[name])
        if weights.total > rooms[best]:
            return f"{weights.component} has {gib(weights.total)} of weights; {_room(machine, rooms, best, ask)}"
        rooms[best] -= weights.total
        found[weights.component] = Resident(best)
    return found


def _sharded(ask: Ask, machine: Machine, rooms: Rooms) -> Placements | str:
    if len(rooms) < 2 or not ask.split:
        return ""
    found: Placements = {}
    for weights in ask.open:
        best = max(rooms, key=lambda name: rooms[name])
        whole = weights.total <= rooms[best] and len(ask.open) > 1
        placement = Resident(best) if whole else _dealt(ask, weights, rooms)
        if placement is None:
            return _short(ask, machine, weights, rooms)
        found[weights.component] = placement
        for device, size in placement.share(weights).items():
            rooms[device] -= size
    return found


def _streamed(ask: Ask, machine: Machine, rooms: Rooms) -> Placements | str:
    if not ask.split or not (machine.cards or ask.offload == "disk"):
        return ""
    if ask.offload is None:
        return "what does not fit would wait in host memory, which nobody allowed"
    found: Placements = {}
    # Where the host is the device that computes, all that waits is on the disk.
    host = machine.host_room if machine.cards else 0
    for weights in ask.open:
        best = max(rooms, key=lambda name: rooms[name])
        placement: Placement = Resident(best)
        if weights.total > rooms[best]:
            streamed = _with_hosted(ask, weights, rooms)
            if streamed is None:
                return f"not even one block of {weights.component} at a time; {_room(machine, rooms, best, ask)}"
            waiting = sum(weights.blocks[name] for name in streamed.cpu_blocks)
            if waiting > host and ask.offload != "disk":
                return (f"{gib(waiting)} of {weights.component} would wait in host memory, which has "
                        f"{gib(host)} for it")
            placement = streamed = _shelved(streamed, weights, host)
            host -= sum(weights.blocks[name] for name in streamed.cpu_blocks)
        found[weights.component] = placement
        for device, size in placement.share(weights).items():
            if device in rooms:
                rooms[device] -= size
    return found


LADDER: dict[str, Callable[[Ask, Machine, Rooms], Placements | str]] = {
    "resident": _resident, "apart": _apart, "sharded": _sharded, "streamed": _streamed,
}


def _dealt(ask: Ask, weights: Weights, rooms: Rooms, cpu_blocks: frozenset[str] = frozenset()) -> Sharded | None:
    """The blocks of one component over as few cards as fit, or as many as there are lanes."""
    if "" in weights.blocks:
        return None
    passing = max((weights.blocks[name] for name in cpu_blocks), default=0)
    loose = {name: 0 if name in cpu_blocks else size
             for name, size in weights.blocks.items() if name not in ask.pinned}
    held = sum(weights.rest.values()) + sum(size for name, size in weights.blocks.items() if name in ask.pinned)
    hand = Blocks(list(loose.values()), [ask.work[weights.component].get(name, 0) for name in loose])
    order = sorted(rooms, key=lambda name: -rooms[name])
    for count in range(min(len(order), max(2, ask.lanes)), len(order) + 1):
        left = [rooms[name] - passing for name in order[:count]]
        left[0] -= held
        cards = partition(hand, left)
        if cards is not None:
            at = {name: order[card] for name, card in zip(loose, cards, strict=True)}
            devices = {name: at.get(name, order[0]) for name in weights.blocks}
            return Sharded(order[0], devices, ask.rest(weights.component))
    return None


def _with_hosted(ask: Ask, weights: Weights, rooms: Rooms) -> Streamed | None:
    """With as few blocks in host memory as fit, spread evenly between the others."""
    names = [name for name in weights.blocks if name not in ask.pinned]
    for count in range(1, len(names) + 1):
        cpu_blocks = _spread(names, count)
        dealt = _dealt(ask, weights, rooms, cpu_blocks)
        if dealt is not None:
            return Streamed(dealt.device, dealt.devices, dealt.rest, cpu_blocks=cpu_blocks)
    return None


def _shelved(placement: Streamed, weights: Weights, room: int) -> Streamed:
    """With as few of the blocks that wait on the disk as leave the others `room` bytes of host memory."""
    names = [name for name in weights.blocks if name in placement.cpu_blocks]
    for count in range(len(names) + 1):
        disk_blocks = _spread(names, count)
        if sum(weights.blocks[name] for name in placement.cpu_blocks - disk_blocks) <= room:
            break
    return replace(placement, cpu_blocks=placement.cpu_blocks - disk_blocks, disk_blocks=disk_blocks)


def _spread(names: Sequence[str], count: int) -> frozenset[str]:
    """So many of the names, evenly between the others."""
    return frozenset(names[(2 * at + 1) * len(names) // (2 * count)] for at in range(count))


def _usable(machine: Machine) -> Sequence[Device]:
    return machine.cards or machine.devices


def _room(machine: Machine, rooms: Rooms, name: str, ask: Ask) -> str:
    """Such as `cuda:0 has 12.9 GiB for them (14.4 free, 0.5 left to the runtime, 1.0 for activations)`."""
    device = machine[name]
    free = f"{gib(device.free)} free" if device.limit is None else f"limited to {gib(device.limit)}"
    parts = [free, f"{gib(device.spare)} left to the runtime" if device.limit is None and device.spare else "",
             f"{gib(ask.reserve.get(name, 0))} for activations"]
    return f"{name} has {gib(max(0, rooms[name]))} for them ({', '.join(filter(None, parts))})"


def _short(ask: Ask, machine: Machine, weights: Weights, rooms: Rooms) -> str:
    if "" in weights.blocks:
        return f"{weights.component} cannot be split"
    together = sum(max(0, room) for room in rooms.values())
    each = " + ".join(gib(max(0, room)) for room in rooms.values())
    largest = gib(max(weights.blocks.values()))
    return (f"{weights.component} has {gib(weights.total)} of weights in blocks of up to {largest}; "
            f"{', '.join(rooms)} have {each} = {gib(together)} for them")
