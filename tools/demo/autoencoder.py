"""The demo's autoencoder: its shape, and its training on crops and whole drawings."""

import random

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from tools.demo.phase import Phase
from tools.demo.scenes import layout, training_scene
from tools.demo.shapes import SIDE, paint

CROP = 64
"""Pixels along each side of a crop."""
CROPS = 24
"""Crops in a batch of crops."""
WHOLES = 6
"""Drawings in a batch of whole drawings, which every third is."""
LEVELS = 4
DECODER_ONLY = 0.75
"""The share of the budget after which the decoder learns alone."""
PEAK = 2e-3
PRIOR = 2e-4
"""How much the latents' distance from a normal distribution counts."""
NOISE = 0.15
"""What is added to latents for the decoder alone, in their standard deviations."""


def build_autoencoder() -> AutoencoderKL:
    """FLUX's layout, small: 16 latent channels, a picture 8 times the latents' size."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def _example(rng: random.Random, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels [side, side, 3] and weights [side, side]: the smaller a shape, the more each of its pixels counts."""
    scene = training_scene(rng)
    shapes = layout(scene)
    masks = [(placed.color, placed.mask()) for placed in shapes]
    weight = 1 + sum(mask * (0.5 * CROP * CROP / mask.sum()) for _, mask in masks)
    pixels = paint(scene.background, masks)
    placed = rng.choice(shapes)
    # Around any point near the shape, so that it lies in every way on the latents' grid.
    left, top = (
        min(max(round(center + rng.uniform(-1, 1) * placed.radius - side / 2), 0), SIDE - side)
        for center in placed.center
    )
    window = np.s_[top : top + side, left : left + side]
    return pixels[window], np.asarray(weight)[window]


def _batch(rng: random.Random, count: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, 3, side, side] from -1 to 1, and weights [count, 1, side, side]."""
    pixels, weights = zip(*(_example(rng, side) for _ in range(count)), strict=True)
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    return pictures.to(device), torch.from_numpy(np.stack(weights)).float()[:, None].to(device)


def autoencoder_optimizer(model: AutoencoderKL) -> torch.optim.Optimizer:
    """AdamW for all weights."""
    group = {"params": list(model.parameters()), "peak": PEAK}
    return torch.optim.AdamW([group], lr=PEAK, weight_decay=0.0, betas=(0.9, 0.99))


def _latents(model: AutoencoderKL, pictures: torch.Tensor, encoder_frozen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures' latents, and their distance from a normal distribution in nats for each value."""
    if encoder_frozen:
        with torch.no_grad():
            modes = model.encode(pictures).latent_dist.mode()
            return modes + torch.randn_like(modes) * NOISE * modes.std(), modes.new_zeros(())
    posterior = model.encode(pictures).latent_dist
    sample: torch.Tensor = posterior.sample()
    return sample, posterior.kl().mean() / sample[0].numel()


def train_autoencoder(phase: Phase, model: AutoencoderKL, device: torch.device) -> None:
    """Train both halves, then the decoder alone on latents with noise, as a sampler would leave in them."""
    rng = random.Random(f"autoencoder/{phase.steps}")

    def step(fraction: float) -> float:
        whole = phase.steps % 3 == 2
        pictures, weights = _batch(rng, *((WHOLES, SIDE) if whole else (CROPS, CROP)), device)
        latents, prior = _latents(model, pictures, fraction >= DECODER_ONLY)
        error = model.decode(latents).sample - pictures
        loss = (weights * (error.abs() + error.square())).mean()
        phase.update(loss + PRIOR * prior, model.parameters())
        return float(loss.detach())

    phase.run(step, warmup=50, decay=1.25)
