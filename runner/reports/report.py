"""Where the time and the memory of a run went, for people and for programs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.text import gib, table

if TYPE_CHECKING:
    from runner.engine.report import Report, StageReport

PARTS = ("load", "compute", "save", "flush")


def lines(report: "Report", seconds: Mapping[str, float]) -> list[str]:
    """The table at the end of a run: a line per stage, and one that splits the `total` of `seconds`.

    `seconds` are the parts outside of the stages, such as imports, and the `total`.
    """
    return [*table(stages_table(report.stages), right=True), spent(report, seconds)]


def stages_table(stages: "Sequence[StageReport]", *, flushes: bool = False) -> list[list[str]]:
    """A head and a row per stage: seconds by part, peaks and, on request, what the flush of a card gave back."""
    devices = list(dict.fromkeys(device for stage in stages for device in stage.peak))
    # Only cards are asked what a flush gave back.
    flushed = ("freed", "left") if flushes and not all(device.endswith("cpu") for device in devices) else ()
    rows = [["stage", "made", "re-used", *(f"{part} s" for part in PARTS), *(f"peak {d}" for d in devices), *flushed]]
    for stage in stages:
        times = [f"{stage.seconds[part]:.2f}" for part in PARTS]
        peaks = [gib(stage.peak[device]) if device in stage.peak else "" for device in devices]
        given = [gib(getattr(stage.flushed, name)) for name in flushed]
        rows.append([stage.stage, str(stage.ran), str(stage.reused), *times, *peaks, *given])
    return rows


def spent(report: "Report", seconds: Mapping[str, float]) -> str:
    """Such as `total 8.1 s: imports 4.2, plan 0.6, encode 0.5, denoise 2.0, decode 0.4, pictures 0.1, other 0.3`."""
    parts = {name: value for name, value in seconds.items() if name != "total"}
    parts |= {stage.stage: sum(stage.seconds.values()) for stage in report.stages}
    parts["other"] = max(0.0, seconds["total"] - sum(parts.values()))
    return f"total {seconds['total']:.1f} s: {', '.join(f'{name} {value:.1f}' for name, value in parts.items())}"


def document(
    report: "Report",
    pictures: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The run as one JSON object: its pictures with what made them, its failures, artifacts, stages and seconds."""
    return {
        "run": report.run,
        "pictures": list(pictures),
        "failed": list(failed),
        "artifacts": {stage.stage: list(report.keys[stage.stage]) for stage in report.stages},
        "stages": [
            {"stage": stage.stage, "made": stage.ran, "reused": stage.reused, "seconds": dict(stage.seconds),
             "peak": dict(stage.peak), "left": stage.flushed.left}
            for stage in report.stages
        ],
        "seconds": dict(seconds),
    }
