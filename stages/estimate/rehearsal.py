"""A denoise loop gone through with its real scheduler and no denoiser: what a scheduler cannot do shows in the plan.

Which schedulers a family can use is written nowhere: its pipeline blocks call what some have, with arguments that some
take, and a config that is fine for one class asks another for a package that is not there.
"""

import inspect
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from stages.errors import BadResult, Fix, Fixes, InvalidInput, ModelError
from stages.estimate.block_memo import BlockMemo, Costs
from stages.estimate.dry_run import FakeTokenizer, tracked
from stages.estimate.memory_tracker import FusedAttention, MemoryTracker
from stages.models.checkpoint import Component
from stages.models.skeleton import odd_config
from stages.models.weights import Weights
from stages.pipeline.build import told
from stages.pipeline.stage import Inputs, Loaded, Stage, moved_to
from stages.pipeline.suspects import suspected
from stages.placement.placement import Place, Resident
from stages.state import State

# How many steps more are tried where some are too few.
_FURTHER = 4
# Of many different numbers of steps those up to this one, and the largest, are gone through to the end.
_FEW = 8


class UnusableSteps(InvalidInput):
    """A number of steps that the scheduler has no schedule for."""

    def __init__(
        self, text: str, fixes: Sequence[Fix] = (), alternatives: Sequence[Fixes] = (), steps: int = 0
    ) -> None:
        super().__init__(text, fixes, alternatives)
        self.steps = steps


def rehearse(
    stage: Stage, dtypes: Mapping[str, torch.dtype], weights: Mapping[str, Weights], state: State, inputs: Inputs,
    counts: Collection[int], costs: Costs,
) -> None:
    """Go through the loop of a denoise once for each of these numbers of steps, its denoiser answering at random.

    `weights` are those of its components by name, and `costs` of blocks those of dry runs. Raises ModelError that
    names a scheduler which the loop cannot use, and UnusableSteps for a number of steps that is too small for it.
    """
    answers = _Answers()
    models = {component.name: answers.model(component, dtypes[component.name], weights[component.name], costs)
              for component in stage.components}
    loaded = Loaded(stage, stage.pipeline(models, FakeTokenizer), moved_to("cpu", dtypes[stage.components[0].name]))
    scheduler: Any = getattr(loaded.pipe, "scheduler", None)
    if scheduler is None:
        return
    for steps in sorted(counts):
        before, whole = torch.get_rng_state(), steps <= _FEW or steps == max(counts)
        with suspected(stage), stage.shortened(steps if whole else 1):
            trouble = _trouble(loaded, scheduler, state, {**inputs, "num_inference_steps": steps})
        if not torch.equal(before, torch.get_rng_state()):
            raise _refused(stage, scheduler, "its steps draw noise from a source that no seed sets")
        if not trouble:
            continue
        for enough in range(steps + 1, steps + _FURTHER):
            with suspected(stage):
                still = _trouble(loaded, scheduler, state, {**inputs, "num_inference_steps": enough})
            if not still:
                raise UnusableSteps(f"`steps={steps}`: {_name(scheduler)} has no schedule for so few: {trouble} -> "
                                    f"use `steps={enough}` or more", (Fix("steps", enough),), steps=steps)
        raise _refused(stage, scheduler, trouble)


def _trouble(loaded: Loaded, scheduler: Any, state: State, inputs: Inputs) -> str:
    """Why the scheduler cannot go through so many steps, or what that is no number it comes to; empty if it can."""
    try:
        # What comes of it is said in one line, and numpy would say more.
        with torch.no_grad(), np.errstate(all="ignore"):
            loaded.run(state, inputs)
    except BadResult as error:
        return _not_finite(scheduler) or error.text.partition(":")[2].strip().partition(":")[0]
    except MemoryError:
        raise
    except Exception as error:  # Anything: it is a class that was not made for this loop.
        if _of_scheduler(error):
            # A step is looked up by its timestep, and what is no number equals none.
            return _not_finite(scheduler) or told(error)
        raise
    return ""


def _not_finite(scheduler: Any) -> str:
    for name in ("sigmas", "timesteps"):
        values = getattr(scheduler, name, None)
        if isinstance(values, torch.Tensor) and not bool(torch.isfinite(values).all()):
            return f"its {name} are {', '.join(f'{value:.3g}' for value in values.tolist()[:4])} (0/0)"
    return ""


def _of_scheduler(error: Exception) -> bool:
    """Whether an error came by way of a scheduler, or of the block that sets it up."""
    return any(Path(frame.filename).parent.name == "schedulers" or "scheduler" in (frame.line or "")
               or frame.name == "retrieve_timesteps" for frame in traceback.extract_tb(error.__traceback__))


def _refused(stage: Stage, scheduler: Any, why: str) -> ModelError:
    if stage.checkpoint.scheduler is not None:
        return ModelError(f"{_name(scheduler)} cannot run the denoise of {stage.checkpoint.pipeline}: {why} -> "
                          f"another `scheduler`, such as FlowMatchEulerDiscreteScheduler, or the model's own")
    part = stage.checkpoint.components.get("scheduler")
    file, fields = odd_config(part) if part is not None else ("", [])
    why += f", with {file} ({', '.join(fields)})" if fields else ""
    return ModelError(f"{_name(scheduler)} cannot run the denoise of {stage.checkpoint.pipeline}: {why} -> give "
                      f"{stage.checkpoint.path / 'scheduler'} one that can, such as FlowMatchEulerDiscreteScheduler")


def _name(scheduler: Any) -> str:
    """The class of a scheduler, with what its config sets otherwise than the class does."""
    usual = {name: parameter.default for name, parameter in inspect.signature(type(scheduler)).parameters.items()}
    changed = [f"{name}={value}" for name, value in scheduler.config.items() if name in usual and usual[name] != value]
    return f"{type(scheduler).__name__} ({', '.join(changed)})" if changed else type(scheduler).__name__


class _Answers:
    """Stands in for models: a call like one before gets the same numbers, of the shapes that the model would give."""

    def __init__(self) -> None:
        self._tracker = MemoryTracker("cpu", {})
        self._known: dict[Any, Any] = {}

    def model(self, component: Component, dtype: torch.dtype, weights: Weights, costs: Costs) -> nn.Module:
        """The skeleton of a component, with a `forward` that answers."""
        place = Place(Resident("cpu"), dtype)
        known = costs.setdefault((component.name, place.dtype, place.precomputed), {})
        memo = BlockMemo(self._tracker, Counter(), known)
        model: Any = tracked(component, place, weights, "cpu", memo, self._tracker)
        model.forward = self._answering(component.name, model.forward)
        return model  # type: ignore[no-any-return]

    def _answering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        # Pipelines read the signature to see what a denoiser takes.
        @wraps(forward)
        def answer(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            shapes = ((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
            key = name, form, tuple(shapes)
            if key not in self._known:
                with self._tracker, FusedAttention(self._tracker):
                    self._known[key] = forward(*args, **kwargs)
            # Schedulers may write to what they are given.
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, self._known[key])

        return answer
