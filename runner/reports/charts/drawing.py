"""An SVG by hand: rectangles, lines, curves and words with colors from classes of charts.css, axes, and a legend."""

import math
from collections.abc import Sequence
from itertools import count

from markupsafe import Markup

from runner.text import gib, visible

# A letter's width in the widest usual font, as a part of the font's size: labels are measured, not seen.
LETTER = 0.62
SIZE = 11
LEGEND_LINE = 20
SWATCH = 14

_SVG = Markup(
    '<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
    'aria-label="{words}"><defs><pattern id="{hatch}" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect class="hatched" width="6" height="6"/>'
    '<line class="hatching" x1="0" y1="0" x2="0" y2="6"/></pattern></defs>{parts}</svg>')
_RECT = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}">{}</rect>')
_HATCHED = Markup('<rect class="reserve" fill="url(#{})" x="{}" y="{}" width="{}" height="{}">{}</rect>')
_LINE = Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>')
_AREA = Markup('<polygon class="{}" points="{}"/>')
_CURVE = Markup('<polyline class="{}" points="{}"/>')
_TEXT = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
_TITLE = Markup("<title>{}</title>")

_NUMBERS = count()


class Drawing:
    """A picture of `width` by `height` pixels; `words` say what it shows to those who cannot see it."""

    def __init__(self, width: float, height: float, words: str) -> None:
        self.width, self.height, self._words = width, height, words
        # The same id twice on a page is the first one's, and that may not be shown.
        self._hatch = f"hatch-{next(_NUMBERS)}"
        self._parts: list[Markup] = []

    def __html__(self) -> Markup:
        """The SVG, which templates take as it is."""
        return _SVG.format(width=_n(self.width), height=_n(self.height), words=visible(self._words, 300),
                           hatch=self._hatch, parts=Markup().join(self._parts))

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        """A rectangle of the classes `kind`; `title` shows where the pointer rests."""
        self._parts.append(_RECT.format(kind, _n(x), _n(y), _n(max(0, width)), _n(max(0, height)), _title(title)))

    def hatched(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """A rectangle filled with slanted lines."""
        self._parts.append(_HATCHED.format(self._hatch, _n(x), _n(y), _n(width), _n(height), _title(title)))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> None:
        """A straight line."""
        self._parts.append(_LINE.format(kind, _n(x1), _n(y1), _n(x2), _n(y2), _title(title)))

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points; of the class "area", closed and filled."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._parts.append((_AREA if "area" in kind.split() else _CURVE).format(kind, path))

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words whose baseline is at `y`; `x` is where they start, are centered ("middle") or end ("end")."""
        self._parts.append(_TEXT.format(kind, _n(x), _n(y), anchor, visible(words, 200)))


class Axis:
    """Maps 0 to `most` onto the pixels from `start` to `end`, which may run backwards."""

    def __init__(self, most: float, start: float, end: float) -> None:
        self.most, self.start, self.end = most or 1.0, start, end

    def at(self, value: float) -> float:
        """The pixel of a value; what lies outside is put on the edge."""
        part = min(1.0, max(0.0, value / self.most))
        return self.start + part * (self.end - self.start)

    def seconds(self, apart: float = 80) -> list[tuple[float, str]]:
        """Pixels and words of round numbers of seconds, at least `apart` pixels from each other."""
        step = _round(self._least(apart))
        places = max(0, -math.floor(math.log10(step)))
        return [(self.at(value), f"{value:.{places}f} s") for value in self._steps(step)]

    def bytes(self, apart: float = 32) -> list[tuple[float, str]]:
        """Pixels and words of round numbers of bytes, at least `apart` pixels from each other."""
        unit = next((size for size in (2**30, 2**20, 2**10) if self.most >= size), 1)
        return [(self.at(value), gib(round(value)).replace(".0 ", " ") if value else "0")
                for value in self._steps(_round(self._least(apart) / unit) * unit)]

    def _least(self, apart: float) -> float:
        return self.most * min(1.0, apart / abs(self.end - self.start))

    def _steps(self, step: float) -> list[float]:
        return [number * step for number in range(math.floor(self.most / step * 1.0001) + 1)]


def legend(drawing: Drawing, entries: Sequence[tuple[str, str, str]]) -> float:
    """Draw the key to a chart's colors and lines at its top, wrapped to its width; the height that it takes.

    An entry is a shape ("rect", "hatched", "line" or "mark"), the classes of it, and its words.
    """
    left, top = 0.0, 0.0
    for shape, kind, words in entries:
        taken = SWATCH + 6 + width_of(words) + 14
        if left > 0 and left + taken > drawing.width:
            left, top = 0.0, top + LEGEND_LINE
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
    return top + LEGEND_LINE


def width_of(words: str, size: float = SIZE) -> float:
    """About how many pixels words take, rather more than less."""
    return len(words) * size * LETTER


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _title(words: str) -> Markup:
    return _TITLE.format(visible(words, 300)) if words else Markup()


def _round(least: float) -> float:
    """The smallest of 1, 2, 5 and 10 times a power of ten that is no less than `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * 0.9999)
