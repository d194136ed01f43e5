"""What memory a stage took, and the proof that it gave it back."""

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from runner.engine.report import Flushed, Leftover
from stages.machine import clear_workspaces

PATIENCE = 10


class Meter:
    """Bytes allocated on each device: the baseline at its creation, the peak since, and what is left.

    The host has no allocator to ask: there the resident set's high-water mark stands for the peak.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.cards = tuple(device for device in devices if device != "cpu")
        self._host = "cpu" in devices
        if self.cards:
            clear_workspaces()
        self.baseline = {card: torch.accelerator.memory_allocated(card) for card in self.cards}
        self.restart()

    def restart(self) -> None:
        """Count the peak anew from here."""
        for card in self.cards:
            torch.accelerator.reset_peak_memory_stats(card)
        if self._host:
            _reset_host_peak()

    def peak(self) -> dict[str, int]:
        """The most bytes allocated on each device since the last restart."""
        peaks = {card: torch.accelerator.max_memory_allocated(card) for card in self.cards}
        return peaks | ({"cpu": _host_peak()} if self._host else {})

    def used(self) -> int:
        """Bytes allocated on all cards above the baseline."""
        return sum(torch.accelerator.memory_allocated(card) - self.baseline[card] for card in self.cards)

    def flush(self) -> Flushed:
        """Give back everything that nobody holds, and say what is still held above the baseline."""
        before = self.used()
        for card in self.cards:
            torch.accelerator.synchronize(card)
        gc.collect()
        if self.cards:
            clear_workspaces()
        for _ in range(PATIENCE):
            # transformers reads weights in threads; after an error one may still be letting go of a tensor.
            if self.used() <= 0:
                break
            time.sleep(0.05)
        if self.cards:
            torch.accelerator.empty_cache()
        _trim_host()
        left = self.used()
        return Flushed(before - left, left, _leftovers(self.cards) if left > 0 else ())


def _leftovers(cards: Sequence[str], most: int = 5) -> tuple[Leftover, ...]:
    """The largest tensors on the cards that Python still holds."""
    devices = {torch.device(card) for card in cards}
    seen: dict[int, Leftover] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device in devices:
            # A tensor that is cut over processes has its part in another one.
            storage = getattr(thing, "_local_tensor", thing).untyped_storage()
            seen[storage.data_ptr()] = Leftover(type(thing).__name__, tuple(thing.shape), storage.nbytes())
    return tuple(sorted(seen.values(), key=lambda leftover: -leftover.bytes)[:most])


def _trim_host() -> None:
    if sys.platform == "linux":
        # glibc keeps freed blocks below its threshold; the next stage needs them as pages, not as a heap.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_host_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _host_peak() -> int:
    # psutil knows no peak that can be counted anew.
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
