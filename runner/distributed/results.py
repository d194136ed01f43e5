"""What each rank did, as it tells the first one, and the one report that becomes of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from runner.artifacts import Store
from runner.engine.report import Failure, Flushed, Picture, Report, StageReport
from runner.job import Job
from stages.errors import BadResult

if TYPE_CHECKING:
    from pydantic import TypeAdapter


_OTHERS = "one process would have made other pictures of these"


@dataclass(frozen=True)
class RankResult:
    """What a rank did; positions are those of requests in the whole job."""

    rank: int
    """Its number."""
    positions: tuple[int, ...]
    """The requests that were its share."""
    made: tuple[int, ...] = ()
    """Those of them that are pictures now."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the metadata of its pictures say besides the request, and the tile."""
    tiles: Mapping[int, int] = field(default_factory=dict)
    """For each picture that was decoded in tiles, the pixels along a side of them."""
    failures: tuple[Failure, ...] = ()
    """Those of them that came to nothing."""
    changes: tuple[str, ...] = ()
    """What it changed to go on after a stage ran out of memory."""
    device_map: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Where the modules of each component were."""
    stages: tuple[StageReport, ...] = ()
    """What it did in each stage."""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By stage, the artifact keys of its requests."""
    written: tuple[Mapping[str, Any], ...] = ()
    """The data of its `picture` events."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """Warnings and previews, as the record of a run has them."""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "RankResult":
        """The result that `to_json` wrote."""
        return _adapter().validate_json(json.dumps(document))


@cache
def _adapter() -> "TypeAdapter[RankResult]":
    from pydantic import TypeAdapter

    return TypeAdapter(RankResult)


def joined(job: Job, results: Sequence[RankResult], store: Store) -> Report:
    """One report of all results, pictures in the order of the requests.

    A stage's seconds are those of the slowest rank, its bytes of memory those of each card of each rank. Raises
    BadResult where nothing but failures came of it.
    """
    requests = job.requests
    keys: dict[str, list[str]] = {}
    pictures: dict[int, Picture] = {}
    for result in results:
        for name, own in result.keys.items():
            row = keys.setdefault(name, [""] * len(requests))
            for position, key in zip(result.positions, own, strict=True):
                row[position] = key
        for position in result.made:
            request = requests[position]
            tile = {"tile": result.tiles[position]} if position in result.tiles else {}
            pictures[position] = Picture(request.index, request, keys["decode"][position], store,
                                         {**result.facts, **tile} if tile else result.facts)
    failures = tuple(failure for result in results for failure in result.failures)
    if len({failure.index for failure in failures}) == len(requests):
        raise BadResult(f"every picture failed; the first: {failures[0].text}")
    names = dict.fromkeys(stage.stage for result in results for stage in result.stages)
    return Report(
        job, job.run, tuple(pictures[position] for position in sorted(pictures)),
        tuple(_stage(name, results) for name in names), {name: tuple(row) for name, row in keys.items()}, failures,
        tuple(dict.fromkeys(change for result in results for change in result.changes)),
        {f"rank {result.rank} {component}": devices
         for result in results for component, devices in result.device_map.items()},
    )


def differing(job: Job, results: Sequence[RankResult]) -> str | None:
    """What the ranks did not do alike, because their cards differ: then pictures depend on which rank made them."""
    worked = [result for result in results if result.facts]
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for result in worked:
        ours, theirs = worked[0].facts.get("dtype"), result.facts.get("dtype")
        if ours != theirs:
            return (f"rank {worked[0].rank} worked with dtype {ours}, rank {result.rank} with {theirs}: {_OTHERS} "
                    f"(`dtype` makes ranks alike)")
        for position in result.made:
            request, tile = job.requests[position], result.tiles.get(position, 0)
            rank, other = first.setdefault((request.width, request.height), (result.rank, tile))
            if tile != other:
                how, instead = (f"in tiles of {side} pixels" if side else "whole" for side in (other, tile))
                return (f"rank {rank} decoded pictures of {request.width}x{request.height} {how}, rank {result.rank} "
                        f"{instead}: {_OTHERS} (`tile={tile or other}` makes ranks alike)")
    return None


def recorded(results: Sequence[RankResult]) -> dict[str, Any]:
    """What the record of the whole run says besides that of the first rank."""
    warnings = dict.fromkeys(text for result in results for text in result.recorded.get("warnings", ()))
    previews = {name: key for result in results for name, key in result.recorded.get("previews", {}).items()}
    return {"warnings": list(warnings), "previews": previews,
            "failures": [asdict(failure) for result in results for failure in result.failures],
            "changes": list(dict.fromkeys(change for result in results for change in result.changes))}


def _stage(name: str, results: Sequence[RankResult]) -> StageReport:
    rows = [(result.rank, stage) for result in results for stage in result.stages if stage.stage == name]
    parts = dict.fromkeys(part for _, stage in rows for part in stage.seconds)
    return StageReport(
        name, sum(stage.ran for _, stage in rows), sum(stage.reused for _, stage in rows),
        {part: max(stage.seconds.get(part, 0.0) for _, stage in rows) for part in parts},
        {f"rank {rank} {device}": peak for rank, stage in rows for device, peak in stage.peak.items()},
        Flushed(sum(stage.flushed.freed for _, stage in rows), sum(stage.flushed.left for _, stage in rows)),
    )
