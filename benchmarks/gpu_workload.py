"""What benchmarks.gpu has its processes do, and what they tell of it."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Does some work and tells the bytes that it copied each way.
Count = Callable[[Callable[[], object]], dict[str, int]]
# Seconds that a way leaves for what comes after the picture that is timed.
SPARE = 5.0


@dataclass(frozen=True)
class Way:
    """One way: its card has `limit` units of memory (None: all of it). It is not begun with fewer than `least` seconds
    left, and given up after `most`.
    """

    kind: str
    limit: int | None
    least: float
    most: float

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.kind}, {self.limit or 'no'} {'GiB' if self.limit else 'limit'}"


# Those that tell most come first: a run that is cut off has them.
WAYS = (
    Way("stages", 24, 45, 150),
    Way("resident pipeline", None, 45, 120),
    Way("model offload", 24, 60, 150),
    Way("stages", 16, 45, 150),
    Way("group offload", 16, 75, 150),
    Way("sequential offload", 16, 60, 110),
    Way("model offload", 16, 30, 90),
)


@dataclass(frozen=True)
class Workload:
    """What every way does: a picture of `side` times `side` pixels, until a time of the day in seconds.

    Limits are counted in `unit` bytes; `count` tells what is copied, where anything can.
    """

    model: Path
    device: str
    dtype: "torch.dtype"
    side: int = 1024
    steps: int = 28
    tokens: int = 512
    unit: int = 2**30
    until: float = float("inf")
    count: Count | None = None

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.time()

    def late(self) -> bool:
        """Whether the picture that is timed must end where it is."""
        return self.left < SPARE


@dataclass
class Notes:
    """What is known of a way so far; on the disk as soon as it is known, as the process may be ended at any time."""

    path: Path | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def add(self, **facts: object) -> None:
        """Keep these facts, too."""
        self.known |= facts
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.known))
            os.replace(part, self.path)


class Clock:
    """When each step of a denoise was done, the card having done all that it was ordered."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self.marks: list[float] = []

    def start(self) -> None:
        """The denoise begins, unless it has begun."""
        if not self.marks:
            self.step()

    def step(self) -> None:
        """A step is done."""
        import torch

        torch.accelerator.synchronize()
        self.marks.append(time.perf_counter())
        if self._notes is not None:
            self._notes.add(steps=self.steps)

    @property
    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]

    def hear(self, kind: str, data: Mapping[str, Any]) -> None:
        """Listen to a run."""
        if kind == "item" and data["stage"] == "denoise":
            # Once more where a stage that ran out of memory is tried again.
            self.marks.clear()
            self.start()
        elif kind == "step":
            self.step()
