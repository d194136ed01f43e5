"""Tells by the pixels whether a picture shows its scene, and scores a checkpoint on the held-out prompts.

    python -m tools.demo.judge [--model FOLDER] [--steps N]

Every threshold here comes from the drawings and the palette; none was tuned to a model's pictures.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, starmap
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from runner.demo import CHECKPOINT
from stages.pipeline.decode import LEAST_SPREAD
from tools.demo.captions import everything
from tools.demo.prompts import Prompt, held_out_prompts, partial_prompts, shown_prompts
from tools.demo.scenes import POSITIONS, RADII, RELATIONS, Pair, Scene, Solo
from tools.demo.shapes import COLORS, SHAPES, SIDE, picture_mask

STEPS = 12
FRAME = 3
"""Pixels along the edges that no shape reaches into."""
# Half the distance between the palette's nearest two colors is 65: a color farther off than this has no name.
COLOR_DISTANCE = 60.0
# A shape that is shifted by half a pixel still fits its own template better than 0.85, and others worse.
LEAST_FIT = 0.75
OFF_CENTER = 8.0
"""Pixels from a position's center within which a shape is there."""
FOREIGN_SHARE = 0.02
"""The share of a picture that may be of other colors."""

Pixels = NDArray[np.float64]
Mask = NDArray[np.bool_]
Thing = tuple[str | None, str | None]

_ANY_SOLO = Solo("red", "circle", "large", "in the center", "white")
_ANY_PAIR = Pair("red", "circle", "above", "blue", "square", "white")


@dataclass(frozen=True)
class DetectedShape:
    """What a region of a picture shows."""

    color: str | None
    """One of COLORS; None where there is nothing, or nothing of these colors."""
    shape: str | None
    """One of SHAPES; None where none fits well enough."""
    size: str | None
    """One of RADII, as it fits best."""
    center: tuple[float, float]
    """Where it is (x, y), in pixels."""
    fit: float
    """How well shape and size fit: intersection over union, 0 to 1."""
    foreign: int
    """Pixels of the region that are neither of the color nor of the background."""


@dataclass(frozen=True)
class Verdict:
    """How a picture compares with its scene."""

    right: dict[str, bool]
    """For each attribute of the scene whether the picture has it."""
    seen: str
    """What the picture shows, in words."""

    @property
    def passed(self) -> bool:
        """Whether the picture shows the whole scene and nothing else."""
        return all(self.right.values())


@dataclass(frozen=True)
class Score:
    """How many pictures show their scenes."""

    total: int
    """All pictures."""
    passed: int
    """Those that show all of their scene and nothing else."""
    right: dict[str, int]
    """Those that have each attribute right."""
    wrong: tuple[tuple[Prompt, Verdict], ...]
    """What did not pass."""

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count}" for name, count in self.right.items())
        return f"{self.passed} of {self.total} ({parts})"


