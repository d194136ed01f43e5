"""A rough picture in a terminal: every letter is two pixels, one above the other."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segments

COLUMNS, ROWS = 32, 12
# The upper half of a letter's place in its own color, and the lower half in that of the background.
HALF = "\u2580"


def can_show(console: "Console") -> bool:
    """Whether a terminal has the letter, colors enough, and room for the picture and some lines."""
    return console.color_system in ("truecolor", "256") and sayable(console.encoding) and console.height > ROWS + 8


def sayable(encoding: str) -> bool:
    """Whether an encoding has the letter."""
    return HALF.encode(encoding, "ignore").decode(encoding) == HALF


def mosaic(pixels: Any) -> "Segments":
    """Pixels, uint8 [height, width, 3], as at most 32 columns and 12 lines of letters."""
    from PIL import Image
    from rich.color import Color
    from rich.segment import Segment, Segments
    from rich.style import Style

    picture = Image.fromarray(pixels)
    scale = min(COLUMNS / picture.width, 2 * ROWS / picture.height)
    width, lines = max(1, round(picture.width * scale)), max(1, round(picture.height * scale / 2))
    colors = picture.resize((width, 2 * lines), Image.Resampling.BOX).load()
    assert colors is not None
    found = []
    for line in range(lines):
        for column in range(width):
            upper, lower = (Color.from_rgb(*colors[column, 2 * line + half]) for half in (0, 1))  # type: ignore[misc]
            found.append(Segment(HALF, Style(color=upper, bgcolor=lower)))
        found.append(Segment.line())
    return Segments(found)
