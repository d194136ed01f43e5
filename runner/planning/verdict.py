"""Whether a plan fits, in a line: the first that is said of it."""

import math
from collections import Counter

from runner.planning.plan import Plan
from runner.text import gib
from stages.placement.placement import DISK


def verdict(plan: Plan) -> str:
    """Such as `fits: 2 cards, weights 26.1 GiB, peak 12.1 of 14.0 GiB (cuda:1, denoise)`."""
    weights = sum(held.total for held in plan.weights.values())
    used = {device for needs in plan.needs.values() for device, need in needs.items() if need.total}
    cards = len([card for card in plan.machine.cards if card.name in used])
    where = f"{cards} card{'' if cards == 1 else 's'}" if cards else "the CPU"
    download = plan.checkpoint.bytes_to_download
    return ", ".join((f"fits: {where}", f"weights {gib(weights)}", _peak(plan), *_waiting(plan),
                      *([f"{gib(download)} to download"] if download else [])))


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


def _peak(plan: Plan) -> str:
    """The device and the stage that are filled most."""
    computing = {device.name: device.room for device in plan.machine.devices}
    filled = [(need.total / computing[device], need.total, device, stage) for stage, needs in plan.needs.items()
              for device, need in needs.items() if computing.get(device)]
    if not filled:
        return "peak 0 B"
    _, need, device, stage = max(filled)
    most = gib(computing[device])
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
