"""The guides' recipe for a FLUX that no card can hold, written out: encode, flush, denoise, flush, decode by hand.

As it is published, it gives no seed, calls a counter reset that is deprecated, and names no memory for the
transformer, upon which accelerate takes 90 % of what is free; here it has a seed, the counters are read in between,
and the 90 % are said. Nothing of it is kept when it fails, and in a notebook an exception keeps the model alive.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoModel, FluxPipeline
from diffusers.image_processor import VaeImageProcessor


@dataclass
class Figures:
    """Seconds, and the most bytes on each card, by part; what loading and computing took is not told apart."""

    seconds: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, cards: Sequence[str]) -> Iterator[None]:
        """Measure a part of the recipe."""
        for card in cards:
            torch.accelerator.reset_peak_memory_stats(card)
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        self.parts[name] = {card: torch.accelerator.max_memory_allocated(card) for card in cards}

    @property
    def peak(self) -> dict[str, int]:
        """The most bytes on each card in any part."""
        return {card: max(part[card] for part in self.parts.values()) for part in self.parts.values() for card in part}


def tutorial(
    model: Path, caps: Mapping[str, int], prompt: str, *, size: tuple[int, int], steps: int, guidance: float,
    tokens: int, seed: int, dtype: torch.dtype,
) -> "tuple[np.ndarray[Any, np.dtype[np.uint8]], Figures]":
    """Make one picture, uint8 [height, width, 3], on cards of so many bytes by the guides' recipe."""
    cards, figures, folder = list(caps), Figures(), str(model)
    limits = dict(enumerate(caps.values()))
    with figures.part("encode", cards):
        pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None, device_map="balanced",
                                                max_memory=limits, torch_dtype=dtype)
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(prompt, prompt_2=None, max_sequence_length=tokens)
        del pipeline
        flush()
    with figures.part("denoise", cards):
        transformer = AutoModel.from_pretrained(
            folder, subfolder="transformer", device_map="auto", torch_dtype=dtype,
            max_memory={card: limit * 9 // 10 for card, limit in limits.items()},
        )
        pipeline = FluxPipeline.from_pretrained(
            folder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, vae=None,
            transformer=transformer, torch_dtype=dtype,
        )
        latents = pipeline(
            prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=steps, guidance_scale=guidance,
            width=size[0], height=size[1], output_type="latent", generator=torch.Generator("cpu").manual_seed(seed),
        ).images
        del pipeline, transformer
        flush()
    with figures.part("decode", cards):
        pixels = decoded(folder, latents, cards[0], size, dtype)
        flush()
    return pixels, figures


def decoded(
    folder: str, latents: torch.Tensor, card: str, size: tuple[int, int], dtype: torch.dtype
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The recipe's last part: the VAE on one card."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype).to(card)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.no_grad():
        unpacked = FluxPipeline._unpack_latents(latents.to(card), size[1], size[0], scale)
        image = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    (picture,) = VaeImageProcessor(vae_scale_factor=scale).postprocess(image, output_type="pil")
    return np.asarray(picture)


def flush() -> None:
    """The recipe's way to free memory."""
    gc.collect()
    torch.accelerator.empty_cache()
