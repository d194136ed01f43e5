"""What memory did over the run, a panel per card: bands for stages, the limit, the plan, and every flush."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.reports.charts.drawing import Axis, Drawing, legend, width_of
from runner.text import gib

LEFT = 72
PANEL, GAP, TITLE = 118, 24, 20
POINTS = 300


@dataclass(frozen=True)
class Panel:
    """The memory of one device, in bytes."""

    name: str
    """Its name."""
    points: Sequence[tuple[float, int]]
    """What was in use, with the second at which it was."""
    limit: int | None
    """What there is room for; None where nothing limits it."""
    planned: Mapping[str, int]
    """What each stage was to take at most."""
    peaks: Mapping[str, int]
    """What each stage took at most."""
    flushes: Sequence[tuple[float, str]]
    """The second of every flush, and what it did."""


def memory(record: Mapping[str, Any], width: float) -> Drawing | None:
    """The chart, `width` pixels wide; None where the record has no samples."""
    timeline = record.get("timeline") or {}
    if not timeline.get("samples"):
        return None
    shown = panels(record)
    drawing = Drawing(width, 0, "Memory over the run, on each card and on the host.")
    y = legend(drawing, legend_of(shown)) + 4
    across = Axis(timeline["seconds"], LEFT, width - 8)
    spans = bands(timeline)
    y += _names(drawing, spans, across, y)
    # Cards are compared with each other, the host only with itself.
    *cards, host = (highest_of(panel) for panel in shown)
    for panel, highest in zip(shown, [max(cards, default=0)] * len(cards) + [host], strict=True):
        _panel(drawing, panel, max(1, highest), across, spans, y + TITLE)
        y += TITLE + PANEL + GAP
    for x, words in across.seconds():
        drawing.text(x, y - GAP + 15, words, "faint", "middle" if x > LEFT else "start")
    drawing.height = y
    return drawing


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """A panel for every card, and the last for the host."""
    timeline, plan = record["timeline"], record["plan"]
    samples = timeline["samples"]
    flushes = [(flush["seconds"], f"flush after {flush['stage']}: freed {gib(flush['freed'])}, "
                f"left {gib(flush['left'])}") for flush in timeline["flushes"]]
    found = []
    for at, device in enumerate(timeline["devices"]):
        planned = {stage: needs[device]["weights"] + needs[device]["activations"]
                   for stage, needs in plan["stages"].items() if device in needs}
        peaks = {stage: peaks[device] for stage, peaks in timeline["peaks"].items() if device in peaks}
        found.append(Panel(device, [(s[0], s[3][at]) for s in samples], plan["devices"][device]["room"], planned,
                           peaks, flushes))
    host = [(s[0], s[4]) for s in samples]
    return [*found, Panel("host", host, None, {}, {}, [] if found else flushes)]


def bands(timeline: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Every stage with the seconds from its first sample to its last."""
    found: dict[str, tuple[float, float]] = {}
    for seconds, stage, *_ in timeline["samples"]:
        if stage:
            found[stage] = found.get(stage, (seconds, seconds))[0], seconds
    return [(stage, begin, end) for stage, (begin, end) in found.items()]


def highest_of(panel: Panel) -> int:
    """The most bytes that a panel shows, its limit aside."""
    return max([*(used for _, used in panel.points), *panel.peaks.values(), *panel.planned.values()])


def legend_of(shown: Sequence[Panel]) -> list[tuple[str, str, str]]:
    """What the colors and lines mean."""
    found = [("line", "used", "bytes in use")]
    if any(panel.peaks for panel in shown):
        found += [("line", "peak", "peak of the stage"), ("line", "planned", "plan for the stage")]
    if any(panel.limit is not None for panel in shown):
        found.append(("line", "limit", "limit"))
    return [*found, ("mark", "mark", "flush")]


def thin(points: Sequence[tuple[float, int]], most: int = POINTS) -> list[tuple[float, int]]:
    """At most about `most` points: of each stretch its ends, its lowest and its highest."""
    size = max(1, -(-len(points) * 4 // most))
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found += sorted({part[0], part[-1], min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return found


def _names(drawing: Drawing, spans: Sequence[tuple[str, float, float]], across: Axis, y: float) -> float:
    """The names of the stages over their bands, in as many lines as they need; the height of these."""
    ends: list[float] = []
    for stage, begin, _ in spans:
        # A name begins at its band, or further left where it would run out of the drawing.
        x = min(across.at(begin), drawing.width - width_of(stage, 12))
        line = next((number for number, end in enumerate(ends) if end <= x), len(ends))
        ends[line:line + 1] = [x + width_of(stage, 12) + 10]
        drawing.text(x, y + 14 + 15 * line, stage, "strong")
    return 15.0 * len(ends) + 4


def _panel(
    drawing: Drawing, panel: Panel, highest: int, across: Axis, spans: Sequence[tuple[str, float, float]], y: float
) -> None:
    near = panel.limit is not None and panel.limit < 3 * highest
    up = Axis(max(highest, panel.limit or 0) * 1.06 if near else highest * 1.12, y + PANEL, y)
    most = max([used for _, used in panel.points] + list(panel.peaks.values()))
    limit = f" of {gib(panel.limit)}" if panel.limit is not None else ""
    drawing.text(LEFT, y - 6, f"{panel.name}: at most {gib(most)}{limit}")
    drawing.rect(across.start, y, across.end - across.start, PANEL, "frame")
    for number, (stage, begin, end) in enumerate(spans):
        drawing.rect(across.at(begin), y, across.at(end) - across.at(begin), PANEL, f"band{number % 2}", stage)
    for at, words in up.bytes():
        drawing.line(across.start, at, across.end, at, "grid")
        drawing.text(LEFT - 8, at + 4, words, "faint", "end")
    points = [(across.at(seconds), up.at(used)) for seconds, used in thin(panel.points)]
    drawing.curve([(points[0][0], up.start), *points, (points[-1][0], up.start)], "area")
    drawing.curve(points, "used")
    _levels(drawing, panel, across, up, spans)
    for seconds, title in panel.flushes:
        x = across.at(seconds)
        drawing.line(x, y, x, y + PANEL, "freed", title)
        drawing.curve([(x - 5, y), (x + 5, y), (x, y + 8)], "area mark")
    if near and panel.limit is not None:
        drawing.line(across.start, up.at(panel.limit), across.end, up.at(panel.limit), "limit",
                     f"limit of {panel.name}: {gib(panel.limit)}")


def _levels(
    drawing: Drawing, panel: Panel, across: Axis, up: Axis, spans: Sequence[tuple[str, float, float]]
) -> None:
    for stage, begin, end in spans:
        for kind, sizes in (("planned", panel.planned), ("peak", panel.peaks)):
            if sizes.get(stage):
                at = up.at(sizes[stage])
                drawing.line(across.at(begin), at, across.at(end), at, kind,
                             f"{stage}, {'plan' if kind == 'planned' else 'measured peak'}: {gib(sizes[stage])}")
