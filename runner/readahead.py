"""The next stage's files, read into the page cache while the current stage computes."""

import os
from collections.abc import Iterable
from pathlib import Path

from stages.machine import host_memory

# What the current stage and the process may still take; a page cache that pushes those out would cost more.
SPARE = 2 * 2**30


def read_ahead(files: Iterable[Path]) -> int:
    """Ask the system to read the files into its page cache; the bytes asked for, 0 where host memory is short.

    The system reads on its own: nothing waits for it, and a page that is not there yet is read when it is needed.
    """
    known = [(file, file.stat().st_size) for file in files]
    needed = sum(size for _, size in known)
    if not hasattr(os, "posix_fadvise") or needed + SPARE > host_memory()[1]:
        return 0
    for file, size in known:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
    return needed
