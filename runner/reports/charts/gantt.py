"""Which stage took the time, and which part of it: a line per part, and per lane where there are several."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from runner.reports.charts.drawing import Axis, Drawing, width_of
from runner.reports.charts.timeline import LEFT

ROW, GAP, AXIS = 18, 10, 24
PARTS = ("table", "load", "compute", "save", "flush")
LANES = 8

Row = tuple[str, str, list[Mapping[str, Any]]]


def gantt(record: Mapping[str, Any], width: float) -> Drawing | None:
    """The chart, `width` pixels wide, on the scale of the memory chart; None where the record has no times."""
    timeline = record.get("timeline") or {}
    if not timeline.get("spans"):
        return None
    found = rows(timeline["spans"])
    stages = list(dict.fromkeys(stage for stage, _, _ in found))
    height = ROW * len(found) + (GAP + ROW) * len(stages) + AXIS
    drawing = Drawing(width, height, "When each part of each stage was at work, and for how long.")
    across = Axis(timeline["seconds"], LEFT, width - 8)
    for x, words in across.seconds():
        drawing.line(x, 0, x, height - AXIS, "grid")
        drawing.text(x, height - 8, words, "faint", "middle" if x > LEFT else "start")
    y = 0.0
    for stage, group in groupby(found, key=lambda row: row[0]):
        members = list(group)
        every = [span for _, _, spans in members for span in spans]
        whole = max(span["end"] for span in every) - min(span["begin"] for span in every)
        drawing.text(0, y + 13, f"{stage}: {took(whole)}", "strong")
        y += ROW
        for row in members:
            _row(drawing, row, across, y)
            y += ROW
        y += GAP
    return drawing


def rows(spans: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The spans by stage, in the order of the run, and part; lanes that compute get a line each."""
    found: list[Row] = []
    for stage in dict.fromkeys(str(span["stage"]) for span in spans):
        for part in PARTS:
            mine = [span for span in spans if (span["stage"], span["part"]) == (stage, part)]
            lanes = sorted({span["lane"] for span in mine})[:LANES]
            for lane in lanes:
                name = f"{part} {lane + 1}" if len(lanes) > 1 else part
                found.append((stage, name, [span for span in mine if span["lane"] == lane]))
    return found


def busy(spans: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of work in spans."""
    return float(sum(span["busy"] for span in spans))


def took(seconds: float) -> str:
    """Such as `12.3 s`, `8 ms`."""
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds * 1000:.0f} ms"


def _row(drawing: Drawing, row: Row, across: Axis, y: float) -> None:
    stage, name, spans = row
    drawing.text(LEFT - 8, y + 13, name, "faint", "end")
    for span in spans:
        x = across.at(span["begin"])
        pieces = f" in {span['count']} pieces" if span["count"] > 1 else ""
        # What is too short to be seen is drawn as a stroke all the same.
        drawing.rect(x, y + 3, max(2.0, across.at(span["end"]) - x), ROW - 6, name.split()[0],
                     f"{stage}, {name}: {took(span['busy'])}{pieces}")
    words, end = took(busy(spans)), max(across.at(span["end"]) for span in spans)
    if end + 6 + width_of(words) <= drawing.width:
        drawing.text(end + 6, y + 13, words)
    else:
        drawing.text(min(across.at(span["begin"]) for span in spans) - 6, y + 13, words, anchor="end")
