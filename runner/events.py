"""What happens in a run is told through one callable; here it is, and the text that it may carry."""

import json
import os
import time
from collections.abc import Mapping
from typing import TextIO

from stages.events import Emit as Emit
from stages.events import silent as silent


def tee(*emits: Emit) -> Emit:
    """One emit that tells all of `emits`."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        for each in emits:
            each(kind, data)

    return emit


def json_lines(stream: TextIO) -> Emit:
    """Writes every event as one JSON line with its `kind` and the `time` in seconds since 1970."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        facts = {name: value for name, value in data.items() if not callable(value)}
        stream.write(json.dumps({"time": round(time.time(), 3), "kind": kind, **facts}, default=str) + "\n")
        stream.flush()

    return emit


class Tolerant:
    """A text stream that goes quiet, instead of raising, once nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Write what the encoding of the stream can say; nothing once the other end is gone."""
        try:
            return self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        """Flush, unless the other end is gone."""
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def isatty(self) -> bool:
        """Whether a person is likely to watch."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The number of the file below."""
        return self._stream.fileno()

    def _leave(self) -> None:
        # What the stream still holds would be written, and fail, once more when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
