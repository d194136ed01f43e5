"""The calls that denoise loops will make of the denoiser, known before it is loaded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from stages.errors import NotPrecomputable
from stages.events import silent
from stages.models.skeleton import copy_skeleton, skeleton
from stages.pipeline.stage import Inputs, Loaded, Stage
from stages.placement.placement import Place, Places, Resident
from stages.precompute.conditioning import program_of
from stages.precompute.program import Call, Program
from stages.state import State


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """What one call of the denoiser was told, of what its program reads: tensors on the host, in its order.

    `step` is the number of the step, from 0, that makes the call.
    """

    program: Program
    given: tuple[torch.Tensor, ...]
    step: int = 0

    @classmethod
    def of(cls, found: Program, call: Call, step: int = 0) -> "RecordedCall":
        """What `found` reads of the call, copied: pipelines may write to what they gave."""
        leaves = (call.leaves[at] for at, _ in found.reads)
        return cls(found, tuple(torch.empty(leaf.shape, dtype=leaf.dtype).copy_(leaf) for leaf in leaves), step)

    @cached_property
    def key(self) -> Any:
        """Equal for calls whose layers give the same."""
        return self.program.kind, *(tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in self.given)


class Recorder(Loaded):
    """The denoise stage with nothing loaded: its loop runs, and the denoiser's calls are kept and answered by ones.

    `programs` are those found so far; calls that fit none add another, which leads to `layers`.
    """

    def __init__(
        self, stage: Stage, places: Places, programs: list[Program], layers: Collection[str] | None = None
    ) -> None:
        super().__init__(stage, places, silent)
        self._layers = layers
        self.programs, self.calls, self._step = programs, list[RecordedCall](), 0

    def __enter__(self) -> "Recorder":
        (component,) = self.stage.components
        self.pipe = self.stage.blocks.init_pipeline(str(self.stage.checkpoint.path))
        model = copy_skeleton(skeleton(component, self.places[component.name].dtype), lambda: self.home)
        model.forward = self._recording(model, model.forward)
        self.pipe.update_components(**{component.name: model})
        self.complete()
        self.pipe.set_progress_bar_config(disable=True)
        self.stage.prepare(self.pipe)
        return self

    def record(self, state: State, inputs: Inputs) -> list[RecordedCall]:
        """The calls that the denoise loop of one request makes."""
        self.calls, self._step = [], 0
        self.run(state, inputs, self._next)
        return self.calls

    def _next(self, kind: str, data: Mapping[str, object]) -> None:
        self._step += kind == "step"

    def _recording(self, model: nn.Module, forward: Any) -> Any:
        # Pipelines read the signature to see what a denoiser takes.
        @wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            call = Call(model, args, kwargs)
            found = next((known for known in self.programs if known.fits(call, self.home)), None)
            if found is None:
                del model.forward
                found = program_of(model, call, self._layers)
                model.forward = recorded
                like = next((known.kind for known in self.programs if known.essence() == found.essence()), None)
                found = replace(found, like=like)
                self.programs.append(found)
            self.calls.append(RecordedCall.of(found, call, self._step))
            # Not by zeros: some guiders divide by the norm of what they combine.
            return tree_map(lambda leaf: torch.ones_like(leaf, device=self.home)
                            if isinstance(leaf, torch.Tensor) else leaf, found.result)

        return recorded


def conditional(stage: Stage, dtype: torch.dtype, state: State, inputs: Inputs) -> Program:
    """What the stage's denoiser, at `dtype`, computes from its conditioning alone; nothing is loaded.

    `state` and `inputs` are those of some request. Raises NotPrecomputable with a reason where there is no such part.
    """
    if len(stage.components) != 1:
        raise NotPrecomputable(f"{stage.name} has {len(stage.components)} components that take turns")
    (component,) = stage.components
    known = _programs(component.class_name, (component.folder / "config.json").read_text(), dtype)
    with Recorder(stage, {component.name: Place(Resident("cpu"), dtype)}, known) as recorder:
        found = recorder.record(state, inputs)[0].program
    if not found.layers:
        raise NotPrecomputable(f"no layer of {stage.components[0].class_name} sees only conditioning")
    return found


@lru_cache(maxsize=8)
def _programs(class_name: str, config: str, dtype: torch.dtype) -> list[Program]:
    """The programs found so far in such a model: to find one takes the better part of a second, and plans repeat."""
    return []
