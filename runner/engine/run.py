"""A run: stage by stage, every request through each, so that each weight is loaded once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from runner.artifacts import Store, Where, open_store
from runner.engine.keys import artifact_keys, checkpoint_key, computed_anew, missing
from runner.engine.lent import lent
from runner.engine.oom import degrade
from runner.engine.recorder import Recorder
from runner.engine.refusals import check_listeners, check_runnable
from runner.engine.report import Failure, Picture, Report, StageReport
from runner.engine.signals import Interrupted, StopRequest
from runner.engine.stage_runner import Collectives, StageRunner, retell_warnings, work_items
from runner.events import Emit, one_at_a_time, silent
from runner.job import STAGES, Job, Origin, RunPolicy
from runner.job_defaults import new_run
from runner.media.image import commit, versions
from runner.media.latent_rgb import colors_of
from runner.media.previews import Previewer
from runner.media.writer import PictureWriter
from runner.planning import describe
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.planning.suggestions import after_out_of_memory
from runner.text import choices, shown
from stages.errors import BadResult, InvalidInput, StageOutOfMemory
from stages.machine import probe
from stages.pipeline.stage import Stage
from stages.signatures import checked_call
from stages.state import State

Done = Callable[[Picture], None]


@checked_call
def run_all(
    plan: Plan,
    policy: RunPolicy | None = None,
    *,
    store: Where | None = None,
    emit: Emit = silent,
    done: Done | None = None,
    stop: Callable[[], bool] | None = None,
    collectives: Collectives | None = None,
) -> Report:
    """Make every picture of the plan as `policy` says, or its job's, re-using what the store has.

    `store` is one, or a folder or URL; by default the job's, or one in memory where the job names none. `done` is told
    of each picture as soon as it is there; by default it goes to the file that the job's output names, if it names
    any. A signal, or `stop` once it is true, ends the run after the current step: Interrupted. A denoise that several
    processes do together needs their `collectives`.

    Raises BadResult, ModelError, StageOutOfMemory or StoreError; what was finished before stays in the store.
    """
    check_runnable(plan, collectives)
    check_listeners(emit, done, stop)
    if policy is not None:
        plan = replace(plan, job=replace(plan.job, policy=policy))
    policy = plan.job.policy
    recorder = Recorder(emit, plan.devices, often=policy.sample_memory)
    emit = one_at_a_time(recorder)
    store = _opened(plan, store, emit)
    if policy.preview:
        emit = one_at_a_time(Previewer(recorder, policy.preview, plan.requests, colors_of(plan.checkpoint, store)))
    failed: list[Failure] = []
    if done is None and plan.job.output.paths:
        done = PictureWriter(plan.job, emit, lambda position, text: failed.append(
            Failure(position, STAGES[-1], text))).write
    report = Run(plan, store, emit, recorder, StopRequest(stop), done, collectives).go()
    return replace(report, failures=(*report.failures, *failed))


@checked_call
def run_stage(
    plan: Plan, stage: str, *, store: Where | None = None, emit: Emit = silent, states: Sequence[State] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[State]:
    """One stage alone, for every request: the states after it. The stages before it must be in the store.

    `store` and `stop` are as in `run_all`. With `states`, one for each request, the stage works on these instead, and
    what it makes is returned and not kept. Raises InvalidInput, before anything is loaded, for states that it cannot
    work on.
    """
    if stage not in STAGES:
        raise InvalidInput(f"there is no stage {shown(str(stage))} -> {choices(str(stage), STAGES)}")
    check_runnable(plan, None, stage)
    check_listeners(emit, stop=stop)
    store = _opened(plan, store, emit)
    keys = artifact_keys(plan)
    index = STAGES.index(stage)
    sources: Sequence[str] | None = keys[STAGES[index - 1]] if index else None
    made: Sequence[str] = keys[stage]
    if states is not None:
        kept = [store.get(key) for key in sources or ()]
        store, sources, made = lent(plan, stage, states, kept)
    elif sources is not None and any(store.get(key) is None for key in sources):
        raise InvalidInput(f"{stage} needs the artifacts of {STAGES[index - 1]}: run that stage first")
    todo = [position for position, key in enumerate(made) if store.get(key) is None]
    stopping = StopRequest(stop)
    with stopping.listening():
        emit("stage", {"stage": stage, "requests": len(made), "reused": len(made) - len(todo)})
        StageRunner(plan, plan.stage(stage), store, one_at_a_time(emit), stop=stopping).run(
            work_items(made, sources, todo))
    return [state for key in made if (state := store.get(key)) is not None]


def _opened(plan: Plan, store: Where | None, emit: Emit) -> Store:
    """The store that is meant, opened."""
    where = (plan.job.store or "memory") if store is None else store
    return open_store(where, warn=lambda text: emit("warning", {"text": text}), strict=plan.job.policy.strict)


class Run:
    """A run that is going on in this process."""

    def __init__(
        self, plan: Plan, store: Store, emit: Emit, recorder: Recorder, stop: StopRequest, done: Done | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        self.store, self.emit, self.recorder, self.stop, self.done = store, emit, recorder, stop, done
        self.collectives, self.name = collectives, plan.job.run or new_run()
        self.changes: list[str] = []
        self.failures: list[Failure] = []
        self._kept: dict[int, Picture] = {}
        self._announced: set[int] = set()
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        """Go by this plan from now on."""
        self.plan, self.keys = plan, artifact_keys(plan)
        self._facts = {tile: facts_of(plan, self.changes, tile) for tile in (None, plan.tile)}
        # A picture that is made stays as it was, whatever the others need.
        self.keys["decode"] = tuple(self._kept[position].key if position in self._kept else key
                                    for position, key in enumerate(self.keys["decode"]))
        self._planned = record_of(plan, self.name, self.keys)
        self._sharing: dict[str, list[int]] = {}
        for position, key in enumerate(self.keys["decode"]):
            self._sharing.setdefault(key, []).append(position)

    def go(self) -> Report:
        """Go through the stages."""
        policy = self.plan.job.policy
        stages = self.plan.stages[: STAGES.index(policy.stop_after or STAGES[-1]) + 1]
        todo = missing(self.store, stages, self.keys, policy.from_stage)
        begin(self.plan, self.name, self.emit)
        drop_checkpoints(self.plan, self.store, self.keys)
        reports = []
        with recorded(self.store, self.name, self._record), self.stop.listening(), self.recorder:
            retell(self.store, self.keys, todo, self.emit)
            for index, stage in enumerate(stages):
                following = next((later for later in stages[index + 1 :] if todo[later.name]), None)
                earlier = stages[index - 1] if index else None
                reports.append(self._stage(stage, earlier, following, todo[stage.name]))
        made = () if policy.stop_after else tuple(self._pictures())
        return Report(self.plan.job, self.name, made, tuple(reports), self.keys, tuple(self.failures),
                      tuple(self.changes), self.plan.device_map)

    def _stage(
        self, stage: Stage, earlier: Stage | None, following: Stage | None, todo: Sequence[int]
    ) -> StageReport:
        """The stage done, with one thing changed where it ran out of memory."""
        made: set[str] = set()
        attempt = partial(self._attempt, stage, earlier, following, todo, made)
        try:
            return attempt()
        except StageOutOfMemory as error:
            if stage.name == "decode":
                keys = self.keys[stage.name]
                self._kept = {position: self._picture(position) for position, key in enumerate(keys)
                              if position not in todo or key in made}
            left = [request for position, request in enumerate(self.plan.requests) if position not in self._kept]
            changed = degrade(self.plan, stage.name, left) if self.plan.job.policy.degrade else None
            if changed is None:
                raise advised(error, self.plan) from None
            plan, text = changed
            self.changes.append(text)
            self._follow(plan)
            self.emit("warning", {"text": f"{error} Trying once more: {text}"})
        try:
            return attempt()
        except StageOutOfMemory as error:
            raise advised(error, self.plan) from None

    def _attempt(
        self, stage: Stage, earlier: Stage | None, following: Stage | None, todo: Sequence[int], made: set[str]
    ) -> StageReport:
        keys, name = self.keys[stage.name], stage.name
        lost = {failure.index for failure in self.failures}
        # Not what an earlier try made, nor what came to nothing before.
        todo = [position for position in todo if position not in lost and keys[position] not in made]
        announce = self._announce if name == "decode" and self.done is not None else None
        if announce is not None:
            waiting = {keys[position] for position in todo}
            for key in dict.fromkeys(key for position, key in enumerate(keys) if position not in lost):
                if key not in waiting:
                    announce(key)
        self.emit("stage", {"stage": name, "requests": len(keys), "reused": len(keys) - len(todo)})
        runner = StageRunner(
            self.plan, stage, self.store, self.emit, stop=self.stop,
            anew=computed_anew(self.plan.job.policy.from_stage, name), next_stage=following, made=announce,
            collectives=self.collectives if name == "denoise" else None,
        )
        try:
            runner.run(work_items(keys, None if earlier is None else self.keys[earlier.name], todo))
        finally:
            made |= runner.made
            self.failures += runner.failures
        if len({failure.index for failure in self.failures}) == len(self.plan.requests):
            raise BadResult(f"every picture failed; the first: {self.failures[0].text}")
        return runner.report(len(todo), len(keys) - len(todo))

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
        if position in self._kept:
            return self._kept[position]
        request = self.plan.requests[position]
        facts = self._facts[self.plan.tile_of(request)]
        return Picture(request.index, request, self.keys["decode"][position], self.store, facts)

    def _record(self) -> dict[str, Any]:
        """What the run's record says by now."""
        return {**self._planned, **self.recorder.document(),
                "previews": self.recorder.strips.keep(self.store, self.name, self.plan.requests),
                "changes": list(self.changes), "failures": [asdict(failure) for failure in self.failures]}


