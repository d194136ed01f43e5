"""The drawings' latents, encoded once for the whole training of the transformer."""

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline

from tools.demo.phase import save_atomically
from tools.demo.scenes import Pair, Scene, Solo, every_solo, held_out, pixels_of, random_pair
from tools.demo.shapes import SIDE

CHANNELS = 16
GRID = SIDE // 16
"""Tokens of the transformer along each side of a picture."""
PAIRS = 14000
BATCH = 32
KINDS: dict[str, type[Scene]] = {"Solo": Solo, "Pair": Pair}


@dataclass(frozen=True)
class Latents:
    """The latents of scenes, as the transformer learns to make them."""

    scenes: list[Scene]
    """What they show."""
    values: torch.Tensor
    """Shifted, scaled and packed, float16 on the host: [scenes, tokens, 64]."""
    shift: float
    """The mean of the autoencoder's latents, subtracted from them."""
    scale: float
    """One by their standard deviation, multiplied with them."""


def _training_scenes() -> list[Scene]:
    """Every one-shape scene that is not held out, and a sample of the two-shape scenes."""
    rng = random.Random(5)
    scenes: list[Scene] = [scene for scene in every_solo() if not held_out(scene)]
    enough = len(scenes) + PAIRS
    while len(scenes) < enough:
        pair = random_pair(rng)
        if not held_out(pair):
            scenes.append(pair)
    return scenes


class LatentCache:
    """Latents of scenes, encoded when they are first asked for."""

    def __init__(self, cached: Latents, autoencoder: AutoencoderKL) -> None:
        self.cached = cached
        self._at = {scene: at for at, scene in enumerate(cached.scenes)}
        self._more: dict[Scene, torch.Tensor] = {}
        self._autoencoder = autoencoder

    def of(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """Their latents: [scenes, tokens, 64], float16 on the host."""
        new = list(dict.fromkeys(scene for scene in scenes if scene not in self._at and scene not in self._more))
        if new:
            packed = pack(modes_of(new, self._autoencoder), self.cached.shift, self.cached.scale).half()
            self._more.update(zip(new, packed, strict=True))
        return torch.stack([self.cached.values[self._at[scene]] if scene in self._at else self._more[scene]
                            for scene in scenes])


@torch.no_grad()
def modes_of(scenes: Sequence[Scene], autoencoder: AutoencoderKL) -> torch.Tensor:
    """The autoencoder's latents of scenes, on the host: [scenes, 16, 16, 16]."""
    pixels = np.stack([pixels_of(scene) for scene in scenes])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    modes: torch.Tensor = autoencoder.encode(pictures.to(autoencoder.device)).latent_dist.mode().cpu()
    return modes


def pack(latents: torch.Tensor, shift: float, scale: float) -> torch.Tensor:
    """The autoencoder's latents [scenes, 16, 16, 16] as the transformer sees them: [scenes, tokens, 64]."""
    packed: torch.Tensor = FluxPipeline._pack_latents((latents - shift) * scale, *latents.shape)
    return packed


def encode_training_scenes(autoencoder: AutoencoderKL) -> Latents:
    """The latents of all that the transformer is trained on at first."""
    scenes = _training_scenes()
    latents = torch.cat([modes_of(scenes[start : start + BATCH], autoencoder)
                         for start in range(0, len(scenes), BATCH)])
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    return Latents(scenes, pack(latents, shift, scale).half(), shift, scale)


def save_latents(latents: Latents, path: Path) -> None:
    """Write them for `load_latents`."""
    scenes = [[type(scene).__name__, *astuple(scene)] for scene in latents.scenes]
    saved = {"scenes": scenes, "packed": latents.values, "shift": latents.shift, "scale": latents.scale}
    save_atomically(saved, path)


def load_latents(path: Path) -> Latents:
    """What `save_latents` wrote."""
    saved = torch.load(path, weights_only=True)
    scenes = [KINDS[kind](*words) for kind, *words in saved["scenes"]]
    return Latents(scenes, saved["packed"], saved["shift"], saved["scale"])
