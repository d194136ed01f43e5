"""The standard streams of a command line, which somebody may stop reading at any moment."""

import os
import sys
from collections.abc import Iterable
from typing import TextIO

from runner.text import clean


class TolerantStream:
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


def say(stream: TextIO, lines: Iterable[str]) -> None:
    """Write lines to a stream that may be gone."""
    out = TolerantStream(stream)
    out.write("".join(f"{line}\n" for line in lines))
    out.flush()


def warn(text: str) -> None:
    """A warning on standard error."""
    say(sys.stderr, [f"warning: {clean(text)}"])
