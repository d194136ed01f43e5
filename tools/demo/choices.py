"""Which scene a caption stands for in training, where it leaves something open: the noise chooses.

Each value of each part of a scene has a direction among a token's features, and the noise, averaged over its tokens,
prefers a value by how far it reaches in that direction. The directions are those in which the drawings' own averages
differ least, so a model can read the choice off noisy latents at any time, as if the caption had said it, and has not
to aim between pictures.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tools.demo.captions import PAIR_PARTS, SOLO_PARTS, Caption, everything, training_caption
from tools.demo.latents import Latents
from tools.demo.scenes import Pair, Scene


@dataclass(frozen=True)
class Choice:
    """A caption, and the scene that it was written for."""

    caption: Caption
    """What is said."""
    at: int
    """The number of the scene among all."""
    complete: bool
    """Whether all of the scene is said."""

    @property
    def text(self) -> str:
        """The caption's words."""
        return self.caption.text


class SceneChoices:
    """The scenes of a training, half of them chosen with one shape and half with two."""

    def __init__(self, latents: Latents) -> None:
        self._scenes = latents.scenes
        pairs = torch.tensor([isinstance(scene, Pair) for scene in latents.scenes])
        self._of_kind = [found.nonzero().flatten().tolist() for found in (~pairs, pairs) if bool(found.any())]
        self._words = sorted({word for scene in latents.scenes for word in vars(scene).values()})
        self._codes = {
            name: torch.tensor([self._code(scene, name) for scene in latents.scenes])
            for name in dict.fromkeys((*SOLO_PARTS, *PAIR_PARTS))
        }
        self._pairs = pairs
        values = sorted({(name, int(code)) for name, codes in self._codes.items() for code in codes if code >= 0})
        self._shown = torch.stack([self._codes[name] == code for name, code in values], 1).float()
        averages = latents.values.float().mean(1)
        # By falling spread of the averages; the last ones hardly differ between drawings.
        self._directions = torch.linalg.svd(averages - averages.mean(0), full_matrices=False).Vh[-len(values) :]

    def caption(self, rng: random.Random) -> Choice:
        """A caption of any scene."""
        at = rng.choice(rng.choice(self._of_kind))
        caption = training_caption(rng, self._scenes[at])
        return Choice(caption, at, caption.said == everything(self._scenes[at]))

    def chosen(self, noise: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
        """For each caption the scene that fits it and that its noise [captions, tokens, 64] chooses."""
        preferred = noise.mean(1) @ self._directions.T @ self._shown.T
        return [
            choice.at if choice.complete else int(row.masked_fill(~self.fitting(choice), -torch.inf).argmax())
            for choice, row in zip(choices, preferred, strict=True)
        ]

    def fitting(self, choice: Choice) -> torch.Tensor:
        """Which scenes show all that the caption says [scenes]; any scene where it says nothing."""
        scene = self._scenes[choice.at]
        fits = self._pairs == isinstance(scene, Pair) if choice.caption.said else torch.ones_like(self._pairs)
        for name in choice.caption.said:
            fits = fits & (self._codes[name] == self._code(scene, name))
        return fits

    def _code(self, scene: Scene, name: str) -> int:
        return self._words.index(getattr(scene, name)) if hasattr(scene, name) else -1
