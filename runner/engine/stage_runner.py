"""One stage of a plan at work: loaded once, fed with what is to be made, measured, flushed."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch

from runner.artifacts import Store
from runner.engine import lanes
from runner.engine.keys import checkpoint_key
from runner.engine.memory import Meter
from runner.engine.oom import describe_oom
from runner.engine.report import Failure, Flushed, StageReport
from runner.engine.signals import StopRequest
from runner.engine.step_checkpoint import StepCheckpointer, StopAtStep, load_checkpoint
from runner.planning.plan import Plan
from stages.errors import BadResult, StageOutOfMemory, StoreError
from stages.events import Emit, silent
from stages.loading.readahead import reading_ahead
from stages.out_of_memory import is_out_of_memory
from stages.pipeline.stage import Loaded, Stage, forget_frames
from stages.pipeline.step_hook import StepCheckpoint
from stages.placement.placement import Places, verified
from stages.precompute.table import ModulationTable
from stages.state import State


@dataclass(frozen=True)
class WorkItem:
    """One artifact to make."""

    index: int
    """Its number among the items."""
    requests: tuple[int, ...]
    """The positions of the requests that share it."""
    key: str
    """Its key in the store."""
    source: str | None
    """The key of the artifact that it is made from; None in the first stage."""

    @property
    def request(self) -> int:
        """The first of its requests."""
        return self.requests[0]


class Collectives(Protocol):
    """What a stage asks of the other ranks that work on the same picture."""

    def begin(self, items: Sequence[WorkItem]) -> None:
        """The first rank tells the others what is to be made."""

    def broadcast_flag(self, flag: bool) -> bool:
        """The flag of the first rank."""

    def any_stopping(self, stopping: bool) -> bool:
        """Whether any rank must stop."""


def work_items(keys: Sequence[str], sources: Sequence[str] | None, todo: Sequence[int]) -> list[WorkItem]:
    """The artifacts of the requests at the positions `todo`; those of one key (one prompt, many seeds) once."""
    sharing: dict[str, list[int]] = {}
    for position in todo:
        sharing.setdefault(keys[position], []).append(position)
    return [WorkItem(index, tuple(requests), key, None if sources is None else sources[requests[0]])
            for index, (key, requests) in enumerate(sharing.items())]


def retell_warnings(store: Store, keys: Sequence[str], emit: Emit) -> None:
    """Tell `emit` once more what it was warned of when these artifacts were made."""
    for key in dict.fromkeys(keys):
        artifact = store.find(key)
        kept = () if artifact is None else artifact.note.get("warnings", ())
        for text in kept if isinstance(kept, list) else ():
            emit("warning", {"text": str(text)})


class StageRunner:
    """One stage of a plan and the store that it works on.

    `run` is the whole of it. A worker that keeps the stage loaded enters `measured` and `loaded` itself, and calls
    `process` as often as there is something to make.
    """

    def __init__(
        self,
        plan: Plan,
        stage: Stage,
        store: Store,
        emit: Emit = silent,
        *,
        stop: StopRequest | None = None,
        anew: bool = False,
        next_stage: Stage | None = None,
        made: Callable[[str], None] | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        """`anew` makes once more what the store has; `next_stage` is read ahead; `made` hears the key of an artifact.

        With `collectives` other ranks do the same at the same time.
        """
        self.plan, self.stage, self.store, self.emit = plan, stage, store, emit
        self.stop = stop or StopRequest()
        self._anew, self._next_stage, self._made, self._collectives = anew, next_stage, made, collectives
        self.failures: list[Failure] = []
        self.made: set[str] = set()
        self.seconds = dict.fromkeys(("load", "compute", "save", "flush"), 0.0)
        self.peak: Mapping[str, int] = {}
        self.flushed = Flushed(0, 0)
        self._clock, self._failed = threading.Lock(), threading.Event()
        self._loaded: Loaded | None = None
        self._table: ModulationTable | None = None

    @property
    def lanes(self) -> int:
        """How many requests are in flight."""
        return self.plan.lanes if self.stage.name == "denoise" else 1

    def run(self, items: Sequence[WorkItem]) -> None:
        """Load the stage, make the items, and give its memory back."""
        with self.measured():
            if items:
                if self._collectives is not None:
                    self._collectives.begin(items)
                with self.loaded(items) as stage:
                    stage.process(items)

    def peak_now(self) -> Mapping[str, int]:
        """Bytes at most so far, by device."""
        return self._meter.peak()

    def report(self, ran: int, reused: int) -> StageReport:
        """What the stage did."""
        return StageReport(self.stage.name, ran, reused, self.seconds, self.peak, self.flushed, self.lanes)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the memory that the block takes, and prove at its end that it was given back.

        An error of any library that means a device is full leaves as StageOutOfMemory.
        """
        meter = self._meter = Meter(self.plan.devices)
        try:
            yield
        except StopAtStep:
            self.stop.raise_if_asked()
            raise AssertionError("a request was left at a step, and nobody asked for it") from None
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, StageOutOfMemory) or not is_out_of_memory(error):
                raise
            doing = "computing" if self.seconds["load"] else "loading"
            raise StageOutOfMemory(describe_oom(self.plan, self.stage.name, doing, meter.peak(), error),
                                   stage=self.stage.name) from None
        finally:
            self.peak = meter.peak()
            with self._timed("flush"):
                self.flushed = meter.flush()
            self.emit("flush", {"stage": self.stage.name, "freed": self.flushed.freed, "left": self.flushed.left,
                                "leftovers": [asdict(leftover) for leftover in self.flushed.leftovers]})
        self.emit("end", {"stage": self.stage.name, "seconds": self.seconds, "peak": self.peak})

    @contextmanager
    def loaded(self, items: Sequence[WorkItem] = ()) -> Iterator["StageRunner"]:
        """The stage in memory for the block; the modulation of `items` is computed before, while there is room."""
        places = verified(self.plan.places_of(self.stage.name), self.emit)
        # The patterns that were copied for this are no part of the stage.
        self._meter.restart()
        if items:
            self._table = self._tabulated(places, items)
        start = time.perf_counter()
        with self.stage.loaded(places, self.emit) as self._loaded:
            self._places = places
            self.seconds["load"] += time.perf_counter() - start
            self.emit("loaded", {"stage": self.stage.name, "seconds": self.seconds["load"]})
            try:
                yield self
            finally:
                self._loaded = self._table = None

    def process(self, items: Sequence[WorkItem]) -> None:
        """Make the items with the loaded stage; requests that fail alone become `failures`, unless it is the only one.

        Raises BadResult, StoreError, and Interrupted where the run must stop.
        """
        loaded, self._failed = self._loaded, threading.Event()
        assert loaded is not None, f"{self.stage.name} is not loaded"
        table = self._table or self._tabulated(self._places, items)
        self._table = None
        before = dict(self.seconds)
        cards = [name for name in self.plan.devices if name != "cpu"]
        try:
            with (nullcontext() if table is None else table.attached(loaded), self._reading_ahead(),
                  self.stop.patiently() if loaded.resumable else nullcontext()):
                lanes.process(loaded, self.lanes, cards, items, partial(self._run, table, len(items)), self._failed)
        except BaseException as error:
            # Here, as `loaded` gives an error the traceback back that it came with.
            forget_frames(error)
            raise
        for part in ("compute", "save"):
            self.seconds[part] = before[part] + (self.seconds[part] - before[part]) / min(self.lanes, len(items))

    @contextmanager
    def _reading_ahead(self) -> Iterator[None]:
        """While this stage computes, the files of the following one are read into the page cache."""
        if self._next_stage is None:
            yield
            return
        files = [file for component in self._next_stage.components for file in component.files]
        with reading_ahead(files) as size:
            self.emit("readahead", {"stage": self._next_stage.name, "bytes": size})
            yield

    def _run(self, table: ModulationTable | None, of: int, lane: Loaded, item: WorkItem) -> None:
        self.emit("item", {"stage": self.stage.name, "index": item.index, "of": of, "request": item.request})
        try:
            with self.store.working(item.key):
                # Another process may have made it while this one loaded or waited.
                wanted = self._anew or self.store.get(item.key) is None
                if wanted if self._collectives is None else self._collectives.broadcast_flag(wanted):
                    self._make(table, lane, item, of)
        except BadResult as error:
            if of == 1:
                raise
            self.failures.extend(Failure(position, self.stage.name, error.text) for position in item.requests)
            self.emit("failure", {"stage": self.stage.name, "request": item.request, "text": error.text})
            return
        self.made.add(item.key)
        if self._made is not None:
            self._made(item.key)

    def _make(self, table: ModulationTable | None, lane: Loaded, item: WorkItem, of: int) -> None:
        state, warnings = self._source(item), list[str]()

        def emit(kind: str, data: Mapping[str, Any]) -> None:
            if kind == "warning":
                warnings.append(str(data["text"]))
            self.emit(kind, data)

        checkpointer = StepCheckpointer(
            emit, item.key, {"index": item.index, "of": of, "request": item.request}, self._stopping,
            self.store if lane.resumable else None, self.plan.job.policy.step_every,
        )
        checkpoint = load_checkpoint(self.store, item.key) if lane.resumable else None
        if checkpoint is not None:
            self.emit("resumed", {"stage": self.stage.name, "request": item.request, "step": checkpoint.steps})
        done = 0 if checkpoint is None else checkpoint.steps
        with nullcontext() if table is None else table.request(item.request, done), self._timed("compute"):
            result = self._kept(lane, state, item, checkpointer, checkpoint)
        with self._timed("save"):
            self.store.put(item.key, self.stage.name, result, self._note(warnings))
            if lane.resumable:
                self.store.drop(checkpoint_key(item.key))

    def _kept(
        self, lane: Loaded, state: State, item: WorkItem, checkpointer: StepCheckpointer,
        checkpoint: StepCheckpoint | None,
    ) -> State:
        try:
            return lane.run(state, self.plan.requests[item.request].inputs, checkpointer, checkpoint)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                checkpointer.keep()
            raise

    def _stopping(self) -> bool:
        stopping = self.stop.asked or self._failed.is_set()
        if self._collectives is not None and self._collectives.any_stopping(stopping):
            self.stop.ask()
        return stopping or self.stop.asked

    def _tabulated(self, places: Places, items: Sequence[WorkItem]) -> ModulationTable | None:
        """The stage's modulation table, if layers of its component are left on the disk."""
        layers = places[self.stage.components[0].name].precomputed
        if not layers:
            return None
        known = {item.request: item for item in items}
        table = ModulationTable(self.stage, places, layers, list(known), lambda position: (
            self._source(known[position]), self.plan.requests[position].inputs))
        self.seconds.setdefault("table", 0.0)
        with self._timed("table"):
            table.chunk_for(items[0].request)
        self.emit("table", {"stage": self.stage.name, "layers": len(layers), "bytes": table.bytes,
                            "seconds": self.seconds["table"]})
        return table

    def _source(self, item: WorkItem) -> State:
        """What the stage reads for an item."""
        state = State() if item.source is None else self.store.get(item.source)
        if state is None:
            raise StoreError(
                f"the artifact {(item.source or '')[:12]} that {self.stage.name} reads was there and is now gone or "
                f"damaged: run again, and it will be computed anew"
            )
        return state

    def _note(self, warnings: Sequence[str]) -> dict[str, Any]:
        return {"warnings": list(warnings), "model": self.plan.checkpoint.identity, "torch": torch.__version__,
                "places": {name: str(place.placement)
                           for name, place in self.plan.places_of(self.stage.name).items()}}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of the stage's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            with self._clock:
                self.seconds[part] += took
            self.emit("part", {"stage": self.stage.name, "part": part, "seconds": took})
