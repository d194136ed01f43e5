"""Files read into the page cache before somebody asks for them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from stages.host_memory import host_memory

# What the current stage and the process may still take; a page cache that pushes those out would cost more.
SPARE = 2 * 2**30
# Asked for more at once, the system reads only as much as the disk takes at a time; it takes this much everywhere.
PIECE = 128 * 2**10


@contextmanager
def reading_ahead(files: Iterable[Path]) -> Iterator[int]:
    """In the block a thread has the system read the files, one after the other; 0 bytes where host memory is short.

    Nobody waits for it: a page that is not there yet is read when it is needed. At the end of the block it stops.
    """
    known = list(files)
    needed = sum(file.stat().st_size for file in known)
    if not hasattr(os, "posix_fadvise") or needed + SPARE > host_memory()[1]:
        yield 0
        return
    over = Event()
    thread = Thread(target=_read, args=(known, over), name="readahead", daemon=True)
    thread.start()
    try:
        yield needed
    finally:
        over.set()
        thread.join()


def _read(files: Sequence[Path], over: Event) -> None:
    # A file that is gone meanwhile is an error for those who load it.
    with suppress(OSError):
        for file in files:
            with file.open("rb") as opened:
                for start in range(0, file.stat().st_size, PIECE):
                    if over.is_set():
                        return
                    os.posix_fadvise(opened.fileno(), start, PIECE, os.POSIX_FADV_WILLNEED)
