"""Whether a plan fits, in a line: the first that is said of it."""

import math
from collections import Counter
from collections.abc import Sequence

from runner.planning.plan import Plan
from runner.text import gib
from stages.placement.placement import DISK
from stages.wording import counted


def verdict(plan: Plan) -> str:
    """Such as `fits: 2 cards, weights 26.1 GiB, peak 12.1 of 14.0 GiB (cuda:1, denoise)`."""
    used = {device for needs in plan.needs.values() for device, need in needs.items() if need.total}
    return ", ".join((f"fits: {_where(len([card for card in plan.machine.cards if card.name in used]))}",
                      *_facts(plan)))


def verdict_of_ranks(plans: Sequence[Plan], ranks: int, cards: int) -> str:
    """The same of so many ranks, which use so many cards: what is said of memory is of the rank that is filled most.

    `plans` has one of each kind of rank.
    """
    fullest = max(plans, key=lambda plan: max(_filled(plan), default=(0.0, 0, "", ""))[0])
    return ", ".join((f"fits: {counted(ranks, 'rank')} on {_where(cards)}", *_facts(fullest)))


def rough(seconds: float) -> str:
    """A time for people who wait, rounded to one digit: `2 s`, `40 s`, `3 min`, `2 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size * 1.5:
            return f"{_one_digit(seconds / size)} {unit}"
    return f"{max(1, _one_digit(seconds))} s"


def rough_range(seconds: float) -> str:
    """The range that a time lies in which was measured once: a disk that is busy, or has the file in memory, differs.
    """
    low, high = rough(seconds / 2), rough(seconds * 4)
    if low == high:
        return low
    number, unit = low.split()
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def _where(cards: int) -> str:
    return counted(cards, "card") if cards else "the CPU"


def _facts(plan: Plan) -> list[str]:
    """What a plan takes, from its weights to its download."""
    download = plan.checkpoint.bytes_to_download
    return [f"weights {gib(sum(held.total for held in plan.weights.values()))}", _peak(plan), *_waiting(plan),
            *([f"{gib(download)} to download"] if download else [])]


def _filled(plan: Plan) -> list[tuple[float, int, str, str]]:
    """By device and stage, the part of the room that is taken, and its bytes."""
    computing = {device.name: device.room for device in plan.machine.devices}
    return [(need.total / computing[device], need.total, device, stage) for stage, needs in plan.needs.items()
            for device, need in needs.items() if computing.get(device)]


def _peak(plan: Plan) -> str:
    """The device and the stage that are filled most."""
    filled = _filled(plan)
    if not filled:
        return "peak 0 B"
    _, need, device, stage = max(filled)
    most = gib({each.name: each.room for each in plan.machine.devices}[device])
    # One unit is enough where both have it.
    return f"peak {gib(need).removesuffix(f' {most.split()[1]}')} of {most} ({device}, {stage})"


def _waiting(plan: Plan) -> list[str]:
    """What is in host memory beside the cards, or stays on the disk."""
    held = Counter[str]()
    for part, place in plan.places.items():
        held.update(place.placement.share(plan.weights[part]))
    names = {"cpu": "in host memory", DISK: "on the disk"}
    return [f"{gib(held[device])} {where}" for device, where in names.items()
            if held[device] and not (device == "cpu" and not plan.machine.cards)]


def _one_digit(number: float) -> int:
    """A number from 1 on with one digit that is not 0."""
    size = int(10 ** max(0, math.floor(math.log10(max(number, 1)))))
    return round(number / size) * size
