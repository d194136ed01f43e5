"""What a rank does: its share of a job, on its own cards, with the others told of nothing but the result."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from runner.artifacts import ForwardingStore, Store
from runner.distributed.channel import Channel
from runner.distributed.env import Rank, share
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.results import RankResult, differing, recorded
from runner.distributed.shares import Share
from runner.engine.keys import artifact_keys
from runner.engine.report import Failure
from runner.engine.run import record_of, run_all
from runner.engine.session import open_job_store
from runner.engine.stage_runner import Collectives
from runner.events import Emit, tee
from runner.job import Job
from runner.media.writer import PictureWriter, labelled
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.planning.verdict import verdict
from stages.errors import BadResult, InvalidInput, RankLost, StagerunError, StoreError
from stages.machine import Machine, check_cards, device_names, probe
from stages.wording import counted


class RankStore(ForwardingStore):
    """A store as one rank uses it: a wait for another is no idleness, and there is one record for the whole run.

    Only the first rank, which knows what the record says of the `whole` run, writes it.
    """

    def __init__(self, store: Store, heartbeat: Heartbeat, whole: Mapping[str, Any] | None) -> None:
        super().__init__(store)
        self._heartbeat, self._whole = heartbeat, whole
        self.last: Mapping[str, Any] = {}

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        """Only one process at a time is inside for `key`."""
        with ExitStack() as stack:
            with self._heartbeat.waiting():
                stack.enter_context(super().working(key))
            yield

    def save_run(self, run: str, record: Mapping[str, object]) -> None:
        """Keep the record of the whole run, which is not done when a share of it is."""
        self.last = record
        if self._whole is not None:
            status = "running" if record["status"] == "done" else record["status"]
            super().save_run(run, {**record, **self._whole, "status": status})


def own_part(machine: Machine, rank: Rank) -> Machine:
    """The rank's part of its host: its own cards, in their order, or a part of the memory where there are no cards.

    Raises InvalidInput where there are fewer cards than ranks.
    """
    parts, cards = rank.local_size, machine.cards
    if not cards:
        devices = tuple(replace(device, free=device.free // parts) for device in machine.devices)
        return replace(machine, devices=devices, host_free=machine.host_free // parts)
    if len(cards) < parts:
        raise InvalidInput(
            f"{counted(parts, 'rank')} on this host, and {counted(len(cards), 'card')} for them: "
            f"{', '.join(card.name for card in cards)} "
            f"-> start {counted(len(cards), 'rank')}{', or choose `devices=cpu`' if machine.here else ''}"
        )
    mine = tuple(cards[index] for index in share(len(cards), rank.local, parts))
    return replace(machine, devices=mine, host_free=machine.host_free // parts)


class RankWorker:
    """One rank with its channel to the others; `emit` hears of its own work."""

    def __init__(self, rank: Rank, channel: Channel, heartbeat: Heartbeat, emit: Emit) -> None:
        self.rank, self.channel, self.heartbeat = rank, channel, heartbeat
        heartbeat.share = self.share()
        self.emit = tee(heartbeat, emit)

    def share(self) -> Share | None:
        """What follows this rank through its share of the job; None where it has none of its own."""
        return Share()

    def run_rank0(self, job: Job) -> tuple[Job, list[RankResult]]:
        """Have all ranks do the job, this one its share of it; the job as it was done, and all results.

        Errors of the job or the model are raised before any other rank begins.
        """
        store = open_job_store(job, self.emit)
        plan = self.planned(job, own_machine(job, self.rank))
        whole = self.begun(plan, store)
        self.channel.publish({"job": plan.job.to_json()})
        with self.answering():
            positions = share(len(plan.requests), self.rank.rank, self.rank.size)
            mine = self.work(plan, RankStore(store, self.heartbeat, whole), positions)
            return plan.job, self.gathered(plan.job, store, mine)

    def run_rank(self, message: Mapping[str, Any]) -> RankResult:
        """Do this rank's share of a job that the first one published."""
        with self.answering():
            job = Job.from_json(message["job"])
            store = open_job_store(job, self.emit)
            check_shared(store, job, f"rank {self.rank.rank}")
            plan = self.planned(job, own_machine(job, self.rank))
            positions = share(len(plan.requests), self.rank.rank, self.rank.size)
            return self.work(plan, RankStore(store, self.heartbeat, None), positions)

    def planned(self, job: Job, machine: Machine) -> Plan:
        """The plan of the whole job for these cards: what it decides does not depend on the share."""
        self.emit("begin", {"what": "planning"})
        plan = make_plan(job, machine=machine, shapes=False)
        # What the job repeats is for the first rank alone to check.
        return replace(plan, job=replace(plan.job, origin=None))

    def begun(self, plan: Plan, store: Store) -> dict[str, Any]:
        """Tell of the plan, keep the record of the whole run, and give it."""
        self.emit("plan", {"text": verdict(plan)})
        whole = record_of(plan, plan.job.run, artifact_keys(plan))
        store.save_run(plan.job.run, {**whole, "status": "running"})
        return whole

    def gathered(self, job: Job, store: Store, mine: RankResult) -> list[RankResult]:
        """The results of all ranks, once all are done; the record of the run then says so."""
        with self.heartbeat.waiting():
            results = [mine, *map(RankResult.from_json, self.channel.results())]
        store.save_run(job.run, {**store.load_run(job.run), **recorded(results), "status": "done"})
        for result in results[1:]:
            for data in result.written:
                self.emit("picture", data)
        if (text := differing(job, results)) is not None:
            self.emit("warning", {"text": text})
        return results

    def work(
        self, plan: Plan, store: RankStore, positions: Sequence[int], collectives: Collectives | None = None
    ) -> RankResult:
        """Do the requests at these positions; what came of it."""
        if not positions:
            return RankResult(self.rank.rank, ())
        own, at = plan.only(positions), tuple(positions)
        heard = Heard(self.emit, positions, len(plan.requests))
        failures: list[Failure] = []
        writer = PictureWriter(own.job, heard, lambda position, text: failures.append(
            Failure(position, "decode", text)))
        try:
            report = run_all(own, store=store, emit=labelled(own.job, heard), collectives=collectives,
                             done=writer.write if own.job.output.paths else None)
        except BadResult as error:
            # Other ranks may do better: it is for the whole run to say whether anything came of it.
            lost = tuple(Failure(position, self.heartbeat.stage, error.text) for position in at)
            return RankResult(self.rank.rank, at, failures=lost, recorded=_recorded(store, at))
        failures += report.failures
        made = {at[own.job.positions[picture.index]]: picture.facts for picture in report.pictures}
        return RankResult(
            self.rank.rank, at,
            made=tuple(made),
            facts={name: value for facts in [*made.values()][:1] for name, value in facts.items() if name != "tile"},
            tiles={position: facts["tile"] for position, facts in made.items() if "tile" in facts},
            failures=tuple(replace(failure, index=at[failure.index]) for failure in failures),
            changes=report.changes, device_map=report.device_map, stages=report.stages, keys=report.keys,
            written=tuple(heard.written), recorded=_recorded(store, at),
        )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Tell whoever watches if the block fails, with the place where it did."""
        try:
            yield
        except Exception as error:  # whatever it is, the others must hear of it
            cause = error if isinstance(error, StagerunError) else StagerunError(f"{type(error).__name__}: {error}")
            self.channel.fail(RankLost(f"rank {self.rank.rank} failed {self.heartbeat.where}: {cause.text}",
                                       cause.fixes, cause.alternatives))


class Heard:
    """An emit for one rank's share of a run, which is told as part of the whole."""

    def __init__(self, emit: Emit, positions: Sequence[int], requests: int) -> None:
        self._emit, self._positions, self._requests = emit, positions, requests
        self.written: list[Mapping[str, Any]] = []

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "run":
            data = {**data, "requests": self._requests}
        elif kind == "picture":
            data = {**data, "position": self._positions[data["position"]]}
            self.written.append(data)
        elif "request" in data:
            data = {**data, "request": self._positions[data["request"]]}
        self._emit(kind, data)


