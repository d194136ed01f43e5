"""The prompts that a checkpoint is scored on, none of them drawn or said in training."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo.captions import complete_captions, everything, held_out_text, partial_caption
from tools.demo.scenes import Scene, held_out, random_pair, random_solo

SEEDS = 3
"""Pictures of each prompt that leaves something open."""


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


def _complete_prompts(pick: Callable[[random.Random], Scene], count: int, first_seed: int) -> list[Prompt]:
    rng = random.Random(first_seed)
    scenes: dict[Scene, str] = {}
    while len(scenes) < count:
        scene = pick(rng)
        if held_out(scene) and scene not in scenes:
            scenes[scene] = rng.choice(complete_captions(scene))
    return [Prompt(text, first_seed + i, scene, everything(scene)) for i, (scene, text) in enumerate(scenes.items())]
