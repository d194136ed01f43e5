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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from typing import Any

import torch

from runner.artifacts import Store
from runner.distributed.ray.actor import ACTORS, cards_of, own_names
from runner.distributed.ray.pools import Pools, groups, pools
from runner.engine.keys import artifact_keys, missing
from runner.engine.refusals import check_runnable
from runner.engine.report import Failure, Flushed, Picture, Report, StageReport
from runner.engine.run import Done, begin, drop_checkpoints, facts_of, record_of, recorded, retell
from runner.engine.session import open_job_store
from runner.engine.signals import StopRequest
from runner.events import Emit, from_wire, one_at_a_time
from runner.job import STAGES, Job
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.planning.verdict import verdict
from runner.text import pictures
from stages.errors import BadResult, InvalidInput, from_json
from stages.machine import Machine, probe

# What goes through Ray's own store are a few hundred bytes for each picture.
_OBJECTS = 80 * 2**20


def run_job(job: Job, *, emit: Emit, done: Done | None = None, verbose: bool = False) -> Report:
    """Plan a job for the cluster and do it there."""
    store = open_job_store(job, emit)
    with connected(verbose=verbose) as ray:
        emit("begin", {"what": "planning"})
        plan = make_plan(job, machine=cluster_machine(ray, job.devices), shapes=False)
        emit("plan", {"text": verdict(plan)})
        return run_all(ray, plan, store=store, emit=emit, done=done)


@contextmanager
def connected(*, verbose: bool = False) -> Iterator[Any]:
    """Ray, for a `with` statement: as it is, or as RAY_ADDRESS says, or one of this machine's own, which then ends.

    Raises InvalidInput where it is not installed.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:
        # Whether Ray binds to addresses that other machines reach, on Linux as well; read when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.util.queue
    except ImportError:
        raise InvalidInput("`engine=ray` needs Ray -> pip install 'stagerun[ray]'") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    level = logging.INFO if verbose else logging.ERROR
    local: dict[str, Any] = {} if address else {"object_store_memory": _OBJECTS, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    with importable(), reached(address):
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
def reached(address: str | None) -> Iterator[None]:
    """Connect to a cluster in the block; InvalidInput, with what to do, where none answers at this address."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not address:
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"no Ray lets this process in at RAY_ADDRESS={address}: {why} -> ray start --head there, "
                           f"RAY_AUTH_MODE=token where it asks for one, or unset RAY_ADDRESS for a Ray of this "
                           f"machine's own") from error


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


def cluster_machine(ray: Any, devices: Sequence[str]) -> Machine:
    """The machine to plan for: the cluster's node with most cards, or this one where it has none."""
    most = max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if not most or "cpu" in devices:
        return probe(devices)
    return Machine.from_json(ray.get(ray.remote(num_gpus=most, num_cpus=0)(own_machine).remote()))


def own_machine() -> dict[str, Any]:
    """The machine of the process that this runs in, as JSON."""
    return probe().to_json()


def run_all(ray: Any, plan: Plan, *, store: Store, emit: Emit, done: Done | None = None) -> Report:
    """Make every picture of the plan on Ray, as `runner.run_all` does in this process.

    A stage's seconds are the sum of all workers', its bytes of memory the most of any. Raises what `runner.run_all`
    raises.
    """
    check_runnable(plan, None)
    emit = one_at_a_time(emit)
    policy, name = plan.job.policy, plan.job.run
    stages = [stage.name for stage in plan.stages[: STAGES.index(policy.stop_after or STAGES[-1]) + 1]]
    keys = artifact_keys(plan)
    todo = missing(store, plan.stages[: len(stages)], keys, policy.from_stage)
    begin(plan, name, emit)
    drop_checkpoints(plan, store, keys)
    run = ClusterRun(plan, stages, keys, todo, store, done if policy.stop_after is None else None)
    whole = record_of(plan, name, keys)
    with recorded(store, name, lambda: {**whole, **run.record()}), StopRequest().listening():
        retell(store, keys, todo, lambda _, data: run.warn(str(data["text"]), emit))
        emit("begin", {"what": "starting workers"})
        run.finish([at for at in range(len(plan.requests)) if not any(at in todo[stage] for stage in stages)])
        with previewing(ray, emit) if policy.preview else nullcontext() as previews:
            for group in worked(ray, plan, stages, todo, previews):
                run.take(group, emit)
                emit("begin", {"what": f"{len(run.finished):,} of {pictures(len(plan.requests))} done",
                               "workers": {stage: did["worker"] for stage, did in group["did"].items()}})
        if len({failure.index for failure in run.failures}) == len(plan.requests):
            raise BadResult(f"every picture failed; the first: {run.failures[0].text}")
    return run.report(name)


