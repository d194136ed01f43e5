"""What a rank does: its share of an order, on its own cards, with the others told of nothing but the result."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from runner.commands.order import Order
from runner.commands.results import Writer
from runner.commands.resumption import record_of
from runner.distributed.channel import Channel
from runner.distributed.env import Rank, part, share
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.task import Task, read_task
from runner.events import Emit
from runner.planning.parallel import wished
from stages.errors import BadResult, StoreError

if TYPE_CHECKING:
    from runner.artifacts import ArtifactStore
    from runner.distributed.collectives import Collectives
    from runner.planning.plan import Plan
    from stages.machine import Machine


class RankStore:
    """A store as one rank uses it: a wait for another is no idleness, and there is one record for the whole run.

    Only the first rank, which knows `whole`, writes the record.
    """

    def __init__(self, store: "ArtifactStore", pulse: Heartbeat, whole: Mapping[str, Any] | None) -> None:
        self._store, self._pulse, self._whole = store, pulse, whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        """Only one process at a time is inside for `key`."""
        inside = self._store.working(key)
        with self._pulse.waiting():
            inside.__enter__()
        try:
            yield
        finally:
            inside.__exit__(None, None, None)

    def save_run(self, run: str, record: Mapping[str, object]) -> None:
        """Keep the record of the whole run, which is not done when a share of it is."""
        if self._whole is not None:
            status = "running" if record["status"] == "done" else record["status"]
            self._store.save_run(run, {**record, **self._whole, "status": status})


class RankWorker:
    """One rank with its link to the others; `emit` hears of its own work."""

    def __init__(self, rank: Rank, link: Channel, pulse: Heartbeat, emit: Emit) -> None:
        self.rank, self.link, self.pulse, self.emit = rank, link, pulse, emit

    def lead(self, task: Task, store: "ArtifactStore") -> tuple[Order, list[dict[str, Any]]]:
        """Have all ranks do the task, this one its share of it; the order less what its model cannot make, and all
        shares, by rank.

        Errors of the order or the model are raised before any other rank begins.
        """
        if wished(task.said.place) is not None:
            from runner.distributed.tensor_parallel import lead

            return lead(self, task, store)
        job, task = self.planned(task, part(probed(task), self.rank))
        whole = whole_of(task, job)
        store.save_run(task.order.run, {**whole, "status": "running"})
        self.link.publish(task.document())
        with self.answering():
            positions = share(len(task.order.items), self.rank.rank, self.rank.size)
            mine = self.work(task, job, cast("ArtifactStore", RankStore(store, self.pulse, whole)), positions)
            with self.pulse.waiting():
                shares = [mine, *self.link.shares()]
            store.save_run(task.order.run, {**store.load_run(task.order.run), "status": "done"})
        return task.order, shares

    def follow(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Do this rank's share of a task that the first one published."""
        from runner.commands.make import opened

        with self.answering():
            task = read_task(document)
            store = opened(task.order, task.said, self.emit)
            self.check_shared(store, task)
            if "company" in document:
                from runner.distributed.tensor_parallel import follow

                return follow(self, task, store, document["company"])
            job, task = self.planned(task, part(probed(task), self.rank))
            positions = share(len(task.order.items), self.rank.rank, self.rank.size)
            return self.work(task, job, cast("ArtifactStore", RankStore(store, self.pulse, None)), positions)

    def planned(self, task: Task, machine: "Machine") -> tuple["Plan", Task]:
        """The plan of the whole order for these cards: what it decides does not depend on the share."""
        from runner.commands.make import planned

        self.emit("begin", {"what": "planning"})
        job, order = planned(task.order, task.said, machine=machine)
        return job, replace(task, order=order)

    def work(
        self, task: Task, job: "Plan", store: "ArtifactStore", positions: range, company: "Collectives | None" = None
    ) -> dict[str, Any]:
        """Do the part of the task at these positions; what came of it."""
        from runner.distributed.results import Share
        from runner.engine.run import run_all
        from runner.engine.stage_runner import Failure

        if not positions:
            return Share(self.rank.rank, positions).document()
        own = slice(positions.start, positions.stop)
        order = replace(task.order, items=task.order.items[own], paths=task.order.paths[own])
        cards: dict[int, Mapping[str, Any]] = {}
        writer = Writer(order, task.said, self.emit, cards.__setitem__)
        try:
            report = run_all(
                replace(job, requests=order.requests), store=store, emit=self._heard(task, writer.hear),
                name=order.run, stop_after=task.said.stop_after, from_stage=task.said.from_stage,
                done=writer.keep if order.paths else None, degrade=not task.said.no_degrade,
                step_every=order.step_every,
                company=company,
            )
        except BadResult as error:
            # Other ranks may do better: it is for the whole run to say whether anything came of it.
            lost = [Failure(index, self.pulse.stage, str(error)) for index in range(len(positions))]
            return Share(self.rank.rank, positions, failures=lost).document()
        return Share(self.rank.rank, positions, report, cards, [*report.failures, *writer.failures]).document()

    def _heard(self, task: Task, hear: Emit) -> Emit:
        """The emit of this rank's work, which begins by telling of the whole run."""

        def emit(kind: str, data: Mapping[str, Any]) -> None:
            hear(kind, {**data, "requests": len(task.order.items)} if kind == "run" else data)

        return emit

    def check_shared(self, store: "ArtifactStore", task: Task) -> None:
        try:
            store.load_run(task.order.run)
        except StoreError:
            raise StoreError(
                f"run {task.order.run} is not in {task.order.store} as rank {self.rank.rank} sees it -> ranks on "
                f"several hosts need one store that all of them see: --artifacts DIR or URL"
            ) from None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Tell whoever watches if the block fails, with the place where it did."""
        try:
            yield
        except Exception as error:  # whatever it is, the others must hear of it
            text = f"{type(error).__name__}: {error}" if type(error).__module__ == "builtins" else str(error)
            self.link.fail(f"rank {self.rank.rank} failed {self.pulse.where}: {text}")


def probed(task: Task) -> "Machine":
    """This host, as far as the task may use it; ValueError for a card that cannot compute."""
    from stages.machine import check_cards, probe

    return check_cards(probe(task.order.devices))


def whole_of(task: Task, job: "Plan") -> dict[str, Any]:
    """What the record of the run says of all its requests."""
    from runner.engine.keys import chain

    return {**record_of(task.order, task.said, job), "model": job.checkpoint.identity,
            "stages": {name: list(keys) for name, keys in chain(job).items()}}
