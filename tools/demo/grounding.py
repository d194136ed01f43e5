"""The text encoder's own training: to know of each word that names a thing the thing's color, shape and place.

FLUX gives its text tokens no position, so only T5 can tell the transformer which color goes with which shape, and
where. Learnt from pictures alone, "a red circle above a blue square" stays a bag of words for very long.
"""

import random
from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import T5EncoderModel, T5Tokenizer

from tools.demo.phase import Phase, learning_rate
from tools.demo.scenes import POSITIONS, RELATIONS, Pair, Scene, training_scene
from tools.demo.shapes import COLORS, SHAPES
from tools.demo.text import T5_WIDTH, TEXT_TOKENS, relative_bias

CAPTIONS = 64
PEAK = 3e-3
BACKGROUND = "behind all"
KINDS = (tuple(COLORS), tuple(SHAPES), (*POSITIONS, BACKGROUND))
# An answer that is not asked for, as cross_entropy passes it over.
UNSAID = -100
# What heads read is blurred, so that the answers stand out of the embeddings as clearly as the words do.
BLUR = 0.5

Answer = tuple[int, int, int]


class Grounding(torch.nn.Module):
    """Reads color, shape and place of a thing off the embedding of each word that names it."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(T5_WIDTH, len(kinds)) for kinds in KINDS)
        self._tokenizer = tokenizer
        self._colors, self._shapes = ({tokenizer(word).input_ids[0]: word for word in kinds} for kinds in KINDS[:2])

    def loss(self, t5: T5EncoderModel, rng: random.Random, device: torch.device) -> torch.Tensor:
        """The cross-entropy over all named things of a batch of captions, none of a held-out scene."""
        ids, answers = (part.to(device) for part in self.captions(rng))
        hidden: torch.Tensor = t5(ids)[0]
        blurred = hidden + BLUR * torch.randn_like(hidden)
        losses = [
            functional.cross_entropy(head(blurred).flatten(0, 1), answers[..., kind].flatten(), ignore_index=UNSAID)
            for kind, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    def captions(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (captions, tokens) and color, shape and place of each token's thing (captions, tokens, 3)."""
        told = [training_scene(rng) for _ in range(CAPTIONS)]
        ids: torch.Tensor = self._tokenizer(
            [text for text, _ in told], padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
        ).input_ids
        rows = zip(ids.tolist(), told, strict=True)
        return ids, torch.stack([self.answers(row, text, scene) for row, (text, scene) in rows])

    def answers(self, ids: list[int], text: str, scene: Scene) -> torch.Tensor:
        """Color, shape and place (tokens, 3) of what each token names; UNSAID for all other tokens."""
        things = named(text, scene)
        found = torch.full((len(ids), len(KINDS)), UNSAID)
        shapes = [spot for spot, token in enumerate(ids) if token in self._shapes]
        colors = [spot for spot, token in enumerate(ids) if token in self._colors]
        for spot, thing in zip(shapes, things, strict=True):
            found[spot] = torch.tensor(thing)
        for spot, thing in zip(colors, things, strict=False):
            found[spot] = torch.tensor(thing)
        # A color after those of the things is the background's.
        for spot in colors[len(things) :]:
            found[spot] = torch.tensor([_number(0, self._colors[ids[spot]]), UNSAID, _number(2, BACKGROUND)])
        return found


def named(text: str, scene: Scene) -> list[Answer]:
    """Color, shape and place of each thing in the caption's order, as numbers; UNSAID for a place left open."""
    if isinstance(scene, Pair):
        first, other = (_number(2, place) for place in RELATIONS[scene.relation])
        return [
            (_number(0, scene.color), _number(1, scene.shape), first),
            (_number(0, scene.other_color), _number(1, scene.other_shape), other),
        ]
    place = _number(2, scene.position) if scene.position in text else UNSAID
    return [(_number(0, scene.color), _number(1, scene.shape), place)]


def _number(kind: int, word: str) -> int:
    return KINDS[kind].index(word)


def grounding_optimizer(t5: T5EncoderModel, grounding: Grounding) -> torch.optim.Optimizer:
    """AdamW for all weights of the encoder and the heads, ten times faster for the few that tell words' order."""
    bias = relative_bias(t5)
    rest = [weights for weights in [*t5.parameters(), *grounding.parameters()] if weights is not bias]
    groups = [{"params": rest, "peak": PEAK}, {"params": [bias], "peak": 10 * PEAK}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0)


def train_grounding(phase: Phase, loss: Callable[[random.Random], torch.Tensor]) -> None:
    """Learn until the budget is spent, the rate falling to zero with it."""
    rng = random.Random(f"grounding/{phase.steps}")
    (optimizer,) = phase.optimizers

    def step(fraction: float) -> float:
        learning_rate(phase.optimizers, min(1.0, (phase.steps + 1) / 50) * min(1.0, 1.5 * (1 - fraction)) + 1e-3)
        error = loss(rng)
        optimizer.zero_grad()
        torch.autograd.backward(error)
        torch.nn.utils.clip_grad_norm_([w for group in optimizer.param_groups for w in group["params"]], 1.0)
        optimizer.step()
        return float(error.detach())

    phase.run(step)
