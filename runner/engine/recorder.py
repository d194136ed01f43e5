"""What the record of a run keeps of its events: memory by the second, and what took the time."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from runner.events import Emit
from runner.media.previews import Strips

BORDERS = ("stage", "load", "loaded", "table", "flush", "end")
WITHIN = ("item", "step", "part")
MOST_SAMPLES = 400
MOST_SPANS = 300
RATE = 10.0


@dataclass(frozen=True)
class Sample:
    """What memory was in use at a moment of a run."""

    seconds: float
    """The moment, from the beginning of the run."""
    stage: str
    """The stage at work."""
    what: str
    """The event that it was taken at, or "tick" from the thread that takes ten a second."""
    used: tuple[int, ...]
    """The bytes allocated on each card."""
    host: int
    """The bytes that this process holds in the host's memory, its resident set."""


@dataclass(frozen=True)
class Span:
    """A part of a stage at work, in one lane."""

    stage: str
    """The stage."""
    part: str
    """What was done: "load", "table", "compute", "save" or "flush"."""
    lane: int
    """The number of the lane that computed; 0 for everything else."""
    begin: float
    """When it began, in seconds from the beginning of the run."""
    end: float
    """When it ended, in seconds from the beginning of the run."""
    busy: float
    """Seconds at work between these two."""
    count: int = 1
    """How many pieces of work it was."""


class Recorder:
    """An emit that passes every event on and keeps what a report needs; its size does not grow with the run's.

    In a `with` statement and with `often`, memory is sampled ten times a second too, not only at events.
    """

    def __init__(
        self, emit: Emit, devices: Sequence[str], *, often: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._emit, self._clock = emit, clock
        self._cards = tuple(device for device in devices if device != "cpu")
        self._often = often
        self._process = psutil.Process()
        self._begin, self.begun = clock(), time.time()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._stage = ""
        self._lanes: dict[int, int] = {}
        self._samples: list[Sample] = []
        self._spans: list[Span] = []
        self._flushes: list[dict[str, Any]] = []
        self._peaks: dict[str, dict[str, int]] = {}
        self._warnings: list[str] = []
        self.strips = Strips()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        with self._lock:
            self._see(kind, data)
        self.strips(kind, data)
        self._emit(kind, data)

    def __enter__(self) -> "Recorder":
        if self._often:
            self._over.clear()
            self._thread = threading.Thread(target=self._tick, name="memory samples", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def document(self) -> dict[str, Any]:
        """What was seen so far, for the record of the run; seconds count from the beginning of the run."""
        with self._lock:
            return {
                "warnings": list(self._warnings),
                "timeline": {
                    "seconds": self._now(),
                    "devices": list(self._cards),
                    "samples": [[s.seconds, s.stage, s.what, list(s.used), s.host] for s in self._samples],
                    "spans": [vars(span) for span in self._spans],
                    "flushes": list(self._flushes),
                    "peaks": dict(self._peaks),
                },
            }

    def _see(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "stage":
            self._stage, self._lanes = str(data["stage"]), {}
        if kind in BORDERS or kind in WITHIN:
            self._sample(kind)
        if kind in ("loaded", "part"):
            self._span(str(data.get("part", "load")), float(data["seconds"]))
        elif kind == "flush":
            self._flushes.append({"seconds": self._now(), **{n: data[n] for n in ("stage", "freed", "left")}})
        elif kind == "end":
            self._peaks[str(data["stage"])] = dict(data.get("peak", {}))
        elif kind == "warning":
            self._warnings.append(str(data["text"]))

    def _sample(self, what: str) -> None:
        used = tuple(torch.accelerator.memory_allocated(card) for card in self._cards)
        self._samples.append(Sample(self._now(), self._stage, what, used, self._process.memory_info().rss))
        if len(self._samples) > MOST_SAMPLES:
            self._samples = thinned(self._samples)

    def _span(self, part: str, seconds: float) -> None:
        # A lane is a thread; the one that runs the stages is the first.
        lane = self._lanes.setdefault(threading.get_ident(), len(self._lanes)) if part == "compute" else 0
        now = self._now()
        self._spans.append(Span(self._stage, part, lane, max(0.0, now - seconds), now, seconds))
        if len(self._spans) > MOST_SPANS:
            self._spans = joined(self._spans)

    def _tick(self) -> None:
        while not self._over.wait(1 / RATE):
            with self._lock:
                self._sample("tick")

    def _now(self) -> float:
        return round(self._clock() - self._begin, 4)


def thinned(samples: Sequence[Sample]) -> list[Sample]:
    """Half of the samples within stages, of each two neighbors the one with more on a device; borders all stay."""
    kept: list[Sample] = []
    waiting: Sample | None = None
    for sample in samples:
        if sample.what in BORDERS:
            kept += [sample] if waiting is None else [waiting, sample]
            waiting = None
        elif waiting is None:
            waiting = sample
        else:
            kept.append(max(waiting, sample, key=lambda one: (max(one.used, default=0), one.host)))
            waiting = None
    return kept if waiting is None else [*kept, waiting]


def joined(spans: Sequence[Span]) -> list[Span]:
    """Half of the spans: every second one of a stage, part and lane becomes one with that before it."""
    kept: list[Span] = []
    waiting: dict[tuple[str, str, int], int] = {}
    for span in spans:
        row = span.stage, span.part, span.lane
        at = waiting.pop(row, None)
        if at is None:
            waiting[row] = len(kept)
            kept.append(span)
        else:
            first = kept[at]
            kept[at] = replace(first, end=span.end, busy=first.busy + span.busy, count=first.count + span.count)
    return kept
