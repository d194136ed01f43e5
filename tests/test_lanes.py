"""Several requests in flight over one sharded denoiser: the same bits, no card idle, and no lane lost."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from runner import Job, Plan, Request, RunPolicy, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.engine.keys import artifact_keys, checkpoint_key
from runner.engine.signals import Interrupted
from runner.planning.describe import document, lines, pace
from stages.errors import StageOutOfMemory
from stages.placement.device_turns import DeviceTurns, enter, taking
from stages.placement.sharded import Sharded
from tests import tiny
from tests.staging import named

Cards = Callable[..., list[str]]
WORDS = ("a red circle", "a green square", "a blue star", "a heart", "two rings")
ASKED = [Request(prompt, 64, 48, 3, 3.5, 7 + index, 32, index) for index, prompt in enumerate(WORDS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose transformer has 7 MB, in blocks that can be dealt."""
    return tiny.flux(tmp_path_factory.mktemp("lanes") / "flux", doubles=4, singles=8, heads=5, shard="5MB")


@pytest.fixture(scope="module")
def alone(model: Path) -> list[np.ndarray]:
    """The pictures that the CPU makes, one at a time."""
    job = make_plan(Job("flux", ASKED, model=model, dtype={"": torch.float32}, devices=["cpu"]))
    return [picture.pixels for picture in run_all(job).pictures]


def plan(model: Path, requests: list[Request] = ASKED, **more: Any) -> Plan:
    return make_plan(Job("flux", requests, model=model, dtype={"": torch.float32}, **more))


def sharded(model: Path, **more: Any) -> Plan:
    return plan(model, place=["denoise=sharded"], **more)


def test_the_plan_has_a_lane_for_each_card_that_takes_turns(model: Path, cards: Cards) -> None:
    cards(40_000_000, 40_000_000)
    resident, both, alone = plan(model), sharded(model), sharded(model, requests=ASKED[:1])
    assert resident.lanes == 1, "resident on one card: nothing else would work meanwhile"
    assert both.lanes == 2 and alone.lanes == 1
    assert sharded(model, lanes=3).lanes == 3
    for job, says in ((both, "2 pictures in flight"), (resident, "one picture at a time, as one device does all")):
        assert pace(job) in " ".join(" ".join(lines(job)).split())
        assert pace(job).startswith(f"denoise: {says}") and "own, as" in pace(job)
    assert pace(alone) not in " ".join(" ".join(lines(alone)).split()) and document(both)["lanes"] == 2
    one, two = (sharded(model, lanes=count).needs["denoise"] for count in (1, 2))
    assert all(two[card].activations == 2 * one[card].activations for card in two)


@pytest.mark.parametrize("count", [2, 3])
def test_lanes_make_the_pictures_of_one_at_a_time(
    model: Path, alone: list[np.ndarray], cards: Cards, count: int
) -> None:
    devices = cards(40_000_000, 40_000_000)
    job = sharded(model, lanes=count)
    placement = job.places["denoise", "transformer"].placement
    assert isinstance(placement, Sharded) and set(placement.devices.values()) == set(devices)
    assert job.places["denoise", "transformer"].precomputed
    done: list[int] = []
    made = run_all(job, done=lambda picture: done.append(picture.index))
    assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(made.pictures, alone, strict=True))
    assert made.stages[1].lanes == count and sorted(done) == [0, 1, 2, 3, 4]
    assert all(stage.flushed.left == 0 for stage in made.stages)
    assert all(made.stages[1].peak[card] <= job.needs["denoise"][card].total for card in devices)


@dataclass(frozen=True)
class Spell:
    """A time that a thread spent in a linear layer of the transformer's blocks."""

    thread: int
    card: str
    start: float
    end: float

    def meets(self, other: "Spell") -> bool:
        return self.thread != other.thread and self.start < other.end and other.start < self.end


