"""How the demo draws: its palette and its shapes, with smooth edges."""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 128
FINE = 8
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (245, 220, 50),
    "pink": (240, 110, 190),
    "cyan": (60, 205, 225),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}

Pixels = NDArray[np.float32]
Point = tuple[float, float]


def _circle(d: ImageDraw.ImageDraw, c: float, r: float) -> None:
    d.ellipse((c - r, c - r, c + r, c + r), fill=255)


def _ring(d: ImageDraw.ImageDraw, c: float, r: float) -> None:
    _circle(d, c, r)
    hole = r * 0.55
    d.ellipse((c - hole, c - hole, c + hole, c + hole), fill=0)


def _cross(d: ImageDraw.ImageDraw, c: float, r: float) -> None:
    arm = r * 0.34
    d.rectangle((c - arm, c - r, c + arm, c + r), fill=255)
    d.rectangle((c - r, c - arm, c + r, c + arm), fill=255)


def _heart(d: ImageDraw.ImageDraw, c: float, r: float) -> None:
    lobe = r * 1.06
    top = c - r * 0.85
    d.ellipse((c - r, top, c - r + lobe, top + lobe), fill=255)
    d.ellipse((c + r - lobe, top, c + r, top + lobe), fill=255)
    d.polygon([(c - r * 0.93, c - r * 0.08), (c, c - r * 0.3), (c + r * 0.93, c - r * 0.08), (c, c + r)], fill=255)


def _skeleton(d: ImageDraw.ImageDraw, c: float, r: float, *, corners: tuple[Point, ...]) -> None:
    d.polygon([(c + x * r, c + y * r) for x, y in corners], fill=255)


def _star_corners() -> tuple[Point, ...]:
    spokes = [(i * math.pi / 5, 0.42 if i % 2 else 1.0) for i in range(10)]
    return tuple((length * math.sin(turn), -length * math.cos(turn)) for turn, length in spokes)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, float, float], None]] = {
    "circle": _circle,
    "square": partial(_skeleton, corners=((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))),
    "triangle": partial(_skeleton, corners=((0, -1), (0.98, 0.8), (-0.98, 0.8))),
    "star": partial(_skeleton, corners=_star_corners()),
    "ring": _ring,
    "cross": _cross,
    "diamond": partial(_skeleton, corners=((0, -1), (0.72, 0), (0, 1), (-0.72, 0))),
    "heart": _heart,
}


@lru_cache(maxsize=512)
def stamp(shape: str, radius: int) -> Pixels:
    """The shape's coverage of each pixel, 0 to 1, in a square of 2 * radius + 4 pixels around its center."""
    side = 2 * radius + 4
    fine = Image.new("L", (side * FINE, side * FINE))
    SHAPES[shape](ImageDraw.Draw(fine), side * FINE / 2, radius * FINE)
    samples = np.asarray(fine, dtype=np.float32).reshape(side, FINE, side, FINE)
    coverage: Pixels = samples.mean((1, 3), dtype=np.float32) / np.float32(255)
    coverage.flags.writeable = False
    return coverage


def place(shape: str, radius: int, center: tuple[int, int]) -> Pixels:
    """The coverage of a whole picture, (SIDE, SIDE), by one shape that lies wholly inside it."""
    mark = stamp(shape, radius)
    left, top = center[0] - radius - 2, center[1] - radius - 2
    mask = np.zeros((SIDE, SIDE), dtype=np.float32)
    mask[top : top + mark.shape[0], left : left + mark.shape[1]] = mark
    return mask


def paint(background: str, things: list[tuple[str, Pixels]]) -> Pixels:
    """Pixels (SIDE, SIDE, 3), 0 to 255: each (color, coverage) laid over the background in turn."""
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    pixels[:] = COLORS[background]
    for color, mask in things:
        pixels += mask[:, :, None] * (np.asarray(COLORS[color], dtype=np.float32) - pixels)
    return pixels
