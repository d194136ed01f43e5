"""One stage as a Ray actor does it: loaded once, then for one group of requests after the other."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch

from runner.distributed.rank import check_shared
from runner.engine.keys import artifact_keys, computed_anew
from runner.engine.oom import degrade
from runner.engine.recorder import Recorder
from runner.engine.run import advised, facts_of
from runner.engine.session import open_job_store
from runner.engine.stage_runner import StageRunner, work_items
from runner.events import Emit, one_at_a_time, silent, to_wire
from runner.job import STAGES, Job
from runner.media.latent_rgb import colors_of
from runner.media.previews import Previewer
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.startup import hush
from stages.errors import BadResult, StageOutOfMemory, StagerunError
from stages.machine import Machine


class StageActor:
    """A stage of a job in an actor: takes and gives rows with one text, a group of requests as JSON.

    Its subclasses are the stages, under whose names Ray shows them. A group has the `positions` of its requests, those
    `todo` by stage, and what became of them so far; one that met an `error` is passed on as it is.
    """

    name: ClassVar[str]

    def __init__(self, document: str, previews: Any = None) -> None:
        """`previews` is a queue of Ray's that takes them as JSON, if any are wanted."""
        self._error: dict[str, Any] = {}
        self._previews = previews
        try:
            self._start(json.loads(document))
        except StagerunError as error:
            self._error = error.to_json()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        group = json.loads(row["group"])
        group["error"] = group["error"] or self._error
        if not group["error"]:
            try:
                self._work(group)
            except StagerunError as error:
                group["error"] = error.to_json()
        return {"group": json.dumps(group)}

    def _start(self, document: Mapping[str, Any]) -> None:
        hush()
        torch.set_num_threads(document["threads"])
        job = Job.from_json(document["job"])
        self._store = open_job_store(job, silent)
        check_shared(self._store, job, platform.node())
        whole = make_plan(replace(job, origin=None), machine=Machine.from_json(document["machine"]), shapes=False)
        self._changes: list[str] = []
        self._load(on_own_cards(whole, self.name))

    def _load(self, plan: Plan) -> None:
        """Load the stage as this plan has it; it stays until the actor ends, or runs out of memory."""
        self._plan, self._keys = plan, artifact_keys(plan)
        policy = plan.job.policy
        self._recorder = Recorder(self._tell, plan.devices, often=policy.sample_memory)
        emit: Emit = self._recorder
        if policy.preview:
            emit = Previewer(emit, policy.preview, plan.requests, colors_of(plan.checkpoint, self._store))
        self._runner = StageRunner(
            plan, plan.stage(self.name), self._store, one_at_a_time(emit),
            anew=computed_anew(policy.from_stage, self.name),
        )
        emit("stage", {"stage": self.name})
        # Seconds that a group was told of already: the first one is told of the load.
        self._told: dict[str, float] = {}
        self._held = ExitStack()
        self._held.enter_context(self._recorder)
        self._held.enter_context(self._runner.measured())
        self._enter_loaded()

    def _tell(self, kind: str, data: Mapping[str, Any]) -> None:
        """What cannot wait until the group is done."""
        if kind == "preview" and self._previews is not None:
            self._previews.put(to_wire(kind, data))

    def _enter_loaded(self) -> None:
        try:
            self._held.enter_context(self._runner.loaded())
        except BaseException as error:
            self._let_go(error)

    def _let_go(self, error: BaseException) -> None:
        """Give the stage's memory back after an error, which is raised again as the measurement tells it."""
        if not self._held.__exit__(type(error), error, error.__traceback__):
            raise error

    def _work(self, group: dict[str, Any]) -> None:
        lost = {failure["index"] for failure in group["failures"]}
        todo = [position for position in group["todo"].get(self.name, ()) if position not in lost]
        try:
            self._made(group, todo)
        except StageOutOfMemory as error:
            left = [self._plan.requests[position] for position in todo]
            changed = degrade(self._plan, self.name, left) if self._plan.job.policy.degrade else None
            if changed is None:
                raise advised(error, self._plan) from None
            plan, text = changed
            self._changes.append(text)
            self._load(plan)
            try:
                self._made(group, todo)
            except StageOutOfMemory as again:
                raise advised(again, self._plan) from None
        seconds = {part: took - self._told.get(part, 0.0) for part, took in self._runner.seconds.items()}
        self._told = dict(self._runner.seconds)
        group["did"][self.name] = {
            "ran": len(todo), "seconds": seconds, "peak": dict(self._runner.peak_now()),
            "begun": self._recorder.begun, "worker": f"{platform.node()} {os.getpid()}",
            "changes": list(self._changes), "recorded": self._recorder.document(),
            "previews": self._recorder.strips.keep(self._store, self._plan.job.run, self._plan.requests),
        }
        for position in todo if self._changes else ():
            before = group["facts"].get(str(position), {}).get("changes", ())
            tile = self._plan.tile_of(self._plan.requests[position])
            group["facts"][str(position)] = facts_of(self._plan, (*before, *self._changes), tile)
            if self.name == STAGES[-1]:
                # Other tiles are another picture, under another key.
                group["keys"][str(position)] = self._keys[self.name][position]

    def _made(self, group: dict[str, Any], todo: Sequence[int]) -> None:
        at = STAGES.index(self.name)
        sources = self._keys[STAGES[at - 1]] if at else None
        items = work_items(self._keys[self.name], sources, todo)
        if not items:
            return
        self._runner.failures.clear()
        try:
            self._runner.process(items)
        except BadResult as error:
            # All of them are one artifact.
            group["failures"] += [{"index": position, "stage": self.name, "text": error.text} for position in todo]
        except (RuntimeError, MemoryError) as error:
            self._let_go(error)
        group["failures"] += [asdict(failure) for failure in self._runner.failures]


class Encode(StageActor):
    """Prompts become embeddings."""

    name = "encode"


class Denoise(StageActor):
    """Embeddings become latents."""

    name = "denoise"


class Decode(StageActor):
    """Latents become pictures."""

    name = "decode"


ACTORS: dict[str, type[StageActor]] = {"encode": Encode, "denoise": Denoise, "decode": Decode}


def cards_of(plan: Plan, stage: str) -> list[str]:
    """The cards that a stage computes on, in order."""
    used = [device for place in plan.places_of(stage).values() for device in place.placement.compute_devices.values()]
    return [device for device in dict.fromkeys(used) if device != "cpu"]


def own_names(plan: Plan, stage: str) -> dict[str, str]:
    """What a worker of a stage, which sees no other cards, calls the stage's cards."""
    return {card: f"{card.partition(':')[0]}:{at}" for at, card in enumerate(cards_of(plan, stage))}


def on_own_cards(plan: Plan, stage: str) -> Plan:
    """The plan as a worker of one stage has it, whose cards are numbered from 0."""
    cards = cards_of(plan, stage)
    names = own_names(plan, stage)
    places = {name: replace(place, placement=place.placement.renamed(names))
              for name, place in plan.places_of(stage).items()}
    devices = tuple(replace(device, name=names.get(device.name, device.name)) for device in plan.machine.devices
                    if device.name in names or not cards)
    return replace(plan.moved(stage, places), machine=replace(plan.machine, devices=devices))
