"""The calls that denoise loops will make of the denoiser, known before it is loaded."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from stages.errors import NotPrecomputable
from stages.models.checkpoint import Component
from stages.models.skeleton import config_text, copy_skeleton, skeleton
from stages.pipeline.stage import Inputs, Loaded, Stage, moved_to
from stages.pipeline.suspects import suspected
from stages.placement.placement import Place, Places, Resident
from stages.precompute.conditioning import program_of
from stages.precompute.program import Call, Program
from stages.state import State


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of the denoiser, as far as its program reads it."""

    program: Program
    """The program that it goes through."""
    given: tuple[torch.Tensor, ...]
    """What the program reads, in its order, on the host."""
    step: int = 0
    """The number of the step that makes the call, from 0."""

    @classmethod
    def of(cls, program: Program, call: Call, step: int = 0) -> "RecordedCall":
        """What the program reads of the call, copied: pipelines may write to what they gave."""
        leaves = (call.leaves[at] for at, _ in program.reads)
        return cls(program, tuple(torch.empty(leaf.shape, dtype=leaf.dtype).copy_(leaf) for leaf in leaves), step)

    @cached_property
    def key(self) -> Any:
        """Equal for calls whose layers give the same."""
        return self.program.canonical, *(leaf.view(-1).view(torch.uint8).numpy().tobytes() for leaf in self.given)


class CallRecorder:
    """The denoise stage with nothing loaded: its loop runs, and the denoiser's calls are kept and answered by ones."""

    def __init__(
        self, stage: Stage, places: Places, programs: list[Program], layers: Collection[str] | None = None
    ) -> None:
        """`programs` are those found so far; a call that fits none adds another, which leads to `layers`."""
        (component,) = stage.components
        self._home, self._programs, self._layers = stage.home(places), programs, layers
        self._calls, self._step = list[RecordedCall](), 0
        dtype = places[component.name].dtype
        model = copy_skeleton(skeleton(component, dtype), lambda: self._home)
        model.forward = self._recording(model, model.forward)
        self._loaded = Loaded(stage, stage.pipeline({component.name: model}), moved_to(self._home, dtype))

    def record(self, state: State, inputs: Inputs) -> list[RecordedCall]:
        """The calls that the denoise loop of one request makes."""
        self._calls, self._step = [], 0
        self._loaded.run(state, inputs, self._count_steps)
        return self._calls

    def _count_steps(self, kind: str, data: Mapping[str, object]) -> None:
        self._step += kind == "step"

    def _recording(self, model: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        # Pipelines read the signature to see what a denoiser takes.
        @wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            call = Call(model, args, kwargs)
            program = next((known for known in self._programs if known.fits(call, self._home)), None)
            if program is None:
                del model.forward
                program = self._found(model, call)
                model.forward = recorded
            self._calls.append(RecordedCall.of(program, call, self._step))
            # Not by zeros: some guiders divide by the norm of what they combine.
            return tree_map(lambda leaf: torch.ones_like(leaf, device=self._home)
                            if isinstance(leaf, torch.Tensor) else leaf, program.result)

        return recorded

    def _found(self, model: nn.Module, call: Call) -> Program:
        program = program_of(model, call, self._layers)
        same = (known.canonical for known in self._programs if known.signature() == program.signature())
        self._programs.append(replace(program, same_as=next(same, None)))
        return self._programs[-1]


class ProgramMemo:
    """The programs found in the last few models: to find one takes the better part of a second, and plans repeat."""

    def __init__(self, models: int = 8) -> None:
        self._models, self._programs = models, dict[Any, list[Program]]()

    def programs(self, component: Component, dtype: torch.dtype) -> list[Program]:
        """Those of a component at a type, for the caller to add to."""
        key = component.class_name, config_text(component), dtype
        self._programs[key] = self._programs.pop(key, [])
        while len(self._programs) > self._models:
            del self._programs[next(iter(self._programs))]
        return self._programs[key]


_KNOWN = ProgramMemo()


def conditioning_program(stage: Stage, dtype: torch.dtype, state: State, inputs: Inputs) -> Program:
    """What the stage's denoiser, at `dtype`, computes from its conditioning alone; nothing is loaded.

    `state` and `inputs` are those of some request. Raises NotPrecomputable with a reason where there is no such part.
    """
    if len(stage.components) != 1:
        raise NotPrecomputable(f"{stage.name} has {len(stage.components)} components that take turns")
    (component,) = stage.components
    places = {component.name: Place(Resident("cpu"), dtype)}
    recorder = CallRecorder(stage, places, _KNOWN.programs(component, dtype))
    with suspected(stage), stage.shortened(1):
        first, *_ = recorder.record(state, inputs)
    if not first.program.layers:
        raise NotPrecomputable(f"no layer of {component.class_name} sees only conditioning")
    return first.program
