"""Tells by the pixels whether a picture shows its scene, and scores a checkpoint on the held-out prompts.

    python -m tools.demo.judge [--model FOLDER] [--steps N]

Every threshold here comes from the drawings and the palette; none was tuned to a model's pictures.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runner.demo import CHECKPOINT
from tools.demo.scenes import POSITIONS, RADII, RELATIONS, Pair, Prompt, Scene, Solo, exam_prompts
from tools.demo.shapes import COLORS, SHAPES, SIDE, place

STEPS = 12
FRAME = 3
# Half the distance between the palette's nearest two colors is 65: a color farther off than this has no name.
COLOR_REACH = 60.0
# A shape that is shifted by half a pixel still fits its own template better than 0.85, and others worse.
FIT = 0.75
OFF_CENTER = 8.0
FOREIGN = 0.02

Pixels = NDArray[np.float64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Thing:
    """What the judge reads in one region: names, or None where nothing fits; `center` (x, y) in pixels."""

    color: str | None
    shape: str | None
    size: str | None
    center: tuple[float, float]
    fit: float
    foreign: int


@dataclass(frozen=True)
class Verdict:
    """Which attributes of the scene the picture shows rightly."""

    right: dict[str, bool]
    seen: str

    @property
    def passed(self) -> bool:
        """Whether the picture shows the whole scene and nothing else."""
        return all(self.right.values())


@dataclass(frozen=True)
class Score:
    """How many of `of` pictures passed, and how many were right in each attribute."""

    of: int
    passed: int
    right: dict[str, int]
    wrong: tuple[tuple[Prompt, Verdict], ...]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {count}" for name, count in self.right.items())
        return f"{self.passed} of {self.of} ({parts})"


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Read the picture and hold it against the scene; ValueError unless it is SIDE x SIDE."""
    if picture.size != (SIDE, SIDE):
        raise ValueError(f"the judge reads pictures of {SIDE}x{SIDE}, got {picture.width}x{picture.height}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    return _judge_pair(pixels, scene) if isinstance(scene, Pair) else _judge_solo(pixels, scene)


def score(prompts: Iterable[Prompt], pictures: Iterable[Image.Image]) -> Score:
    """Judge one picture for each prompt, in order; ValueError if their numbers differ."""
    verdicts = [(prompt, judge(picture, prompt.scene)) for prompt, picture in zip(prompts, pictures, strict=True)]
    right: Counter[str] = Counter()
    for _, verdict in verdicts:
        right.update(verdict.right)
    wrong = tuple((prompt, verdict) for prompt, verdict in verdicts if not verdict.passed)
    return Score(len(verdicts), len(verdicts) - len(wrong), dict(right), wrong)


def _name(color: Pixels) -> str | None:
    """The palette's nearest name, or None where none is near."""
    far = {name: float(np.linalg.norm(color - np.asarray(rgb))) for name, rgb in COLORS.items()}
    nearest = min(far, key=lambda name: far[name])
    return nearest if far[nearest] <= COLOR_REACH else None


def _background(pixels: Pixels) -> str | None:
    """The name of the frame's median color: no shape reaches into the frame."""
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return _name(np.median(pixels[frame], axis=0))


@lru_cache(maxsize=64)
def _template(shape: str, radius: int) -> tuple[Marks, tuple[float, float]]:
    """The shape in the middle of the picture, and where its centroid (x, y) lies."""
    marks = place(shape, radius, (SIDE // 2, SIDE // 2)) > 0.5
    return marks, _centroid(marks)


def _centroid(marks: Marks) -> tuple[float, float]:
    rows, columns = np.nonzero(marks)
    return float(columns.mean()), float(rows.mean())


def _fit(marks: Marks, center: tuple[float, float], shape: str, radius: int) -> tuple[float, tuple[float, float]]:
    """Intersection over union with the shape laid centroid on centroid, and where its center then lies."""
    template, (x, y) = _template(shape, radius)
    moved = np.roll(template, (round(center[1] - y), round(center[0] - x)), axis=(0, 1))
    overlap = float((moved & marks).sum() / (moved | marks).sum())
    return overlap, (SIDE / 2 + center[0] - x, SIDE / 2 + center[1] - y)


def _read(pixels: Pixels, background: str | None, region: Marks, sizes: Iterable[str]) -> Thing:
    """The one thing that a region shows against the background."""
    nothing = Thing(None, None, None, (0.0, 0.0), 0.0, 0)
    if background is None:
        return nothing
    ground = np.asarray(COLORS[background], dtype=np.float64)
    raised = region & (np.linalg.norm(pixels - ground, axis=-1) > COLOR_REACH)
    if not raised.any():
        return nothing
    color = _name(np.median(pixels[raised], axis=0))
    if color is None or color == background:
        return nothing
    span = np.asarray(COLORS[color], dtype=np.float64) - ground
    share = np.clip((pixels - ground) @ span / (span @ span), 0, 1)
    # Blends of the two colors are edges; whatever lies off the line between them is something else.
    foreign = region & (np.linalg.norm(pixels - ground - share[:, :, None] * span, axis=-1) > COLOR_REACH)
    marks = region & (share > 0.5)
    if not marks.any():
        return nothing
    center = _centroid(marks)
    tried = {(shape, size): _fit(marks, center, shape, RADII[size]) for shape in SHAPES for size in sizes}
    shape, size = max(tried, key=lambda key: tried[key][0])
    fit, middle = tried[shape, size]
    return Thing(color, shape if fit >= FIT else None, size, middle, fit, int(foreign.sum()))


def _spot(thing: Thing) -> str | None:
    """The position whose center the thing's lies on, or None."""
    off = {name: float(np.hypot(thing.center[0] - x, thing.center[1] - y)) for name, (x, y) in POSITIONS.items()}
    nearest = min(off, key=lambda name: off[name])
    return nearest if off[nearest] <= OFF_CENTER else None


def _judge_solo(pixels: Pixels, scene: Solo) -> Verdict:
    background = _background(pixels)
    thing = _read(pixels, background, np.ones((SIDE, SIDE), dtype=bool), RADII)
    right = {
        "background": background == scene.background,
        "color": thing.color == scene.color,
        "shape": thing.shape == scene.shape,
        "size": thing.size == scene.size,
        "position": thing.color is not None and _spot(thing) == scene.position,
        "nothing else": thing.foreign <= FOREIGN * SIDE * SIDE,
    }
    seen = f"{thing.size} {thing.color} {thing.shape} {_spot(thing)} on {background}, fit {thing.fit:.2f}"
    return Verdict(right, seen)


def _halves(spots: tuple[str, str]) -> tuple[Marks, Marks]:
    """The picture's halves around two opposite positions."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    first, other = (POSITIONS[spot] for spot in spots)
    nearer = np.hypot(columns - first[0], rows - first[1]) < np.hypot(columns - other[0], rows - other[1])
    return nearer, ~nearer


def _judge_pair(pixels: Pixels, scene: Pair) -> Verdict:
    background = _background(pixels)
    readings = {}
    for spots in (RELATIONS["above"], RELATIONS["to the left of"]):
        halves = _halves(spots)
        readings[spots] = dict(
            zip(spots, (_read(pixels, background, half, ["large"]) for half in halves), strict=True)
        )
    found = max(readings.values(), key=lambda reading: sum(thing.fit for thing in reading.values()))
    first, other = RELATIONS[scene.relation]
    wanted = {first: (scene.color, scene.shape), other: (scene.other_color, scene.other_shape)}
    shown = {spot: (thing.color, thing.shape) for spot, thing in found.items() if _spot(thing) == spot}
    foreign = sum(thing.foreign for thing in found.values())
    right = {
        "background": background == scene.background,
        "colors": Counter(color for color, _ in shown.values()) == Counter(color for color, _ in wanted.values()),
        "shapes": Counter(shape for _, shape in shown.values()) == Counter(shape for _, shape in wanted.values()),
        "things": Counter(shown.values()) == Counter(wanted.values()),
        "relation": {spot: color for spot, (color, _) in shown.items()}
        == {spot: color for spot, (color, _) in wanted.items()},
        "nothing else": foreign <= FOREIGN * SIDE * SIDE,
    }
    seen = "; ".join(f"{thing.color} {thing.shape} {spot}, fit {thing.fit:.2f}" for spot, thing in found.items())
    return Verdict(right, f"{seen}; on {background}")


def pictures_of(model: Path, prompts: Iterable[Prompt], steps: int = STEPS, batch: int = 10) -> Iterator[Image.Image]:
    """The model's picture of each prompt, by diffusers' own FluxPipeline in float32 on the CPU."""
    import torch
    from diffusers import FluxPipeline

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
    for kind, prompts in zip(("one shape", "two shapes"), exam_prompts(), strict=True):
        result = score(prompts, pictures_of(options.model, prompts, options.steps))
        for prompt, verdict in result.wrong:
            print(f"  {prompt.text!r} (seed {prompt.seed}): saw {verdict.seen}")
        print(f"{kind}: {result}")


if __name__ == "__main__":
    main()
