"""What a pipeline's caller hears of a run: its steps, and warnings as Python's."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.events import Emit
from runner.request import FilledRequest
from stages.errors import InvalidInput
from stages.wording import kind_of

# Is called with the index of the picture, the step from 0, the scheduler's timestep, and {"latents": tensor}.
OnStep = Callable[[int, int, float | None, dict[str, Any]], Any]


class StepListener:
    """An emit that calls `on_step` after every step, and hands every event on to `emit`.

    `stopping` is whether `on_step` gave False: the run is to end. With `warns`, a warning becomes one of Python's.
    """

    def __init__(self, on_step: OnStep | None, requests: Sequence[FilledRequest], emit: Emit, *,
                 warns: bool = True) -> None:
        if on_step is not None and not callable(on_step):
            raise InvalidInput(f"on_step is {kind_of(on_step)} -> a function of (index, step, timestep, "
                               f"values)")
        self._on_step, self._requests, self._emit, self._warns = on_step, requests, emit, warns
        self.stopping = False

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        self._emit(kind, data)
        if kind == "warning" and self._warns:
            warnings.warn(str(data["text"]), stacklevel=2)
        elif kind == "step" and self._on_step is not None and not self.stopping:
            self._tell(self._on_step, data)

    def _tell(self, on_step: OnStep, data: Mapping[str, Any]) -> None:
        latents = data["latents"]() if "latents" in data else None
        timestep = data["timestep"]() if "timestep" in data else None
        answer = on_step(self._requests[data["request"]].index, data["step"] - 1, timestep, {"latents": latents})
        if answer is False:
            self.stopping = True
        elif isinstance(answer, Mapping) and answer.get("latents") is not latents:
            raise InvalidInput("on_step gave other latents, and a step cannot take them -> change the state between "
                               "pipe.denoise and pipe.decode, or return False to stop")
