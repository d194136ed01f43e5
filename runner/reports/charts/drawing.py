"""An SVG by hand: rectangles, lines, curves and words, with colors from classes of the style sheet."""

from collections.abc import Sequence
from itertools import count

from runner.reports.charts.style import STYLE
from runner.reports.markup import said

# A letter's width in the widest usual font, as a part of the font's size: labels are measured, not seen.
LETTER = 0.62
SIZE = 11

HATCH = ('<defs><pattern id="{}" width="6" height="6" patternUnits="userSpaceOnUse" '
         'patternTransform="rotate(45)"><rect class="hatched" width="6" height="6"/>'
         '<line class="hatching" x1="0" y1="0" x2="0" y2="6"/></pattern></defs>')

_NUMBERS = count()


class Drawing:
    """A picture of `width` by `height` pixels; `words` say what it shows to those who cannot see it."""

    def __init__(self, width: float, height: float, words: str) -> None:
        self.width, self.height, self._words = width, height, words
        # The same id twice on a page is the first one's, and that may not be shown.
        self._hatch = f"hatch-{next(_NUMBERS)}"
        self._parts: list[str] = []

    def __str__(self) -> str:
        width, height = _n(self.width), _n(self.height)
        return (f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
                f'aria-label="{said(self._words, 300)}">{HATCH.format(self._hatch)}'
                f'{"".join(self._parts)}</svg>')

    def _repr_html_(self) -> str:
        return f'<style>{STYLE}</style><div class="stagerun">{self}</div>'

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        """A rectangle of the classes `kind`; `title` shows where the pointer rests."""
        self._parts.append(f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(max(0, width))}" '
                           f'height="{_n(max(0, height))}">{_title(title)}</rect>')

    def hatched(self, x: float, y: float, width: float, height: float, title: str) -> None:
        """A rectangle filled with slanted lines."""
        self._parts.append(f'<rect class="reserve" fill="url(#{self._hatch})" x="{_n(x)}" y="{_n(y)}" '
                           f'width="{_n(width)}" height="{_n(height)}">{_title(title)}</rect>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> None:
        """A straight line."""
        self._parts.append(f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}">'
                           f"{_title(title)}</line>")

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points; of the class "area", closed and filled."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        tag = "polygon" if "area" in kind.split() else "polyline"
        self._parts.append(f'<{tag} class="{kind}" points="{path}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start", title: str = "") -> None:
        """Words whose baseline is at `y`; `x` is where they start, are centered ("middle") or end ("end")."""
        self._parts.append(f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{said(words, 200)}'
                           f"{_title(title)}</text>")


def wide(words: str, size: float = SIZE) -> float:
    """About how many pixels words take, rather more than less."""
    return len(words) * size * LETTER


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _title(words: str) -> str:
    return f"<title>{said(words, 300)}</title>" if words else ""
