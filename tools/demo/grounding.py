"""The text encoder's own training: to know of each word that names a thing the thing's color, shape and place.

FLUX gives its text tokens no position, so only T5 can tell the transformer which color goes with which shape, and
where. Learnt from pictures alone, "a red circle above a blue square" stays a bag of words for very long.
"""

import random
from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import T5EncoderModel, T5Tokenizer

from tools.demo.captions import OPEN_SHAPES, Caption, captioned_scene
from tools.demo.phase import Phase
from tools.demo.scenes import POSITIONS, RELATIONS, Scene, Solo
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
        names = [*COLORS, *SHAPES, *OPEN_SHAPES, "something"]
        self._names = {tokenizer(name).input_ids[0] for name in names}

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
        examples = [captioned_scene(rng) for _ in range(BATCH)]
        ids: torch.Tensor = self._tokenizer(
            [caption.text for caption, _ in examples],
            padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt",
        ).input_ids
        rows = zip(ids.tolist(), examples, strict=True)
        return ids, torch.stack([self.token_labels(row, caption, scene) for row, (caption, scene) in rows])

    def token_labels(self, ids: list[int], caption: Caption, scene: Scene) -> torch.Tensor:
        """Color, shape and place of what each token of a caption names [tokens, 3]; IGNORED for all other tokens."""
        labels = torch.full((len(ids), len(CLASSES)), IGNORED)
        naming = [at for at, token in enumerate(ids) if token in self._names]
        # A caption that was cut has fewer.
        for at, (_, whose) in zip(naming, caption.named, strict=False):
            labels[at] = torch.tensor(thing_labels(scene, caption.said, whose))
        return labels


def thing_labels(scene: Scene, said: frozenset[str], whose: str) -> Labels:
    """What is said of the first shape "0", the other "1", or the background "b"; IGNORED is what is left open."""
    if whose == "b":
        return _color(scene.background), IGNORED, _place(BACKGROUND)
    if isinstance(scene, Solo):
        color, shape, place, prefix = scene.color, scene.shape, scene.position, ""
    else:
        places = RELATIONS[scene.relation]
        color, shape = (scene.color, scene.shape) if whose == "0" else (scene.other_color, scene.other_shape)
        place, prefix = places[int(whose)], "" if whose == "0" else "other_"
    return (
        _color(color) if prefix + "color" in said else IGNORED,
        _shape(shape) if prefix + "shape" in said else IGNORED,
        _place(place) if said & {"position", "relation"} else IGNORED,
    )


def _color(word: str) -> int:
    return CLASSES[0].index(word)


def _shape(word: str) -> int:
    return CLASSES[1].index(word)


def _place(word: str) -> int:
    return CLASSES[2].index(word)


def grounding_optimizer(t5: T5EncoderModel, grounding: Grounding, peak: float = PEAK) -> torch.optim.Optimizer:
    """AdamW for all weights of the encoder and the heads, ten times faster for the few that tell words' order."""
    bias = position_bias(t5)
    rest = [weights for weights in t5.parameters() if weights is not bias]
    groups = [
        {"params": list(grounding.parameters()), "peak": PEAK},
        {"params": rest, "peak": peak},
        {"params": [bias], "peak": 10 * peak},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)


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
