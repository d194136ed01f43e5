"""The scheduler of a denoise: what it draws its noise from, and what a step of it needs of the steps before."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.utils import logging

from stages.errors import InvalidInput
from stages.models.scheduler import SchedulerRequest

_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def exchanged(scheduler: Any, asked: SchedulerRequest) -> Any:
    """The scheduler that is asked for, with the config of this one where it says nothing else.

    Raises InvalidInput for a class that diffusers has not, or a config that it does not take.
    """
    kind = _class(asked.name) if asked.name else type(scheduler)
    known = [name for name in inspect.signature(kind).parameters if name not in ("args", "kwargs")]
    for name in asked.config:
        # A whole config has what its class has no use for as well: pipelines look into it.
        if name not in known and not asked.whole:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
            raise InvalidInput(f"`scheduler`: {kind.__name__} has no {name} -> {hint}")
    level = logging.get_verbosity()
    # What another class has no use for is told in warnings, and kept: some make a second scheduler of it.
    logging.set_verbosity_error()
    try:
        config = {name: _INFINITIES.get(value, value) if isinstance(value, str) else value
                  for name, value in asked.config.items()}
        return kind.from_config(config) if asked.whole else kind.from_config(scheduler.config, **config)
    except Exception as error:  # Anything: it is a library's constructor with anybody's numbers.
        raise InvalidInput(f"`scheduler`: {kind.__name__} cannot be made of {asked} ({error!s:.200}) -> another "
                           f"config") from None
    finally:
        logging.set_verbosity(level)


def _class(name: str) -> Any:
    names = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in names:
        close = get_close_matches(name, names, 1) or get_close_matches(f"{name}Scheduler", names, 1)
        hint = f"did you mean {close[0]}?" if close else "docs/schedulers.md lists them"
        raise InvalidInput(f"`scheduler`: diffusers has no {name} -> {hint}")
    found = getattr(diffusers, name)
    if not hasattr(found, "from_config"):
        raise InvalidInput(f"`scheduler`: {name} needs a package that is not here, or is no scheduler -> another one")
    return found


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
