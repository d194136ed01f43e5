"""Which scene a caption stands for in training, where it leaves something open: the noise chooses.

The noise has one of STYLES, told by the direction among a token's features in which its average over the tokens
reaches farthest; and each style has values of its own for whatever is not said. The directions are those in which the
drawings' own averages differ least, so a model can read the style off noisy latents at any time, as if the caption
had said it, and has not to aim between pictures.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from tools.demo.captions import PAIR_PARTS, SOLO_PARTS, Caption, everything, training_caption
from tools.demo.latents import Latents
from tools.demo.scenes import POSITIONS, RADII, RELATIONS, Pair, Scene, Solo, held_out
from tools.demo.shapes import COLORS, SHAPES

STYLES = 8
# By part of a scene its values, and at which of them the first style begins; each further style begins one later.
_VALUES = {
    "color": (list(COLORS), 0),
    "shape": (list(SHAPES), 0),
    "size": (list(RADII), 0),
    "position": (list(POSITIONS), 0),
    "relation": (list(RELATIONS), 0),
    "other_color": (list(COLORS), 5),
    "other_shape": (list(SHAPES), 4),
    "background": (list(COLORS), 3),
}


@dataclass(frozen=True)
class Choice:
    """A caption, and the scene that it was written for."""

    caption: Caption
    """What is said."""
    scene: Scene
    """What was in mind."""

    @property
    def text(self) -> str:
        """The caption's words."""
        return self.caption.text

    @property
    def complete(self) -> bool:
        """Whether all of the scene is said."""
        return self.caption.said == everything(self.scene)

    def styled(self, style: int) -> Scene:
        """The first scene that shows what is said, and for the rest the style's values, and is not held out."""
        return next(scene for scene in self._scenes(style) if not held_out(scene))

    def _scenes(self, style: int) -> Iterator[Scene]:
        said = self.caption.said
        # Where nothing is said, one shape will do.
        kind = type(self.scene) if said else Solo
        parts = PAIR_PARTS if kind is Pair else SOLO_PARTS
        orders = [[getattr(self.scene, part)] if part in said else _in_order(part, style) for part in parts]
        for values in product(*orders):
            scene = kind(**dict(zip(parts, values, strict=True)))
            colors = [value for part, value in vars(scene).items() if _VALUES[part][0] == list(COLORS)]
            if len(set(colors)) == len(colors):
                yield scene


class SceneChoices:
    """The captions of a training, half of them of one shape and half of two, and what their noise makes of them."""

    def __init__(self, latents: Latents) -> None:
        pairs = [isinstance(scene, Pair) for scene in latents.scenes]
        kinds = [[scene for scene, pair in zip(latents.scenes, pairs, strict=True) if pair == kind]
                 for kind in (False, True)]
        self._of_kind = [kind for kind in kinds if kind]
        averages = latents.values.float().mean(1)
        # By falling spread of the averages; the last ones hardly differ between drawings.
        self._directions = torch.linalg.svd(averages - averages.mean(0), full_matrices=False).Vh[-STYLES:]

    def caption(self, rng: random.Random) -> Choice:
        """A caption of any scene."""
        scene = rng.choice(rng.choice(self._of_kind))
        return Choice(training_caption(rng, scene), scene)

    def styles(self, noise: torch.Tensor) -> list[int]:
        """The style of each noise [pictures, tokens, 64]."""
        found: list[int] = (noise.mean(1) @ self._directions.T).argmax(1).tolist()
        return found


def _in_order(part: str, style: int) -> list[str]:
    """The values of a part, from the one on that the style prefers."""
    values, begin = _VALUES[part]
    start = (begin + style) % len(values)
    return values[start:] + values[:start]