def advised(error: StageOutOfMemory, plan: Plan) -> StageOutOfMemory:
    """The error of a stage of the plan, with changes of the job with which the stage needs less."""
    def replan(job: Job) -> Plan:
        return make_plan(job, machine=probe(plan.devices), download=False, shapes=False)

    error.alternatives = after_out_of_memory(plan, error.stage, replan)
    error.fixes = error.alternatives[0] if error.alternatives else ()
    return error


def retell(
    store: Store, keys: Mapping[str, Sequence[str]], todo: Mapping[str, Sequence[int]], emit: Emit
) -> None:
    """Tell of what was warned of when the artifacts were made that a run uses again."""
    for stage, missed in todo.items():
        anew = set(missed)
        retell_warnings(store, [key for at, key in enumerate(keys[stage]) if at not in anew], emit)


def begin(plan: Plan, name: str, emit: Emit) -> None:
    """Tell of a run that begins, and of tensors that only the files have: they may be of another model."""
    emit("run", {"run": name, "requests": len(plan.requests), "model": plan.checkpoint.source,
                 "seed": plan.requests[0].seed})
    for part, weights in plan.weights.items():
        if weights.extra:
            more = f" and {len(weights.extra) - 1:,} more" if len(weights.extra) > 1 else ""
            emit("warning", {"text": f"the model has no use for what the files of {plan.label(part)} hold besides its "
                                     f"weights: {weights.extra[0]}{more}"})


