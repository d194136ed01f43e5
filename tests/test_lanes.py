"""Several requests in flight over one sharded denoiser: the same bits, no card idle, and no lane lost."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from runner import Plan, Request, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.interrupts import Interrupted
from runner.keys import chain, midway_key
from stages.errors import StageOutOfMemory
from stages.placement import Sharded
from tests import tiny

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
    job = make_plan("flux", ASKED, model=model, dtype={"": torch.float32}, devices=["cpu"])
    return [picture.pixels for picture in run_all(job).pictures]


def plan(model: Path, requests: list[Request] = ASKED, **more: Any) -> Plan:
    return make_plan("flux", requests, model=model, dtype={"": torch.float32}, **more)


def sharded(model: Path, **more: Any) -> Plan:
    return plan(model, place=["denoise=sharded"], **more)


def test_the_plan_has_a_lane_for_each_card_that_takes_turns(model: Path, cards: Cards) -> None:
    cards(40_000_000, 40_000_000)
    assert plan(model).lanes == 1, "resident on one card: nothing else would work meanwhile"
    assert sharded(model).lanes == 2
    assert sharded(model, requests=ASKED[:1]).lanes == 1
    assert sharded(model, lanes=3).lanes == 3
    one, two = (sharded(model, lanes=count).needs["denoise"] for count in (1, 2))
    assert all(two[card].activations == 2 * one[card].activations for card in two)


@pytest.mark.parametrize("count", [2, 3])
def test_lanes_make_the_pictures_of_one_at_a_time(
    model: Path, alone: list[np.ndarray], cards: Cards, count: int
) -> None:
    devices = cards(40_000_000, 40_000_000)
    job = sharded(model, lanes=count)
    placement = job.places["transformer"].placement
    assert isinstance(placement, Sharded) and set(placement.devices.values()) == set(devices)
    assert job.places["transformer"].folded
    done: list[int] = []
    made = run_all(job, done=lambda picture: done.append(picture.index))
    assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(made.pictures, alone, strict=True))
    assert made.stages[1].lanes == count and sorted(done) == [0, 1, 2, 3, 4]
    assert all(stage.flushed.left == 0 for stage in made.stages)
    assert all(made.stages[1].peak[card] <= job.needs["denoise"][card].total for card in devices)


def test_lanes_keep_both_cards_busy(model: Path, cards: Cards, sim: ModuleType) -> None:
    cards(40_000_000, 40_000_000)
    seconds = {}
    for count in (1, 2):
        job = sharded(model, requests=ASKED[:4], lanes=count)
        store = MemoryStore(warn=print)
        run_all(job, store=store, stop_after="encode")
        # Long enough that what the host does between kernels does not matter.
        sim.delay(per_kernel_seconds=0.0005)
        start = time.monotonic()
        run_all(job, store=store, stop_after="denoise")
        seconds[count] = time.monotonic() - start
        sim.reset()
    print(f"four pictures: one lane {seconds[1]:.1f} s, two lanes {seconds[2]:.1f} s")
    assert seconds[2] < 0.85 * seconds[1]


def test_a_stop_keeps_every_lane(model: Path, alone: list[np.ndarray], cards: Cards) -> None:
    cards(40_000_000, 40_000_000)
    job, store, steps = sharded(model), MemoryStore(warn=print), list[int]()

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["request"])

    with pytest.raises(Interrupted):
        run_all(job, store=store, emit=emit, stop=lambda: len(set(steps)) == 2)
    assert [store.find(midway_key(key)) is not None for key in chain(job)["denoise"]] == [True, True] + [False] * 3
    made = run_all(job, store=store)
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

    made = run_all(job, store=store, emit=emit, name="tight")
    assert all(np.array_equal(picture.pixels, pixels) for picture, pixels in zip(made.pictures, alone, strict=True))
    assert made.changes == ("one request at a time instead of 2",) and made.stages[1].lanes == 1
    assert store.load_run("tight")["changes"] == list(made.changes) == made.pictures[0].facts["changes"]
    (warning,) = (data["text"] for kind, data in told if kind == "warning")
    assert "denoise ran out of memory" in warning and "one request at a time" in warning
    # No step was done twice.
    assert sum(kind == "step" for kind, _ in told) == 3 * len(ASKED)
    assert sum(kind == "rejoin" for kind, _ in told) >= 1


def test_without_leave_to_degrade_out_of_memory_ends_the_run(model: Path, cards: Cards, sim: ModuleType) -> None:
    devices = cards(40_000_000, 40_000_000)
    job, store = sharded(model), MemoryStore(warn=print)

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            sim.fail_allocation(devices[0], 1)

    with pytest.raises(StageOutOfMemory, match="denoise ran out of memory"):
        run_all(job, store=store, emit=emit, degrade=False, name="no")
    record = store.load_run("no")
    assert record["status"] == "failed" and "out of memory" in str(record["error"])
    assert [torch.accelerator.memory_allocated(card) for card in devices] == [0, 0]
