"""The steps of a denoise loop: who hears of them, and how a loop goes on from where another one stopped."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
)

# Is told the number of the step from 0, how many there are, and what the loop has then.
OnStep = Callable[[int, int, BlockState], None]


@dataclass(frozen=True)
class StepCheckpoint:
    """What a denoise that stopped between two steps goes on from."""

    steps: int
    """How many steps are done."""
    latents: torch.Tensor
    """The latents after them, on the host, in the loop's own type and shape."""
    generator: torch.Tensor | None = None
    """The state of the picture's generator after them; None for a scheduler that draws no noise."""


def ignore(step: int, steps: int, block_state: BlockState) -> None:
    """The `OnStep` of those who do not listen."""


class StepHook(threading.local):
    """What the denoise loop of this thread is given: who hears of its steps, where it goes on from and what it draws.

    `limit` is how many steps it goes through at most; those after it are passed over.
    """

    on_step: OnStep = staticmethod(ignore)
    resume_from: StepCheckpoint | None = None
    generator: torch.Generator | None = None
    limit: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepHook":
        # init_pipeline deep-copies the blocks, and a copy would not hear what the original is given.
        return self


class StepCallback(ModularPipelineBlocks):
    """A pipeline block at the end of a denoise loop: diffusers' modular loops have no callback per step."""

    model_name = "stagerun"

    def __init__(self, hook: StepHook) -> None:
        super().__init__()
        self.hook = hook

    @property
    def description(self) -> str:
        return "Tells a listener that a denoise step is done."

    def __call__(self, components: ModularPipeline, block_state: BlockState, i: int = 0, **loop: Any) -> Any:
        # Chunked loops pass more than i and t, and their state may have no timesteps.
        timesteps = getattr(block_state, "timesteps", None)
        self.hook.on_step(i, 0 if timesteps is None else len(timesteps), block_state)
        return components, block_state


def install(loop: LoopSequentialPipelineBlocks, hook: StepHook) -> None:
    """Make a denoise loop tell the hook of its steps, and skip those that a checkpoint has done."""
    whole_step = type(loop).loop_step

    def loop_step(self: Any, components: ModularPipeline, state: BlockState, **step: Any) -> Any:
        checkpoint = hook.resume_from
        if checkpoint is not None and step["i"] < checkpoint.steps:
            return components, state
        if hook.limit is not None and step["i"] >= hook.limit:
            return components, state
        if checkpoint is not None and step["i"] == checkpoint.steps:
            state.latents = checkpoint.latents.to(state.latents.device)
            components.scheduler.set_begin_index(checkpoint.steps)
            if checkpoint.generator is not None and hook.generator is not None:
                hook.generator.set_state(checkpoint.generator)
        return whole_step(self, components, state, **step)

    # As a method of this one loop: init_pipeline's deep copy then has it as a method of its own.
    loop.loop_step = MethodType(loop_step, loop)
    loop.sub_blocks.insert("step_events", StepCallback(hook), len(loop.sub_blocks))
