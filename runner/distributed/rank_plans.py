"""What several ranks would do, before any of them is started: the plan of each on its own cards."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runner.distributed.env import Rank, share
from runner.distributed.rank import own_part
from runner.job import Job
from runner.planning import describe
from runner.planning.cache import PlanCache
from runner.planning.ladder import LADDER
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.planning.verdict import verdict_of_ranks
from runner.text import table, wrapped
from stages.errors import Word, as_keyword, worded
from stages.machine import Machine


@dataclass(frozen=True)
class RankPlan:
    """Ranks whose cards are alike, so that they plan alike."""

    ranks: tuple[int, ...]
    """Their numbers."""
    devices: tuple[tuple[str, ...], ...]
    """The devices of each."""
    shares: tuple[int, ...]
    """The pictures of each."""
    plan: Plan
    """The plan of the first of them, with its devices."""


def rank_plans(
    job: Job, machine: Machine, count: int, *, cache: PlanCache | None = None, shapes: bool = False
) -> list[RankPlan]:
    """The plans of so many ranks on one machine; ranks with cards alike have one. Raises what `make_plan` does.

    Where the job names cards, each rank is planned: it has some of them alone.
    """
    cache = cache or PlanCache()
    parts = [own_part(machine, Rank(rank, count, rank, count)) for rank in range(count)]
    alike: dict[object, list[int]] = {}
    named = _names_cards(job)
    for rank, part in enumerate(parts):
        kind = tuple((device.total, device.free, device.bfloat16, device.limit, device.name if named else "")
                     for device in part.devices)
        alike.setdefault(kind, []).append(rank)
    found = []
    for ranks in alike.values():
        plan = make_plan(job, machine=parts[ranks[0]], download=False, cache=cache, shapes=shapes)
        shares = tuple(len(share(len(plan.requests), rank, count)) for rank in ranks)
        devices = tuple(tuple(device.name for device in parts[rank].devices) for rank in ranks)
        found.append(RankPlan(tuple(ranks), devices, shares, plan))
    return found


def lines(
    plans: Sequence[RankPlan], *, verbose: bool = False, columns: int = 80, word: Word = as_keyword
) -> Iterator[str]:
    """The plans for people: whether they fit, what the devices of every rank hold, and all of the first rank's plan.
    """
    yield from wrapped(verdict(plans), columns)
    rows = sorted((pair for each in plans for pair in _rows(each)), key=lambda pair: pair[0])
    head, *_ = describe.needs(plans[0].plan)
    yield from table([("rank", "pictures", *head), *(row for _, row in rows)], right=True)
    if idle := sorted(without_picture(plans)):
        busy = sum(len(each.ranks) for each in plans) - len(idle)
        text = f"without a picture: rank {', '.join(map(str, idle))} -> `ranks={busy}`, or more pictures (`count`)"
        yield from wrapped(worded(text, word), columns)
    yield f"rank {plans[0].ranks[0]}:"
    yield from describe.lines(plans[0].plan, verbose=verbose, columns=columns, word=word)


def _names_cards(job: Job) -> bool:
    """Whether the job says something of one card by its name."""
    return bool(job.max_memory.by_device.keys() - {"", "cpu"}) or any(
        place.processes is None and place.where not in LADDER for place in job.place)


def verdict(plans: Sequence[RankPlan]) -> str:
    """Whether they fit, in a line: the first that is said of them."""
    ranks = sum(len(each.ranks) for each in plans) - len(without_picture(plans))
    return verdict_of_ranks([each.plan for each in plans], ranks, len(used_by_ranks(plans) - {"cpu"}))


def used_devices(plans: Iterable[Plan]) -> set[str]:
    """The devices that any stage of the plans takes memory of."""
    return {device for plan in plans for needs in plan.needs.values() for device, need in needs.items() if need.total}


def used_by_ranks(plans: Iterable[RankPlan]) -> set[str]:
    """The devices that ranks with pictures take memory of: ranks that are alike fill the same of their cards."""
    used = set[str]()
    for each in plans:
        filled = used_devices([each.plan])
        for devices, count in zip(each.devices, each.shares, strict=True):
            used |= {device for own, device in zip(each.plan.devices, devices, strict=True)
                     if count and own in filled}
    return used


def without_picture(plans: Sequence[RankPlan]) -> list[int]:
    """The ranks that have nothing to do, as there are more of them than pictures."""
    return [rank for each in plans for rank, count in zip(each.ranks, each.shares, strict=True) if not count]


def _rows(plan: RankPlan) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The rows of the table, each with its rank."""
    _, *rows = describe.needs(plan.plan)
    for rank, devices, count in zip(plan.ranks, plan.devices, plan.shares, strict=True):
        names = dict(zip(plan.plan.devices, devices, strict=True))
        for stage, device, *numbers in rows:
            yield rank, (str(rank), str(count), stage, names.get(device, device), *numbers)


def document(plans: Sequence[RankPlan]) -> dict[str, Any]:
    """The plans as one JSON object: that of the first rank, and under `ranks` what each rank's devices hold."""
    ranks = [{"rank": rank, "devices": list(devices), "pictures": count, "stages": _renamed(each.plan, devices)}
             for each in plans for rank, devices, count in zip(each.ranks, each.devices, each.shares, strict=True)]
    ranks.sort(key=lambda rank: int(str(rank["rank"])))
    return {**describe.document(plans[0].plan), "verdict": verdict(plans), "ranks": ranks}


def _renamed(plan: Plan, devices: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """What a plan's devices hold, as it is said of others that are like them."""
    names = dict(zip(plan.devices, devices, strict=True))
    return {stage: {names.get(device, device): {"weights": need.weights, "activations": need.activations}
                    for device, need in needs.items()} for stage, needs in plan.needs.items()}
