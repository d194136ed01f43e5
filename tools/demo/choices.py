"""Which scene a caption stands for in training, where it leaves something open: the one that the noise is most like."""

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
        flat = latents.values.flatten(1).float()
        self._directions = torch.nn.functional.normalize(flat - flat.mean(0), dim=1)

    def caption(self, rng: random.Random) -> Choice:
        """A caption of any scene."""
        at = rng.choice(rng.choice(self._of_kind))
        caption = training_caption(rng, self._scenes[at])
        return Choice(caption, at, caption.said == everything(self._scenes[at]))

    def nearest(self, noise: torch.Tensor, choices: Sequence[Choice]) -> list[int]:
        """For each caption the scene that it fits and that its noise [captions, tokens, 64] is most like."""
        left_open = [number for number, choice in enumerate(choices) if not choice.complete]
        likeness = noise[left_open].flatten(1) @ self._directions.T
        picks = [choice.at for choice in choices]
        for number, row in zip(left_open, likeness, strict=True):
            picks[number] = int(row.masked_fill(~self.fitting(choices[number]), -torch.inf).argmax())
        return picks

    def fitting(self, choice: Choice) -> torch.Tensor:
        """Which scenes show all that the caption says [scenes]; any scene where it says nothing."""
        scene = self._scenes[choice.at]
        fits = self._pairs == isinstance(scene, Pair) if choice.caption.said else torch.ones_like(self._pairs)
        for name in choice.caption.said:
            fits = fits & (self._codes[name] == self._code(scene, name))
        return fits

    def _code(self, scene: Scene, name: str) -> int:
        return self._words.index(getattr(scene, name)) if hasattr(scene, name) else -1