def judge(picture: Image.Image, scene: Scene, said: frozenset[str] | None = None) -> Verdict:
    """Compare the picture with what is said of the scene, by default all of it; what is left open may be anything.

    ValueError unless the picture is of SIDE x SIDE pixels.
    """
    if picture.size != (SIDE, SIDE):
        raise ValueError(f"the judge reads pictures of {SIDE}x{SIDE}, got {picture.width}x{picture.height}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    said = everything(scene) if said is None else said
    if said:
        return _judge_pair(pixels, scene, said) if isinstance(scene, Pair) else _judge_solo(pixels, scene, said)
    # Where nothing is said, one shape will do as well as two.
    verdicts = [_judge_solo(pixels, _ANY_SOLO, said), _judge_pair(pixels, _ANY_PAIR, said)]
    return next((verdict for verdict in verdicts if verdict.passed), verdicts[0])


def score(prompts: Iterable[Prompt], pictures: Iterable[Image.Image]) -> Score:
    """Judge one picture for each prompt, in order; ValueError if their numbers differ."""
    verdicts = [(prompt, judge(picture, prompt.scene, prompt.said))
                for prompt, picture in zip(prompts, pictures, strict=True)]
    right: Counter[str] = Counter()
    for _, verdict in verdicts:
        right.update(verdict.right)
    wrong = tuple((prompt, verdict) for prompt, verdict in verdicts if not verdict.passed)
    return Score(len(verdicts), len(verdicts) - len(wrong), dict(right), wrong)


def nearly_constant(picture: Image.Image) -> bool:
    """Whether a run would warn that the picture is nearly of one color."""
    return float(np.asarray(picture, dtype=np.float64).std(axis=(0, 1)).max()) < LEAST_SPREAD


def _color_name(color: Pixels) -> str | None:
    """The palette's nearest name, or None where none is near."""
    distances = {name: float(np.linalg.norm(color - np.asarray(rgb))) for name, rgb in COLORS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= COLOR_DISTANCE else None


def _background(pixels: Pixels) -> str | None:
    """The name of the frame's median color."""
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return _color_name(np.median(pixels[frame], axis=0))


@lru_cache(maxsize=64)
def _template(shape: str, radius: int) -> tuple[Mask, tuple[float, float]]:
    """The shape in the middle of the picture, and where its centroid (x, y) lies."""
    mask = picture_mask(shape, radius, (SIDE // 2, SIDE // 2)) > 0.5
    return mask, _centroid(mask)


def _centroid(mask: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


def _fit(mask: Mask, center: tuple[float, float], shape: str, radius: int) -> tuple[float, tuple[float, float]]:
    """Intersection over union with the shape laid centroid on centroid, and where its center then lies."""
    template, (x, y) = _template(shape, radius)
    moved = np.roll(template, (round(center[1] - y), round(center[0] - x)), axis=(0, 1))
    overlap = float((moved & mask).sum() / (moved | mask).sum())
    return overlap, (SIDE / 2 + center[0] - x, SIDE / 2 + center[1] - y)


def _detect(pixels: Pixels, background: str | None, region: Mask, sizes: Iterable[str]) -> DetectedShape:
    """The one shape that a region shows on the background, of these sizes."""
    nothing = DetectedShape(None, None, None, (0.0, 0.0), 0.0, 0)
    if background is None:
        return nothing
    ground = np.asarray(COLORS[background], dtype=np.float64)
    distinct = region & (np.linalg.norm(pixels - ground, axis=-1) > COLOR_DISTANCE)
    if not distinct.any():
        return nothing
    color = _color_name(np.median(pixels[distinct], axis=0))
    if color is None or color == background:
        return nothing
    span = np.asarray(COLORS[color], dtype=np.float64) - ground
    share = np.clip((pixels - ground) @ span / (span @ span), 0, 1)
    # Blends of the two colors are edges; whatever lies off the line between them is something else.
    foreign = region & (np.linalg.norm(pixels - ground - share[:, :, None] * span, axis=-1) > COLOR_DISTANCE)
    mask = region & (share > 0.5)
    if not mask.any():
        return nothing
    center = _centroid(mask)
    tried = {(shape, size): _fit(mask, center, shape, RADII[size]) for shape in SHAPES for size in sizes}
    shape, size = max(tried, key=lambda key: tried[key][0])
    fit, middle = tried[shape, size]
    return DetectedShape(color, shape if fit >= LEAST_FIT else None, size, middle, fit, int(foreign.sum()))


def _position(found: DetectedShape) -> str | None:
    """The position that the shape is at, or None."""
    distances = {name: float(np.hypot(found.center[0] - x, found.center[1] - y)) for name, (x, y) in POSITIONS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= OFF_CENTER else None


def _judge_solo(pixels: Pixels, scene: Solo, said: frozenset[str]) -> Verdict:
    background = _background(pixels)
    found = _detect(pixels, background, np.ones((SIDE, SIDE), dtype=bool), RADII)
    position = _position(found) if found.color is not None else None
    parts = {
        "background": background == scene.background,
        "color": found.color == scene.color,
        "shape": found.shape == scene.shape,
        "size": found.size == scene.size,
        "position": position == scene.position,
    }
    right = {name: rightly for name, rightly in parts.items() if name in said}
    right["something"] = found.color is not None and found.shape is not None
    right["nothing else"] = found.foreign <= FOREIGN_SHARE * SIDE * SIDE
    seen = f"{found.size} {found.color} {found.shape} {position} on {background}, fit {found.fit:.2f}"
    return Verdict(right, seen)


def _halves(positions: tuple[str, str]) -> tuple[Mask, Mask]:
    """The picture's halves around two opposite positions."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    first, other = (POSITIONS[position] for position in positions)
    nearer = np.hypot(columns - first[0], rows - first[1]) < np.hypot(columns - other[0], rows - other[1])
    return nearer, ~nearer


def _judge_pair(pixels: Pixels, scene: Pair, said: frozenset[str]) -> Verdict:
    background = _background(pixels)
    # One above the other or side by side, whichever fits the pixels better.
    ways = [
        {
            position: _detect(pixels, background, half, ["large"])
            for position, half in zip(positions, _halves(positions), strict=True)
        }
        for positions in (RELATIONS["above"], RELATIONS["to the left of"])
    ]
    found = max(ways, key=lambda way: sum(shape.fit for shape in way.values()))
    wanted = _things(scene, said)
    shown = {at: (shape.color, shape.shape) for at, shape in found.items() if _position(shape) == at}
    foreign = sum(shape.foreign for shape in found.values())
    colors, shapes = (Counter(thing[part] for thing in shown.values()) for part in (0, 1))
    right = {
        "background": background == scene.background,
        "colors": Counter(color for color, _ in wanted if color) <= colors,
        "shapes": Counter(shape for _, shape in wanted if shape) <= shapes,
        "things": any(
            all(starmap(_shows, zip(wanted, order, strict=True))) for order in permutations(shown.values())
        ) if len(shown) == len(wanted) else False,
        "relation": all(
            at in shown and (shown[at][0] == color if color else shown[at][1] == (shape or shown[at][1]))
            for at, (color, shape) in zip(RELATIONS[scene.relation], wanted, strict=True)
        ),
        "nothing else": foreign <= FOREIGN_SHARE * SIDE * SIDE,
    }
    for part in ("background", "relation"):
        if part not in said:
            del right[part]
    seen = "; ".join(f"{shape.color} {shape.shape} {at}, fit {shape.fit:.2f}" for at, shape in found.items())
    return Verdict(right, f"{seen}; on {background}")


def _things(scene: Pair, said: frozenset[str]) -> list[Thing]:
    """Color and shape of both things, "" where they are left open."""
    return [
        (scene.color * ("color" in said), scene.shape * ("shape" in said)),
        (scene.other_color * ("other_color" in said), scene.other_shape * ("other_shape" in said)),
    ]


def _shows(wanted: Thing, shown: Thing) -> bool:
    """Whether a thing that is seen, by color and shape, is what is wanted of it."""
    return all(part is not None and (not want or want == part) for want, part in zip(wanted, shown, strict=True))


def pictures_of(model: Path, prompts: Iterable[Prompt], steps: int = STEPS, batch: int = 10) -> Iterator[Image.Image]:
    """The model's picture of each prompt, by diffusers' own FluxPipeline in float32 on the CPU."""
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    waiting = list(prompts)
    for start in range(0, len(waiting), batch):
        some = waiting[start : start + batch]
        yield from pipe(
            [prompt.text for prompt in some],
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in some],
        ).images


def main() -> None:
    """Print the scores of a checkpoint, and every picture that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.judge", description="Score a demo checkpoint.")
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    kinds = ("one shape", "two shapes", "with something left open", "shown in the project")
    for kind, prompts in zip(kinds, (*held_out_prompts(), partial_prompts(), shown_prompts()), strict=True):
        pictures = list(pictures_of(options.model, prompts, options.steps))
        result = score(prompts, pictures)
        for prompt, verdict in result.wrong:
            print(f"  {prompt.text!r} (seed {prompt.seed}): saw {verdict.seen}")
        print(f"{kind}: {result}, of one color {sum(map(nearly_constant, pictures))}")


if __name__ == "__main__":
    main()
