"""Denoise: embeddings and noise become latents."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
)

from stages.checkpoint import Checkpoint
from stages.errors import BadResult
from stages.stage import Emit, Inputs, Stage
from stages.weights import skeleton

OnStep = Callable[[int, int, Any], None]


def unheard(step: int, steps: int, block_state: Any) -> None:
    """The `OnStep` of those who do not listen."""


class StepEvents(ModularPipelineBlocks):
    """A pipeline block at the end of a denoise loop: diffusers' modular loops have no callback per step."""

    model_name = "stagerun"

    def __init__(self) -> None:
        super().__init__()
        self.on_step: OnStep = unheard

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepEvents":
        # init_pipeline deep-copies the blocks, and a copy would not hear who listens to the original.
        return self

    @property
    def description(self) -> str:
        return "Tells a listener that a denoise step is done."

    def __call__(self, components: Any, block_state: Any, i: int = 0, **loop: Any) -> tuple[Any, Any]:
        # Chunked loops pass more than i and t, and their state may have no timesteps.
        timesteps = getattr(block_state, "timesteps", None)
        self.on_step(i, 0 if timesteps is None else len(timesteps), block_state)
        return components, block_state


class Denoise(Stage):
    """The diffusion transformer and its scheduler."""

    name = "denoise"

    def __init__(self, checkpoint: Checkpoint, blocks: Any, reads: Any, tags: Any) -> None:
        super().__init__(checkpoint, blocks, reads, tags)
        self.steps = StepEvents()
        for block in blocks.sub_blocks.values():
            if isinstance(block, LoopSequentialPipelineBlocks):
                block.sub_blocks.insert("step_events", self.steps, len(block.sub_blocks))

    @property
    def scale_factor(self) -> int:
        """Pixels per latent along an edge, as the family's own pipeline class reads it off the VAE."""
        pipe = self.blocks.init_pipeline(str(self.checkpoint.path))
        self.prepare(pipe)
        return int(pipe.vae_scale_factor)

    def prepare(self, pipe: ModularPipeline) -> None:
        """Lend the pipeline the VAE's skeleton: without a VAE, diffusers falls back to constants for its geometry."""
        vae = self.checkpoint.components.get("vae")
        if vae is not None and "vae" not in pipe.components:
            pipe.vae = skeleton(vae)

    def arguments(self, pipe: Any, inputs: Inputs, emit: Emit) -> dict[str, Any]:
        """The inputs, and one CPU generator per picture: its noise depends on no card, rank or lane."""
        self.steps.on_step = Watch(emit)
        arguments = super().arguments(pipe, inputs, emit)
        seed = inputs.get("seed")
        if "seed" in self.inputs and isinstance(seed, int):
            arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        return arguments

    def forget(self) -> None:
        """Drop the listener of the last request, which holds a tensor on the device."""
        self.steps.on_step = unheard


class Watch:
    """Tells of every step, and stops a run whose latents are no longer finite."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._finite: torch.Tensor | None = None

    def __call__(self, step: int, steps: int, block_state: Any) -> None:
        self._check(step - 1)
        latents = getattr(block_state, "latents", None)
        if isinstance(latents, torch.Tensor):
            # Read one step later, so that the host never waits for the device within a step.
            self._finite = torch.isfinite(latents).all()
        if step + 1 == steps:
            self._check(step)
            self._finite = None
        self._emit("step", {"stage": "denoise", "step": step + 1, "steps": steps})

    def _check(self, step: int) -> None:
        if self._finite is not None and not bool(self._finite):
            raise BadResult(
                f"denoise: latents are not finite after step {step + 1}: run again with --dtype "
                f"transformer=bfloat16 (or float32)"
            )
