"""Unfinished denoises: kept in the store from time to time, and when the run must stop; and read back to go on."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.artifacts import Store
from runner.engine.keys import checkpoint_key
from stages.events import Emit
from stages.pipeline.step_hook import StepCheckpoint
from stages.state import State


class StopAtStep(BaseException):
    """A request was left after a step, because the run must stop; it goes on from there."""


def load_checkpoint(store: Store, key: str) -> StepCheckpoint | None:
    """Where the denoise of the artifact `key` was left, if it was."""
    state = store.get(checkpoint_key(key))
    if state is None:
        return None
    steps, latents = state.values.get("steps"), state.values.get("latents")
    generator = state.values.get("generator")
    assert isinstance(steps, int) and isinstance(latents, torch.Tensor)
    return StepCheckpoint(steps, latents, generator if isinstance(generator, torch.Tensor) else None)


@dataclass
class StepCheckpointer:
    """An emit for the denoise of one request, which keeps its latents and the state of its generator."""

    emit: Emit
    """Hears of every event."""
    key: str
    """That of the artifact to be."""
    facts: Mapping[str, object]
    """What is told with every step."""
    stopping: Callable[[], bool]
    """Asked after every step whether the run must stop."""
    store: Store | None
    """Where latents are kept; without one, a request that must stop starts over the next time."""
    seconds: float
    """Seconds from one checkpoint to the next."""
    kept: float = field(default_factory=time.monotonic)
    """When the last checkpoint was kept."""
    last: Mapping[str, Any] | None = None
    """The last step that could be kept."""

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind != "step":
            self.emit(kind, data)
            return
        self.emit(kind, {**data, **self.facts})
        stopping = self.stopping()
        # After the last step there is an artifact to write, which is as good as stopping.
        self.last = data if data["step"] < data["steps"] and "latents" in data else None
        if stopping or time.monotonic() - self.kept >= self.seconds:
            self.keep()
        if stopping and data["step"] < data["steps"]:
            raise StopAtStep

    def keep(self) -> None:
        """Keep the request as it was after its last step."""
        if self.store is not None and self.last is not None:
            tensors = {name: self.last[name]() for name in ("latents", "generator") if name in self.last}
            state = State({**tensors, "steps": int(self.last["step"])})
            self.store.put(checkpoint_key(self.key), "midway", state, {"of": self.key})
            self.kept = time.monotonic()
