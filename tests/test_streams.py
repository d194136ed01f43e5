"""Lanes and loading on cards that do what they are asked for later, in every order that streams allow."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from runner import Job, Request, make_plan, run_all
from runner.distributed.env import Rank
from runner.distributed.rank import own_machine
from runner.distributed.worker import threads_for
from runner.engine import lanes
from runner.engine.memory import Meter
from stages.errors import BadResult
from stages.events import silent
from stages.loading import pinned_copy
from stages.loading.pinned_copy import PendingTensor, copy_to_devices
from stages.models.safetensors_header import read_header
from stages.models.weights import StoredTensor
from stages.pipeline.denoise import StepMonitor
from stages.placement.placement import Resident
from stages.placement.sharded import Sharded
from tests import tiny, tiny_families

Cards = Callable[..., list[str]]
ASKED = [Request(prompt, 64, 48, 2, 3.5, 7 + index, 32, index) for index, prompt in enumerate(("a star", "two rings"))]
LIMIT = 60_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of a few blocks that can be dealt."""
    return tiny.flux(tmp_path_factory.mktemp("streams") / "flux", doubles=2, singles=4, heads=5, shard="5MB")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-Image, whose transformer keeps tensors between calls."""
    return tiny_families.qwen_image(tmp_path_factory.mktemp("streams") / "qwen")


def pictures(family: str, model: Path, devices: Sequence[str], **more: Any) -> list[np.ndarray]:
    """What two requests come to; nothing is left on a card."""
    asked = ASKED if family == "flux" else [Request("a star", 64, 48, 2, 4.0, 7 + index, 224, index)
                                            for index in range(2)]
    job = make_plan(Job(family, asked, model=model, dtype={"": torch.float32}, devices=devices, **more))
    report = run_all(job)
    assert not report.failures and all(stage.flushed.left == 0 for stage in report.stages)
    return [picture.pixels for picture in report.pictures]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[np.ndarray]:
    """What the CPU makes of the requests."""
    return pictures("flux", model, ["cpu"])


@pytest.fixture(scope="module")
def qwen_alone(qwen: Path) -> list[np.ndarray]:
    """What the CPU makes of them by Qwen-Image."""
    return pictures("qwen-image", qwen, ["cpu"])


def same(made: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.streams
def test_lanes_over_two_cards_make_what_the_cpu_makes(model: Path, alone: list[np.ndarray], cards: Cards) -> None:
    devices = cards(LIMIT, LIMIT)
    job = make_plan(Job("flux", ASKED, model=model, dtype={"": torch.float32}, devices=devices,
                        place=["denoise=sharded"], lanes=2))
    assert isinstance(job.places["denoise", "transformer"].placement, Sharded)
    assert same(pictures("flux", model, devices, place=["denoise=sharded"], lanes=2), alone)


@pytest.mark.streams
def test_lanes_on_one_card_make_what_the_cpu_makes(qwen: Path, qwen_alone: list[np.ndarray], cards: Cards) -> None:
    assert same(pictures("qwen-image", qwen, cards(LIMIT), lanes=2, modulation_table=False), qwen_alone)


@pytest.mark.streams
def test_what_is_read_arrives_whole(tmp_path: Path, cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more pieces than there are buffers, in two readers."""
    (card,) = cards(LIMIT)
    monkeypatch.setattr(pinned_copy, "PIECE", 4096)
    numbers = {f"t{index}": torch.rand(9000 + index, generator=torch.Generator().manual_seed(index))
               for index in range(6)}
    save_file(numbers, tmp_path / "model.safetensors")
    header = read_header(tmp_path / "model.safetensors")
    targets = {name: torch.empty_like(tensor, device=card) for name, tensor in numbers.items()}
    copy_to_devices([PendingTensor(StoredTensor(tmp_path / "model.safetensors", name, header[name]), torch.float32,
                                   target) for name, target in targets.items()])
    # It has arrived when that returns: whoever reads it need not wait.
    with torch.Stream(device=card):
        for name, target in targets.items():
            assert torch.equal(target.cpu(), numbers[name]), name


