"""A run past one machine: the stages as operators of Ray Data over pools of actors, which work at the same time.

Through Ray go numbers of pictures and what became of them; what a stage makes goes through the store, which all nodes
share. So a worker that dies takes nothing with it: Ray starts another, and that finds what was finished.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from runner.artifacts import ArtifactStore
from runner.distributed.ray.actor import OPERATORS, TROUBLES, cards_of, errands
from runner.distributed.ray.pools import Pools, groups, pools
from runner.distributed.task import Task
from runner.engine.keys import STAGES, chain, midway_key, missing
from runner.engine.memory import Flushed
from runner.engine.run import Done, Picture, Report, check_whole, facts_of
from runner.engine.signals import Interrupted, StopRequest
from runner.engine.stage_runner import Failure, StageReport
from runner.planning.plan import Plan
from runner.reports.record import described
from stages.errors import BadResult
from stages.events import Emit, silent
from stages.machine import Device, Machine, probe

if TYPE_CHECKING:
    from stages.pipeline.stage import Stage

# What goes through Ray's own store are a few hundred bytes for each picture.
_OBJECTS = 80 * 2**20


@contextmanager
def connected(*, verbose: bool = False) -> Iterator[Any]:
    """Ray, for a `with` statement: as it is, or as RAY_ADDRESS says, or one of this machine's own, which then ends.

    Raises ValueError where it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine ray needs Ray -> pip install 'stagerun[ray]'") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    level = logging.INFO if verbose else logging.ERROR
    local: dict[str, Any] = {} if address else {"object_store_memory": _OBJECTS, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    with importable():
        ray.init(address=address or "local", log_to_driver=verbose, logging_level=level, **local)
    if threading.current_thread() is threading.main_thread():
        # Ray takes this signal, and would end the process without a word.
        signal.signal(signal.SIGTERM, before)
    # Ray tells of workers that died, up to its end, where results go.
    with redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def importable() -> Iterator[None]:
    """What this process can import, processes that it starts in the block can import too."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def machine(ray: Any, devices: Sequence[str]) -> Machine:
    """The machine to plan for: the cluster's node with most cards, or this one where it has none."""
    most = max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if not most or "cpu" in devices:
        return probe(devices)
    found = ray.get(ray.remote(num_gpus=most, num_cpus=0)(seen).remote())
    return Machine(**{**found, "devices": tuple(Device(**device) for device in found["devices"])})


def seen() -> dict[str, Any]:
    """The machine of the process that this runs in."""
    return asdict(probe())


def run_all(
    ray: Any, task: Task, plan: Plan, *, store: ArtifactStore, emit: Emit = silent, done: Done | None = None,
    record: Mapping[str, object] | None = None,
) -> Report:
    """Make every picture of the plan on Ray, as `runner.run_all` does in this process.

    A stage's seconds are the sum of all workers', its bytes of memory the most of any. Raises what `runner.run_all`
    raises.
    """
    check_whole(plan)
    said, name = task.said, task.order.run
    stages = plan.stages[: STAGES.index(said.stop_after) + 1] if said.stop_after else plan.stages
    keys = chain(plan)
    todo = missing(store, stages, keys, said.from_stage)
    for key in keys["denoise"] if said.from_stage in ("encode", "denoise") else ():
        store.drop(midway_key(key))
    emit("run", {"run": name, "requests": len(plan.requests), "model": plan.checkpoint.source,
                 "seed": plan.requests[0].seed})
    run = Run(plan, stages, keys, todo, store, done if said.stop_after is None else None)
    whole = {**(record or {}), **described(plan), "model": plan.checkpoint.identity,
             "requests": [vars(request) for request in plan.requests],
             "stages": {stage.name: list(keys[stage.name]) for stage in stages}}
    with store.running(name), recorded(store, name, whole, run.failures), StopRequest().listening():
        emit("begin", {"what": "starting workers"})
        run.finish([at for at in range(len(plan.requests)) if not any(at in todo[stage.name] for stage in stages)])
        for errand in worked(ray, task, plan, stages, todo):
            run.take(errand)
            emit("begin", {"what": f"{len(run.finished):,} of {len(plan.requests):,} pictures done",
                           "workers": {stage: did["worker"] for stage, did in errand["did"].items()}})
        if len({failure.index for failure in run.failures}) == len(plan.requests):
            raise BadResult(f"every picture failed; the first: {run.failures[0].text}")
    return run.report(name)


def worked(
    ray: Any, task: Task, plan: Plan, stages: Sequence["Stage"], todo: Mapping[str, Sequence[int]]
) -> Iterator[dict[str, Any]]:
    """The errands that Ray's workers did, as they come in."""
    wanted = [stage for stage in stages if todo[stage.name]]
    count = len({at for positions in todo.values() for at in positions})
    if not count:
        return
    there = int(ray.cluster_resources().get("GPU", 0))
    chosen = pools({stage.name: len(cards_of(plan, stage)) for stage in wanted}, there, count)
    document = json.dumps({**task.document(), "machine": asdict(plan.machine), "threads": torch.get_num_threads()})
    size = max(pool.size for pool in chosen.by_stage.values())
    rows = errands(groups(len(plan.requests), size), todo)
    for row in operated(ray, rows, document, chosen).iter_rows():
        errand = json.loads(row["errand"])
        if errand["trouble"]:
            kind = next(kind for kind in TROUBLES if kind.__name__ == errand["trouble"]["kind"])
            raise kind(errand["trouble"]["text"])
        yield errand


def operated(ray: Any, rows: Sequence[Mapping[str, str]], document: str, chosen: Pools) -> Any:
    """The rows after all stages, as a Ray dataset."""
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    for name, pool in chosen.by_stage.items():
        dataset = dataset.map(
            OPERATORS[name], fn_constructor_args=(document,), num_cpus=pool.cores,
            compute=ray.data.ActorPoolStrategy(size=pool.size), **({"num_gpus": pool.cards} if pool.cards else {}),
        )
        if not chosen.together:
            # Its workers give back their cards before those of the next stage take them.
            dataset = dataset.materialize()
    return dataset


class Run:
    """What came of a run so far."""

    def __init__(
        self, plan: Plan, stages: Sequence["Stage"], keys: Mapping[str, tuple[str, ...]],
        todo: Mapping[str, Sequence[int]], store: ArtifactStore, done: Done | None,
    ) -> None:
        self._plan, self._stages, self._keys, self._todo, self._store = plan, stages, keys, todo, store
        self._done, self._facts = done, facts_of(plan, ())
        self._did: list[tuple[str, Mapping[str, Any]]] = []
        self.failures: list[Failure] = []
        self.finished: set[int] = set()

    def take(self, errand: Mapping[str, Any]) -> None:
        """Take in an errand that was done."""
        failures = [Failure(**failure) for failure in errand["failures"]]
        self.failures += failures
        self._did += errand["did"].items()
        lost = {failure.index for failure in failures}
        self.finish([at for at in errand["positions"] if at not in lost])

    def finish(self, positions: Sequence[int]) -> None:
        """These pictures are made."""
        for at in positions:
            if at not in self.finished:
                self.finished.add(at)
                if self._done is not None:
                    self._done(self._picture(at))

    def report(self, name: str) -> Report:
        """The report of all of it."""
        whole = self._stages[-1].name == STAGES[-1]
        pictures = tuple(self._picture(at) for at in sorted(self.finished)) if whole else ()
        return Report(name, pictures, tuple(self._stage(stage.name) for stage in self._stages), self._keys,
                      tuple(self.failures), (), self._plan.device_map)

    def _picture(self, at: int) -> Picture:
        request = self._plan.requests[at]
        return Picture(request.index, request, self._keys["decode"][at], self._store, self._facts)

    def _stage(self, name: str) -> StageReport:
        mine = [did for stage, did in self._did if stage == name]
        seconds = dict.fromkeys(("load", "compute", "save", "flush"), 0.0)
        peak: dict[str, int] = {}
        for did in mine:
            seconds |= {part: seconds.get(part, 0.0) + took for part, took in did["seconds"].items()}
            peak |= {device: max(size, peak.get(device, 0)) for device, size in did["peak"].items()}
        ran = sum(did["ran"] for did in mine)
        return StageReport(name, ran, len(self._plan.requests) - len(self._todo[name]), seconds, peak, Flushed(0, 0))


@contextmanager
def recorded(
    store: ArtifactStore, name: str, whole: Mapping[str, Any], failures: Sequence[Failure]
) -> Iterator[None]:
    """Keep the run's record with how it stands."""

    def save(status: str, **more: object) -> None:
        store.save_run(name, {**whole, "status": status, "changes": [], "failures": [vars(one) for one in failures],
                              **more})

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
