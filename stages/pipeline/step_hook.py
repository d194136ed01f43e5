"""The steps of a denoise loop: who hears of them, and how a loop goes on from where another one stopped."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, ModularPipelineBlocks

OnStep = Callable[[int, int, Any], None]


@dataclass(frozen=True)
class StepCheckpoint:
    """A denoise that stopped after `steps` of its steps, with its latents on the host, in the loop's own type."""

    steps: int
    latents: torch.Tensor


def ignore(step: int, steps: int, block_state: Any) -> None:
    """The `OnStep` of those who do not listen."""


class StepHook(threading.local):
    """What the loop in this thread is told: who listens, and where it goes on from."""

    on_step: OnStep = staticmethod(ignore)
    midway: StepCheckpoint | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepHook":
        # init_pipeline deep-copies the blocks, and a copy would not install what the original is told.
        return self


class StepCallback(ModularPipelineBlocks):
    """A pipeline block at the end of a denoise loop: diffusers' modular loops have no callback per step."""

    model_name = "stagerun"

    def __init__(self, turn: StepHook) -> None:
        super().__init__()
        self._turn = turn

    @property
    def description(self) -> str:
        return "Tells a listener that a denoise step is done."

    def __call__(self, components: Any, block_state: Any, i: int = 0, **loop: Any) -> tuple[Any, Any]:
        # Chunked loops pass more than i and t, and their state may have no timesteps.
        timesteps = getattr(block_state, "timesteps", None)
        self._turn.on_step(i, 0 if timesteps is None else len(timesteps), block_state)
        return components, block_state


def install(loop: LoopSequentialPipelineBlocks, turn: StepHook) -> None:
    """Make a denoise loop tell `turn` of its steps, and skip those that its midway has done."""
    kind = type(loop)

    def loop_step(self: Any, components: Any, state: Any, **step: Any) -> Any:
        midway = turn.midway
        if midway is not None and step["i"] < midway.steps:
            return components, state
        if midway is not None and step["i"] == midway.steps:
            state.latents = midway.latents.to(state.latents.device)
            components.scheduler.set_begin_index(midway.steps)
        return kind.loop_step(self, components, state, **step)

    loop.__class__ = type(kind.__name__, (kind,), {"loop_step": loop_step, "__module__": kind.__module__})
    loop.sub_blocks.insert("step_events", StepCallback(turn), len(loop.sub_blocks))
