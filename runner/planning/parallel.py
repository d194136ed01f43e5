"""The wish `tensor_parallel`: several processes denoise one picture together, each on a card of its own."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.request import read_whole

if TYPE_CHECKING:
    from stages.machine import Machine

RANKS = 64
WISH = "denoise=tensor_parallel"
_FORM = re.compile("tensor_parallel(:(?P<count>[1-9][0-9]?))?")


def processes(wish: str | None) -> int | None:
    """The processes that `tensor_parallel` or `tensor_parallel:2` asks for, 0 for one on each card; None otherwise."""
    match = _FORM.fullmatch(wish or "")
    return None if match is None else int(match["count"] or 0)


def wished(places: Sequence[str] | None) -> int | None:
    """The same for the last of the --place options that is about the whole denoise."""
    wishes = [text.removeprefix("denoise=") for text in places or () if text.startswith("denoise=")]
    return processes(wishes[-1]) if wishes else None


def without(places: Sequence[str] | None) -> list[str]:
    """The --place options less those that ask for it."""
    return [text for text in places or () if processes(text.removeprefix("denoise=")) is None]


def team(said: Any) -> int:
    """How many processes the options `said` ask for, that denoise together; ValueError where it would be one."""
    count = wished(said.place)
    assert count is not None, "nobody asked for tensor_parallel"
    ranks = None if said.ranks is None else read_whole("ranks", said.ranks, 1, RANKS)
    if ranks is not None and count not in (0, ranks):
        raise ValueError(f"--place denoise=tensor_parallel:{count} and --ranks {ranks} contradict each other -> leave "
                         f"one of them out")
    found = count or ranks or len(said.gpus.split(",") if said.gpus else said.device or ()) or _cards()
    if found < 2:
        raise ValueError("--place denoise=tensor_parallel needs several cards, and there is one device -> leave it "
                         "out; on a CPU, --ranks 2 says how many processes")
    return found


def spread(machine: "Machine", count: int) -> tuple[str, ...]:
    """The devices of `count` processes: the first cards, or all for 0; on a host without cards, that several times.

    Raises ValueError where it is fewer than two, or than there are cards.
    """
    cards = tuple(card.name for card in machine.cards)
    if not cards and count > 1:
        return (machine.devices[0].name,) * count
    found = cards[:count] if count else cards
    if len(found) < max(2, count):
        there = f"{len(cards)} cards ({', '.join(cards)})" if len(cards) > 1 else cards[0] if cards else "no card"
        raise ValueError(f"denoise=tensor_parallel needs {max(2, count)} cards, and there is {there} -> leave it out; "
                         f"on a CPU, --ranks 2 says how many processes")
    return found


def _cards() -> int:
    from stages.machine import probe

    return len(probe().devices)
