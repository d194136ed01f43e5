"""A run: stage by stage, every request through each, so that each weight is loaded once."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from runner.artifacts import ArtifactStore, key_of, open_store
from runner.memory import Flushed, Meter
from runner.plan import Plan, inputs_of
from runner.readahead import read_ahead
from runner.request import Request
from stages.copies import sound
from stages.errors import StageOutOfMemory, StoreError
from stages.modulation import Modulation
from stages.placement import Places
from stages.stage import Emit, Loaded, Stage, silent
from stages.state import State

STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Picture:
    """One finished picture; its pixels stay in the store until somebody asks."""

    index: int
    request: Request
    key: str
    store: ArtifactStore = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)

    @cached_property
    def pixels(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """uint8 [height, width, 3]."""
        state = self.store.get(self.key)
        assert state is not None, f"picture {self.index} left the store"
        pixels = state.values["pixels"]
        assert isinstance(pixels, torch.Tensor)
        return pixels.numpy()


@dataclass(frozen=True)
class StageReport:
    """What a stage did: requests computed and re-used, seconds by part, peak bytes by device, the flush."""

    stage: str
    ran: int
    reused: int
    seconds: Mapping[str, float]
    peak: Mapping[str, int]
    flushed: Flushed


@dataclass(frozen=True)
class Report:
    """What a run did."""

    run: str
    pictures: tuple[Picture, ...]
    stages: tuple[StageReport, ...]
    keys: Mapping[str, tuple[str, ...]]


def run_all(
    plan: Plan,
    *,
    store: ArtifactStore | None = None,
    emit: Emit = silent,
    stop_after: str | None = None,
    from_stage: str | None = None,
    name: str | None = None,
) -> Report:
    """Make every picture of the plan, re-using what the store has.

    `stop_after` ends the run behind a stage; `from_stage` computes that stage and those behind it anew. Raises
    BadResult, LoadError, StageOutOfMemory or StoreError; what was finished before stays in the store.
    """
    if not plan.machine.here:
        raise ValueError("this is a plan for cards that are not here: plan without machine= to run")
    store = store or open_store("memory", warn=lambda text: emit("warning", {"text": text}))
    name = name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    keys = chain(plan)
    stages = plan.stages[: STAGES.index(stop_after) + 1] if stop_after else plan.stages
    todo = missing(store, stages, keys, from_stage)
    emit("run", {"run": name, "requests": len(plan.requests), "model": plan.checkpoint.source,
                 "seed": plan.requests[0].seed})
    reports = []
    record = {"model": plan.checkpoint.identity, "requests": [vars(r) for r in plan.requests],
              "stages": {stage.name: list(keys[stage.name]) for stage in stages}}
    store.save_run(name, {**record, "status": "running"})
    warned: list[str] = []
    for index, stage in enumerate(stages):
        before = keys[stages[index - 1].name] if index else None
        anew = from_stage is not None and STAGES.index(stage.name) >= STAGES.index(from_stage)
        shift = Shift(plan, stage, store, keeping(emit, warned), anew, following(stages, index, todo))
        reports.append(shift.work(keys[stage.name], before, todo[stage.name]))
    store.save_run(name, {**record, "status": "done", "warnings": list(warned)})
    pictures = () if stop_after in ("encode", "denoise") else tuple(
        Picture(request.index, request, key, store, facts(plan))
        for request, key in zip(plan.requests, keys["decode"], strict=True)
    )
    return Report(name, pictures, tuple(reports), keys)


def run_stage(plan: Plan, stage: str, *, store: ArtifactStore, emit: Emit = silent) -> list[State]:
    """One stage alone, for every request: the states after it. The stages before it must be in the store."""
    keys = chain(plan)
    index = STAGES.index(stage)
    before = keys[STAGES[index - 1]] if index else None
    if before is not None and any(store.get(key) is None for key in before):
        raise ValueError(f"{stage} needs the artifacts of {STAGES[index - 1]}: run that stage first")
    todo = [i for i, key in enumerate(keys[stage]) if store.get(key) is None]
    Shift(plan, plan.stages[index], store, emit).work(keys[stage], before, todo)
    return [state for key in keys[stage] if (state := store.get(key)) is not None]


def chain(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Per stage, the artifact key of every request: the hash of everything that changes the artifact."""
    keys: dict[str, tuple[str, ...]] = {}
    before: Sequence[str] = [plan.checkpoint.identity] * len(plan.requests)
    for stage in plan.stages:
        types = {c.name: str(plan.places[c.name].dtype) for c in stage.components}
        # A picture decoded in tiles is another picture.
        tile = {"tile": plan.tile} if stage.name == "decode" and plan.tile is not None else {}
        versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
        before = keys[stage.name] = tuple(
            key_of({"before": key, "stage": stage.name, "versions": versions, "dtype": types, **tile,
                    "inputs": {n: v for n, v in inputs_of(request).items() if n in stage.inputs}})
            for key, request in zip(before, plan.requests, strict=True)
        )
    return keys