class Keeper(nn.Module):
    """A model that keeps a tensor between calls, as those that cache positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.kept = nn.Identity(), torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.kept.numel():
            self.kept = self.block(x) * 3
        return self.kept + 1


@pytest.mark.parametrize("placement", ["resident", "sharded"])
def test_a_lane_waits_for_what_another_has_made(cards: Cards, sim: ModuleType, placement: str) -> None:
    (card,) = cards(LIMIT)
    model, x = Keeper(), torch.ones(100, device=card)
    if placement == "resident":
        Resident(card).attach(model, card)
    else:
        Sharded(card, {"block": card}).attach(model, card)
    made, read, seen = threading.Event(), threading.Event(), dict[int, list[float]]()

    def do(loaded: Any, item: int) -> None:
        if item:
            made.wait(30)
        y = model(x)
        if not item:
            made.set()
            read.wait(30)
        seen[item] = y.cpu().tolist()
        read.set()

    sim.schedule("late")
    lanes.process(SimpleNamespace(lane=lambda: None), 2, [card], [0, 1], do, threading.Event())
    assert seen == {0: [4.0] * 100, 1: [4.0] * 100}


def test_lanes_begin_when_what_was_ordered_before_them_is_there(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(LIMIT)
    sim.schedule("late")
    weights, seen = torch.full((100,), 3.0, device=card), []
    lanes.process(SimpleNamespace(lane=lambda: None), 2, [card], [0, 1],
                  lambda loaded, item: seen.append(weights.cpu().tolist()), threading.Event())
    assert seen == [[3.0] * 100] * 2


def test_a_flush_hears_of_what_failed_in_its_stage(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(LIMIT)
    sim.schedule("late")
    held = torch.ones(2**20 // 4, device=card)
    torch.accelerator.synchronize(card)
    meter = Meter([card])
    sim.fail_kernel(card, 1)
    held.add_(1)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        meter.flush()


@pytest.mark.parametrize("nth", [1, 30, 90])
def test_a_lane_whose_card_fails_ends_the_run_for_all(
    model: Path, cards: Cards, sim: ModuleType, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    devices = cards(LIMIT, LIMIT)
    job = make_plan(Job("flux", ASKED, model=model, dtype={"": torch.float32}, devices=devices,
                        place=["denoise=sharded"], lanes=2))
    process = lanes.process

    def failing(*args: Any) -> None:
        sim.schedule("late")
        sim.fail_kernel(devices[1], nth)
        process(*args)

    monkeypatch.setattr(lanes, "process", failing)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        run_all(job)


@pytest.mark.parametrize("place", ["denoise=sharded", "denoise=resident"])
def test_the_host_waits_once_a_step_and_for_the_step_before(
    model: Path, cards: Cards, sim: ModuleType, place: str
) -> None:
    """With the table of modulations, whose rows and checks are copied while the card computes."""
    devices = cards(LIMIT, LIMIT)
    found = {}
    for steps in (2, 4):
        sim.reset()
        sim.schedule("late")
        request = Request("a star", 64, 48, steps, 3.5, 7, 32)
        job = make_plan(Job("flux", [request], model=model, dtype={"": torch.float32}, devices=devices, place=[place]))
        assert job.places["denoise", "transformer"].precomputed
        with sim.watched_waits() as places:
            run_all(job)
        # The loop is gone through once more, with nothing loaded, to find what the table is of.
        found[steps] = [frames.split(" < ") for frames in places
                        if "StageRunner._make" in frames and "loop_step" in frames]
    assert len(found[4]) - len(found[2]) == 2
    assert all("_Flag.__bool__" in frames[0] for frames in found[4])
    assert all("StepMonitor._check" in frames[1] for frames in found[4])


@pytest.mark.parametrize(("chosen", "own"), [((), [["sim:0", "sim:1"], ["sim:2", "sim:3"]]),
                                             (("2", "sim:1"), [["sim:2"], ["sim:1"]])])
def test_a_rank_has_contexts_on_its_own_cards_alone(
    cards: Cards, sim: ModuleType, chosen: Sequence[str], own: list[list[str]]
) -> None:
    for number, mine in enumerate(own):
        sim.withdraw()
        cards(*[LIMIT] * 4)
        sim.withdraw()
        sim.configure([LIMIT] * 4)
        assert threads_for((), 4, Rank(number, 2, number, 2)) == 2 and sim.contexts() == []
        machine = own_machine(Job("demo", "a star", devices=chosen), Rank(number, 2, number, 2))
        assert [card.name for card in machine.cards] == mine
        assert sim.contexts() == sorted(mine)


@pytest.mark.parametrize(("bfloat16", "says"), [(True, "dtype='transformer=bfloat16' (or float32)"),
                                                (False, "dtype='transformer=float32'")])
def test_latents_that_are_not_finite_are_told_a_step_later_with_a_type_that_the_card_has(
    cards: Cards, sim: ModuleType, bfloat16: bool, says: str
) -> None:
    (card,) = cards(LIMIT)
    sim.schedule("late")
    sim.bfloat16(bfloat16)
    latents = torch.ones(1, 4, device=card)
    monitor, state = StepMonitor(silent), SimpleNamespace(latents=latents)
    monitor(0, 5, state)
    latents[0, 0] = torch.inf
    monitor(1, 5, state)
    with pytest.raises(BadResult, match="not finite after step 2") as caught:
        monitor(2, 5, state)
    assert says in str(caught.value)


def test_ten_runs_leave_cards_and_streams_as_they_were(
    model: Path, alone: list[np.ndarray], cards: Cards, sim: ModuleType
) -> None:
    devices = cards(LIMIT, LIMIT)
    sim.workspaces(2**20)
    before = lanes.stream.cache_info().currsize
    for _ in range(3):
        assert same(pictures("flux", model, devices, place=["denoise=sharded"], lanes=2), alone)
        assert [torch.accelerator.memory_allocated(card) for card in devices] == [0, 0]
    assert lanes.stream.cache_info().currsize - before <= 4