def _recorded(store: RankStore, positions: Sequence[int]) -> dict[str, Any]:
    """What the record of the whole run is to say of a share of it."""
    previews = {str(positions[int(position)]): key for position, key in store.last.get("previews", {}).items()}
    return {"warnings": list(store.last.get("warnings", ())), "previews": previews}


def own_machine(job: Job, rank: Rank) -> Machine:
    """The rank's part of this host, with no card of another rank touched; InvalidInput as `own_part` raises it."""
    names = [name for name in device_names(job.devices) if name != "cpu"]
    if len(names) < max(1, rank.local_size):
        return own_part(usable_machine(job), rank)
    own = check_cards(probe([names[index] for index in share(len(names), rank.local, rank.local_size)]))
    return replace(own, host_free=own.host_free // rank.local_size)


def usable_machine(job: Job) -> Machine:
    """This host, as far as the job may use it; InvalidInput for a card that cannot compute."""
    return check_cards(probe(job.devices))


def check_shared(store: Store, job: Job, who: str) -> None:
    """Raise StoreError where this process sees another store than the one that the run is in."""
    try:
        store.load_run(job.run)
    except StoreError:
        raise StoreError(f"run {job.run} is not in {job.store} as {who} sees it -> processes on several hosts need "
                         f"one store that all of them see: `store=DIR` or a URL") from None
