"""After a stage ran out of memory for good: changes to the command line with which it needs less."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from runner.planning.plan import Plan, make_plan
from runner.planning.suggestions import changed
from stages.errors import DoesNotFit

WAYS = 3
LESS = 0.75


def ways_out(job: Plan, stage: str, options: Mapping[str, Any], *, degraded: bool) -> list[dict[str, str]]:
    """At most three sets of changed options, planned on paper: all fits, and the stage's fullest device has less.

    `options` are those of `make_plan` that led to `job`; a run that was `degraded` tried one lane already.
    """
    found: list[dict[str, str]] = []
    for changes in _candidates(job, stage, options, degraded):
        sized, altered = changed(job.requests, options, changes)
        try:
            other = make_plan(job.family.name, sized, **(altered | {"weights": False}))
        except DoesNotFit:
            continue
        if fullest(other, stage) < fullest(job, stage):
            found.append(changes)
        if len(found) == WAYS:
            break
    return found


def fullest(job: Plan, stage: str) -> int:
    """The bytes that a stage needs on the device that it fills most."""
    return max(need.total for need in job.needs[stage].values())


def _candidates(job: Plan, stage: str, options: Mapping[str, Any], degraded: bool) -> Iterator[dict[str, str]]:
    """First what leaves the picture as it is."""
    alone = {"--lanes": "1"} if job.lanes > 1 and stage == "denoise" else {}
    if alone and not degraded:
        yield alone
    if job.machine.cards:
        tight = {**alone, "--max-memory": _tighter(job)}
        yield tight
        if options["allow_offload"] is None:
            yield {**tight, "--allow-offload": "cpu"}
    if not options["dtype"] and any(job.places[part.name].dtype == torch.float32
                                    for one in job.stages if one.name == stage for part in one.components):
        yield {**alone, "--dtype": "bfloat16"}
    if stage != "encode" and job.placer is not None:
        yield from ({**alone, "--size": size} for size, part in job.placer.smaller.items() if part <= LESS)


def _tighter(job: Plan) -> str:
    """For each card a limit of three quarters of what it had, so that weights leave more of it free."""
    limits = ((card.name.rpartition(":")[2], card.free if card.limit is None else card.limit)
              for card in job.machine.cards)
    return ",".join(f"{name}={int(size * LESS / 2**20)}MiB" for name, size in limits)
