"""Requests that are midway through their denoise: kept from time to time, and when the run must stop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.artifacts import ArtifactStore
from runner.engine.keys import midway_key
from stages.events import Emit
from stages.pipeline.step_hook import StepCheckpoint
from stages.state import State


class StopAtStep(BaseException):
    """A request was left midway, because the run must stop; it goes on from there."""


def midway_of(store: ArtifactStore, key: str) -> StepCheckpoint | None:
    """Where the request whose artifact is to be `key` was left, if it was."""
    state = store.get(midway_key(key))
    if state is None:
        return None
    steps, latents = state.values.get("steps"), state.values.get("latents")
    assert isinstance(steps, int) and isinstance(latents, torch.Tensor)
    return StepCheckpoint(steps, latents)


@dataclass
class StepCheckpointer:
    """An emit for one request, which keeps its latents every `seconds` and when `stopping`.

    `facts` go with every step that is told. With no `store`, a request that must stop starts over the next time.
    """

    emit: Emit
    key: str
    facts: Mapping[str, object]
    stopping: Callable[[], bool]
    store: ArtifactStore | None
    seconds: float
    kept: float = field(default_factory=time.monotonic)
    last: Mapping[str, Any] | None = None

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
            midway = State({"latents": self.last["latents"](), "steps": int(self.last["step"])})
            self.store.put(midway_key(self.key), "midway", midway, {"of": self.key})
            self.kept = time.monotonic()
