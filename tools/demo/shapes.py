"""How the demo draws: its palette and its shapes, with smooth edges."""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 128
"""Pixels along each side of a drawing."""
SUPERSAMPLING = 8
"""Shapes are drawn this many times larger, and averaged, for smooth edges."""
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
"""The palette: red, green and blue, 0 to 255."""

Pixels = NDArray[np.float32]
Point = tuple[float, float]
Draw = ImageDraw.ImageDraw


def _circle(draw: Draw, c: float, r: float) -> None:
    draw.ellipse((c - r, c - r, c + r, c + r), fill=255)


def _ring(draw: Draw, c: float, r: float) -> None:
    _circle(draw, c, r)
    hole = r * 0.55
    draw.ellipse((c - hole, c - hole, c + hole, c + hole), fill=0)


def _cross(draw: Draw, c: float, r: float) -> None:
    arm = r * 0.34
    draw.rectangle((c - arm, c - r, c + arm, c + r), fill=255)
    draw.rectangle((c - r, c - arm, c + r, c + arm), fill=255)


def _heart(draw: Draw, c: float, r: float) -> None:
    lobe = r * 1.06
    top = c - r * 0.85
    draw.ellipse((c - r, top, c - r + lobe, top + lobe), fill=255)
    draw.ellipse((c + r - lobe, top, c + r, top + lobe), fill=255)
    draw.polygon([(c - r * 0.93, c - r * 0.08), (c, c - r * 0.3), (c + r * 0.93, c - r * 0.08), (c, c + r)], fill=255)


def _polygon(draw: Draw, c: float, r: float, *, corners: tuple[Point, ...]) -> None:
    draw.polygon([(c + x * r, c + y * r) for x, y in corners], fill=255)


def _star_corners() -> tuple[Point, ...]:
    spokes = [(i * math.pi / 5, 0.42 if i % 2 else 1.0) for i in range(10)]
    return tuple((length * math.sin(angle), -length * math.cos(angle)) for angle, length in spokes)


SHAPES: dict[str, Callable[[Draw, float, float], None]] = {
    "circle": _circle,
    "square": partial(_polygon, corners=((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))),
    "triangle": partial(_polygon, corners=((0, -1), (0.98, 0.8), (-0.98, 0.8))),
    "star": partial(_polygon, corners=_star_corners()),
    "ring": _ring,
    "cross": _cross,
    "diamond": partial(_polygon, corners=((0, -1), (0.72, 0), (0, 1), (-0.72, 0))),
    "heart": _heart,
}
"""What draws each shape in white: around the point (center, center), as far as the radius reaches."""


@lru_cache(maxsize=512)
def shape_mask(shape: str, radius: int) -> Pixels:
    """The shape's coverage of each pixel, 0 to 1, in a square of 2 * radius + 4 pixels around its center."""
    side = 2 * radius + 4
    fine = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    SHAPES[shape](ImageDraw.Draw(fine), side * SUPERSAMPLING / 2, radius * SUPERSAMPLING)
    samples = np.asarray(fine, dtype=np.float32).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
    coverage: Pixels = samples.mean((1, 3), dtype=np.float32) / np.float32(255)
    coverage.flags.writeable = False
    return coverage


def picture_mask(shape: str, radius: int, center: tuple[int, int]) -> Pixels:
    """The coverage of a whole picture, [SIDE, SIDE], by one shape that lies wholly inside it."""
    mask = shape_mask(shape, radius)
    left, top = center[0] - radius - 2, center[1] - radius - 2
    picture = np.zeros((SIDE, SIDE), dtype=np.float32)
    picture[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return picture


def paint(background: str, things: list[tuple[str, Pixels]]) -> Pixels:
    """Pixels [SIDE, SIDE, 3], 0 to 255: each thing's color laid over the background by its coverage, in turn."""
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    pixels[:] = COLORS[background]
    for color, mask in things:
        pixels += mask[:, :, None] * (np.asarray(COLORS[color], dtype=np.float32) - pixels)
    return pixels
