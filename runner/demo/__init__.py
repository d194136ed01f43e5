"""The demo checkpoint, a small FLUX that draws colored shapes, and what its latents look like."""

import json
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
LATENT_RGB = Path(__file__).parent / "latent_rgb.json"


def latent_rgb_weights() -> list[list[float]]:
    """The linear map from its latents to colors, [65, 48]: `runner.media.latent_rgb.Colors` says what that means."""
    weights: list[list[float]] = json.loads(LATENT_RGB.read_text())
    return weights
