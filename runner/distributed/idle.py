"""Cards that a plan leaves idle, and the change of the job that uses them, planned before it is told."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from runner.distributed.rank_plans import rank_plans, used_by_ranks, used_devices
from runner.inputs import SEED
from runner.job import Job
from runner.placement_options import PlaceRequest
from runner.planning.cache import PlanCache
from runner.planning.planner import make_plan
from stages.errors import StagerunError
from stages.machine import Machine


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

    def by_ranks(number: int, job: Job = job) -> set[str]:
        return used_by_ranks(rank_plans(job, here, number, cache=cache, shapes=shapes))

    def by_ranks_of_more(number: int) -> set[str]:
        return by_ranks(number, of_more(job, number))

    def planned(changed: Job) -> set[str]:
        return used_devices([make_plan(changed, machine=here, download=False, cache=cache, shapes=shapes)])

    def by_lanes(number: int) -> set[str]:
        return planned(replace(job, lanes=number))

    def together(number: int) -> set[str]:
        # Beside what is said of places and lanes already, as it would stand there when it is pasted.
        return planned(replace(job, place=(*job.place, PlaceRequest("denoise", f"tensor_parallel:{number}"))))

    def part(number: int) -> str:
        return "all" if number == len(cards) else str(number)

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
        if (found := _first(way, most, len(cards) - len(idle))) is not None:
            number, used_then = found
            option = words.format("" if number == len(cards) and way is together else number).removesuffix(":")
            yield f"{named} -> `{option}` uses {part(used_then)} of them: {why}"
            return
    more = ""
    if count < 2 and alone and job.store != "memory" and (
            found := _first(by_ranks_of_more, len(cards), len(cards) - len(idle))) is not None:
        more = f"; `count={found[0]}` with `ranks={found[0]}` would use {part(found[1])} of them"
    yield f"{named}: nothing that would use them fits here{more}"


def of_more(job: Job, pictures: int) -> Job:
    """The job with so many pictures in place of its one."""
    [first] = job.requests
    requests = tuple(replace(first, seed=first.seed + at if first.seed + pictures <= SEED else at, index=at)
                     for at in range(pictures))
    return replace(job, requests=requests, labels=(), output=replace(job.output, paths=()))


def listed(names: Sequence[str]) -> str:
    """Such as `cuda:1`, `cuda:1 and cuda:2`, `cuda:1 to cuda:7`."""
    first, last = names[0], names[-1]
    numbers = [int(name.rpartition(":")[2]) for name in names]
    if len(names) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]:
        return f"{first} to {last}"
    return " and ".join(filter(None, (", ".join(names[:-1]), last)))


def _first(way: Callable[[int], set[str]], most: int, before: int) -> tuple[int, int] | None:
    """The first of most, one less, half of that, ..., 2 with which a way can be planned and uses more than `before`.

    With it comes how many cards that uses. The numbers are few, however many cards there are.
    """
    for number in dict.fromkeys((most, most - 1, *(most >> half for half in range(1, most.bit_length())), 2)):
        if not 1 < number <= most:
            continue
        with suppress(StagerunError):
            if (used := len(way(number))) > before:
                return number, used
    return None
