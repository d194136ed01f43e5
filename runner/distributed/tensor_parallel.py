"""A task that all ranks do together: the first one does all of it, and the others denoise with it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from runner.artifacts import ArtifactStore
from runner.commands.order import Order
from runner.distributed.collectives import Collectives
from runner.distributed.env import Rank
from runner.distributed.rank import RankStore, RankWorker, probed, whole_of
from runner.distributed.results import Share
from runner.distributed.task import Task
from runner.engine.run import Report
from runner.engine.signals import StopRequest
from runner.engine.stage_runner import StageReport, StageRunner
from runner.planning.parallel import WISH, without
from runner.planning.plan import Plan
from stages.errors import BadResult
from stages.machine import Device, Machine
from stages.state import State


class ReadOnlyStore:
    """A store as the ranks behind the first one use it: they read what it reads, and write nothing."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        """The first rank holds the lock for all."""
        yield

    def put(self, key: str, stage: str, state: State, note: Mapping[str, Any]) -> None:
        """The first rank puts it there."""

    def drop(self, key: str) -> None:
        """The first rank drops it."""


def cut_for(task: Task, rank: Rank) -> Task:
    """The task with as many processes for the denoise as there are ranks; ValueError where some are elsewhere."""
    if rank.local_size != rank.size:
        raise ValueError(f"--place {WISH} works on one host, and {rank.local_size} of {rank.size} ranks are on this "
                         f"one -> start them on one host, or leave it out")
    place = [*without(task.said.place), f"{WISH}:{rank.size}"]
    return replace(task, said=replace(task.said, place=place))


def to_document(machine: Machine, meeting: Path) -> dict[str, Any]:
    """What the other ranks must know to plan as the first one does, and to meet it."""
    return {"machine": asdict(machine), "meeting": str(meeting)}


def machine_of(document: Mapping[str, Any]) -> Machine:
    """The machine of the first rank."""
    devices = tuple(Device(**device) for device in document["machine"]["devices"])
    return Machine(**{**document["machine"], "devices": devices})


def lead(member: RankWorker, task: Task, store: ArtifactStore) -> tuple[Order, list[dict[str, Any]]]:
    """The first rank's part: as `RankWorker.lead`, with the others at every step of the denoise."""
    machine = probed(task)
    job, task = member.planned(cut_for(task, member.rank), machine)
    # Whoever goes on with the run may be one process alone, and makes the same pictures.
    whole = whole_of(replace(task, said=replace(task.said, place=without(task.said.place))), job)
    store.save_run(task.order.run, {**whole, "status": "running"})
    shared = cast(ArtifactStore, RankStore(store, member.pulse, whole))
    with meeting() as file:
        member.link.publish({**task.document(), "company": to_document(machine, file)})
        with member.answering(), Collectives(member.rank, rank_device(job, 0), file, member.pulse) as company:
            mine = member.work(task, job, shared, range(len(task.order.items)), company)
            company.over()
            with member.pulse.waiting():
                shares = [mine, *member.link.shares()]
            store.save_run(task.order.run, {**store.load_run(task.order.run), "status": "done"})
    return task.order, shares


def follow(member: RankWorker, task: Task, store: ArtifactStore, company: Mapping[str, Any]) -> dict[str, Any]:
    """The part of another rank: nothing but its part of the denoise."""
    job, task = member.planned(task, machine_of(company))
    job = on_card(job, member.rank.rank)
    halt, reports = StopRequest(), list[StageReport]()
    with halt.listening(), Collectives(member.rank, job.devices[0], Path(company["meeting"]), member.pulse) as others:
        while (said := others.next()) is not None:
            shift = StageRunner(job, job.stages[1], cast(ArtifactStore, ReadOnlyStore(store)), member.emit, halt,
                                company=others)
            try:
                report = shift.work(said["keys"], said["before"], said["todo"])
            except BadResult:
                # The first rank found the same, and says so.
                continue
            reports.append(replace(report, ran=0, reused=0))
    return Share(member.rank.rank, range(0), Report(task.order.run, (), tuple(reports), {})).document()


def rank_device(job: Plan, rank: int) -> str:
    """The device of a rank."""
    return next(place.placement.for_rank(rank).entry for place in job.places.values() if place.placement.processes > 1)


def on_card(job: Plan, rank: int) -> Plan:
    """The plan as another rank than the first has it: nothing but its own card."""
    mine = rank_device(job, rank)
    machine = replace(job.machine, devices=tuple(device for device in job.machine.devices if device.name == mine))
    places = {name: replace(place, placement=place.placement.for_rank(rank)) for name, place in job.places.items()}
    return replace(job, machine=machine, places=places)


@contextmanager
def meeting() -> Iterator[Path]:
    """A file where the ranks of this host find each other."""
    with tempfile.TemporaryDirectory(prefix="stagerun-") as folder:
        yield Path(folder) / "meeting"
