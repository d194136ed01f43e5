"""What a run did and made, as data; torch is imported only when pixels are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runner.artifacts import Store
from runner.job import Job
from runner.media.image import card_of
from runner.request import FilledRequest
from runner.text import gib, pictures, shown
from stages.signatures import checked_call

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Leftover:
    """A tensor that is still on a device after a flush."""

    kind: str
    """Its class."""
    shape: tuple[int, ...]
    """Its shape."""
    bytes: int
    """Those of its storage."""


@dataclass(frozen=True)
class Flushed:
    """What a flush gave back."""

    freed: int
    """Bytes."""
    left: int
    """Bytes that stayed above the baseline."""
    leftovers: tuple[Leftover, ...] = ()
    """The largest tensors that are left."""


@dataclass(frozen=True)
class StageReport:
    """What a stage did."""

    stage: str
    """Its name."""
    ran: int
    """Requests that were computed."""
    reused: int
    """Requests whose artifact was there."""
    seconds: Mapping[str, float]
    """Seconds by part (load, compute, save, flush, table); with several lanes, compute and save are averages."""
    peak: Mapping[str, int]
    """Bytes at most, by device."""
    flushed: Flushed
    """What the flush gave back."""
    lanes: int = 1
    """Requests that were in flight at a time."""

    def __repr__(self) -> str:
        peaks = "".join(f", peak {device} {gib(peak)}" for device, peak in self.peak.items())
        return (f"StageReport({self.stage}, {self.ran} made, {self.reused} re-used, "
                f"{sum(self.seconds.values()):.1f} s{peaks})")


@dataclass(frozen=True)
class Failure:
    """A request that came to nothing, while others went on."""

    index: int
    """Its position in the job."""
    stage: str
    """Where it failed."""
    text: str
    """Why."""


@dataclass(frozen=True)
class Picture:
    """One finished picture; its pixels stay in the store until somebody asks."""

    index: int
    """That of its request in the whole run."""
    request: FilledRequest
    """What was asked for."""
    key: str
    """The key of its artifact."""
    store: Store
    """Where the artifact is."""
    facts: Mapping[str, Any]
    """What its metadata say of how it was made, besides the request."""

    def __repr__(self) -> str:
        asked = self.request
        return f"Picture({self.index}, {shown(asked.prompt)}, {asked.width}x{asked.height}, seed {asked.seed})"

    @cached_property
    def pixels(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """uint8 [height, width, 3]."""
        return self.read()

    @property
    def card(self) -> dict[str, Any]:
        """What its metadata say: all that is needed to make it again."""
        return card_of(self.request, self.facts)

    @cached_property
    def image(self) -> "Image":
        """The picture as PIL has it, which keeps its metadata when it is saved as it is."""
        from runner.media.pil import image_of

        return image_of(self.pixels, self.card)

    @checked_call
    def save(self, path: "str | os.PathLike[str]", *, overwrite: bool = False) -> "Path":
        """Write the picture with its metadata, as the command line does; the path.

        Raises InvalidInput where something is there, unless it is to be overwritten.
        """
        from runner.media import pil

        return pil.save(path, self.read(), self.card, overwrite=overwrite)

    def read(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The pixels, read from the store and not kept here."""
        state = self.store.get(self.key)
        assert state is not None, f"picture {self.index} left the store"
        return state.tensors()["pixels"].numpy()


@dataclass(frozen=True)
class Report:
    """What a run did."""

    job: Job
    """What was asked for, less the requests that the model cannot make."""
    run: str
    """Its name."""
    pictures: tuple[Picture, ...]
    """Those that were made, in the order of the requests."""
    stages: tuple[StageReport, ...]
    """What each stage did."""
    keys: Mapping[str, tuple[str, ...]]
    """By stage, the artifact key of every request."""
    failures: tuple[Failure, ...] = ()
    """Requests without a picture."""
    changes: tuple[str, ...] = ()
    """What the run changed to go on after a stage ran out of memory."""
    device_map: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Where the modules of each component were, as `Plan.device_map` has it."""

    def __repr__(self) -> str:
        stages = (f"{stage.stage} {sum(stage.seconds.values()):.1f} s" for stage in self.stages)
        return f"Report({', '.join((self.run, pictures(len(self.pictures)), *stages))})"
