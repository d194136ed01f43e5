"""How fast the disk gives a model, and how long loading takes at that rate."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stages.stage import Stage

SAMPLE = 128 * 2**20
CHUNK = 8 * 2**20


def read_rate(files: Iterable[Path]) -> float | None:
    """Bytes per second from the disk itself, measured on the largest file; None where nothing can be measured.

    At most 128 MiB are read, after the system was asked to forget that it knows them.
    """
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    if largest is None or not hasattr(os, "posix_fadvise"):
        return None
    descriptor = os.open(largest, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, SAMPLE, os.POSIX_FADV_DONTNEED)
        begin, done = time.perf_counter(), 0
        while done < SAMPLE and (data := os.pread(descriptor, CHUNK, done)):
            done += len(data)
        seconds = time.perf_counter() - begin
    finally:
        os.close(descriptor)
    return done / seconds if done and seconds > 0 else None


def stored(stages: Sequence[Stage]) -> Mapping[str, int]:
    """Bytes of the weights of each stage on the disk."""
    return {stage.name: sum(file.stat().st_size for component in stage.components for file in component.files)
            for stage in stages}
