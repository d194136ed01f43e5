"""The demo checkpoint, a small FLUX that draws colored shapes, and what its latents look like."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
LATENT_RGB = Path(__file__).parent / "latent_rgb.json"
