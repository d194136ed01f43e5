"""What would help: changes of a job that does not fit, or ran out of memory, each planned before it is told."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from runner.inputs import read_size
from runner.job import Job
from runner.planning.ladder import NoStrategyFits, PlacementProblem, Placements, attempt, usable
from runner.planning.lighter import smaller
from runner.planning.plan import Plan, sizes_of
from runner.planning.tiles import smaller_tiles
from runner.text import gib
from stages.errors import DoesNotFit, Fix, Fixes
from stages.machine import Machine
from stages.placement.placement import DISK

OFFLOADS = (None, "cpu", "disk")
ROUNDS = 6
WAYS = 3
LESS = 0.75
IN_HALF = Fix("dtype", "bfloat16")
HALF = "half of the bytes, fast on a processor that has it, and slow on another"

Replan = Callable[[Job], Plan]


def with_fixes(job: Job, plan: Replan) -> Plan:
    """What `plan` makes of the job; its DoesNotFit has the fixes with which all of the job fits, if there are any.

    What helps one stage may not help the next, and a change that fails again is no help at all: so what the error
    asks for is planned, and what is asked for then, until all of the job fits.
    """
    try:
        return plan(job)
    except DoesNotFit as error:
        _complete(error)
        refused: DoesNotFit | None = error
        fixes: dict[tuple[str, str], Fix] = {}
        for _ in range(ROUNDS):
            if refused is None or not refused.fixes:
                break
            fixes |= {(fix.field, fix.component): fix for fix in refused.fixes}
            refused = _refusal(applied(job, tuple(fixes.values())), plan)
        if refused is None and len(fixes) > len(error.fixes):
            error.text = f"{error.text}\n-> with what other stages need, it fits {_listed(tuple(fixes.values()))}"
        if refused is not None and fixes:
            tried = " ".join(map(reference, fixes.values()))
            error.text = f"{error.text}\nThat is not enough, with {tried}: {refused.text}"
        error.fixes = tuple(fixes.values())
        if refused is not None and (together := _together(job, plan)):
            error.text = f"{error.text}\n-> it fits {_listed(together)}"
            error.fixes = together
        elif refused is not None:
            error.fixes = ()
        if isinstance(error, NoStrategyFits) and error.machine is not None and not error.machine.cards:
            if IN_HALF not in error.fixes and _refusal(applied(job, (IN_HALF,)), plan) is None:
                error.text += f"\n-> {'or ' if error.fixes else ''}`dtype=bfloat16`: {HALF}"
                error.fixes = error.fixes or (IN_HALF,)
            names = smaller(job.defaults.name)
            error.text += f"\nsmaller models: {', '.join(names)}" if names else ""
        raise


def after_out_of_memory(plan: Plan, stage: str, replan: Replan) -> tuple[Fixes, ...]:
    """At most three sets of fixes with which all of the job fits, and the stage's fullest device has less to hold.

    First come those that leave the picture as it is.
    """
    found: list[Fixes] = []
    for fixes in _candidates(plan, stage):
        try:
            other = replan(applied(plan.job, fixes))
        except DoesNotFit:
            continue
        if fullest(other, stage) < fullest(plan, stage):
            found.append(fixes)
        if len(found) == WAYS:
            break
    return tuple(found)


def applied(job: Job, fixes: Fixes) -> Job:
    """The job with its fields changed."""
    for fix in fixes:
        if fix.field == "size":
            width, height = read_size(str(fix.value))
            requests = tuple(replace(request, width=width, height=height) for request in job.requests)
            job = replace(job, requests=requests)
        elif fix.field == "tile":
            job = replace(job, tile=int(str(fix.value)), whole=0)
        elif fix.field == "place":
            job = replace(job, place=tuple(place for place in job.place if place.stage != fix.component))
        else:
            # A job reads the text forms of its fields.
            change: dict[str, Any] = {fix.field: fix.value}
            job = replace(job, **change)
    return job


def reference(fix: Fix) -> str:
    """A fix as messages name it."""
    value = fix.component if fix.field == "place" else fix.value
    return f"`{fix.field}`" if value is None else f"`{fix.field}={value}`"


def fullest(plan: Plan, stage: str) -> int:
    """The bytes that a stage takes, once loaded, on the device that it fills most."""
    return max(need.running for need in plan.needs[stage].values())


def _together(job: Job, plan: Replan) -> Fixes:
    """Of all options that leave less room, those that must change together for the job to fit; none where none help.

    What helps a stage by itself may be in the way of another change that would help more.
    """
    lifted = [*(Fix("place", None, stage) for stage in dict.fromkeys(place.stage for place in job.place)),
              *([Fix("max_memory")] if job.max_memory.by_device else []),
              *([Fix("lanes", 1)] if job.lanes not in (None, 1) else [])]
    for offload in (None, *OFFLOADS[OFFLOADS.index(job.allow_offload) + 1 :]):
        fixes = [*lifted, *([Fix("allow_offload", offload)] if offload else [])]
        if fixes and _refusal(applied(job, tuple(fixes)), plan) is None:
            for fix in lifted:
                fewer = [other for other in fixes if other != fix]
                if fewer and _refusal(applied(job, tuple(fewer)), plan) is None:
                    fixes = fewer
            return tuple(fixes)
    return ()


def _listed(fixes: Fixes) -> str:
    """Such as "with `allow_offload=cpu`, without `max_memory`"."""
    added = " ".join(reference(fix) for fix in fixes if fix.value is not None)
    left = " ".join(f"`place={fix.component}`" if fix.field == "place" else reference(fix)
                    for fix in fixes if fix.value is None)
    return ", ".join([*([f"with {added}"] if added else []), *([f"without {left}"] if left else [])])


def _refusal(job: Job, plan: Replan) -> DoesNotFit | None:
    try:
        plan(job)
    except DoesNotFit as error:
        _complete(error)
        return error
    return None


def _complete(error: DoesNotFit) -> None:
    """Have the error of a stage that no strategy places say the least change that makes it fit."""
    if isinstance(error, NoStrategyFits) and error.problem is not None and error.machine is not None:
        words, error.fixes = least_change(error.problem, error.machine, error.only)
        error.text += f"\n-> {words}"


def least_change(problem: PlacementProblem, machine: Machine, only: str | None = None) -> tuple[str, Fixes]:
    """The least change that makes a stage fit: in words, and as changes of the job."""
    if (only or problem.fixed) and _fits(replace(problem, fixed={}), machine):
        return f"it fits without `place={problem.stage}`", (Fix("place", None, problem.stage),)
    problem = replace(problem, fixed={})
    if problem.lanes > 1:
        # Each lane has activations of its own.
        one = {name: held // problem.full_lanes for name, held in problem.reserve.items()}
        if _fits(replace(problem, lanes=1, reserve=one), machine):
            return "`lanes=1`: one picture at a time needs less for activations", (Fix("lanes", 1),)
    if machine.unlimited != machine and _fits(problem, machine.unlimited):
        return "it fits without `max_memory`", (Fix("max_memory"),)
    for offload in OFFLOADS[OFFLOADS.index(problem.offload) + 1 :]:
        streamed = attempt(replace(problem, offload=offload), machine)[0]
        if streamed is not None:
            words = _waiting(problem, streamed, machine)
            return f"`allow_offload={offload}`: {words}", (Fix("allow_offload", offload),)
    if problem.tile:
        return (f"`tile={problem.tile}`: what is decoded in tiles needs less, and is another picture in its last bits",
                (Fix("tile", problem.tile),))
    for size, part in problem.smaller.items():
        # What does not shrink with the picture, such as the prompt, is a small part.
        reserve = {name: int(held * min(1, part + 0.1)) for name, held in problem.reserve.items()}
        if _fits(replace(problem, reserve=reserve), machine):
            return f"`size={size}`: a smaller picture needs less for activations", (Fix("size", size),)
    if _fits_in_bfloat16(problem, machine):
        return f"`dtype=bfloat16`: {HALF}", (IN_HALF,)
    return f"it would fit with {gib(lacking(problem, machine))} more on {usable(machine)[0].name}", ()


def lacking(problem: PlacementProblem, machine: Machine) -> int:
    """The bytes that the first device lacks for the stage to fit, to a sixteenth."""
    first = usable(machine)[0]

    def fits(more: int) -> bool:
        grown = replace(first, total=first.total + more, free=first.free + more, limit=None)
        devices = (grown, *(device for device in machine.devices if device.name != first.name))
        return _fits(problem, replace(machine, devices=devices))

    more = 1
    while not fits(more):
        more *= 2
    low, high = more // 2, more
    while high - low > more // 32:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _fits(problem: PlacementProblem, machine: Machine) -> bool:
    return attempt(problem, machine)[0] is not None


def _fits_in_bfloat16(problem: PlacementProblem, machine: Machine) -> bool:
    """Whether a host that computes, which does so in float32 unless told otherwise, has room for half of the bytes."""
    half = {name: replace(weights, blocks={block: size // 2 for block, size in weights.blocks.items()},
                          rest={part: size // 2 for part, size in weights.rest.items()})
            for name, weights in problem.weights.items()}
    return not machine.cards and _fits(replace(problem, weights=half), machine)


def _waiting(problem: PlacementProblem, streamed: Placements, machine: Machine) -> str:
    waiting = Counter[str]()
    for name, weights in problem.weights.items():
        waiting.update(streamed[name].share(weights))
    disk = f"{gib(waiting[DISK])} would be read from the disk" if waiting[DISK] else ""
    # Where there is no card, what is in host memory computes there.
    held = waiting["cpu"] if machine.cards else 0
    host = f"{gib(held)} would wait in host memory and be copied to the card" if held else ""
    return f"{' and '.join(filter(None, (host, disk)))} for every pass"


def _candidates(plan: Plan, stage: str) -> Iterator[Fixes]:
    job = plan.job
    alone = (Fix("lanes", 1),) if plan.lanes > 1 and stage == "denoise" else ()
    # A run that may change things itself has tried one lane already.
    if alone and not job.policy.degrade:
        yield alone
    if plan.machine.cards:
        tight = (*alone, Fix("max_memory", _tighter(plan)))
        yield tight
        if job.allow_offload is None:
            yield *tight, Fix("allow_offload", "cpu")
    if stage == "decode" and (job.tile is not None or not job.policy.degrade):
        yield from ((Fix("tile", side),) for side in smaller_tiles(plan.tile or 0, sizes_of(plan.requests)))
    if not job.dtype and any(place.dtype == torch.float32 for place in plan.places_of(stage).values()):
        yield *alone, Fix("dtype", "bfloat16")
    if stage != "encode" and plan.placer is not None:
        yield from ((*alone, Fix("size", size)) for size, part in plan.placer.smaller.items() if part <= LESS)


def _tighter(plan: Plan) -> str:
    """For each card a limit of three quarters of what it had, so that weights leave more of it free."""
    limits = ((card.name.rpartition(":")[2], card.free if card.limit is None else card.limit)
              for card in plan.machine.cards)
    return ",".join(f"{name}={_amount(int(size * LESS))}" for name, size in limits)


def _amount(size: int) -> str:
    """Bytes as a limit is written, rounded down."""
    unit, each = ("MiB", 2**20) if size >= 2**20 else ("KiB", 2**10) if size >= 2**10 else ("B", 1)
    return f"{max(1, size // each)}{unit}"