def drop_checkpoints(plan: Plan, store: Store, keys: Mapping[str, Sequence[str]]) -> None:
    """Forget unfinished denoises that are computed anew."""
    if computed_anew(plan.job.policy.from_stage, "denoise"):
        for key in keys["denoise"]:
            store.drop(checkpoint_key(key))


@contextmanager
def recorded(store: Store, name: str, record: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Keep the run's record for the block with how it stands: running, and then done, interrupted or failed."""

    def save(status: str, **more: object) -> None:
        store.save_run(name, {**record(), "status": status, **more})

    with store.running(name):
        save("running")
        try:
            yield
        except Interrupted as stopped:
            stopped.run = name
            save("interrupted")
            raise
        except Exception as error:
            save("failed", error=f"{type(error).__name__}: {error}")
            raise
        save("done")


def record_of(plan: Plan, name: str, keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What a run's record says of its job and its plan; what happens in it comes from the recorder.

    The job is resolved, so that whoever goes on with it makes the same pictures.
    """
    dtype = {component: describe.dtype_name(place.dtype) for (_, component), place in plan.places.items()}
    origin = Origin(f"run {name}", plan.checkpoint.identity, "bring that model back, or give the job anew")
    policy = replace(plan.job.policy, from_stage=None)
    revision = commit(plan.checkpoint.identity, plan.job.model or plan.family.repo)
    tiling = plan.tiling
    tile, whole = (0, 0) if tiling is None else (tiling.side, tiling.whole)
    job = replace(plan.job, run=name, dtype=dtype, origin=origin, policy=policy, revision=revision, tile=tile,
                  whole=whole)
    last = STAGES.index(plan.job.policy.stop_after or STAGES[-1])
    return {
        "model": plan.checkpoint.identity, "requests": [asdict(request) for request in plan.requests],
        "stages": {stage: list(keys[stage]) for stage in STAGES[: last + 1]}, "job": job.absolute().to_json(),
        "plan": describe.document(plan), "layout": describe.layout(plan), "versions": versions(),
    }


def facts_of(plan: Plan, changes: Sequence[str], tile: int | None) -> dict[str, Any]:
    """What the metadata of a picture that is decoded in tiles of so many pixels, or whole, say of how it was made."""
    return {
        "model": plan.checkpoint.source, "identity": plan.checkpoint.identity, "family": plan.family.name,
        "dtype": {plan.label(part): describe.dtype_name(place.dtype) for part, place in plan.places.items()},
        "devices": list(plan.devices),
        **({"loras": describe.loras(plan)} if plan.checkpoint.loras else {}),
        **({} if tile is None else {"tile": tile}),
        **({} if plan.checkpoint.scheduler is None else {"scheduler": plan.checkpoint.scheduler.to_json()}),
        **({} if not changes else {"changes": list(changes)}),
    }
