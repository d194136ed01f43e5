"""What each rank did, as it tells the first one, and the one report that becomes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.artifacts import Store
from runner.engine.memory import Flushed
from runner.engine.run import Picture, Report
from runner.engine.stage_runner import Failure, StageReport
from runner.request import Request
from stages.errors import BadResult


@dataclass(frozen=True)
class Share:
    """What a rank did: the positions of its requests in the order, its report, and what its pictures say.

    A rank without a report had nothing to do, or nothing but `failures`, which count within the share, as `cards` do.
    """

    rank: int
    positions: range
    report: Report | None = None
    cards: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    failures: Sequence[Failure] = ()

    def document(self) -> dict[str, Any]:
        """The share as JSON; the pictures stay in the store."""
        stages = () if self.report is None else self.report.stages
        made = () if self.report is None else self.report.pictures
        return {
            "rank": self.rank,
            "positions": list(self.positions),
            "pictures": [picture.index for picture in made],
            "facts": dict(made[0].facts) if made else {},
            "failures": [{**vars(failure), "index": self.positions[failure.index]} for failure in self.failures],
            "changes": [] if self.report is None else list(self.report.changes),
            "device_map": {} if self.report is None else dict(self.report.device_map),
            "stages": [{"stage": stage.stage, "ran": stage.ran, "reused": stage.reused, "left": stage.flushed.left,
                        "freed": stage.flushed.freed, "seconds": dict(stage.seconds), "peak": dict(stage.peak)}
                       for stage in stages],
            "keys": {} if self.report is None else {name: list(keys) for name, keys in self.report.keys.items()},
            "cards": [[self.positions[at], card] for at, card in self.cards.items()],
        }


def joined(
    run: str, requests: Sequence[Request], shares: Sequence[Mapping[str, Any]], store: Store
) -> Report:
    """One report of all shares, pictures in the order of the requests.

    A stage's seconds are those of the slowest rank, its bytes of memory those of each card of each rank. Raises
    BadResult where nothing but failures came of it.
    """
    keys: dict[str, list[str]] = {}
    pictures: dict[int, Picture] = {}
    for share in shares:
        for name, own in share["keys"].items():
            row = keys.setdefault(name, [""] * len(requests))
            for position, key in zip(share["positions"], own, strict=True):
                row[position] = key
        for position in share["positions"]:
            request = requests[position]
            if request.index in share["pictures"]:
                pictures[position] = Picture(request.index, request, keys["decode"][position], store, share["facts"])
    failures = tuple(Failure(**failure) for share in shares for failure in share["failures"])
    if len({failure.index for failure in failures}) == len(requests):
        raise BadResult(f"every picture failed; the first: {failures[0].text}")
    names = dict.fromkeys(stage["stage"] for share in shares for stage in share["stages"])
    return Report(
        run, tuple(pictures[position] for position in sorted(pictures)), tuple(_stage(name, shares) for name in names),
        {name: tuple(row) for name, row in keys.items()},
        failures,
        tuple(dict.fromkeys(change for share in shares for change in share["changes"])),
        {f"rank {share['rank']} {component}": devices
         for share in shares for component, devices in share["device_map"].items()},
    )


def cards_of(shares: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """The positions of all pictures that were written, in the order of the requests, and what they say."""
    told = {position: card for share in shares for position, card in share["cards"]}
    return sorted(told.items())


def differing(shares: Sequence[Mapping[str, Any]]) -> str | None:
    """What the ranks did not do alike, because their cards differ: then pictures depend on which rank made them."""
    worked = [share for share in shares if share["facts"]]
    for name in ("dtype", "tile"):
        for share in worked[1:]:
            ours, theirs = worked[0]["facts"].get(name), share["facts"].get(name)
            if ours != theirs:
                return (f"rank {worked[0]['rank']} worked with {name} {ours}, rank {share['rank']} with {theirs}: one "
                        f"process would have made other pictures of these (--dtype makes ranks alike)")
    return None


def _stage(name: str, shares: Sequence[Mapping[str, Any]]) -> StageReport:
    rows = [(share["rank"], stage) for share in shares for stage in share["stages"] if stage["stage"] == name]
    parts = dict.fromkeys(part for _, stage in rows for part in stage["seconds"])
    total = {part: sum(int(stage[part]) for _, stage in rows) for part in ("ran", "reused", "freed", "left")}
    return StageReport(
        name, total["ran"], total["reused"],
        {part: max(float(stage["seconds"].get(part, 0.0)) for _, stage in rows) for part in parts},
        {f"rank {rank} {device}": int(peak) for rank, stage in rows for device, peak in stage["peak"].items()},
        Flushed(total["freed"], total["left"]),
    )