@contextmanager
def previewing(ray: Any, emit: Emit) -> Iterator[Any]:
    """A queue for the previews of workers, of which `emit` is told while the block lasts."""
    queue = ray.util.queue.Queue(actor_options={"num_cpus": 0})
    over = threading.Event()

    def listen() -> None:
        ending = False
        while not ending:
            # Once more behind the end, for what came just before it.
            ending = over.wait(0.1)
            for event in queue.get_nowait_batch(queue.qsize()):
                emit(*from_wire(event))

    thread = threading.Thread(target=listen, name="previews", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        over.set()
        thread.join()
        queue.shutdown()


def worked(
    ray: Any, plan: Plan, stages: Sequence[str], todo: Mapping[str, Sequence[int]], previews: Any = None
) -> Iterator[dict[str, Any]]:
    """The groups that Ray's workers did, as they come in."""
    wanted = [stage for stage in stages if todo[stage]]
    count = len({at for positions in todo.values() for at in positions})
    if not count:
        return
    there = int(ray.cluster_resources().get("GPU", 0))
    chosen = pools({stage: len(cards_of(plan, stage)) for stage in wanted}, there, count)
    document = json.dumps({"job": plan.job.to_json(), "machine": plan.machine.unlimited.to_json(),
                           "threads": torch.get_num_threads()})
    size = max(pool.size for pool in chosen.by_stage.values())
    rows = group_rows(groups(len(plan.requests), size), todo)
    for row in dataset(ray, rows, (document, previews), chosen).iter_rows():
        group = json.loads(row["group"])
        if group["error"]:
            raise from_json(group["error"])
        yield group


def group_rows(ranges: Sequence[range], todo: Mapping[str, Sequence[int]]) -> list[dict[str, str]]:
    """The rows to begin with; a group of which nothing is to be computed is none."""
    rows = []
    for positions in ranges:
        mine = {name: [at for at in positions if at in set(wanted)] for name, wanted in todo.items()}
        if any(mine.values()):
            rows.append({"group": json.dumps({"positions": list(positions), "todo": mine, "failures": [], "did": {},
                                              "error": {}, "keys": {}, "facts": {}})})
    return rows


def dataset(ray: Any, rows: Sequence[Mapping[str, str]], arguments: tuple[Any, ...], chosen: Pools) -> Any:
    """The rows after all stages, as a Ray dataset; `arguments` are those of the actors."""
    found = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    for name, pool in chosen.by_stage.items():
        found = found.map(
            ACTORS[name], fn_constructor_args=arguments, num_cpus=pool.cores,
            compute=ray.data.ActorPoolStrategy(size=pool.size), **({"num_gpus": pool.cards} if pool.cards else {}),
        )
        if not chosen.together:
            # Its workers give back their cards before those of the next stage take them.
            found = found.materialize()
    return found


class ClusterRun:
    """What came of a run so far."""

    def __init__(
        self, plan: Plan, stages: Sequence[str], keys: Mapping[str, tuple[str, ...]],
        todo: Mapping[str, Sequence[int]], store: Store, done: Done | None,
    ) -> None:
        self._plan, self._stages, self._todo, self._store, self._done = plan, stages, todo, store, done
        self._keys = {stage: list(keys[stage]) for stage in STAGES}
        self._facts: dict[int, Mapping[str, Any]] = {}
        self._usual = {tile: facts_of(plan, (), tile) for tile in (None, plan.tile)}
        self._did: list[tuple[str, Mapping[str, Any]]] = []
        self._begun = time.time()
        self.failures: list[Failure] = []
        self.changes: list[str] = []
        self.warnings: list[str] = []
        self.finished: set[int] = set()

    def warn(self, text: str, emit: Emit) -> None:
        """Warn of something, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            emit("warning", {"text": text})

    def take(self, group: Mapping[str, Any], emit: Emit) -> None:
        """Take in a group that was done."""
        failures = [Failure(**failure) for failure in group["failures"]]
        for failure in failures:
            emit("failure", {"stage": failure.stage, "request": failure.index, "text": failure.text})
        self.failures += failures
        self._did += group["did"].items()
        for did in group["did"].values():
            for text in [text for text in did["changes"] if text not in self.changes]:
                self.changes.append(text)
                emit("warning", {"text": f"ran out of memory. Tried once more: {text}"})
            for text in did["recorded"]["warnings"]:
                self.warn(text, emit)
        for position, key in group["keys"].items():
            self._keys["decode"][int(position)] = key
        self._facts |= {int(position): facts for position, facts in group["facts"].items()}
        lost = {failure.index for failure in failures}
        self.finish([at for at in group["positions"] if at not in lost])

    def finish(self, positions: Sequence[int]) -> None:
        """These pictures are made."""
        for at in positions:
            if at not in self.finished:
                self.finished.add(at)
                if self._done is not None:
                    self._done(self._picture(at))

    def report(self, name: str) -> Report:
        """The report of all of it."""
        whole = self._stages[-1] == STAGES[-1]
        pictures = tuple(self._picture(at) for at in sorted(self.finished)) if whole else ()
        return Report(self._plan.job, name, pictures, tuple(map(self._stage, self._stages)),
                      {stage: tuple(keys) for stage, keys in self._keys.items()}, tuple(self.failures),
                      tuple(self.changes), self._plan.device_map)

    def record(self) -> dict[str, Any]:
        """What the record of the run says by now: the times of all workers on the clock of this process.

        Of memory it says what the first worker of each stage took, by the plan's names of its cards.
        """
        spans, peaks, samples = [], dict[str, dict[str, int]](), list[Any]()
        cards = [card.name for card in self._plan.machine.cards]
        workers: dict[tuple[str, str], Mapping[str, Any]] = {(stage, did["worker"]): did for stage, did in self._did}
        lanes: dict[str, int] = {}
        for (stage, _), did in workers.items():
            lane, seen = lanes.setdefault(stage, 0), did["recorded"]
            lanes[stage] += 1
            later = did["begun"] - self._begun
            spans += [{**span, "lane": span["lane"] + lane, "begin": max(0.0, span["begin"] + later),
                       "end": max(0.0, span["end"] + later)} for span in seen["timeline"]["spans"]]
            names, there = own_names(self._plan, stage), peaks.setdefault(stage, {})
            for device, size in did["peak"].items():
                card = next((card for card, own in names.items() if own == device), device)
                there[card] = max(size, there.get(card, 0))
            for seconds, _, what, used, host in () if lane else seen["timeline"]["samples"]:
                own = dict(zip(seen["timeline"]["devices"], used, strict=True))
                samples.append([max(0.0, seconds + later), stage, what,
                                [own.get(names.get(card, ""), 0) for card in cards], host])
        timeline = {"seconds": time.time() - self._begun, "devices": cards, "samples": sorted(samples),
                    "flushes": [], "spans": spans, "peaks": peaks}
        previews = {position: key for _, did in self._did for position, key in did["previews"].items()}
        return {"timeline": timeline, "warnings": self.warnings, "changes": self.changes, "previews": previews,
                "failures": [asdict(failure) for failure in self.failures]}

    def _picture(self, at: int) -> Picture:
        request = self._plan.requests[at]
        facts = self._facts.get(at) or self._usual[self._plan.tile_of(request)]
        return Picture(request.index, request, self._keys["decode"][at], self._store, facts)

    def _stage(self, name: str) -> StageReport:
        mine = [did for stage, did in self._did if stage == name]
        seconds = dict.fromkeys(("load", "compute", "save", "flush"), 0.0)
        peak: dict[str, int] = {}
        for did in mine:
            seconds |= {part: seconds.get(part, 0.0) + took for part, took in did["seconds"].items()}
            peak |= {device: max(size, peak.get(device, 0)) for device, size in did["peak"].items()}
        ran = sum(did["ran"] for did in mine)
        return StageReport(name, ran, len(self._plan.requests) - len(self._todo[name]), seconds, peak, Flushed(0, 0))
