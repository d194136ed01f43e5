"""The demo's autoencoder: its shape, and its training on crops and whole drawings."""

import random

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from tools.demo.phase import Phase, learning_rate
from tools.demo.scenes import layout, training_scene
from tools.demo.shapes import SIDE, paint, place

CROP = 64
CROPS = 24
WHOLES = 6
LEVELS = 4
DECODER_ONLY = 0.75
PEAK = 2e-3
PRIOR = 2e-4
NOISE = 0.15


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
    """Pixels (side, side, 3) and weights (side, side): the smaller a shape, the more each of its pixels counts."""
    _, scene = training_scene(rng)
    things = layout(scene)
    masks = [(color, place(shape, radius, center)) for color, shape, radius, center in things]
    weight = 1 + sum(mask * (0.5 * CROP * CROP / mask.sum()) for _, mask in masks)
    pixels = paint(scene.background, masks)
    _, _, radius, (x, y) = rng.choice(things)
    # Crops around a point on the shape's skeleton, at any phase of the latents' grid.
    left, top = (min(max(round(c + rng.uniform(-1, 1) * radius - side / 2), 0), SIDE - side) for c in (x, y))
    window = np.s_[top : top + side, left : left + side]
    return pixels[window], np.asarray(weight)[window]


def _batch(rng: random.Random, count: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, side, side) from -1 to 1, and weights (count, 1, side, side)."""
    pixels, weights = zip(*(_example(rng, side) for _ in range(count)), strict=True)
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    return pictures.to(device), torch.from_numpy(np.stack(weights)).float()[:, None].to(device)


def autoencoder_optimizer(model: AutoencoderKL) -> torch.optim.Optimizer:
    """AdamW over all weights."""
    group = {"params": list(model.parameters()), "peak": PEAK}
    return torch.optim.AdamW([group], lr=PEAK, weight_decay=0.0, betas=(0.9, 0.99))


def _latents(model: AutoencoderKL, pictures: torch.Tensor, frozen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures' latents, and their distance from a normal distribution in nats for each value."""
    if frozen:
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
        rate = min(1.0, (phase.steps + 1) / 50) * min(1.0, 1.25 * (1 - fraction)) + 1e-3
        learning_rate(phase.optimizers, rate)
        whole = phase.steps % 3 == 2
        pictures, weights = _batch(rng, *((WHOLES, SIDE) if whole else (CROPS, CROP)), device)
        latents, prior = _latents(model, pictures, fraction >= DECODER_ONLY)
        error = model.decode(latents).sample - pictures
        loss = (weights * (error.abs() + error.square())).mean()
        for optimizer in phase.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss + PRIOR * prior)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in phase.optimizers:
            optimizer.step()
        return float(loss.detach())

    phase.run(step)
