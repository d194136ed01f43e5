"""The standard streams of a command line, which somebody may stop reading at any moment."""

import errno
import json
import os
import sys
from collections.abc import Iterable
from typing import TextIO

from runner.text import clean, harmless
from stages.errors import StoreError

COLUMNS = 80
# What a write ends with when nobody reads any more: a pipe or a terminal whose other end is gone.
_GONE = frozenset((errno.EPIPE, errno.EIO, errno.EBADF))


class TolerantStream:
    """A text stream that goes quiet, instead of raising, once nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Write what the encoding of the stream can say; nothing once the other end is gone.

        Raises StoreError where there is no room for it, unless it is standard error, where nothing could be said.
        """
        try:
            return self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        """Flush, unless the other end is gone; raises what `write` raises."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def isatty(self) -> bool:
        """Whether a person is likely to watch."""
        return self._stream.isatty()

    @property
    def columns(self) -> int:
        """How wide a line may be: as wide as the terminal, and 80 at most."""
        return columns(self._stream)

    def fileno(self) -> int:
        """The number of the file below."""
        return self._stream.fileno()

    def _leave(self, error: OSError) -> None:
        # What the stream still holds would be written, and fail, once more when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if error.errno not in _GONE and self._stream is not sys.stderr:
            raise StoreError(f"cannot write standard output: {error.strerror} -> make room; what was finished is "
                             f"kept") from error


def columns(stream: TextIO) -> int:
    """How wide a line may be on a stream: as wide as its terminal or as COLUMNS says, and 80 at most."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said) > 0:
        return min(COLUMNS, int(said))
    try:
        return min(COLUMNS, os.get_terminal_size(stream.fileno()).columns or COLUMNS)
    except (OSError, ValueError):
        return COLUMNS


def say(stream: TextIO, lines: Iterable[str]) -> None:
    """Write lines to a stream that may be gone; of what others wrote, nothing acts on a terminal."""
    say_exactly(stream, map(harmless, lines))


def say_exactly(stream: TextIO, lines: Iterable[str]) -> None:
    """Write lines as they are: paths, which programs read."""
    out = TolerantStream(stream)
    out.write("".join(f"{line}\n" for line in lines))
    out.flush()


def say_json(stream: TextIO, value: object) -> None:
    """Write a value as a line of JSON that is readable, in which nothing acts on a terminal and nothing is lost."""
    text = json.dumps(value, ensure_ascii=False)
    say_exactly(stream, ["".join(c if c == " " or harmless(c) else json.dumps(c)[1:-1] for c in text)])


def warn(text: str) -> None:
    """A warning on standard error."""
    say(sys.stderr, [f"warning: {clean(text)}"])
