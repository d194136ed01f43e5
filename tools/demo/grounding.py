"""The text encoder's own training: to know of each word that names a thing the thing's color, shape and place.

FLUX gives its text tokens no position, so only T5 can tell the transformer which color goes with which shape, and
where. Learnt from pictures alone, "a red circle above a blue square" stays a bag of words for very long.
"""

import random
from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import T5EncoderModel, T5Tokenizer

from tools.demo.phase import Phase
from tools.demo.scenes import POSITIONS, RELATIONS, Pair, Scene, training_scene
from tools.demo.shapes import COLORS, SHAPES
from tools.demo.text import T5_WIDTH, TEXT_TOKENS, position_bias

BATCH = 64
PEAK = 3e-3
BACKGROUND = "behind all"
CLASSES = (tuple(COLORS), tuple(SHAPES), (*POSITIONS, BACKGROUND))
"""What each of the three heads tells apart."""
# A label that is not asked for, as cross_entropy passes it over.
IGNORED = -100
# Noise on what the heads read, so that the labels stand out of the embeddings as clearly as the words do.
NOISE = 0.5

Labels = tuple[int, int, int]
"""Color, shape and place, each as the index of a class."""


class Grounding(torch.nn.Module):
    """Heads that read color, shape and place of a thing off the embedding of each word that names it."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(T5_WIDTH, len(classes)) for classes in CLASSES)
        self._tokenizer = tokenizer
        self._colors, self._shapes = (
            {tokenizer(word).input_ids[0]: word for word in classes} for classes in CLASSES[:2]
        )

    def loss(self, t5: T5EncoderModel, rng: random.Random, device: torch.device) -> torch.Tensor:
        """The cross-entropy over all named things of a batch of captions, none of a held-out scene."""
        ids, labels = (part.to(device) for part in self.batch(rng))
        hidden: torch.Tensor = t5(ids)[0]
        noisy = hidden + NOISE * torch.randn_like(hidden)
        losses = [
            functional.cross_entropy(head(noisy).flatten(0, 1), labels[..., index].flatten(), ignore_index=IGNORED)
            for index, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of captions [captions, tokens], and the labels of each token [captions, tokens, 3]."""
        examples = [training_scene(rng) for _ in range(BATCH)]
        ids: torch.Tensor = self._tokenizer(
            [text for text, _ in examples], padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
        ).input_ids
        rows = zip(ids.tolist(), examples, strict=True)
        return ids, torch.stack([self.token_labels(row, text, scene) for row, (text, scene) in rows])

    def token_labels(self, ids: list[int], text: str, scene: Scene) -> torch.Tensor:
        """Color, shape and place of what each token of a caption names [tokens, 3]; IGNORED for all other tokens."""
        things = scene_labels(text, scene)
        labels = torch.full((len(ids), len(CLASSES)), IGNORED)
        shapes = [at for at, token in enumerate(ids) if token in self._shapes]
        colors = [at for at, token in enumerate(ids) if token in self._colors]
        for at, thing in zip(shapes, things, strict=True):
            labels[at] = torch.tensor(thing)
        for at, thing in zip(colors, things, strict=False):
            labels[at] = torch.tensor(thing)
        # A color after those of the things is the background's.
        for at in colors[len(things) :]:
            labels[at] = torch.tensor([_color(self._colors[ids[at]]), IGNORED, _place(BACKGROUND)])
        return labels


def scene_labels(text: str, scene: Scene) -> list[Labels]:
    """The labels of each thing in the caption's order; the place is IGNORED where the caption leaves it open."""
    if isinstance(scene, Pair):
        first, other = (_place(position) for position in RELATIONS[scene.relation])
        return [
            (_color(scene.color), _shape(scene.shape), first),
            (_color(scene.other_color), _shape(scene.other_shape), other),
        ]
    place = _place(scene.position) if scene.position in text else IGNORED
    return [(_color(scene.color), _shape(scene.shape), place)]


def _color(word: str) -> int:
    return CLASSES[0].index(word)


def _shape(word: str) -> int:
    return CLASSES[1].index(word)


def _place(word: str) -> int:
    return CLASSES[2].index(word)


def grounding_optimizer(t5: T5EncoderModel, grounding: Grounding) -> torch.optim.Optimizer:
    """AdamW for all weights of the encoder and the heads, ten times faster for the few that tell words' order."""
    bias = position_bias(t5)
    rest = [weights for weights in [*t5.parameters(), *grounding.parameters()] if weights is not bias]
    groups = [{"params": rest, "peak": PEAK}, {"params": [bias], "peak": 10 * PEAK}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0)


def train_grounding(phase: Phase, loss: Callable[[random.Random], torch.Tensor]) -> None:
    """Train until the budget is spent; `loss` draws a batch from the generator it is given."""
    rng = random.Random(f"grounding/{phase.steps}")
    (optimizer,) = phase.optimizers
    weights = [w for group in optimizer.param_groups for w in group["params"]]

    def step(_: float) -> float:
        error = loss(rng)
        phase.update(error, weights)
        return float(error.detach())

    phase.run(step, warmup=50, decay=1.5)
