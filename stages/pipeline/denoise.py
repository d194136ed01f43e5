"""Denoise: embeddings and noise become latents."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    SequentialPipelineBlocks,
)

from stages.errors import BadResult
from stages.events import Emit
from stages.machine import has_bfloat16
from stages.models.checkpoint import Checkpoint
from stages.models.skeleton import skeleton
from stages.pipeline.build import empty_pipeline
from stages.pipeline.scheduler import drawing_from, follows_a_flow, keeps_nothing
from stages.pipeline.stage import Inputs, Stage
from stages.pipeline.step_hook import StepCheckpoint, StepHook, ignore, install
from stages.pipeline.suspects import suspected


class Denoise(Stage):
    """The diffusion transformer and its scheduler."""

    name = "denoise"

    def __init__(
        self, checkpoint: Checkpoint, blocks: SequentialPipelineBlocks, reads: Collection[str], tags: Collection[str]
    ) -> None:
        super().__init__(checkpoint, blocks, reads, tags)
        self.hook = StepHook()
        kind = LoopSequentialPipelineBlocks
        self._loops = [block for block in blocks.sub_blocks.values() if isinstance(block, kind)]
        for loop in self._loops:
            install(loop, self.hook)

    @property
    def scale_factor(self) -> int:
        """Pixels per latent along an edge, as the family's own pipeline class reads it off the VAE."""
        pipe = empty_pipeline(self.blocks, self.checkpoint)
        self.prepare(pipe)
        with suspected(self):
            return int(pipe.vae_scale_factor)

    def prepare(self, pipe: ModularPipeline) -> None:
        """Lend the pipeline the VAE's skeleton: without a VAE, diffusers falls back to constants for its geometry."""
        vae = self.checkpoint.components.get("vae")
        if vae is not None and "vae" not in pipe.components:
            pipe.vae = skeleton(vae)

    def arguments(self, pipe: ModularPipeline, inputs: Inputs) -> dict[str, Any]:
        """The inputs, and one CPU generator per picture: its noise depends on no card, rank or lane."""
        arguments = super().arguments(pipe, inputs)
        seed = inputs.get("seed")
        if "seed" in self.inputs and isinstance(seed, int):
            arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
        return arguments

    def resumable(self, pipe: ModularPipeline) -> bool:
        """Whether a loop that stopped after some step can go on from its latents and the generator's state alone."""
        return keeps_nothing(getattr(pipe, "scheduler", None)) and len(self._loops) == 1

    @contextmanager
    def request(
        self, pipe: ModularPipeline, arguments: Mapping[str, Any], emit: Emit, resume_from: StepCheckpoint | None
    ) -> Iterator[None]:
        """While this thread's pipeline works on a request with these arguments inside, `emit` is told of its steps."""
        scheduler, generator = getattr(pipe, "scheduler", None), arguments.get("generator")
        flow = follows_a_flow(scheduler) and len(self._loops) == 1
        timesteps = pipe.scheduler.config.num_train_timesteps if flow else None
        self.hook.on_step = StepMonitor(emit, timesteps, None if flow else generator)
        self.hook.resume_from, self.hook.generator = resume_from, generator
        try:
            with drawing_from(scheduler, generator):
                yield
        finally:
            # The monitor holds a tensor on the device.
            self.hook.on_step, self.hook.resume_from, self.hook.generator = ignore, None, None

    @contextmanager
    def shortened(self, steps: int) -> Iterator[None]:
        """Inside, this thread's loops go through so many of their steps at most: enough to know what all take."""
        before, self.hook.limit = self.hook.limit, steps
        try:
            yield
        finally:
            self.hook.limit = before


class StepMonitor:
    """An `OnStep` that tells of every step, and stops a run whose latents are no longer finite.

    An event's "latents" is a function that copies them to the host, for those who want them, "clean" one that gives
    what they would be if the model's last direction led straight to the end, and "generator" one that gives the state
    of the picture's generator.
    """

    def __init__(
        self, emit: Emit, timesteps: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        """`timesteps` is how many a flow is trained on; None for a loop whose steps have no such direction.

        `generator` is what steps draw from, if they may draw.
        """
        self._emit, self._timesteps, self._generator = emit, timesteps, generator
        self._finite: _Flag | None = None

    def __call__(self, step: int, steps: int, block_state: BlockState) -> None:
        self._check(step - 1)
        latents = getattr(block_state, "latents", None)
        if isinstance(latents, torch.Tensor):
            # Read one step later, so that the host never waits for what it has just ordered.
            self._finite = _Flag(torch.isfinite(latents).all())
        if step + 1 == steps:
            self._check(step)
            self._finite = None
        views: dict[str, Callable[[], Any]] = {}
        if self._generator is not None:
            views["generator"] = partial(torch.Tensor.clone, self._generator.get_state())
        timesteps = getattr(block_state, "timesteps", None)
        if isinstance(timesteps, torch.Tensor):
            views["timestep"] = partial(torch.Tensor.item, timesteps[step])
        direction = getattr(block_state, "noise_pred", None)
        if isinstance(latents, torch.Tensor):
            views["latents"] = partial(_copy_to_host, latents)
            if self._timesteps is not None and isinstance(direction, torch.Tensor) and step + 1 < steps:
                left = block_state.timesteps[step + 1]
                views["clean"] = partial(_clean, latents, direction, left, self._timesteps)
        self._emit("step", {"stage": "denoise", "step": step + 1, "steps": steps, **views})

    def _check(self, step: int) -> None:
        if self._finite is not None and not bool(self._finite):
            wide = "bfloat16` (or float32)" if has_bfloat16(self._finite.device) else "float32`"
            raise BadResult(f"denoise: latents are not finite after step {step + 1}: run again with "
                            f"`dtype=transformer={wide}")


class _Flag:
    """A truth on a `device`, on its way to the host; whoever asks waits for what was ordered before."""

    def __init__(self, value: torch.Tensor) -> None:
        self.device, self._value, self._arrived = str(value.device), value, None
        if value.device.type != "cpu":
            # To pinned memory, by which the copy has its turn in the stream.
            self._value = value.to("cpu", non_blocking=True)
            self._arrived = torch.accelerator.current_stream(value.device).record_event()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


def _clean(latents: torch.Tensor, direction: torch.Tensor, timestep: torch.Tensor, timesteps: int) -> torch.Tensor:
    return _copy_to_host(latents - timestep.to(latents.device) / timesteps * direction)


def _copy_to_host(latents: torch.Tensor) -> torch.Tensor:
    return latents.detach().to("cpu", copy=True)
