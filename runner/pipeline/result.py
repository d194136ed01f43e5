"""What a call of a pipeline gives: the pictures, the seeds they came from, and the report of the run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL.Image import Image

from runner.engine.report import Report
from runner.pipeline.habits import ResultHabits
from runner.request import FilledRequest
from runner.text import pictures, shown
from stages.errors import InvalidInput


@dataclass(frozen=True)
class Result(ResultHabits):
    """Pictures that were made: `result.images`, or `for image in result`."""

    requests: tuple[FilledRequest, ...]
    """What was asked for, one for each picture."""
    make: Callable[[], list[Image]] = field(repr=False, compare=False)
    """Gives the pictures; it is asked once."""
    report: Report | None = None
    """What the run did; None where a single stage was done."""

    @cached_property
    def images(self) -> list[Image]:
        """The pictures as PIL has them, in the order of the prompts; saved as they are they say how they were made."""
        return self.make()

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [request.seed for request in self.requests]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.images)

    def __getitem__(self, name: str) -> Any:
        """The pictures or the seeds, by their names alone: `[0]` is all pictures in diffusers, and one elsewhere."""
        if name == "images":
            return self.images
        if name == "seeds":
            return self.seeds
        raise InvalidInput(f"result[{shown(name) if isinstance(name, str) else repr(name)}] may mean all pictures or "
                           f"one -> result.images, or result.images[0]")

    def __repr__(self) -> str:
        stages = () if self.report is None else self.report.stages
        took = "".join(f", {stage.stage} {sum(stage.seconds.values()):.1f} s" for stage in stages)
        what = f"{pictures(len(self.requests))}, seed{'s' if len(self.requests) > 1 else ''}"
        return f"Result({what} {', '.join(map(str, self.seeds))}{took})"