@contextmanager
def spells() -> Iterator[list[Spell]]:
    """What every thread does on every card, and when."""
    found, began = list[Spell](), dict[int, float]()

    def before(layer: nn.Module, args: object) -> None:
        began[threading.get_ident()] = time.perf_counter()

    def after(layer: nn.Module, args: object, output: object) -> None:
        if isinstance(layer, nn.Linear):
            me = threading.get_ident()
            found.append(Spell(me, str(layer.weight.device), began[me], time.perf_counter()))

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def test_lanes_keep_both_cards_busy_and_never_share_one(model: Path, cards: Cards, sim: ModuleType) -> None:
    first, second = cards(40_000_000, 40_000_000)
    job, store = sharded(model, requests=ASKED[:2], lanes=2), MemoryStore(warn=print)
    run_all(job, RunPolicy(stop_after="encode"), store=store)
    sim.delay(per_kernel_seconds=0.0005)
    with spells() as found:
        run_all(job, RunPolicy(stop_after="denoise"), store=store)
    assert len({spell.thread for spell in found if spell.card in (first, second)}) == 2
    here, there = ([spell for spell in found if spell.card == card] for card in (first, second))
    assert not any(one.meets(other) for spells in (here, there) for one, other in combinations(spells, 2))
    assert any(one.meets(other) for one, other in product(here, there)), "one card always waited for the other"


def test_a_card_is_given_in_the_order_of_asking(cards: Cards) -> None:
    (card,) = cards(1_000_000)
    turns, had = DeviceTurns(), list[int]()

    def lane(number: int) -> None:
        with taking(turns):
            enter(card)
            had.append(number)

    with taking(turns):
        enter(card)
        threads = [threading.Thread(target=lane, args=(number,)) for number in range(3)]
        for asked, thread in enumerate(threads, 2):
            thread.start()
            while turns.asked(card) < asked:
                time.sleep(0.001)
        assert had == []
    for thread in threads:
        thread.join()
    assert had == [0, 1, 2] and turns.asked(card) == 0


def test_a_stop_keeps_every_lane(model: Path, alone: list[np.ndarray], cards: Cards) -> None:
    cards(40_000_000, 40_000_000)
    job, store, steps = sharded(model), MemoryStore(warn=print), list[int]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["request"])

    with pytest.raises(Interrupted):
        run_all(job, store=store, emit=emit, stop=lambda: len(set(steps)) == 2)
    kept = [store.find(key) or store.find(checkpoint_key(key)) for key in artifact_keys(job)["denoise"]]
    assert {index for index, artifact in enumerate(kept) if artifact is not None} == set(steps)
    made = run_all(job, store=store, emit=emit)
    # No step was done twice.
    assert len(steps) == 3 * len(ASKED)
    assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(made.pictures, alone, strict=True))


def test_out_of_memory_with_two_lanes_goes_on_with_one(
    model: Path, alone: list[np.ndarray], cards: Cards, sim: ModuleType
) -> None:
    devices = cards(40_000_000, 40_000_000)
    job, store, told = sharded(model), MemoryStore(warn=print), list[Any]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        told.append((kind, dict(data)))
        if kind == "step" and sum(kind == "step" for kind, _ in told) == 3:
            sim.fail_allocation(devices[1], 5)

    made = run_all(named(job, "tight"), store=store, emit=emit)
    assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(made.pictures, alone, strict=True))
    assert made.changes == ("one request at a time instead of 2",) and made.stages[1].lanes == 1
    assert store.load_run("tight")["changes"] == list(made.changes) == made.pictures[0].facts["changes"]
    (warning,) = (data["text"] for kind, data in told if kind == "warning")
    assert "denoise ran out of memory" in warning and "one request at a time" in warning
    # No step was done twice.
    assert sum(kind == "step" for kind, _ in told) == 3 * len(ASKED)
    assert sum(kind == "resumed" for kind, _ in told) >= 1


def test_without_leave_to_degrade_out_of_memory_ends_the_run(model: Path, cards: Cards, sim: ModuleType) -> None:
    devices = cards(40_000_000, 40_000_000)
    job, store = sharded(model), MemoryStore(warn=print)

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            sim.fail_allocation(devices[0], 1)

    with pytest.raises(StageOutOfMemory, match="denoise ran out of memory"):
        run_all(named(job, "no"), RunPolicy(degrade=False), store=store, emit=emit)
    record = store.load_run("no")
    assert record["status"] == "failed" and "out of memory" in str(record["error"])
    assert [torch.accelerator.memory_allocated(card) for card in devices] == [0, 0]
