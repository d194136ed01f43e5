"""How long a picture takes, as a range: the plan's operations and copies, at what the devices do of them in a second.

An estimate, and called so: a transformer reaches a part of the rate in a card's data sheet; docs/machines.md says
which, and where that is from. For a card that is not in the table there is none.
"""

from dataclasses import dataclass

import torch

from runner.planning.plan import Plan
from runner.text import gib
from stages.cards import Card, find_card
from stages.machine import Device, host_rate
from stages.wording import counted

# The parts that are reached, at least and at most, of a card's rate, of that of a card before bfloat16, which has no
# flash attention in torch, of the rate measured on a host, and of a link.
CARD_PART, OLD_CARD_PART, HOST_PART, LINK_PART = (0.25, 0.7), (0.12, 0.5), (0.3, 1.0), (0.5, 1.0)


@dataclass(frozen=True)
class PictureTime:
    """How long a picture takes once the weights are where the plan has them."""

    shortest: float
    """Seconds, at best."""
    longest: float
    """Seconds, at worst."""
    step: float
    """Floating point operations of a denoise step."""
    steps: int
    """Denoise steps."""
    rates: tuple[str, ...]
    """What it rests on: such as `12 to 50 % of 65 TFLOP/s in float16 (T4)`."""
    unread: int = 0
    """Bytes that are read from a disk whose rate is not known: their time comes on top."""

    def __str__(self) -> str:
        read = f", and reading {gib(self.unread)} from the disk meanwhile," if self.unread else ""
        comes = "come" if read else "comes"
        whole = "less than a second" if self.longest < 1 else f"{spoken(self.shortest)} to {spoken(self.longest)}"
        return (f"a picture takes {whole}, estimated, not measured: "
                f"{counted(self.steps, 'step')} of {self.step / 1e12:.3g} TFLOP, encode and decode, at "
                f"{' and '.join(self.rates)}; loading the weights{read} {comes} on top")


@dataclass(frozen=True)
class _Rate:
    """What a device does in a second."""

    flops: float
    """Floating point operations, as its maker says or as was measured."""
    parts: tuple[float, float]
    """The part of them that is reached at least, and at most."""
    words: str
    """What it rests on."""


def picture_time(plan: Plan, disk_rate: float | None = None) -> PictureTime | None:
    """The range for the plan's largest picture; None where a device's rate is not known.

    `disk_rate` is in bytes a second; where that is None, what is read from the disk for each picture comes on top.
    """
    if plan.processes > 1 or "denoise" not in plan.work:
        # Processes that compute together wait for each other after every layer.
        return None
    rates = dict[tuple[str, torch.dtype], _Rate]()
    for device, dtype in {key for work in plan.work.values() for key, count in work.flops.items() if count}:
        known = next((each for each in plan.machine.devices if each.name == device), None)
        rate = None if known is None else _rate(known, dtype, here=plan.machine.here)
        if rate is None:
            return None
        rates[device, dtype] = rate
    shortest = longest = 0.0
    for work in plan.work.values():
        for key, count in work.flops.items():
            if count:
                low, high = rates[key].parts
                shortest += count / rates[key].flops / high
                longest += count / rates[key].flops / low
        waited = work.read / disk_rate if disk_rate else 0.0
        if work.copied:
            slowest = min(card.link for card in _cards(plan))
            # What comes while a card computes is not waited for.
            shortest = max(shortest, work.copied / slowest / LINK_PART[1])
            longest += work.copied / slowest / LINK_PART[0]
        shortest, longest = shortest + waited, longest + 2 * waited
    steps = max(request.steps for request in plan.requests)
    words = {f"{rate.parts[0] * 100:.0f} to {rate.parts[1] * 100:.0f} % of {rate.words}" for rate in rates.values()}
    unread = sum(work.read for work in plan.work.values()) if disk_rate is None else 0
    return PictureTime(shortest, longest, plan.work["denoise"].total / steps, steps, tuple(sorted(words)), unread)


def spoken(seconds: float) -> str:
    """Seconds for people, to two digits: `45 s`, `2.5 min`, `14 h`, `3.1 days`."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 else f"{float(f'{number:.2g}'):.0f}"


def _rate(device: Device, dtype: torch.dtype, *, here: bool) -> _Rate | None:
    kind = str(dtype).removeprefix("torch.")
    if device.is_host:
        if not here:
            return None
        measured = host_rate(dtype)
        return _Rate(measured, HOST_PART, f"{measured / 1e12:.2g} TFLOP/s in {kind} (measured on this CPU)")
    card = find_card(device.label)
    rate = None if card is None else card.rate(kind)
    if card is None or rate is None:
        return None
    parts = CARD_PART if card.bfloat16 else OLD_CARD_PART
    return _Rate(rate, parts, f"{rate / 1e12:.3g} TFLOP/s in {kind} ({card.name})")


def _cards(plan: Plan) -> list[Card]:
    return [card for device in plan.machine.cards if (card := find_card(device.label)) is not None]
