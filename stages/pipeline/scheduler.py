"""The scheduler of a denoise: what it draws its noise from, and what a step of it needs of the steps before."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler


@contextmanager
def drawing_from(scheduler: Any, generator: torch.Generator | None) -> Iterator[None]:
    """Inside, the scheduler draws the noise of its steps from the generator."""
    step = getattr(scheduler, "step", None)
    if generator is None or step is None or "generator" not in inspect.signature(step).parameters:
        yield
        return
    # No loop of diffusers' pipeline blocks gives a step the generator, and a step without one draws from torch's own,
    # which no seed of ours sets. A lane's scheduler is its own.
    scheduler.step = partial(step, generator=generator)
    try:
        yield
    finally:
        del scheduler.step


def follows_a_flow(scheduler: object) -> bool:
    """Whether the last direction leads from the latents after a step straight to the end."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.stochastic_sampling


def keeps_nothing(scheduler: object) -> bool:
    """Whether a step reads nothing of the steps before it but latents, and the state of what it draws from."""
    if isinstance(scheduler, FlowMatchLCMScheduler):
        # With scale factors it keeps the size of the first latents.
        return not scheduler.config.scale_factors
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
