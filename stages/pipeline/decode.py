"""Decode: latents become a picture."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import ModularPipeline

from stages.errors import BadResult
from stages.pipeline.stage import Inputs, Stage
from stages.state import State

LEAST_SPREAD = 3.0
"""The standard deviation of a picture's most varied channel, of 255, below which it is nearly of one color."""


class Decode(Stage):
    """The VAE."""

    name = "decode"

    def arguments(self, pipe: ModularPipeline, inputs: Inputs) -> dict[str, Any]:
        """The inputs, and that numbers are asked for: a non-finite value must be seen before it is made a pixel."""
        return {**super().arguments(pipe, inputs), "output_type": "pt"}

    def result(self, values: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
        """One picture as `pixels`, uint8 [height, width, 3]; raises BadResult for one that is none."""
        images = values["images"]
        if not bool(torch.isfinite(images).all()):
            raise BadResult(
                f"decode: the picture has non-finite values ({images.dtype}): the latents are kept, so run again "
                f"with `dtype=vae=float32`"
            )
        pixels = (images[0].permute(1, 2, 0).float() * 255).round().to(torch.uint8)
        height, width = pixels.shape[:2]
        if (width, height) != (inputs["width"], inputs["height"]):
            raise BadResult(
                f"decode: the picture is {width}x{height}, asked for {inputs['width']}x{inputs['height']}"
            )
        if bool((pixels == pixels[0, 0]).all()):
            raise BadResult(f"decode: every pixel is {pixels[0, 0].tolist()}: the latents are damaged or the type "
                            f"overflowed; run again with `dtype=float32`")
        return {"pixels": pixels}

    def doubts(self, made: State, inputs: Inputs) -> Iterator[str]:
        """A picture that is nearly of one color."""
        pixels = made.values["pixels"]
        assert isinstance(pixels, torch.Tensor)
        spread, mean = torch.std_mean(pixels.float(), dim=(0, 1))
        if float(spread.max()) < LEAST_SPREAD:
            color = [round(float(channel)) for channel in mean]
            yield (f"the picture of seed {inputs.get('seed')} is nearly of one color, {color} with a spread of "
                   f"{float(spread.max()):.1f} of 255: another seed, more steps or other words may draw it")
