"""One stage as a Ray actor does it: loaded once, then for one group of pictures after the other."""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from runner.distributed.worker import REFUSALS
from stages.errors import StoreError

if TYPE_CHECKING:
    from runner.planning.plan import Plan
    from stages.pipeline.stage import Loaded, Stage
    from stages.placement.placement import Place

TROUBLES: tuple[type[Exception], ...] = (*REFUSALS, MemoryError)


class Standing:
    """A stage that is loaded and stays so: entering it loads nothing, leaving it lets go of nothing."""

    def __init__(self, stage: "Stage", loaded: "Loaded") -> None:
        self._stage, self._loaded = stage, loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    @contextmanager
    def loaded(self, places: Any, emit: Any) -> "Iterator[Loaded]":
        """The loaded stage."""
        yield self._loaded


class StageActor:
    """A stage of a task in an actor: takes and gives rows with one text, an errand as JSON.

    Its subclasses are the stages, under whose names Ray shows them. An errand has the `positions` of its requests,
    those `todo` by stage, and what became of them so far; one that met `trouble` is passed on as it is.
    """

    name: ClassVar[str]

    def __init__(self, document: str) -> None:
        self.trouble, self.load = dict[str, str](), 0.0
        try:
            self._load(json.loads(document))
        except TROUBLES as error:
            self.trouble = described(error)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        errand = json.loads(row["errand"])
        errand["trouble"] = errand["trouble"] or self.trouble
        if not errand["trouble"]:
            try:
                self._work(errand)
            except TROUBLES as error:
                errand["trouble"] = described(error)
        return {"errand": json.dumps(errand)}

    def _load(self, document: Mapping[str, Any]) -> None:
        import torch

        from runner.commands.make import hush, opened, planned
        from runner.distributed.task import read_task
        from runner.distributed.tensor_parallel import machine_of
        from runner.engine.keys import STAGES, chain
        from stages.events import silent
        from stages.placement.placement import verified

        hush(verbose=False)
        torch.set_num_threads(document["threads"])
        self.task = read_task(document)
        self.store = opened(self.task.order, self.task.said, silent)
        check_shared(self.store, self.task)
        whole, _ = planned(self.task.order, self.task.said, machine=machine_of(document))
        begin = time.perf_counter()
        at = STAGES.index(self.name)
        self.keys = chain(whole)
        self.before = self.keys[STAGES[at - 1]] if at else None
        self.plan = alone(whole, self.name)
        stage = self.plan.stages[at]
        places = {part.name: self.plan.places[part.name] for part in stage.components}
        # For as long as the actor lives: Ray ends it.
        self.stage = Standing(stage, stage.loaded(verified(places, silent)).__enter__())
        self.load = time.perf_counter() - begin

    def _work(self, errand: dict[str, Any]) -> None:
        from runner.engine.keys import starts
        from runner.engine.stage_runner import StageRunner
        from stages.errors import BadResult
        from stages.events import silent

        lost = {failure["index"] for failure in errand["failures"]}
        todo = [at for at in errand["todo"].get(self.name, ()) if at not in lost]
        anew = starts(self.task.said.from_stage, cast(Any, self.stage))
        shift = StageRunner(self.plan, cast(Any, self.stage), self.store, silent, anew=anew,
                      step_every=self.task.order.step_every)
        seconds, peak = dict(shift.seconds), dict[str, int]()
        try:
            report = shift.work(self.keys[self.name], self.before, todo)
            seconds, peak = dict(report.seconds), dict(report.peak)
        except BadResult as error:
            # All of them are one artifact.
            errand["failures"] += [{"index": at, "stage": self.name, "text": str(error)} for at in todo]
        errand["failures"] += [vars(failure) for failure in shift.failures]
        seconds["load"] += self.load
        self.load = 0.0
        errand["did"][self.name] = {"ran": len(todo), "seconds": seconds, "peak": peak,
                                    "worker": f"{platform.node()} {os.getpid()}"}


class Encode(StageActor):
    """Prompts become embeddings."""

    name = "encode"


class Denoise(StageActor):
    """Embeddings become latents."""

    name = "denoise"


class Decode(StageActor):
    """Latents become pictures."""

    name = "decode"


OPERATORS: dict[str, type[StageActor]] = {"encode": Encode, "denoise": Denoise, "decode": Decode}


def check_shared(store: Any, task: Any) -> None:
    """Raise StoreError where this node sees another store than the one that the run is in."""
    try:
        store.load_run(task.order.run)
    except StoreError:
        raise StoreError(f"run {task.order.run} is not in {task.order.store} as {platform.node()} sees it -> nodes "
                         f"need one store that all of them see: --artifacts DIR or URL") from None


def described(error: BaseException) -> dict[str, str]:
    """An error that the one who asked must hear of, by kind."""
    kind = next(kind for kind in TROUBLES if isinstance(error, kind))
    return {"kind": kind.__name__, "text": str(error)}


def cards_of(plan: "Plan", stage: "Stage") -> list[str]:
    """The cards that a stage computes on, in order."""
    used = [device for part in stage.components
            for device in plan.places[part.name].placement.compute_devices.values()]
    return [device for device in dict.fromkeys(used) if device != "cpu"]


def alone(plan: "Plan", name: str) -> "Plan":
    """The plan as a worker of one stage has it, whose cards are numbered from 0."""
    stage = next(stage for stage in plan.stages if stage.name == name)
    cards = cards_of(plan, stage)
    names = {card: f"{card.partition(':')[0]}:{at}" for at, card in enumerate(cards)}
    places = {part.name: moved(plan.places[part.name], names) for part in stage.components}
    devices = tuple(replace(device, name=names.get(device.name, device.name)) for device in plan.machine.devices
                    if device.name in names or not cards)
    return replace(plan, places={**plan.places, **places}, machine=replace(plan.machine, devices=devices))


def moved(place: "Place", names: Mapping[str, str]) -> "Place":
    """The place with its cards renamed."""
    return replace(place, placement=place.placement.renamed(names))


def errands(groups: Sequence[range], todo: Mapping[str, Sequence[int]]) -> list[dict[str, str]]:
    """The rows to begin with; a group of which nothing is to be computed is none."""
    rows = []
    for group in groups:
        mine = {name: [at for at in group if at in set(positions)] for name, positions in todo.items()}
        if any(mine.values()):
            rows.append({"errand": json.dumps({"positions": list(group), "todo": mine, "failures": [], "did": {},
                                               "trouble": {}})})
    return rows
