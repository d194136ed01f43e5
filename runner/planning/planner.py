"""From a job to a plan: the model found and checked, its stages cut, every component placed where it fits."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner import job_fields
from runner.demo import CHECKPOINT
from runner.job import Job
from runner.planning import describe
from runner.planning.cache import PlanCache
from runner.planning.memory_limits import chosen, limited, read_machine
from runner.planning.place_option import places_asked_for
from runner.planning.placed import Placed
from runner.planning.placer import Placer
from runner.planning.plan import Plan, largest, sizes_of
from runner.planning.suggestions import with_fixes
from runner.request import FilledRequest
from runner.sizes import makeable
from runner.text import gib, shown
from stages.basis import Basis
from stages.errors import DoesNotFit, InvalidInput, ModelError
from stages.estimate.rehearsal import UnusableSteps
from stages.families import FAMILIES
from stages.loading import lora_merge
from stages.machine import Machine, check_cards, probe
from stages.models.checkpoint import Checkpoint, check_family, find, find_shapes
from stages.models.files import OutOfReach
from stages.models.lora import LoraRequest, find_lora
from stages.pipeline.split import require, split
from stages.pipeline.stage import Stage
from stages.signatures import checked_call
from stages.wording import kind_of


@checked_call
def make_plan(
    job: Job | str, requests: Any = (), *, machine: str | Machine | None = None, download: bool = True,
    cache: PlanCache | None = None, shapes: bool = True, **options: Any,
) -> Plan:
    """Find and check the job's model, and place every component where it fits together with its activations.

    In place of a job, what one is made of may be given: `make_plan("flux", "a fox", max_memory="14GiB")`.
    `machine` is one that need not be here, such as "2x16GB"; by default it is this one. Weights that are not here are
    downloaded when all of them are placed, unless `download` is False or the machine is not this one. Of a job whose
    requests come from the lines of a file, those of a size that the model does not make become refused lines. `cache`
    has what other plans of the same model found out. The shapes that ship with the package stand in for a model of the
    hub that cannot be read: enough to plan, not to run. Without `shapes` they do so for another machine alone.

    Raises ModelError, InvalidInput, or DoesNotFit with fixes that make all of the job fit, if there are any.
    """
    job = job_of(job, requests, options)
    cache = cache or PlanCache()
    plan = with_fixes(job, partial(_planned, machine=machine, cache=cache, shapes=shapes))
    return fetched(plan) if download and plan.machine.here and not plan.checkpoint.shapes else plan


def job_of(job: Any, requests: Any, options: Mapping[str, Any]) -> Job:
    """The job that is given, or that a family, requests and further fields make; InvalidInput for anything else."""
    if isinstance(job, Job):
        if options or requests != ():
            raise InvalidInput(f"a Job says all of it, and {', '.join(options) or 'requests'} stands beside it -> "
                               f"dataclasses.replace(job, ...)")
        return job
    if not isinstance(job, str):
        raise InvalidInput(f"{kind_of(job)} is no job -> make_plan(\"flux\", ...), or make_plan(Job(...))")
    return job_fields.made(Job, options, family=job, requests=requests)


def fetched(plan: Plan) -> Plan:
    """The same plan with the model's weights on this machine: downloaded, where they are not; ModelError if not."""
    if not plan.checkpoint.bytes_to_download:
        return plan
    if plan.checkpoint.shapes:
        raise ModelError(f"this plan is made of shapes alone, as {plan.checkpoint.source} could not be read -> plan "
                         f"again once it can be")
    # Of the commit that was planned for, whatever has become of its branch.
    checkpoint = replace(find(plan.checkpoint.source, revision=plan.checkpoint.path.name),
                         scheduler=plan.checkpoint.scheduler)
    if plan.checkpoint.loras:
        checkpoint = checkpoint.with_loras(plan.checkpoint.loras)
    return replace(plan, checkpoint=checkpoint, stages=split(checkpoint, largest(plan.requests).inputs))


def _planned(job: Job, *, machine: str | Machine | None, cache: PlanCache, shapes: bool) -> Plan:
    if not isinstance(machine, str | Machine | None):
        raise InvalidInput(f"{kind_of(machine)} is no machine -> such as machine=\"2x16GB\"")
    if isinstance(machine, str):
        there = chosen(read_machine(machine), job.devices)
    else:
        there = machine or check_cards(probe(job.devices))
    with _resting_on(there):
        there = limited(there, job.max_memory)
    if there.here:
        require(job.defaults.requires)
    checkpoint = _checkpoint(job, shapes=shapes or not there.here)
    with _resting_on(there, checkpoint):
        _check_disk(checkpoint, there)
        return _plan_of(job, checkpoint, there, cache)


def _plan_of(job: Job, checkpoint: Checkpoint, there: Machine, cache: PlanCache) -> Plan:
    """The job with a model that was found, on a machine; DoesNotFit where that has no room."""
    stages = split(checkpoint, largest(job.requests).inputs)
    multiple = stages[1].scale_factor * job.defaults.patch
    job = _sound(job, stages, multiple)
    job, placer, placed = _placed(job, there, stages, stages[0].longest, multiple, cache)
    places = placed.places if job.peer_copies else {
        part: replace(place, placement=place.placement.through_host()) for part, place in placed.places.items()}
    loras = tuple(LoraRequest(lora.source, lora.scale, lora.digest) for lora in checkpoint.loras)
    return Plan(replace(job, loras=loras), checkpoint, there, stages, places, placed.weights, placed.needs,
                placed.strategies, placed.reasons, placed.lanes, placed.savings, placed.reads, placed.work,
                describe.lines, placer)


