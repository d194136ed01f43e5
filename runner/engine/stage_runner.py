"""One stage's turn in a run: load, work through the requests, keep the results, flush."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.artifacts import ArtifactStore
from runner.distributed.collectives import Collectives
from runner.engine import lanes
from runner.engine.keys import midway_key
from runner.engine.memory import Flushed, Meter
from runner.engine.oom_message import shortage
from runner.engine.signals import StopRequest
from runner.engine.step_checkpoint import StepCheckpointer, StopAtStep, midway_of
from runner.planning.plan import Plan, inputs_of
from runner.reports import notebook_html
from stages.errors import BadResult, StageOutOfMemory, StoreError
from stages.events import Emit
from stages.loading.readahead import reading_ahead
from stages.pipeline.stage import Inputs, Loaded, Stage
from stages.pipeline.step_hook import StepCheckpoint
from stages.placement.placement import Places, verified
from stages.precompute.table import ModulationTable
from stages.state import State


@dataclass(frozen=True)
class StageReport:
    """What a stage did: requests computed and re-used, seconds by part, peak bytes by device, the flush.

    With several `lanes`, their compute and save seconds are averages.
    """

    stage: str
    ran: int
    reused: int
    seconds: Mapping[str, float]
    peak: Mapping[str, int]
    flushed: Flushed
    lanes: int = 1

    def __repr__(self) -> str:
        return notebook_html.stage_line(self)

    def _repr_html_(self) -> str:
        return notebook_html.stages_html(self)


@dataclass(frozen=True)
class Failure:
    """A request that came to nothing, while others went on: its number in the plan, the stage and the reason."""

    index: int
    stage: str
    text: str


@dataclass(frozen=True)
class WorkItem:
    """One artifact of a shift: its number in it, the requests that share it, its key, and the key to read."""

    position: int
    indices: Sequence[int]
    key: str
    before: str | None

    @property
    def index(self) -> int:
        """The first of its requests."""
        return self.indices[0]


@dataclass
class StageRunner:
    """One stage of a plan with its store.

    The keys of what is made are added to `made` and told to `finished`; requests that fail alone go to `failures`.
    With `company`, other ranks do the same at the same time.
    """

    plan: Plan
    stage: Stage
    store: ArtifactStore
    emit: Emit
    halt: StopRequest = field(default_factory=StopRequest)
    step_every: float = 10.0
    anew: bool = False
    following: Stage | None = None
    failures: list[Failure] = field(default_factory=list)
    made: set[str] = field(default_factory=set)
    finished: Callable[[str], None] | None = None
    company: Collectives | None = None

    def __post_init__(self) -> None:
        self.seconds = dict.fromkeys(("load", "compute", "save", "flush"), 0.0)
        self._clock, self._broken = threading.Lock(), threading.Event()
        self._table: ModulationTable | None = None

    @property
    def lanes(self) -> int:
        """How many requests are in flight."""
        return self.plan.lanes if self.stage.name == "denoise" else 1

    def work(self, keys: Sequence[str], before: Sequence[str] | None, todo: Sequence[int]) -> StageReport:
        """Compute `todo`, the indices of the requests whose artifact is missing; `before` are the keys to read."""
        name = self.stage.name
        self.emit("stage", {"stage": name, "requests": len(keys), "reused": len(keys) - len(todo)})
        # Requests that share an artifact (one prompt, many seeds) are computed once.
        sharing: dict[str, list[int]] = {}
        for index in todo:
            sharing.setdefault(keys[index], []).append(index)
        errands = [WorkItem(position, indices, key, None if before is None else before[indices[0]])
                   for position, (key, indices) in enumerate(sharing.items())]
        places = {component.name: self.plan.places[component.name] for component in self.stage.components}
        meter = Meter(self.plan.devices)
        try:
            if errands:
                places = dict(verified(places, self.emit))
                # The patterns that were copied for this are no part of the stage.
                meter.restart()
                if self.company is not None:
                    self.company.begin(keys, before, todo)
                self._compute(errands, places)
        except StopAtStep:
            self.halt.stop()
            raise AssertionError("a request was left midway, and nobody asked for it") from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            doing = "computing" if self.seconds["load"] else "loading"
            raise StageOutOfMemory(shortage(self.plan, name, doing, meter.peak(), error),
                                   stage=name) from None
        finally:
            peak = meter.peak()
            with self._timed("flush"):
                flushed = meter.flush()
            self.emit("flush", {"stage": name, "freed": flushed.freed, "left": flushed.left,
                                "leftovers": [vars(leftover) for leftover in flushed.leftovers]})
        self.emit("end", {"stage": name, "seconds": self.seconds, "peak": peak})
        return StageReport(name, len(todo), len(keys) - len(todo), self.seconds, peak, flushed, self.lanes)

    def _compute(self, errands: Sequence[WorkItem], places: Places) -> None:
        self._table = self._tabulated(places, errands)
        start = time.perf_counter()
        with (self.stage.loaded(places, self.emit) as loaded,
              nullcontext() if self._table is None else self._table.attached(loaded)):
            self.seconds["load"] = time.perf_counter() - start
            self.emit("loaded", {"stage": self.stage.name, "seconds": self.seconds["load"]})
            cards = [name for name in self.plan.devices if name != "cpu"]
            with self._reading_ahead(), self.halt.patiently() if loaded.resumable else nullcontext():
                lanes.work(loaded, self.lanes, cards, errands, lambda lane, errand: self._run(
                    lane, errand, len(errands)), self._broken)
        for part in ("compute", "save"):
            self.seconds[part] /= min(self.lanes, len(errands))

    @contextmanager
    def _reading_ahead(self) -> Iterator[None]:
        """While this stage computes, the files of the following one are read into the page cache."""
        if self.following is None:
            yield
            return
        files = [file for component in self.following.components for file in component.files]
        with reading_ahead(files) as size:
            self.emit("readahead", {"stage": self.following.name, "bytes": size})
            yield

    def _run(self, lane: Loaded, errand: WorkItem, of: int) -> None:
        self.emit("item", {"stage": self.stage.name, "index": errand.position, "of": of, "request": errand.index})
        try:
            with self.store.working(errand.key):
                # Another process may have made it while this one loaded or waited.
                wanted = self.anew or self.store.get(errand.key) is None
                if wanted if self.company is None else self.company.agreed(wanted):
                    self._make(lane, errand, of)
        except BadResult as error:
            if of == 1:
                raise
            self.failures.extend(Failure(index, self.stage.name, str(error)) for index in errand.indices)
            self.emit("failure", {"stage": self.stage.name, "request": errand.index, "text": str(error)})
            return
        self.made.add(errand.key)
        if self.finished is not None:
            self.finished(errand.key)

    def _make(self, lane: Loaded, errand: WorkItem, of: int) -> None:
        state, inputs = self._state(errand), inputs_of(self.plan.requests[errand.index])
        keeper = StepCheckpointer(
            self.emit, errand.key, {"index": errand.position, "of": of, "request": errand.index}, self._stopping,
            self.store if lane.resumable else None, self.step_every,
        )
        midway = midway_of(self.store, errand.key) if lane.resumable else None
        if midway is not None:
            self.emit("rejoin", {"stage": self.stage.name, "request": errand.index, "step": midway.steps})
        done = 0 if midway is None else midway.steps
        with nullcontext() if self._table is None else self._table.request(errand.index, done), self._timed("compute"):
            result = self._kept(lane, state, inputs, keeper, midway)
        with self._timed("save"):
            self.store.put(errand.key, self.stage.name, result, self._note())
            if lane.resumable:
                self.store.drop(midway_key(errand.key))

    def _kept(
        self, lane: Loaded, state: State, inputs: Inputs, keeper: StepCheckpointer, midway: StepCheckpoint | None
    ) -> State:
        try:
            return lane.run(state, inputs, keeper, midway)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                keeper.keep()
            raise

    def _stopping(self) -> bool:
        wish = self.halt.asked or self._broken.is_set()
        if self.company is not None and self.company.stopping(wish):
            self.halt.ask()
        return wish or self.halt.asked

    def _tabulated(self, places: Places, errands: Sequence[WorkItem]) -> ModulationTable | None:
        """The stage's modulation table, if layers of its component are left on the disk."""
        layers = places[self.stage.components[0].name].precomputed
        if not layers:
            return None
        known = {errand.index: errand for errand in errands}
        table = ModulationTable(self.stage, places, layers, list(known), lambda index: (
            self._state(known[index]), inputs_of(self.plan.requests[index])))
        self.seconds["table"] = 0.0
        with self._timed("table"):
            table.chunk_for(errands[0].index)
        self.emit("table", {"stage": self.stage.name, "layers": len(layers), "bytes": table.bytes,
                            "seconds": self.seconds["table"]})
        return table

    def _state(self, errand: WorkItem) -> State:
        """What the stage reads for a request."""
        state = State() if errand.before is None else self.store.get(errand.before)
        if state is None:
            raise StoreError(
                f"the artifact {(errand.before or '')[:12]} that {self.stage.name} reads was there and is now gone or "
                f"damaged: run again, and it will be computed anew"
            )
        return state

    def _note(self) -> dict[str, Any]:
        return {"model": self.plan.checkpoint.identity, "torch": torch.__version__,
                "places": {c.name: str(self.plan.places[c.name].placement) for c in self.stage.components}}

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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the host has no memory left."""
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)
