"""What the demo checkpoint's latents look like: python -m runner.demo.latent_rgb fits colors.json to its own VAE."""

import json
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline

from runner.demo import CHECKPOINT, COLORS
from runner.demo.scenes import Scene, every_solo, held_out, pixels_of, random_pair
from runner.media.latent_rgb import fitted

SCENES = 160
DIGITS = 4


@torch.no_grad()
def pairs(scenes: Iterable[Scene]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Drawings as the transformer makes them, packed latents [1, tokens, 64], with their pixels."""
    vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae").eval()
    shift, scale = vae.config["shift_factor"], vae.config["scaling_factor"]
    for scene in scenes:
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_of(scene)))
        latents = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
        yield FluxPipeline._pack_latents((latents - shift) * scale, *latents.shape), pixels


def main() -> None:
    """Fit the colors to drawings that the training saw, and write them."""
    rng = random.Random(11)
    solos = [scene for scene in every_solo() if not held_out(scene)]
    scenes = rng.sample(solos, SCENES) + [scene for _ in range(SCENES) if not held_out(scene := random_pair(rng))]
    colors = fitted(pairs(scenes), 64)
    assert colors is not None
    rows = ",\n".join(json.dumps([round(value, DIGITS) for value in row]) for row in colors.weights.tolist())
    COLORS.write_text(f"[{rows}]\n")


if __name__ == "__main__":
    main()