@contextmanager
def _resting_on(machine: Machine, checkpoint: Checkpoint | None = None) -> Iterator[None]:
    """Have what does not fit say what is taken for what nobody looked at."""
    try:
        yield
    except DoesNotFit as error:
        read = ("", "") if checkpoint is None else (checkpoint.shapes, checkpoint.unread)
        error.basis = Basis(machine.assumed, *read)
        raise


def _placed(
    job: Job, there: Machine, stages: Sequence[Stage], longest_of: Callable[[Iterable[str]], str], multiple: int,
    cache: PlanCache,
) -> tuple[Job, Placer, Placed]:
    """The stages placed, and the job less the lines of a file that ask for steps which the scheduler cannot make."""
    most = largest(job.requests, longest_of)
    dtypes: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in job.dtype.items()}
    placer = Placer(there, most.inputs, dtypes, places_asked_for(job.place, stages), job.allow_offload,
                    job.lanes, smaller_sizes(most, multiple), job.modulation_table, len(job.requests),
                    frozenset(request.steps for request in job.requests), sizes_of(job.requests), job.tile, job.whole)
    try:
        return job, placer, placer.place(stages, cache)
    except UnusableSteps as error:
        if not job.listed:
            raise
        lost = {request.index: error.text for request in job.requests if request.steps == error.steps}
    return _placed(job.without(lost), there, stages, longest_of, multiple, cache)


def _checkpoint(job: Job, *, shapes: bool) -> Checkpoint:
    """The job's model, checked, with its LoRAs; its weights may be elsewhere, and with `shapes` all of its files."""
    family = job.defaults
    is_demo = family.repo == "demo" and job.model in (None, "demo")
    source: str | Path = CHECKPOINT if is_demo else job.model or family.repo
    try:
        named = find(source, revision=job.revision, components=())
        check_family(replace(named, source="demo") if is_demo else named, family=FAMILIES[job.family])
        checkpoint = find(source, revision=job.revision, weights=False)
    except OutOfReach as error:
        # What names a commit, or repeats a picture of one, is about that one alone.
        known = find_shapes(str(source)) if job.revision is None and job.origin is None else None
        # What needs no weights is refused before somebody goes for them.
        makeable(job, family.multiple)
        if known is None:
            raise
        check_family(known, family=FAMILIES[job.family])
        if not shapes:
            _sound(job, split(known, largest(job.requests).inputs), family.multiple)
            raise
        checkpoint = replace(known, unread=error.text)
    checkpoint = replace(checkpoint, scheduler=job.scheduler)
    if job.origin is not None and job.origin.identity != checkpoint.identity:
        raise ModelError(f"{job.origin.what} was made by {job.origin.identity}, but {job.model or family.repo} is now "
                         f"{checkpoint.identity} -> {job.origin.advice}")
    if job.loras:
        checkpoint = with_loras(checkpoint, job.loras)
    return replace(checkpoint, source="demo") if is_demo else checkpoint


def _check_disk(checkpoint: Checkpoint, there: Machine) -> None:
    """Raise DoesNotFit where another machine's disk, as far as it is said, does not hold the model."""
    needed = checkpoint.bytes_elsewhere
    if there.disk_free is not None and needed > there.disk_free:
        raise DoesNotFit(f"{checkpoint.source} has {gib(needed)} of weights to download, and the disk of the machine "
                         f"has {gib(there.disk_free)} free -> disk={-(-needed // 10**9)}GB or more")


def with_loras(checkpoint: Checkpoint, asked: Sequence[LoraRequest]) -> Checkpoint:
    """The checkpoint with these LoRAs; ModelError for one that is not there, or not made for it."""
    loras = [find_lora(each, checkpoint.pipeline) for each in asked]
    if twice := [lora.source for lora in loras if loras.count(lora) > 1]:
        raise InvalidInput(f"`loras` name {twice[0]} twice -> name it once, with the sum of its scales")
    adapted = checkpoint.with_loras({lora: lora_merge.components_reached(lora, checkpoint) for lora in loras})
    for component in adapted.components.values():
        if component.loras:
            lora_merge.check_loras(component)
    return adapted


def smaller_sizes(request: FilledRequest, multiple: int) -> Mapping[str, float]:
    """Smaller sizes of the same shape, the largest first, with their part of the request's pixels.

    A side that can be no smaller stays, and the other one shrinks alone.
    """
    found = {}
    for part in (0.875, 0.75, 0.625, 0.5, 0.375, 0.25):
        width, height = (max(multiple, int(side * part) // multiple * multiple)
                         for side in (request.width, request.height))
        if width * height < request.width * request.height:
            found[f"{width}x{height}"] = width * height / (request.width * request.height)
    return found


def _sound(job: Job, stages: Sequence[Stage], multiple: int) -> Job:
    """The job, less the lines of a file whose sizes the model does not make; InvalidInput for what it lacks."""
    known = [component.name for stage in stages for component in stage.components]
    for component in job.dtype.keys() - {"", *known}:
        close = get_close_matches(component, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise InvalidInput(f"`dtype`: the model has no component {shown(component)} -> {hint}")
    places_asked_for(job.place, stages)
    return makeable(job, multiple)
