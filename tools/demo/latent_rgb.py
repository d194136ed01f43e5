"""Fits the map from the demo checkpoint's latents to colors, which previews are made with.

    python -m tools.demo.latent_rgb

It writes runner/demo/latent_rgb.json, from drawings that the training saw and the latents that the VAE has of them.
"""

import json
import random
from collections.abc import Iterable, Iterator

import torch
from diffusers import AutoencoderKL

from runner.demo import CHECKPOINT, LATENT_RGB
from runner.media.latent_rgb import fitted
from tools.demo.latents import pack
from tools.demo.scenes import Scene, every_solo, held_out, pixels_of, random_pair

SCENES = 160
FEATURES = 64
DIGITS = 4


@torch.no_grad()
def latents_and_pixels(scenes: Iterable[Scene]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The latents of each scene as the transformer makes them, [1, tokens, 64], and its drawing [height, width, 3]."""
    vae = AutoencoderKL.from_pretrained(CHECKPOINT / "vae").eval()
    shift, scale = vae.config["shift_factor"], vae.config["scaling_factor"]
    for scene in scenes:
        pixels = torch.from_numpy(pixels_of(scene))
        latents = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
        yield pack(latents, shift, scale), pixels


def main() -> None:
    """Fit the map and write it."""
    rng = random.Random(11)
    solos = [scene for scene in every_solo() if not held_out(scene)]
    scenes = rng.sample(solos, SCENES) + [scene for _ in range(SCENES) if not held_out(scene := random_pair(rng))]
    colors = fitted(latents_and_pixels(scenes), FEATURES)
    assert colors is not None
    rows = ",\n".join(json.dumps([round(value, DIGITS) for value in row]) for row in colors.weights.tolist())
    LATENT_RGB.write_text(f"[{rows}]\n")


if __name__ == "__main__":
    main()
