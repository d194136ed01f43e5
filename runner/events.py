"""What happens in a run is told through one callable; here it is, and the text that it may carry."""

import json
import os
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import TextIO

Emit = Callable[[str, Mapping[str, object]], None]

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def silent(kind: str, data: Mapping[str, object]) -> None:
    """The emit that tells nobody."""


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


def gib(count: int) -> str:
    """Bytes for people: `1.5 GiB`, `12.0 MiB`, `0 B`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def clean(text: str) -> str:
    """`text` on one line without what moves a cursor or turns the reading direction."""
    spaced = " ".join(text.split())
    if spaced.isascii() and spaced.isprintable():
        return spaced
    return "".join(c for c in spaced if c not in BIDI and unicodedata.category(c) not in ("Cc", "Cs"))


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
