"""The scenes that the demo checkpoint is trained on: what they show, their captions, and the held-out split."""

import random
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from PIL import Image

from tools.demo.shapes import COLORS, SHAPES, Pixels, paint, place

RADII = {"small": 15, "large": 27}
# Multiples of 16 px, the transformer's token: a shape looks the same to the model at every position.
POSITIONS = {
    "in the center": (64, 64),
    "on the left": (32, 64),
    "on the right": (96, 64),
    "at the top": (64, 32),
    "at the bottom": (64, 96),
}
RELATIONS = {
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
    "to the left of": ("on the left", "on the right"),
    "to the right of": ("on the right", "on the left"),
}
SOLO_CAPTIONS = (
    "a {size} {color} {shape} {position} on a {background} background",
    "{size} {color} {shape} {position}, {background} background",
    "a {color} {shape}, {size}, {position}, on {background}",
)
SOLO_LOOSE = (
    "a {color} {shape} on a {background} background",
    "a {size} {color} {shape} on a {background} background",
    "a {color} {shape} {position}",
    "a {size} {color} {shape}",
)
PAIR_CAPTIONS = (
    "a {color} {shape} {relation} a {other_color} {other_shape} on a {background} background",
    "{color} {shape} {relation} {other_color} {other_shape}, {background} background",
)
PAIR_LOOSE = ("a {color} {shape} {relation} a {other_color} {other_shape}",)
LOOSE_SHARE = 0.12
STOP_SHARE = 0.1
PAIR_SHARE = 0.5


@dataclass(frozen=True)
class Solo:
    """One shape on a background."""

    color: str
    shape: str
    size: str
    position: str
    background: str


@dataclass(frozen=True)
class Pair:
    """Two large shapes beside or over one another; `relation` says where the first is, seen from the other."""

    color: str
    shape: str
    relation: str
    other_color: str
    other_shape: str
    background: str


Scene = Solo | Pair


@dataclass(frozen=True)
class Prompt:
    """A held-out scene in words, with the seed that its picture is made from."""

    text: str
    seed: int
    scene: Scene


def layout(scene: Scene) -> list[tuple[str, str, int, tuple[int, int]]]:
    """What a scene shows: (color, shape, radius, center) of each thing, in the caption's order."""
    if isinstance(scene, Solo):
        return [(scene.color, scene.shape, RADII[scene.size], POSITIONS[scene.position])]
    first, other = (POSITIONS[spot] for spot in RELATIONS[scene.relation])
    radius = RADII["large"]
    return [(scene.color, scene.shape, radius, first), (scene.other_color, scene.other_shape, radius, other)]


def pixels_of(scene: Scene) -> Pixels:
    """The scene's drawing as pixels (SIDE, SIDE, 3), 0 to 255."""
    things = [(color, place(shape, radius, center)) for color, shape, radius, center in layout(scene)]
    return paint(scene.background, things)


def draw(scene: Scene) -> Image.Image:
    """The scene's drawing, the ground truth of its caption."""
    return Image.fromarray(pixels_of(scene).round().astype(np.uint8))


def captions(scene: Scene) -> tuple[str, ...]:
    """Every wording that names all that the scene shows."""
    return _worded(SOLO_CAPTIONS if isinstance(scene, Solo) else PAIR_CAPTIONS, scene)


def loose_captions(scene: Scene) -> tuple[str, ...]:
    """Every wording that leaves something of the scene open."""
    return _worded(SOLO_LOOSE if isinstance(scene, Solo) else PAIR_LOOSE, scene)


def _worded(templates: tuple[str, ...], scene: Scene) -> tuple[str, ...]:
    words: dict[str, Any] = vars(scene)
    return tuple(template.format(**words) for template in templates)


def mirrored(pair: Pair) -> Pair:
    """The same picture told from its other shape: "a below b" for "b above a"."""
    relation = next(name for name, spots in RELATIONS.items() if spots == RELATIONS[pair.relation][::-1])
    return Pair(pair.other_color, pair.other_shape, relation, pair.color, pair.shape, pair.background)


def held_out(scene: Scene) -> bool:
    """Whether the picture is kept from training, however it is told: one exact combination in ten, by checksum."""
    told = min(astuple(scene), astuple(mirrored(scene))) if isinstance(scene, Pair) else astuple(scene)
    return zlib.crc32("/".join(told).encode()) % 10 == 0


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


def training_scene(rng: random.Random) -> tuple[str, Scene]:
    """A scene that is not held out, and a caption of it."""
    scene: Scene
    while True:
        scene = random_pair(rng) if rng.random() < PAIR_SHARE else random_solo(rng)
        if not held_out(scene):
            break
    return training_caption(rng, scene), scene


def training_caption(rng: random.Random, scene: Scene) -> str:
    """Any wording of the scene, at times a loose one or one with a full stop."""
    wordings = loose_captions(scene) if rng.random() < LOOSE_SHARE else captions(scene)
    return rng.choice(wordings) + ("." if rng.random() < STOP_SHARE else "")


def exam_prompts(solos: int = 100, pairs: int = 50) -> tuple[list[Prompt], list[Prompt]]:
    """The fixed held-out prompts that the checkpoint is scored on: one-shape and two-shape."""
    return _held_out_prompts(random_solo, solos, 1000), _held_out_prompts(random_pair, pairs, 2000)


def _held_out_prompts(pick: Callable[[random.Random], Scene], count: int, first_seed: int) -> list[Prompt]:
    rng = random.Random(first_seed)
    scenes: dict[Scene, str] = {}
    while len(scenes) < count:
        scene = pick(rng)
        if held_out(scene) and scene not in scenes:
            scenes[scene] = rng.choice(captions(scene))
    return [Prompt(text, first_seed + i, scene) for i, (scene, text) in enumerate(scenes.items())]
