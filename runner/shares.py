"""What each rank did, as it tells the first one, and the one report that becomes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.artifacts import ArtifactStore
from runner.memory import Flushed
from runner.request import Request
from runner.run import Picture, Report
from runner.shift import StageReport


@dataclass(frozen=True)
class Share:
    """What a rank did: the positions of its requests in the order, its report, and what its pictures say."""

    rank: int
    positions: range
    report: Report | None
    cards: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """The share as JSON; the pictures stay in the store."""
        stages = () if self.report is None else self.report.stages
        return {
            "rank": self.rank,
            "positions": list(self.positions),
            "stages": [{"stage": stage.stage, "ran": stage.ran, "reused": stage.reused, "left": stage.flushed.left,
                        "freed": stage.flushed.freed, "seconds": dict(stage.seconds), "peak": dict(stage.peak)}
                       for stage in stages],
            "keys": {} if self.report is None else {name: list(keys) for name, keys in self.report.keys.items()},
            "pictures": self.report is not None and bool(self.report.pictures),
            "cards": list(self.cards),
            "facts": dict(self.facts),
        }


def joined(
    run: str, requests: Sequence[Request], shares: Sequence[Mapping[str, Any]], store: ArtifactStore
) -> Report:
    """One report of all shares, pictures in the order of the requests.

    A stage's seconds are those of the slowest rank, its bytes of memory those of each card of each rank.
    """
    keys: dict[str, list[str]] = {}
    pictures: dict[int, Picture] = {}
    for share in shares:
        for name, own in share["keys"].items():
            row = keys.setdefault(name, [""] * len(requests))
            for position, key in zip(share["positions"], own, strict=True):
                row[position] = key
        for position in share["positions"] if share["pictures"] else ():
            request = requests[position]
            pictures[position] = Picture(request.index, request, keys["decode"][position], store, share["facts"])
    names = dict.fromkeys(stage["stage"] for share in shares for stage in share["stages"])
    return Report(run, tuple(pictures[position] for position in sorted(pictures)),
                  tuple(_stage(name, shares) for name in names), {name: tuple(row) for name, row in keys.items()})


def cards_of(shares: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the pictures of all shares say, in the order of the requests."""
    told = {position: card for share in shares if share["cards"]
            for position, card in zip(share["positions"], share["cards"], strict=True)}
    return [told[position] for position in sorted(told)]


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
