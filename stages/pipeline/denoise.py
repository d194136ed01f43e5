"""Denoise: embeddings and noise become latents."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, ModularPipeline

from stages.errors import BadResult
from stages.events import Emit
from stages.models.checkpoint import Checkpoint
from stages.models.skeleton import skeleton
from stages.pipeline.stage import Inputs, Stage
from stages.pipeline.step_hook import StepCheckpoint, StepHook, ignore, install


class Denoise(Stage):
    """The diffusion transformer and its scheduler."""

    name = "denoise"

    def __init__(self, checkpoint: Checkpoint, blocks: Any, reads: Any, tags: Any) -> None:
        super().__init__(checkpoint, blocks, reads, tags)
        self.turn = StepHook()
        kind = LoopSequentialPipelineBlocks
        self._loops = [block for block in blocks.sub_blocks.values() if isinstance(block, kind)]
        for loop in self._loops:
            install(loop, self.turn)

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
        span = pipe.scheduler.config.num_train_timesteps if self.divisible(pipe) else None
        self.turn.on_step = StepMonitor(emit, span)
        arguments = super().arguments(pipe, inputs, emit)
        seed = inputs.get("seed")
        if "seed" in self.inputs and isinstance(seed, int):
            arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        return arguments

    def divisible(self, pipe: Any) -> bool:
        """Whether a loop that stopped after some step can go on from its latents alone, to the same last bit.

        A step of the flow-matching Euler scheduler reads nothing else of the steps before it.
        """
        scheduler = getattr(pipe, "scheduler", None)
        plain = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.stochastic_sampling
        return plain and len(self._loops) == 1

    def resume_from(self, midway: StepCheckpoint | None) -> None:
        """Make the next request of this thread go on from there."""
        self.turn.midway = midway

    def forget(self) -> None:
        """Drop the listener of this thread's last request, which holds a tensor on the device."""
        self.turn.on_step, self.turn.midway = ignore, None


class StepMonitor:
    """Tells of every step, and stops a run whose latents are no longer finite.

    An event's "latents" is a function that copies them to the host, for those who want them, and "clean" one that
    gives what they would be if the model's last direction led straight to the end: a flow of `span` timesteps has one.
    """

    def __init__(self, emit: Emit, span: int | None = None) -> None:
        self._emit, self._span = emit, span
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
        told: dict[str, Callable[[], torch.Tensor]] = {}
        direction = getattr(block_state, "noise_pred", None)
        if isinstance(latents, torch.Tensor):
            told["latents"] = partial(_on_host, latents)
            if self._span is not None and isinstance(direction, torch.Tensor) and step + 1 < steps:
                told["clean"] = partial(_clean, latents, direction, block_state.timesteps[step + 1], self._span)
        self._emit("step", {"stage": "denoise", "step": step + 1, "steps": steps, **told})

    def _check(self, step: int) -> None:
        if self._finite is not None and not bool(self._finite):
            raise BadResult(
                f"denoise: latents are not finite after step {step + 1}: run again with --dtype "
                f"transformer=bfloat16 (or float32)"
            )


def _clean(latents: torch.Tensor, direction: torch.Tensor, timestep: torch.Tensor, span: int) -> torch.Tensor:
    return _on_host(latents - timestep.to(latents.device) / span * direction)


def _on_host(latents: torch.Tensor) -> torch.Tensor:
    return latents.detach().to("cpu", copy=True)
