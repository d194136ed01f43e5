"""Cards that a plan leaves idle, and the change of the job that uses them, planned before it is told."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from runner.distributed.rank_plans import RankPlan, rank_plans
from runner.job import Job
from runner.placement_options import PlaceRequest
from runner.planning.cache import PlanCache
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from stages.errors import StagerunError
from stages.machine import Machine


def used_devices(plans: Iterable[Plan]) -> set[str]:
    """The devices that any stage of the plans takes memory of."""
    return {device for plan in plans for needs in plan.needs.values() for device, need in needs.items() if need.total}


def used_by_ranks(plans: Iterable[RankPlan]) -> set[str]:
    """The devices that ranks with pictures take memory of: ranks that are alike fill the same of their cards."""
    used = set[str]()
    for each in plans:
        filled = used_devices([each.plan])
        for devices, share in zip(each.devices, each.shares, strict=True):
            used |= {device for own, device in zip(each.plan.devices, devices, strict=True)
                     if share and own in filled}
    return used


def idle_cards(machine: Machine, used: set[str]) -> list[str]:
    """The cards that are not among the devices in use."""
    return [card.name for card in machine.cards if card.name not in used]


def idle_lines(
    job: Job, machine: Machine, used: set[str], *, ranks: int | None = None, cache: PlanCache | None = None,
    shapes: bool = False,
) -> Iterator[str]:
    """What is to be said of the cards that are not `used`, where there are any: their names, and what would use them.

    `ranks` is how many were asked for; `cache` and `shapes` are those of the plan.
    """
    cards, idle = machine.cards, idle_cards(machine, used)
    if not idle:
        return
    here = machine.unlimited
    count = len(job.requests)
    cache = cache or PlanCache()

    def by_ranks(number: int) -> set[str]:
        return used_by_ranks(rank_plans(job, here, number, cache=cache, shapes=shapes))

    def planned(changed: Job) -> set[str]:
        return used_devices([make_plan(changed, machine=here, download=False, cache=cache, shapes=shapes)])

    def by_lanes(number: int) -> set[str]:
        return planned(replace(job, lanes=number))

    def together(number: int) -> set[str]:
        places = tuple(place for place in job.place if place.stage != "denoise")
        return planned(replace(job, place=(*places, PlaceRequest("denoise", f"tensor_parallel:{number}")), lanes=None))

    several = [] if count < 2 else [
        *([(by_ranks, "ranks={}", "a share of the pictures for each rank")] if job.store != "memory" else []),
        *([(by_lanes, "lanes={}", "as many pictures in flight")] if ranks is None else []),
    ]
    alone = ranks is None and job.tensor_parallel is None
    layers = (together, "place=denoise=tensor_parallel:{}", "a part of every layer on each, within rounding")
    ways = [*several, *([layers] if alone else [])]
    named = f"idle: {listed(idle)} ({len(idle)} of {len(cards)} cards)"
    for way, words, why in ways:
        most = len(cards) if way is together else min(len(cards), count)
        if (number := _first(way, most, len(cards) - len(idle))) is not None:
            option = words.format("" if number == len(cards) and way is together else number).removesuffix(":")
            yield f"{named} -> `{option}` uses {'all' if number == len(cards) else number} of them: {why}"
            return
    more = "; several pictures (`count`) could be shared by `ranks`" if count < 2 else ""
    yield f"{named}: nothing that would use them fits here{more}"


def listed(names: Sequence[str]) -> str:
    """Such as `cuda:1`, `cuda:1 and cuda:2`, `cuda:1 to cuda:7`."""
    first, last = names[0], names[-1]
    numbers = [int(name.rpartition(":")[2]) for name in names]
    if len(names) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]:
        return f"{first} to {last}"
    return " and ".join(filter(None, (", ".join(names[:-1]), last)))


def _first(way: Callable[[int], set[str]], most: int, before: int) -> int | None:
    """The first of most, half of that, ... with which a way can be planned and uses more cards than `before`."""
    number = most
    while number > 1:
        try:
            if len(way(number)) > before:
                return number
        except StagerunError:
            pass
        number //= 2
    return None