def missing(
    store: ArtifactStore, stages: Sequence[Stage], keys: Mapping[str, Sequence[str]], from_stage: str | None
) -> dict[str, list[int]]:
    """Per stage, the requests that must be computed: those whose later artifact is needed and not there."""
    todo: dict[str, list[int]] = {}
    needed: Iterable[int] = range(len(keys[stages[-1].name]))
    for stage in reversed(stages):
        anew = from_stage is not None and STAGES.index(stage.name) >= STAGES.index(from_stage)
        needed = [i for i in needed if anew or store.get(keys[stage.name][i]) is None]
        if needed and from_stage is not None and not anew:
            raise ValueError(
                f"--from-stage {from_stage} needs the artifacts of {stage.name}, and {len(needed)} are not in the "
                f"store: leave --from-stage out, or name the store with --artifacts"
            )
        todo[stage.name] = needed
    return todo


@dataclass
class Shift:
    """One stage's turn in a run: load, work through the requests, keep the results, flush."""

    plan: Plan
    stage: Stage
    store: ArtifactStore
    emit: Emit
    anew: bool = False
    following: Stage | None = None

    def work(self, keys: Sequence[str], before: Sequence[str] | None, todo: Sequence[int]) -> StageReport:
        """Compute `todo`, the indices of the requests whose artifact is missing; `before` are the keys to read."""
        name = self.stage.name
        self.emit("stage", {"stage": name, "requests": len(keys), "reused": len(keys) - len(todo)})
        seconds = dict.fromkeys(("load", "compute", "save", "flush"), 0.0)
        meter = Meter(self.plan.devices)
        try:
            self._compute(list(todo), keys, before, seconds)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise StageOutOfMemory(self._shortage(error, meter)) from None
        finally:
            peak = meter.peak()
            with timed(seconds, "flush"):
                flushed = meter.flush()
            self.emit("flush", {"stage": name, "freed": flushed.freed, "left": flushed.left,
                                "leftovers": [vars(leftover) for leftover in flushed.leftovers]})
        self.emit("end", {"stage": name, "seconds": seconds, "peak": peak})
        return StageReport(name, len(todo), len(keys) - len(todo), seconds, peak, flushed)

    def _compute(
        self, todo: list[int], keys: Sequence[str], before: Sequence[str] | None, seconds: dict[str, float]
    ) -> None:
        # Requests that share an artifact (one prompt, many seeds) are computed once.
        first = {keys[index]: index for index in reversed(todo)}
        if not first:
            return
        places = sound({c.name: self.plan.places[c.name] for c in self.stage.components}, self.emit)
        table = self._table(places, sorted(first.values()), before, seconds)
        start = time.perf_counter()
        with self.stage.loaded(places, self.emit) as loaded:
            if table is not None:
                table.attach(loaded)
            seconds["load"] = time.perf_counter() - start
            self.emit("loaded", {"stage": self.stage.name, "seconds": seconds["load"]})
            if self.following is not None:
                files = [file for component in self.following.components for file in component.files]
                self.emit("readahead", {"stage": self.following.name, "bytes": read_ahead(files)})
            for position, (key, index) in enumerate(sorted(first.items(), key=lambda item: item[1])):
                self.emit("item", {"stage": self.stage.name, "index": position, "of": len(first)})
                with self.store.working(key):
                    # Another process may have made it while this one loaded or waited.
                    if self.anew or self.store.get(key) is None:
                        with nullcontext() if table is None else table.request(index):
                            self._make(loaded, key, index, before, seconds)

    def _table(
        self, places: Places, order: Sequence[int], before: Sequence[str] | None, seconds: dict[str, float]
    ) -> Modulation | None:
        """The stage's modulation table, if layers of its component are left on the disk."""
        layers = places[self.stage.components[0].name].folded
        if not layers:
            return None
        table = Modulation(self.stage, places, layers, order, lambda index: (
            self._state(index, before), inputs_of(self.plan.requests[index])))
        seconds["table"] = 0.0
        with timed(seconds, "table"):
            table.open(order[0])
        self.emit("table", {"stage": self.stage.name, "layers": len(layers), "bytes": table.bytes,
                            "seconds": seconds["table"]})
        return table

    def _make(
        self, loaded: Loaded, key: str, index: int, before: Sequence[str] | None, seconds: dict[str, float]
    ) -> None:
        state = self._state(index, before)
        with timed(seconds, "compute"):
            result = loaded.run(state, inputs_of(self.plan.requests[index]), self.emit)
        with timed(seconds, "save"):
            self.store.put(key, self.stage.name, result, self._note())

    def _state(self, index: int, before: Sequence[str] | None) -> State:
        """What the stage reads for a request."""
        state = State() if before is None else self.store.get(before[index])
        if state is None:
            raise StoreError(
                f"the artifact {before[index][:12] if before else ''} that {self.stage.name} reads was there and is "
                f"now gone or damaged: run again, and it will be computed anew"
            )
        return state

    def _note(self) -> dict[str, Any]:
        return {"model": self.plan.checkpoint.identity, "torch": torch.__version__,
                "places": {c.name: str(self.plan.places[c.name].placement) for c in self.stage.components}}

    def _shortage(self, error: BaseException, meter: Meter) -> str:
        used = ", ".join(f"{device} peaked at {peak / 2**30:.2f} GiB" for device, peak in meter.peak().items())
        text = str(error).splitlines()[0]
        return f"{self.stage.name} ran out of memory ({used}): {text} The artifacts of earlier stages are kept."


def following(stages: Sequence[Stage], index: int, todo: Mapping[str, Sequence[int]]) -> Stage | None:
    """The stage behind stage `index` that will be loaded, if there is one."""
    return next((stage for stage in stages[index + 1 :] if todo[stage.name]), None)


def keeping(emit: Emit, texts: list[str]) -> Emit:
    """The same emit, which also keeps the text of every warning for the run's record."""

    def kept(kind: str, data: Mapping[str, object]) -> None:
        if kind == "warning":
            texts.append(str(data["text"]))
        emit(kind, data)

    return kept


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the host has no memory left."""
    texts = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def facts(plan: Plan) -> dict[str, Any]:
    """What a picture's metadata says of how it was made."""
    return {
        "model": plan.checkpoint.source, "identity": plan.checkpoint.identity, "family": plan.family.name,
        "dtype": {name: str(place.dtype).removeprefix("torch.") for name, place in plan.places.items()},
        "devices": list(plan.devices),
        **({} if plan.tile is None else {"tile": plan.tile}),
    }


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Any:
    """Add the time of a block to `seconds[part]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] += time.perf_counter() - start
