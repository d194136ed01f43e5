"""Where every block lay: a column per card in each stage, with its blocks, its reserve and its limit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.planning.describe import REST
from runner.reports.charts.drawing import Axis, Drawing, legend, width_of
from runner.text import gib

PLOT = 270
LEFT = 62
HEAD, FOOT = 26, 54
GROUP, COLUMN = 30, 12
LEAST, MOST = 92, 272
COLORS = 6
# Words in the names of lists of blocks that say nothing.
PLAIN = ("block", "blocks", "layer", "layers")


@dataclass(frozen=True)
class Column:
    """A device in a stage, in bytes."""

    device: str
    """Its name."""
    parts: Mapping[str, Mapping[str, int]]
    """What lies on it, by component and block."""
    weights: int
    """All that lies on it."""
    reserve: int
    """What is kept for activations."""
    limit: int | None
    """What there is room for; None where nothing limits it."""
    peak: int | None
    """The most that was measured; None where it was not."""


def blocks(record: Mapping[str, Any], width: float) -> Drawing | None:
    """The chart, `width` pixels wide; None where the record does not say where blocks lay."""
    groups = {stage: columns(record, stage) for stage in record.get("layout") or {}}
    if not groups:
        return None
    rows = arranged(groups, width)
    every = [column for group in groups.values() for column in group]
    most = max(column.weights + column.reserve for column in every)
    limits = [column.limit for column in every if column.limit is not None]
    # A limit far above would press the blocks flat, and is then only said.
    top = max([most * 1.06, *(limit * 1.04 for limit in limits if limit < 3 * most)])
    kinds = colors(record["layout"])
    drawing = Drawing(width, 0, "Where every block lay: bytes on each card in each stage.")
    y = legend(drawing, legend_of(kinds, every)) + 8
    for row in rows:
        _row(drawing, {stage: groups[stage] for stage in row}, Axis(top, y + HEAD + PLOT, y + HEAD), kinds)
        y += HEAD + PLOT + FOOT
    drawing.height = y
    return drawing


def columns(record: Mapping[str, Any], stage: str) -> list[Column]:
    """The columns of a stage: every card, and the host where it holds something or is all there is."""
    plan, there = record["plan"], record["layout"][stage]
    peaks = (record.get("timeline") or {}).get("peaks", {}).get(stage, {})
    cards = [name for name in plan["devices"] if name != "cpu"]
    names = [*cards, *(["cpu"] if "cpu" in there or not cards else [])]
    found = []
    for name in names:
        need = plan["stages"].get(stage, {}).get(name, {"weights": 0, "activations": 0})
        limit = plan["devices"][name]["room"] if name in cards else None
        found.append(Column(name, there.get(name, {}), need["weights"], need["activations"], limit,
                            peaks.get(name) if name in cards else None))
    return found


def arranged(groups: Mapping[str, Sequence[Column]], width: float) -> list[list[str]]:
    """The stages in rows: side by side where each column stays wide enough, else below one another."""
    count = sum(len(group) for group in groups.values())
    room = width - LEFT - GROUP * (len(groups) - 1) - COLUMN * (count - len(groups))
    return [list(groups)] if room / count >= LEAST else [[stage] for stage in groups]


def colors(layout: Mapping[str, Any]) -> dict[str, str]:
    """A class of the style sheet for each component."""
    names = dict.fromkeys(name for devices in layout.values() for parts in devices.values() for name in parts)
    return {name: f"c{number % COLORS}" for number, name in enumerate(names)}


def legend_of(kinds: Mapping[str, str], every: Sequence[Column]) -> list[tuple[str, str, str]]:
    """What the colors and lines mean."""
    found = [("rect", kind, name) for name, kind in kinds.items()]
    found.append(("hatched", "", "reserve for activations"))
    if any(column.peak is not None for column in every):
        found.append(("line", "peak", "measured peak"))
    if any(column.limit is not None for column in every):
        found.append(("line", "limit", "limit"))
    return found


def _row(
    drawing: Drawing, groups: Mapping[str, Sequence[Column]], axis: Axis, kinds: Mapping[str, str]
) -> None:
    count = sum(len(group) for group in groups.values())
    room = drawing.width - LEFT - GROUP * (len(groups) - 1) - COLUMN * (count - len(groups))
    width = min(MOST, room / count)
    for y, words in axis.bytes():
        drawing.line(LEFT - 4, y, drawing.width, y, "grid")
        drawing.text(LEFT - 8, y + 4, words, "faint", "end")
    x: float = LEFT
    for stage, group in groups.items():
        drawing.text(x, axis.end - 12, stage, "strong")
        for column in group:
            _column(drawing, column, axis, x, width, kinds)
            x += width + COLUMN
        x += GROUP - COLUMN


def _column(
    drawing: Drawing, column: Column, axis: Axis, x: float, width: float, kinds: Mapping[str, str]
) -> None:
    top = axis.end if column.limit is None else max(axis.end, axis.at(column.limit))
    drawing.rect(x, top, width, axis.start - top, "frame")
    used = 0
    for component, parts in column.parts.items():
        _component(drawing, component, parts, axis, used, (x, width), kinds[component])
        used += sum(parts.values())
    if column.reserve:
        y = axis.at(used + column.reserve)
        drawing.hatched(x, y, width, axis.at(used) - y, f"reserve for activations: {gib(column.reserve)}")
    if column.limit is not None:
        drawing.line(x - 3, top, x + width + 3, top, "limit", f"limit of {column.device}: {gib(column.limit)}")
    if column.peak is not None:
        y = axis.at(column.peak)
        drawing.line(x - 3, y, x + width + 3, y, "peak", f"measured peak: {gib(column.peak)}")
    _foot(drawing, column, axis.start, x, width)


def _component(
    drawing: Drawing, name: str, parts: Mapping[str, int], axis: Axis, used: int, across: tuple[float, float],
    kind: str,
) -> None:
    """The blocks of a component above the `used` bytes, with a name for each run of them, or one for all."""
    (x, width), below, labeled = across, used, False
    for stem, members in runs(parts):
        low = axis.at(used)
        for block, size in members:
            y = axis.at(used + size)
            drawing.rect(x, y, width, axis.at(used) - y, f"block {kind}", f"{name}: {block}, {gib(size)}")
            used += size
        labeled |= _label(drawing, across, axis.at(used), low, named(name, stem, members), kind)
    if not labeled:
        _label(drawing, across, axis.at(used), axis.at(below), [name], kind)


def _foot(drawing: Drawing, column: Column, bottom: float, x: float, width: float) -> None:
    total = column.weights + column.reserve
    lines = [("plan", gib(total))] if total else []
    lines += [("peak", gib(column.peak))] if column.peak is not None else []
    drawing.text(x, bottom + 16, column.device, "strong")
    if not column.parts:
        drawing.text(x + width / 2, bottom - 8, "nothing", "faint", "middle")
    for number, (word, size) in enumerate(lines):
        words = f"{word} {size}" if width_of(f"{word} {size}") <= width + COLUMN else size
        drawing.text(x, bottom + 30 + 13 * number, words, "faint")


def _label(
    drawing: Drawing, across: tuple[float, float], top: float, bottom: float, choices: Sequence[str], kind: str
) -> bool:
    """Write the first of the choices that has room between `top` and `bottom`; whether one has."""
    (x, width), middle = across, (top + bottom) / 2
    fitting = next((words for words in choices if width_of(words) <= width - 6 and bottom - top >= 14), None)
    if fitting is None:
        return False
    drawing.rect(x + (width - width_of(fitting)) / 2 - 2, middle - 6.5, width_of(fitting) + 4, 13, kind)
    drawing.text(x + width / 2, middle + 4, fitting, "in", "middle")
    return True


def runs(parts: Mapping[str, int]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """The blocks in runs of one list of blocks with numbers that follow each other, under the list's name."""
    members: list[tuple[str, int]] = []
    before: tuple[str, int] | None = None
    for block, size in parts.items():
        stem, _, number = block.rpartition(".")
        place = (stem, int(number)) if number.isdigit() else None
        if members and (before is None or place is None or place != (before[0], before[1] + 1)):
            yield before[0] if before else members[0][0], members
            members = []
        members.append((block, size))
        before = place
    if members:
        yield before[0] if before else members[0][0], members


def named(component: str, stem: str, members: Sequence[tuple[str, int]]) -> list[str]:
    """Names for a run of blocks, the fullest first."""
    first, last = members[0][0].rpartition(".")[2], members[-1][0].rpartition(".")[2]
    if not first.isdigit():
        return [component if stem == REST else stem]
    row = stem.rpartition(".")[2]
    numbers = first if first == last else f"{first}-{last}"
    # Of `single_transformer_blocks` in a transformer, only the first word says something new.
    kind = " ".join(word for word in row.split("_") if word not in (component, *PLAIN))
    blocks = "block" if first == last else "blocks"
    short = [f"{kind} {blocks} {numbers}", f"{kind} {numbers}"] if kind else [f"{blocks} {numbers}"]
    return [f"{row} {numbers}", *short, numbers]
