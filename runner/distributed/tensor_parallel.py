"""A job that all ranks do together: the first one does all of it, and the others denoise with it."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.artifacts import ForwardingStore, Store
from runner.artifacts.atomic_files import File
from runner.distributed.channel import Channel
from runner.distributed.collectives import RankCollectives
from runner.distributed.env import Rank
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.rank import RankStore, RankWorker, check_shared, usable_machine
from runner.distributed.results import RankResult
from runner.engine.report import StageReport
from runner.engine.session import open_job_store
from runner.engine.signals import StopRequest
from runner.engine.stage_runner import StageRunner
from runner.events import Emit
from runner.job import Job
from runner.placement_options import PlaceRequest
from runner.planning.plan import Plan
from stages.errors import BadResult, InvalidInput
from stages.machine import Machine


class ReadOnlyStore(ForwardingStore):
    """A store as the ranks behind the first one use it: they read what it reads, and the first rank writes."""

    def publish(self, files: Sequence[File]) -> None:
        pass

    def remove(self, paths: Sequence[str]) -> None:
        pass

    def working(self, key: str) -> AbstractContextManager[None]:
        """No lock: the first rank holds it for all."""
        return nullcontext()


class TensorParallelWorker(RankWorker):
    """A rank that denoises together with all others."""

    def share(self) -> None:
        """None: every picture is everybody's."""

    def run_rank0(self, job: Job) -> tuple[Job, list[RankResult]]:
        """As `RankWorker.run_rank0`, with the others at every step of the denoise."""
        if self.rank.local_size != self.rank.size:
            raise InvalidInput(f"`place=denoise=tensor_parallel` works on one host, and this one has "
                               f"{self.rank.local_size} of {self.rank.size} ranks -> start them on one host, or "
                               f"leave it out")
        store, machine = open_job_store(job, self.emit), usable_machine(job)
        others = tuple(place for place in job.place if place.processes is None)
        together = PlaceRequest("denoise", f"tensor_parallel:{self.rank.size}")
        plan = self.planned(replace(job, place=(*others, together)), machine)
        # Whoever goes on with the run may be one process alone, and makes the same pictures.
        whole = self.begun(replace(plan, job=replace(plan.job, place=others)), store)
        with rendezvous() as file:
            self.channel.publish({"job": plan.job.to_json(), "machine": machine.to_json(),
                                  "rendezvous": str(file)})
            with (self.answering(),
                  RankCollectives(self.rank, rank_device(plan, 0), file, self.heartbeat) as collectives):
                mine = self.work(plan, RankStore(store, self.heartbeat, whole), range(len(plan.requests)), collectives)
                collectives.end()
                return plan.job, self.gathered(plan.job, store, mine)

    def run_rank(self, message: Mapping[str, Any]) -> RankResult:
        """Nothing but this rank's part of the denoise."""
        with self.answering():
            job = Job.from_json(message["job"])
            store = open_job_store(job, self.emit)
            check_shared(store, job, f"rank {self.rank.rank}")
            plan = on_card(self.planned(job, Machine.from_json(message["machine"])), self.rank.rank)
            return self._followed(plan, store, Path(message["rendezvous"]))

    def _followed(self, plan: Plan, store: Store, file: Path) -> RankResult:
        stop, reports = StopRequest(), list[StageReport]()
        with stop.listening(), RankCollectives(self.rank, plan.devices[0], file, self.heartbeat) as collectives:
            while (items := collectives.next_items()) is not None:
                runner = StageRunner(plan, plan.stage("denoise"), ReadOnlyStore(store), self.emit, stop=stop,
                                     collectives=collectives)
                # Its heartbeat says where it is.
                self.emit("stage", {"stage": "denoise", "requests": len(items), "reused": 0})
                try:
                    runner.run(items)
                except BadResult:
                    # The first rank found the same, and says so.
                    continue
                reports.append(runner.report(0, 0))
        return RankResult(self.rank.rank, (), stages=tuple(reports))


def worker_for(job: Job, rank: Rank, channel: Channel, heartbeat: Heartbeat, emit: Emit) -> RankWorker:
    """The rank that does its part of a job in the way that the job asks for."""
    kind = RankWorker if job.tensor_parallel is None else TensorParallelWorker
    return kind(rank, channel, heartbeat, emit)


def rank_device(plan: Plan, rank: int) -> str:
    """The device of a rank."""
    cut = (place.placement for place in plan.places.values() if place.placement.processes > 1)
    return next(placement.for_rank(rank).entry for placement in cut)


def on_card(plan: Plan, rank: int) -> Plan:
    """The plan as another rank than the first has it: nothing but its own card."""
    mine = rank_device(plan, rank)
    machine = replace(plan.machine, devices=tuple(device for device in plan.machine.devices if device.name == mine))
    places = {part: replace(place, placement=place.placement.for_rank(rank)) for part, place in plan.places.items()}
    return replace(plan, machine=machine, places=places)


@contextmanager
def rendezvous() -> Iterator[Path]:
    """A file where the ranks of this host find each other."""
    with tempfile.TemporaryDirectory(prefix="stagerun-") as folder:
        yield Path(folder) / "rendezvous"
