"""The prompts that a checkpoint is scored on, none of them drawn or said in training."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo.captions import complete_captions, everything, held_out_text, partial_caption
from tools.demo.scenes import Pair, Scene, Solo, held_out, random_pair, random_solo

SEEDS = 3
"""Pictures of each prompt that leaves something open."""


# What README, docs, notebooks and messages ask of the demo: what is said of which scene, by default all of it.
SHOWN: dict[str, tuple[Scene, frozenset[str] | None]] = {
    "a large red circle on the left on a blue background": (
        Solo("red", "circle", "large", "on the left", "blue"), None),
    "a large green heart on the right on a white background": (
        Solo("green", "heart", "large", "on the right", "white"), None),
    "a large white cross in the center on a red background": (
        Solo("white", "cross", "large", "in the center", "red"), None),
    "a large yellow ring in the center on a black background": (
        Solo("yellow", "ring", "large", "in the center", "black"), None),
    "a large black circle at the top on a yellow background": (
        Solo("black", "circle", "large", "at the top", "yellow"), None),
    "a small green star in the center on a white background": (
        Solo("green", "star", "small", "in the center", "white"), None),
    "a small green square at the top on a white background": (
        Solo("green", "square", "small", "at the top", "white"), None),
    "a small cyan star on the left on a black background": (
        Solo("cyan", "star", "small", "on the left", "black"), None),
    "a white cross below a yellow triangle on a red background": (
        Pair("white", "cross", "below", "yellow", "triangle", "red"), None),
    "a red circle above a blue square on a white background": (
        Pair("red", "circle", "above", "blue", "square", "white"), None),
    "a green heart to the left of a pink star on a black background": (
        Pair("green", "heart", "to the left of", "pink", "star", "black"), None),
    "a blue diamond to the right of a cyan ring on a yellow background": (
        Pair("blue", "diamond", "to the right of", "cyan", "ring", "yellow"), None),
    "a small red circle on the left on a white background": (
        Solo("red", "circle", "small", "on the left", "white"), None),
    "large green star at the top, black background": (Solo("green", "star", "large", "at the top", "black"), None),
    "a yellow heart, small, in the center, on blue": (Solo("yellow", "heart", "small", "in the center", "blue"), None),
    "pink ring to the left of black cross, cyan background": (
        Pair("pink", "ring", "to the left of", "black", "cross", "cyan"), None),
    "a red circle on a blue background": (
        Solo("red", "circle", "large", "in the center", "blue"), frozenset({"color", "shape", "background"})),
    "a red circle": (Solo("red", "circle", "large", "in the center", "blue"), frozenset({"color", "shape"})),
}


@dataclass(frozen=True)
class Prompt:
    """Words to make a picture of, and what it should show."""

    text: str
    """A caption of the scene."""
    seed: int
    """What the picture's noise is drawn from."""
    scene: Scene
    """What the picture should show."""
    said: frozenset[str]
    """The parts of the scene that the words tell; the others are the seed's."""


def held_out_prompts(solos: int = 100, pairs: int = 50) -> tuple[list[Prompt], list[Prompt]]:
    """Complete captions of scenes that are never drawn in training, always the same: of one shape, and of two."""
    return _complete_prompts(random_solo, solos, 1000), _complete_prompts(random_pair, pairs, 2000)


def partial_prompts(count: int = 200) -> list[Prompt]:
    """Captions that leave something open and are never said in training, always the same, SEEDS of each in turn."""
    rng = random.Random(3000)
    captions: dict[str, Prompt] = {}
    while len(captions) < count:
        scene = random_pair(rng) if len(captions) % 4 == 3 else random_solo(rng)
        caption = partial_caption(rng, scene)
        if held_out(scene) and held_out_text(caption.text) and caption.text not in captions:
            captions[caption.text] = Prompt(caption.text, 0, scene, caption.said)
    return [
        Prompt(prompt.text, 3000 + SEEDS * index + seed, prompt.scene, prompt.said)
        for index, prompt in enumerate(captions.values())
        for seed in range(SEEDS)
    ]


def shown_prompts() -> list[Prompt]:
    """What the project itself asks of the demo, SEEDS of each in turn."""
    return [
        Prompt(text, 4000 + SEEDS * index + seed, scene, everything(scene) if said is None else said)
        for index, (text, (scene, said)) in enumerate(SHOWN.items())
        for seed in range(SEEDS)
    ]


def _complete_prompts(pick: Callable[[random.Random], Scene], count: int, first_seed: int) -> list[Prompt]:
    rng = random.Random(first_seed)
    scenes: dict[Scene, str] = {}
    while len(scenes) < count:
        scene = pick(rng)
        if held_out(scene) and scene not in scenes:
            scenes[scene] = rng.choice(complete_captions(scene))
    return [Prompt(text, first_seed + i, scene, everything(scene)) for i, (scene, text) in enumerate(scenes.items())]
