"""The pictures of a job, each written to its file as soon as it is there."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from runner.events import Emit
from runner.job import Job
from runner.media.image import card_of, picture_file, shows
from runner.media.paths import write
from runner.request import FilledRequest
from stages.errors import InvalidInput


class Finished(Protocol):
    """A picture that was made."""

    @property
    def index(self) -> int:
        """That of its request in the whole run."""

    @property
    def request(self) -> FilledRequest:
        """What was asked for."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its metadata say besides the request."""

    def read(self) -> Any:
        """Its pixels, uint8 [height, width, 3]."""


class PictureWriter:
    """Writes the pictures of a job, and tells `emit` of each.

    A picture whose name was taken meanwhile is told to `failed` with its position in the job, unless it is the only
    one of the job.
    """

    def __init__(self, job: Job, emit: Emit, failed: Callable[[int, str], None]) -> None:
        self._job, self._emit, self._failed = job, emit, failed
        self._positions = job.positions
        self.seconds = 0.0

    def write(self, picture: Finished) -> None:
        """Write a picture, or leave the same one that is there; StoreError where it cannot be."""
        begin = time.perf_counter()
        position = self._positions[picture.index]
        path, card = Path(self._job.output.paths[position]), card_of(picture.request, picture.facts)
        try:
            kept = self._written(path, picture, card)
        except InvalidInput as error:
            if len(self._job.requests) == 1:
                raise
            self._failed(position, error.text)
            self._emit("failure", {"stage": "decode", "request": position, "text": error.text,
                                   **label(self._job, position)})
        else:
            self._emit("picture", {"path": str(path), "index": picture.index, "seed": picture.request.seed,
                                   "position": position, "kept": kept, "card": card, **label(self._job, position)})
        self.seconds += time.perf_counter() - begin

    def _written(self, path: Path, picture: Finished, card: Mapping[str, Any]) -> bool:
        pixels, output = picture.read(), self._job.output
        if not output.overwrite and os.path.lexists(path) and shows(path, pixels):
            return True
        write(path, picture_file(path, pixels, card if output.metadata else None), overwrite=output.overwrite)
        return False


def labelled(job: Job, emit: Emit) -> Emit:
    """The emit of a job's run: the same events, a failure with the line and the id that it concerns."""

    def heard(kind: str, data: Mapping[str, Any]) -> None:
        emit(kind, {**data, **label(job, data["request"])} if kind == "failure" and job.labels else data)

    return heard


def label(job: Job, position: int) -> dict[str, Any]:
    """The line and the id of a request, where it has them."""
    found = job.label(position)
    return {**({"line": found.line} if found.line else {}), **({} if found.id is None else {"id": found.id})}
