"""The pulse of a rank: once a second it says where it is, and whether it worked since."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from runner.distributed.shares import Share

EVERY = 1.0
ORPHAN = 7
# Less of the processor than this is what threads take that only wait.
_BUSY = 0.02
# What a step may take, as a multiple of the longest one before it, and what may be taken where none is over yet.
_STEPS, _FIRST = 20, 600.0


class Heartbeat:
    """An emit that follows a rank through its events, and, inside of `with`, tells `beat` of it every second.

    A beat is `{"beat": number, "where": text, "idle": seconds without a sign of work, "patience": how many of them may
    be nothing, "share": how far it is}`, None where a rank has no share of its own. Whoever waits for a card keeps a
    processor busy, so while a card computes only events and bytes that move are signs of work. The process
    ends at once when its parent does, so that no rank is left behind with a card.
    """

    def __init__(self, beat: Callable[[Mapping[str, Any]], None]) -> None:
        self.where, self.stage = "at the start", ""
        self.share: Share | None = None
        self._beat = beat
        self._item = ""
        self._card = self._computing = False
        self._longest, self._stepped = 0.0, time.monotonic()
        self._worked = time.monotonic()
        self._waiting = 0
        self._parent = os.getppid()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        self._worked = time.monotonic()
        if self.share is not None:
            self.share(kind, data)
        if kind == "begin":
            self.where = str(data["what"])
        elif kind == "stage":
            self.stage = str(data["stage"])
            self.where = f"in {self.stage}"
            self._card, self._longest = False, 0.0
        elif kind == "load":
            self._card = self._card or data["device"] != "cpu"
            self.where = f"in {self.stage}, loading {data['component']}"
        elif kind == "loaded":
            self._computing = self._card
        elif kind == "item":
            self._stepped = time.monotonic()
            self._item = self.where = f"in {self.stage}, picture {int(data['index']) + 1} of {data['of']}"
        elif kind == "step":
            now = time.monotonic()
            self._longest, self._stepped = max(self._longest, now - self._stepped), now
            self.where = f"{self._item}, step {data['step']} of {data['steps']}"
        elif kind == "end":
            self._computing = False
            self.where = f"after {data['stage']}"

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for another in the block, which is no idleness."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._worked = time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds without a sign of work that may be nothing: 0 where a processor's time is one."""
        return 0.0 if not self._computing else _STEPS * self._longest if self._longest else _FIRST

    def _run(self) -> None:
        number, used = 0, effort()
        while not self._over.wait(EVERY):
            if os.getppid() != self._parent:
                os._exit(ORPHAN)
            now = effort()
            computes = now[0] - used[0] > _BUSY * EVERY and not self._computing
            if self._waiting or computes or now[1] != used[1]:
                self._worked = time.monotonic()
            number, used = number + 1, now
            self._beat({"beat": number, "where": self.where, "idle": time.monotonic() - self._worked,
                        "patience": self.patience, "share": None if self.share is None else self.share.document()})


def effort() -> tuple[float, int]:
    """Seconds of the processor that this process has used, and the bytes that it moved from and to disks."""
    process = psutil.Process()
    # macOS does not count the bytes of a process.
    counts = process.io_counters() if hasattr(process, "io_counters") else None
    return time.process_time(), 0 if counts is None else counts.read_bytes + counts.write_bytes
