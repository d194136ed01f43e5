"""The key to a chart's colors and lines, wrapped to its width."""

from collections.abc import Sequence

from runner.reports.charts.drawing import Drawing, wide

LINE = 20
SWATCH = 14


def legend(drawing: Drawing, entries: Sequence[tuple[str, str, str]], x: float, y: float) -> float:
    """Draw entries of shape ("rect", "hatched", "line" or "mark"), classes and words; the height that they take."""
    left, top = x, y
    for shape, kind, words in entries:
        taken = SWATCH + 6 + wide(words) + 14
        if left > x and left + taken > drawing.width:
            left, top = x, top + LINE
        if shape == "hatched":
            drawing.hatched(left, top + 3, SWATCH, 11, "")
        elif shape == "rect":
            drawing.rect(left, top + 3, SWATCH, 11, kind)
        elif shape == "line":
            drawing.line(left, top + 8.5, left + SWATCH, top + 8.5, kind)
        else:
            drawing.curve([(left + 2, top + 4), (left + 12, top + 4), (left + 7, top + 13)], f"area {kind}")
        drawing.text(left + SWATCH + 6, top + 12.5, words)
        left += taken
    return top + LINE - y
