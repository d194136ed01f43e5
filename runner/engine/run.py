"""A run: stage by stage, every request through each, so that each weight is loaded once."""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from runner.artifacts import ArtifactStore, MemoryStore, key_of, open_store
from runner.distributed.collectives import Collectives
from runner.engine.keys import STAGES, chain, midway_key, missing, starts
from runner.engine.lanes import one_at_a_time
from runner.engine.oom import relieved
from runner.engine.recorder import Recorder
from runner.engine.signals import Interrupted, StopRequest
from runner.engine.stage_runner import Failure, StageReport, StageRunner
from runner.media.latent_rgb import colors_of
from runner.media.previews import Previewer
from runner.planning import describe
from runner.planning.plan import Plan
from runner.reports import notebook_html
from runner.reports.record import described
from runner.request import Request
from stages.errors import BadResult, StageOutOfMemory
from stages.events import Emit, silent
from stages.pipeline.stage import Stage
from stages.state import State


@dataclass(frozen=True)
class Picture:
    """One finished picture; its pixels stay in the store until somebody asks."""

    index: int
    request: Request
    key: str
    store: ArtifactStore
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        return notebook_html.picture_line(self)

    def _repr_html_(self) -> str:
        return notebook_html.picture_html(self)

    @cached_property
    def pixels(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """uint8 [height, width, 3]."""
        return self.read()

    def read(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The pixels, read from the store and not kept here."""
        state = self.store.get(self.key)
        assert state is not None, f"picture {self.index} left the store"
        pixels = state.values["pixels"]
        assert isinstance(pixels, torch.Tensor)
        return pixels.numpy()


Done = Callable[[Picture], None]


@dataclass(frozen=True)
class Report:
    """What a run did: `failures` are requests without a picture, `changes` what it changed to go on.

    `device_map` is that of its plan, as it was at the end.
    """

    run: str
    pictures: tuple[Picture, ...]
    stages: tuple[StageReport, ...]
    keys: Mapping[str, tuple[str, ...]]
    failures: tuple[Failure, ...] = ()
    changes: tuple[str, ...] = ()
    device_map: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return notebook_html.report_line(self)

    def _repr_html_(self) -> str:
        return notebook_html.report_html(self)


def run_all(
    plan: Plan,
    *,
    store: ArtifactStore | None = None,
    emit: Emit = silent,
    stop_after: str | None = None,
    from_stage: str | None = None,
    name: str | None = None,
    record: Mapping[str, object] | None = None,
    done: Done | None = None,
    stop: Callable[[], bool] | None = None,
    step_every: float = 10.0,
    degrade: bool = True,
    preview: int = 0,
    sample_memory: bool = False,
    company: Collectives | None = None,
) -> Report:
    """Make every picture of the plan, re-using what the store has; `done` is told of each as soon as it is there.

    `stop_after` ends the run behind a stage; `from_stage` computes that stage and those behind it anew. `record` is
    kept with the run. An unfinished denoise is kept every `step_every` seconds. A signal, or `stop` once it is true,
    ends the run after the current step: Interrupted. A stage that runs out of memory is tried once more with one
    thing changed, unless `degrade` is False. Rough pictures are told of every `preview` steps; with `sample_memory`,
    memory is recorded ten times a second, too. A denoise that is cut over cards needs the `company` of other ranks.

    Raises BadResult, ModelError, StageOutOfMemory or StoreError; what was finished before stays in the store.
    """
    if not plan.machine.here:
        raise ValueError("this is a plan for cards that are not here: plan without machine= to run")
    if plan.checkpoint.bytes_to_download:
        raise ValueError(f"{plan.checkpoint.bytes_to_download} bytes of weights are not here: plan with weights=True "
                         f"to run")
    if company is None:
        check_whole(plan)
    seen = Recorder(emit, plan.devices, often=sample_memory)
    emit = one_at_a_time(seen)
    store = store or open_store("memory", warn=lambda text: emit("warning", {"text": text}))
    name = name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    if preview:
        emit = one_at_a_time(Previewer(seen, preview, plan.requests, colors_of(plan, store)))
    run = Run(plan, store, emit, seen, name, dict(record or {}), StopRequest(stop), step_every, degrade, done,
              company)
    return run.go(stop_after, from_stage)


def run_stage(
    plan: Plan, stage: str, *, store: ArtifactStore, emit: Emit = silent, states: Sequence[State] | None = None
) -> list[State]:
    """One stage alone, for every request: the states after it. The stages before it must be in the store.

    With `states`, one for each request, it works on these instead, and what it makes is returned and not kept.
    """
    if stage == "denoise":
        check_whole(plan)
    keys = chain(plan)
    index = STAGES.index(stage)
    before: Sequence[str] | None = keys[STAGES[index - 1]] if index else None
    after: Sequence[str] = keys[stage]
    if states is not None:
        store, before, after = lent(plan, stage, states)
    elif before is not None and any(store.get(key) is None for key in before):
        raise ValueError(f"{stage} needs the artifacts of {STAGES[index - 1]}: run that stage first")
    todo = [i for i, key in enumerate(after) if store.get(key) is None]
    halt = StopRequest()
    with halt.listening():
        StageRunner(plan, plan.stages[index], store, one_at_a_time(emit), halt).work(after, before, todo)
    return [state for key in after if (state := store.get(key)) is not None]


def lent(plan: Plan, stage: str, states: Sequence[State]) -> tuple[ArtifactStore, list[str], list[str]]:
    """A store of its own with `states`, their keys in it, and the keys for what the stage makes of them."""
    if stage == STAGES[0]:
        raise ValueError(f"{stage} is the first stage: it works on requests -> leave states out")
    if len(states) != len(plan.requests):
        raise ValueError(f"{len(states)} states for {len(plan.requests)} requests -> one for each")
    store = MemoryStore()
    before = [key_of({"lent": number}) for number in range(len(states))]
    for key, state in zip(before, states, strict=True):
        store.put(key, STAGES[STAGES.index(stage) - 1], state, {})
    return store, before, [key_of({"made of": key}) for key in before]


@dataclass
class Run:
    """A run that is going on."""

    plan: Plan
    store: ArtifactStore
    emit: Emit
    seen: Recorder
    name: str
    record: dict[str, object]
    halt: StopRequest
    step_every: float
    degrade: bool
    done: Done | None
    company: Collectives | None = None
    changes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._announced: set[int] = set()
        self._follow(self.plan)

    def _follow(self, plan: Plan) -> None:
        """Go by this plan from now on."""
        self.plan, self.keys, self._facts = plan, chain(plan), facts_of(plan, self.changes)
        self._sharing: dict[str, list[int]] = {}
        for position, key in enumerate(self.keys["decode"]):
            self._sharing.setdefault(key, []).append(position)

    def go(self, stop_after: str | None, from_stage: str | None) -> Report:
        """Go through the stages."""
        stages = self.plan.stages[: STAGES.index(stop_after) + 1] if stop_after else self.plan.stages
        todo = missing(self.store, stages, self.keys, from_stage)
        self.record |= {
            "model": self.plan.checkpoint.identity, "requests": [vars(r) for r in self.plan.requests],
            "stages": {stage.name: list(self.keys[stage.name]) for stage in stages},
        }
        self.emit("run", {"run": self.name, "requests": len(self.plan.requests),
                          "model": self.plan.checkpoint.source, "seed": self.plan.requests[0].seed})
        self._tell_unread()
        for key in self.keys["denoise"] if from_stage in ("encode", "denoise") else ():
            self.store.drop(midway_key(key))
        reports = []
        with self.store.running(self.name), self._recorded(), self.halt.listening(), self.seen:
            for index, stage in enumerate(stages):
                following = next((later for later in stages[index + 1 :] if todo[later.name]), None)
                shift = StageRunner(self.plan, stage, self.store, self.emit, self.halt, self.step_every,
                              starts(from_stage, stage), following, self.failures,
                              company=self.company if stage.name == "denoise" else None)
                reports.append(self._worked(shift, stages[index - 1] if index else None, todo[stage.name]))
        pictures = () if stop_after in ("encode", "denoise") else tuple(self._pictures())
        return Report(self.name, pictures, tuple(reports), self.keys, tuple(self.failures), tuple(self.changes),
                      self.plan.device_map)

    def _tell_unread(self) -> None:
        """Warn of tensors that only the files have: they may be of another model than the config."""
        for name, weights in self.plan.weights.items():
            if weights.extra:
                more = f" and {len(weights.extra) - 1:,} more" if len(weights.extra) > 1 else ""
                self.emit("warning", {"text": f"the model has no use for what the files of {name} hold besides its "
                                              f"weights: {weights.extra[0]}{more}"})

    def _worked(self, shift: StageRunner, earlier: Stage | None, todo: Sequence[int]) -> StageReport:
        """The stage done, with one thing changed where it ran out of memory."""
        try:
            return self._tried(shift, earlier, todo)
        except StageOutOfMemory as error:
            relief = relieved(self.plan, shift.stage.name) if self.degrade else None
            if relief is None:
                raise
            shortage = str(error)
        changed, text = relief
        self.changes.append(text)
        self._follow(changed)
        self.record["stages"] = {name: list(self.keys[name]) for name in STAGES[: STAGES.index(shift.stage.name) + 1]}
        self.emit("warning", {"text": f"{shortage} Trying once more: {text}"})
        return self._tried(replace(shift, plan=self.plan), earlier, todo)

    def _tried(self, shift: StageRunner, earlier: Stage | None, todo: Sequence[int]) -> StageReport:
        keys = self.keys[shift.stage.name]
        lost = {failure.index for failure in self.failures}
        # Not what an earlier try made, nor what came to nothing before.
        todo = [index for index in todo if index not in lost and keys[index] not in shift.made]
        if shift.stage.name == "decode" and self.done is not None:
            shift = replace(shift, finished=self._announce)
            waiting = {keys[index] for index in todo}
            for key in dict.fromkeys(key for index, key in enumerate(keys) if index not in lost):
                if key not in waiting:
                    self._announce(key)
        report = shift.work(keys, None if earlier is None else self.keys[earlier.name], todo)
        if len({failure.index for failure in self.failures}) == len(self.plan.requests):
            raise BadResult(f"every picture failed; the first: {self.failures[0].text}")
        return report

    def _announce(self, key: str) -> None:
        """Tell of the pictures that are the artifact `key`, once."""
        assert self.done is not None
        for position in self._sharing.get(key, ()):
            if position not in self._announced:
                self._announced.add(position)
                self.done(self._picture(position))

    def _pictures(self) -> Iterator[Picture]:
        """The pictures that have not failed."""
        lost = {failure.index for failure in self.failures}
        return (self._picture(position) for position in range(len(self.plan.requests)) if position not in lost)

    def _picture(self, position: int) -> Picture:
        request = self.plan.requests[position]
        return Picture(request.index, request, self.keys["decode"][position], self.store, self._facts)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep the run's record with how it stands: running, and then done, interrupted or failed."""
        self._save("running")
        try:
            yield
        except Interrupted as stopped:
            stopped.run = self.name
            self._save("interrupted")
            raise
        except Exception as error:
            self._save("failed", error=f"{type(error).__name__}: {error}")
            raise
        self._save("done")

    def _save(self, status: str, **more: object) -> None:
        failures = [vars(failure) for failure in self.failures]
        self.store.save_run(self.name, {**self.record, **described(self.plan), **self.seen.document(),
                                        "previews": self.seen.strips.keep(self.store, self.name), "status": status,
                                        "changes": list(self.changes), "failures": failures, **more})


def check_whole(plan: Plan) -> None:
    """Raise ValueError for a denoise that one process cannot do."""
    if plan.cut:
        raise ValueError("denoise=tensor_parallel takes a process for each card -> runner.spawn(..., ranks=2, "
                         "place=['denoise=tensor_parallel']), or the command line")


def facts_of(plan: Plan, changes: Sequence[str]) -> dict[str, Any]:
    """What a picture's metadata says of how it was made."""
    return {
        "model": plan.checkpoint.source, "identity": plan.checkpoint.identity, "family": plan.family.name,
        "dtype": {name: str(place.dtype).removeprefix("torch.") for name, place in plan.places.items()},
        "devices": list(plan.devices),
        **({"loras": describe.loras(plan)} if plan.checkpoint.loras else {}),
        **({} if plan.tile is None else {"tile": plan.tile}),
        **({} if not changes else {"changes": list(changes)}),
    }
