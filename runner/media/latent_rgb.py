"""From latents to rough colors, without a VAE: a linear map, learned from pictures that the store already has."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from runner.artifacts import Store
from runner.demo import CHECKPOINT, LATENT_RGB
from stages.errors import StoreError
from stages.models.checkpoint import Checkpoint

CELLS = 4
RUNS, PICTURES = 40, 8
# Keeps the map small where few pictures say little about some feature.
RIDGE = 1e-3

Size = tuple[int, int]
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """Latents token by token."""

    rows: torch.Tensor
    """The tokens, float32 [height * width, features]."""
    height: int
    """How many tokens lie one above the other."""
    width: int
    """How many tokens lie side by side."""


@dataclass(frozen=True)
class Colors:
    """A linear map from latents to the colors of 4x4 cells of each token."""

    weights: torch.Tensor
    """The map, float32 [features + 1, 48]: a token's features, and a one, times it are colors from 0 to 1."""

    @classmethod
    def read(cls, path: Path) -> "Colors":
        """The colors in a JSON file, a list of rows."""
        return cls(torch.tensor(json.loads(path.read_text())))

    @property
    def features(self) -> int:
        """How many numbers a token has."""
        return self.weights.shape[0] - 1

    def picture(self, latents: torch.Tensor, size: Size) -> torch.Tensor | None:
        """The rough picture of latents on the host, uint8 [height, width, 3]; `size` is that of the whole one.

        None for latents of another kind.
        """
        grid = grid_of(latents, size)
        if grid is None or grid.rows.shape[1] != self.features:
            return None
        cells = (_with_one(grid.rows) @ self.weights).clamp(0, 1).mul(255).round().to(torch.uint8)
        tiles = cells.reshape(grid.height, grid.width, CELLS, CELLS, 3).transpose(1, 2)
        return tiles.reshape(grid.height * CELLS, grid.width * CELLS, 3)


def grid_of(latents: torch.Tensor, size: Size, features: int | None = None) -> Grid | None:
    """The latents of one picture of `size` (width, height) as tokens; None for what is no picture.

    Packed latents [1, tokens, features] are that already. Of [1, channels, height, width], two by two make a token,
    unless each has `features` numbers itself.
    """
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    if latents.ndim == 3 and latents.shape[0] == 1:
        count = latents.shape[1]
        height = max(1, round(math.sqrt(count * size[1] / size[0])))
        return Grid(latents[0].float(), height, count // height) if count % height == 0 else None
    if latents.ndim != 4 or latents.shape[0] != 1:
        return None
    side = 1 if latents.shape[1] == features else 2
    _, channels, height, width = latents.shape
    if height % side or width % side:
        return None
    parts = latents[0].float().reshape(channels, height // side, side, width // side, side).permute(1, 3, 0, 2, 4)
    return Grid(parts.reshape(-1, channels * side * side), height // side, width // side)


def fitted(pairs: Iterable[Pair], features: int) -> Colors | None:
    """The map that fits best: latents of `features` a token, and pixels uint8 [height, width, 3]; None for no pair."""
    gram = torch.zeros(features + 1, features + 1, dtype=torch.float64)
    sums = torch.zeros(features + 1, CELLS * CELLS * 3, dtype=torch.float64)
    for latents, pixels in pairs:
        grid = grid_of(latents, (pixels.shape[1], pixels.shape[0]), features)
        if grid is not None and grid.rows.shape[1] == features:
            rows = _with_one(grid.rows).double()
            gram += rows.T @ rows
            sums += rows.T @ cells_of(pixels, grid).double()
    if not gram.any():
        return None
    gram += RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    return Colors(torch.linalg.solve(gram, sums).float())


def cells_of(pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The mean colors, 0 to 1, of the 4x4 cells of each token: [tokens, 48]."""
    shape = grid.height * CELLS, grid.width * CELLS
    means = torch.nn.functional.adaptive_avg_pool2d(pixels.permute(2, 0, 1).float() / 255, shape)
    tiles = means.reshape(3, grid.height, CELLS, grid.width, CELLS).permute(1, 3, 2, 4, 0)
    return tiles.reshape(-1, CELLS * CELLS * 3)


def colors_of(checkpoint: Checkpoint, store: Store) -> Callable[[int], Colors | None]:
    """What finds the colors of a model: those that come with the demo, or what the store teaches."""

    def find(features: int) -> Colors | None:
        if checkpoint.path == CHECKPOINT:
            return Colors.read(LATENT_RGB)
        return learned(store, checkpoint.identity, features)

    return find


def learned(store: Store, model: str, features: int) -> Colors | None:
    """What the last pictures of the model with the identity `model` teach; None where the store has none."""
    return fitted(islice(_pairs(store, model), PICTURES), features)


def _pairs(store: Store, model: str) -> Iterator[Pair]:
    for run in reversed(store.runs()[-RUNS:]):
        try:
            record: dict[str, Any] = dict(store.load_run(run))
        except StoreError:
            # A record that is damaged has nothing to teach.
            continue
        if record.get("model") != model:
            continue
        stages = record["stages"]
        for before, after in zip(stages.get("denoise", []), stages.get("decode", []), strict=False):
            latents, picture = store.get(before), store.get(after)
            if latents is not None and picture is not None and "latents" in latents.tensors():
                yield latents.tensors()["latents"], picture.tensors()["pixels"]


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)
