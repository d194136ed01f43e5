"""The scenes that the demo checkpoint is trained on: what they show, their captions, and the held-out split."""

import random
import zlib
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image

from tools.demo.shapes import COLORS, SHAPES, Pixels, paint, picture_mask

RADII = {"small": 15, "large": 27}
"""How far a shape of each size reaches from its center, in pixels."""
# Multiples of 16 px, the transformer's token: a shape looks the same to the model at every position.
POSITIONS = {
    "in the center": (64, 64),
    "on the left": (32, 64),
    "on the right": (96, 64),
    "at the top": (64, 32),
    "at the bottom": (64, 96),
}
"""Where the center (x, y) of a shape lies at each position, in pixels."""
RELATIONS = {
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
    "to the left of": ("on the left", "on the right"),
    "to the right of": ("on the right", "on the left"),
}
"""The positions of the first shape of a pair and of the other."""
PAIR_SHARE = 0.5


@dataclass(frozen=True)
class Solo:
    """One shape on a background."""

    color: str
    """One of COLORS."""
    shape: str
    """One of SHAPES."""
    size: str
    """One of RADII."""
    position: str
    """One of POSITIONS."""
    background: str
    """Another one of COLORS."""


@dataclass(frozen=True)
class Pair:
    """Two large shapes, one beside or over the other."""

    color: str
    """One of COLORS."""
    shape: str
    """One of SHAPES."""
    relation: str
    """One of RELATIONS: where the first shape is, seen from the other."""
    other_color: str
    """Another one of COLORS."""
    other_shape: str
    """One of SHAPES, the same or another."""
    background: str
    """A third one of COLORS."""


Scene = Solo | Pair


@dataclass(frozen=True)
class PlacedShape:
    """A shape as it is drawn."""

    color: str
    """One of COLORS."""
    shape: str
    """One of SHAPES."""
    radius: int
    """How far it reaches from its center, in pixels."""
    center: tuple[int, int]
    """Where it is (x, y), in pixels."""

    def mask(self) -> Pixels:
        """Its coverage of the picture: [SIDE, SIDE], 0 to 1."""
        return picture_mask(self.shape, self.radius, self.center)


def layout(scene: Scene) -> list[PlacedShape]:
    """The shapes of a scene, in the caption's order."""
    if isinstance(scene, Solo):
        return [PlacedShape(scene.color, scene.shape, RADII[scene.size], POSITIONS[scene.position])]
    first, other = (POSITIONS[position] for position in RELATIONS[scene.relation])
    radius = RADII["large"]
    return [
        PlacedShape(scene.color, scene.shape, radius, first),
        PlacedShape(scene.other_color, scene.other_shape, radius, other),
    ]


def pixels_of(scene: Scene) -> Pixels:
    """The scene's drawing: [SIDE, SIDE, 3], 0 to 255."""
    return paint(scene.background, [(placed.color, placed.mask()) for placed in layout(scene)])


def draw(scene: Scene) -> Image.Image:
    """The scene's drawing as a picture."""
    return Image.fromarray(pixels_of(scene).round().astype(np.uint8))


def mirrored(pair: Pair) -> Pair:
    """The same picture described from its other shape: "a below b" for "b above a"."""
    opposite = RELATIONS[pair.relation][::-1]
    relation = next(name for name, positions in RELATIONS.items() if positions == opposite)
    return Pair(pair.other_color, pair.other_shape, relation, pair.color, pair.shape, pair.background)


def held_out(scene: Scene) -> bool:
    """Whether the picture is kept from training, however it is described: one combination in ten, by checksum."""
    words = min(astuple(scene), astuple(mirrored(scene))) if isinstance(scene, Pair) else astuple(scene)
    return zlib.crc32("/".join(words).encode()) % 10 == 0


def every_solo() -> list[Solo]:
    """All one-shape scenes, held out or not."""
    return [
        Solo(color, shape, size, position, background)
        for color in COLORS
        for shape in SHAPES
        for size in RADII
        for position in POSITIONS
        for background in COLORS
        if background != color
    ]


def random_solo(rng: random.Random) -> Solo:
    """Any one-shape scene, held out or not."""
    background, color = rng.sample(list(COLORS), 2)
    return Solo(color, rng.choice(list(SHAPES)), rng.choice(list(RADII)), rng.choice(list(POSITIONS)), background)


def random_pair(rng: random.Random) -> Pair:
    """Any two-shape scene, held out or not; its three colors differ."""
    background, color, other_color = rng.sample(list(COLORS), 3)
    shapes = list(SHAPES)
    relation = rng.choice(list(RELATIONS))
    return Pair(color, rng.choice(shapes), relation, other_color, rng.choice(shapes), background)


def training_scene(rng: random.Random) -> Scene:
    """A scene that is not held out, as often of one shape as of two."""
    while True:
        scene = random_pair(rng) if rng.random() < PAIR_SHARE else random_solo(rng)
        if not held_out(scene):
            return scene
