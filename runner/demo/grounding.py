"""A side task for the text encoder: to say of each thing that a caption names its color, its shape and its place.

Without it "a red circle above a blue square" stays a bag of words for very long: the pictures have both colors and
both shapes, in any order.
"""

import random

import torch
from torch.nn import functional
from transformers import T5Tokenizer

from runner.demo.scenes import POSITIONS, RELATIONS, Scene, Solo, training_scene
from runner.demo.shapes import COLORS, SHAPES
from runner.demo.text import T5_WIDTH, TEXT_TOKENS

CAPTIONS = 128
KINDS = (tuple(COLORS), tuple(SHAPES), tuple(POSITIONS))
UNSAID = -100


class Grounding(torch.nn.Module):
    """Reads color, shape and place of a thing off the embedding of each word that names it."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(T5_WIDTH, len(kinds)) for kinds in KINDS)
        self._tokenizer = tokenizer
        self._colors, self._shapes = (frozenset(_token(tokenizer, word) for word in kinds) for kinds in KINDS[:2])

    def loss(self, t5: torch.nn.Module, rng: random.Random, device: torch.device) -> torch.Tensor:
        """The cross-entropy over all named things of a batch of captions of scenes that are not held out."""
        told = [training_scene(rng) for _ in range(CAPTIONS)]
        ids = self._tokenizer([text for text, _ in told], padding="max_length", max_length=TEXT_TOKENS,
                              return_tensors="pt").input_ids
        answers = torch.stack([self.answers(row, text, scene)
                               for row, (text, scene) in zip(ids.tolist(), told, strict=True)]).to(device)
        hidden: torch.Tensor = t5(ids.to(device))[0]
        losses = [functional.cross_entropy(head(hidden).flatten(0, 1), answers[..., kind].flatten(),
                                           ignore_index=UNSAID) for kind, head in enumerate(self.heads)]
        return torch.stack(losses).mean()

    def answers(self, ids: list[int], text: str, scene: Scene) -> torch.Tensor:
        """Color, shape and place (tokens, 3) of the thing that each token names; UNSAID for all others."""
        things = named(text, scene)
        found = torch.full((len(ids), len(KINDS)), UNSAID)
        for vocabulary in (self._colors, self._shapes):
            spots = [spot for spot, token in enumerate(ids) if token in vocabulary]
            # The color after those of the things is the background's.
            for spot, thing in zip(spots, things, strict=False):
                found[spot] = torch.tensor(thing)
        return found


def named(text: str, scene: Scene) -> list[tuple[int, int, int]]:
    """Color, shape and place of each thing in the caption's order, as numbers; UNSAID for a place left open."""
    colors, shapes, places = (list(kinds) for kinds in KINDS)
    if isinstance(scene, Solo):
        place = places.index(scene.position) if scene.position in text else UNSAID
        return [(colors.index(scene.color), shapes.index(scene.shape), place)]
    first, other = (places.index(place) for place in RELATIONS[scene.relation])
    return [(colors.index(scene.color), shapes.index(scene.shape), first),
            (colors.index(scene.other_color), shapes.index(scene.other_shape), other)]


def _token(tokenizer: T5Tokenizer, word: str) -> int:
    token: int = tokenizer(word).input_ids[0]
    return token
