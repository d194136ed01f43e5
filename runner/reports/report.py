"""Where the time and the memory of a run went, for people and for programs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.text import gib, pictures, table, wrapped

if TYPE_CHECKING:
    from runner.engine.report import Report, StageReport

PARTS = ("load", "compute", "save", "flush")
SHOWN = 20


def closing(
    report: "Report", written: Sequence[tuple[str, int]], seconds: Mapping[str, float], *, paths: bool = True
) -> list[str]:
    """What a run ends with: the path and the seed of each picture in `written`, and how long one took.

    Without `paths`, which then are told elsewhere, the seeds alone.
    """
    total, count = seconds["total"], len(written)
    if not count:
        made = len(report.pictures) or max((stage.ran + stage.reused for stage in report.stages), default=0)
        last = report.stages[-1].stage if report.stages else "nothing"
        return [f"{last} is done for {pictures(made)}, {total:.1f} s in all"]
    if count == 1:
        (path, seed), = written
        return [f"{f'{path}: ' if paths else ''}seed {seed}, {total:.1f} s"]
    last = f"{count:,} pictures in {total:.1f} s, {total / count:.1f} s per picture"
    if not paths:
        return [f"{last}, {_seeds([seed for _, seed in written])}"]
    listed = [f"{path}: seed {seed}" for path, seed in written[:SHOWN]]
    more = [f"... and {count - SHOWN:,} more"] if count > SHOWN else []
    return [*listed, *more, last]


def _seeds(seeds: Sequence[int]) -> str:
    """Such as `seeds 7 to 10`, `seeds 3, 1, 4`, and of many the first ones."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    more = f", ... and {len(seeds) - SHOWN:,} more" if len(seeds) > SHOWN else ""
    return f"{'seeds' if len({*seeds}) > 1 else 'seed'} {', '.join(map(str, dict.fromkeys(seeds[:SHOWN])))}{more}"


def lines(report: "Report", seconds: Mapping[str, float], columns: int = 80) -> list[str]:
    """Where the time went, in lines of so many columns: a line per stage, its peaks, and the parts of the `total`.

    `seconds` are the parts outside of the stages, such as imports, and the `total`.
    """
    peaks = (f"peak of {stage.stage}: {', '.join(f'{device} {gib(peak)}' for device, peak in stage.peak.items())}"
             for stage in report.stages if stage.peak)
    return [*table(stages_table(report.stages, peaks=False), right=True),
            *(part for line in (*peaks, spent(report, seconds)) for part in wrapped(line, columns))]


def stages_table(stages: "Sequence[StageReport]", *, flushes: bool = False, peaks: bool = True) -> list[list[str]]:
    """A head and a row per stage: seconds by part, peaks and, on request, what the flush of a card gave back."""
    devices = list(dict.fromkeys(device for stage in stages for device in stage.peak)) if peaks else []
    # Only cards are asked what a flush gave back.
    flushed = ("freed", "left") if flushes and not all(device.endswith("cpu") for device in devices) else ()
    rows = [["stage", "made", "re-used", *(f"{part} s" for part in PARTS), *(f"peak {d}" for d in devices), *flushed]]
    for stage in stages:
        times = [f"{stage.seconds[part]:.2f}" for part in PARTS]
        most = [gib(stage.peak[device]) if device in stage.peak else "" for device in devices]
        given = [gib(getattr(stage.flushed, name)) for name in flushed]
        rows.append([stage.stage, str(stage.ran), str(stage.reused), *times, *most, *given])
    return rows


def spent(report: "Report", seconds: Mapping[str, float]) -> str:
    """Such as `total 8.1 s: imports 4.2, plan 0.6, encode 0.5, denoise 2.0, decode 0.4, pictures 0.1, other 0.3`."""
    parts = {name: value for name, value in seconds.items() if name != "total"}
    parts |= {stage.stage: sum(stage.seconds.values()) for stage in report.stages}
    parts["other"] = max(0.0, seconds["total"] - sum(parts.values()))
    return f"total {seconds['total']:.1f} s: {', '.join(f'{name} {value:.1f}' for name, value in parts.items())}"


def document(
    report: "Report",
    made: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The run as one JSON object: its pictures with what made them, its failures, artifacts, stages and seconds."""
    return {
        "run": report.run,
        "pictures": list(made),
        "failed": list(failed),
        "artifacts": {stage.stage: list(report.keys[stage.stage]) for stage in report.stages},
        "stages": [
            {"stage": stage.stage, "made": stage.ran, "reused": stage.reused, "seconds": dict(stage.seconds),
             "peak": dict(stage.peak), "left": stage.flushed.left}
            for stage in report.stages
        ],
        "seconds": dict(seconds),
    }
