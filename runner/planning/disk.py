"""How fast the disk gives a model, and how long loading takes at that rate."""

import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.planning.plan import Plan
from stages.pipeline.stage import Stage

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
        chunk = bytearray(CHUNK)
        begin, done = time.perf_counter(), 0
        while done < SAMPLE and (count := os.preadv(descriptor, [chunk], done)):
            done += count
        seconds = time.perf_counter() - begin
    finally:
        os.close(descriptor)
    return done / seconds if done and seconds > 0 else None


@dataclass(frozen=True)
class Disk:
    """What a plan takes from the disk."""

    free: int | None
    """Bytes that are free where the model lies; None where that is another machine, and nobody said."""
    download: int
    """Bytes that are to be downloaded."""
    stored: Mapping[str, int]
    """By stage, the bytes of its weights."""
    rate: float | None
    """Bytes that the disk gives in a second; None where that cannot be measured."""

    def seconds(self, count: int) -> float | None:
        """How long the disk takes to give so many bytes."""
        return None if self.rate is None else count / self.rate


def look(plan: Plan) -> Disk:
    """What the plan takes from the disk; the rate is measured, but not for a machine that is not here."""
    checkpoint, machine = plan.checkpoint, plan.machine
    if not machine.here:
        return Disk(machine.disk_free, checkpoint.bytes_elsewhere, stored(plan.stages), None)
    files = [file for component in checkpoint.components.values() for file in component.files]
    here = [file for file in files if file.suffix == ".safetensors"]
    return Disk(shutil.disk_usage(checkpoint.path).free, checkpoint.bytes_to_download, stored(plan.stages),
                read_rate(here))


def stored(stages: Sequence[Stage]) -> Mapping[str, int]:
    """Bytes of the weights of each stage on the disk."""
    return {stage.name: sum(component.bytes for component in stage.components) for stage in stages}
