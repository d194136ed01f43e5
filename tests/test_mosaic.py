"""A preview stands under the progress line, where the terminal has the colors and the letter for it."""

import io

import numpy as np
import pytest
from rich.console import Console

from runner.reports.progress import HALF, Progress, mosaic


class Terminal(io.StringIO):
    """A stream that says that somebody watches."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


def halves() -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Red above blue."""
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:24, :, 0] = pixels[24:, :, 2] = 255
    return pixels


@pytest.mark.parametrize(("size", "columns", "lines"), [((48, 96), 32, 8), ((96, 48), 12, 12), ((8, 512), 32, 1)])
def test_a_mosaic_keeps_the_shape_and_stays_small(size: tuple[int, int], columns: int, lines: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    found = console.render_lines(mosaic(np.zeros((*size, 3), np.uint8)), pad=False)
    shown = ["".join(segment.text for segment in line) for line in found]
    assert [line for line in shown if line] == [HALF * columns] * lines


def test_a_letter_has_the_colors_of_two_pixels() -> None:
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor", width=80).print(mosaic(halves()[20:28, ::12]))
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m" in stream.getvalue()
    assert "\x1b[38;2;0;0;255;48;2;0;0;255m" in stream.getvalue()


@pytest.mark.parametrize(
    ("colors", "term", "encoding", "shown"),
    [("truecolor", "xterm-256color", "utf-8", True), ("", "xterm-256color", "utf-8", True),
     ("", "xterm", "utf-8", False), ("truecolor", "dumb", "utf-8", False),
     ("truecolor", "xterm-256color", "ascii", False)],
)
def test_a_preview_stands_under_the_line_where_the_terminal_can(
    monkeypatch: pytest.MonkeyPatch, colors: str, term: str, encoding: str, shown: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLORTERM": colors, "TERM": term, "COLUMNS": "100", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    stream = Terminal(encoding)
    with Progress(stream) as progress:
        # What stands there at the end is drawn once more, whenever the last time was.
        progress("stage", {"stage": "denoise", "requests": 1, "reused": 0})
        progress("preview", {"request": 0, "step": 2, "steps": 4, "pixels": halves})
    assert (HALF in stream.getvalue()) is shown


def test_a_preview_goes_when_its_stage_is_over() -> None:
    with Progress(Terminal("utf-8")) as progress:
        assert progress._preview is None
        progress("preview", {"request": 0, "step": 2, "steps": 4, "pixels": halves})
        assert progress._preview.shape == (48, 96, 3)
        progress("end", {"stage": "denoise", "seconds": {}, "peak": {}})
        assert progress._preview is None
