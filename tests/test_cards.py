"""What happens on cards with too little memory each: the three stages over two of them."""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from runner import Job, Plan, Request, RunPolicy, make_plan, run_all, run_stage
from runner.artifacts import MemoryStore
from stages.errors import StageOutOfMemory
from stages.machine import probe
from stages.placement.placement import Place, Placement, Resident
from stages.placement.sharded import Sharded
from stages.state import State
from tests import tiny

Cards = Callable[..., list[str]]
ASKED = Request("a red circle", 64, 48, 3, 3.5, 7, 32)
MIB = 2**20


def reference(model: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The picture that the CPU makes."""
    return run_all(make_plan(Job("flux", [ASKED], model=model, dtype={"": dtype}, devices=["cpu"]))).pictures[0].pixels


def over(
    model: Path, devices: list[str], places: dict[str, Placement], requests: Sequence[Request] = (ASKED,)
) -> Plan:
    """A plan with its components placed by hand."""
    job = make_plan(Job("flux", requests, model=model, dtype={"": torch.float32}, devices=["cpu"]))
    there = {(stage, name): Place(places[name], torch.float32) for stage, name in job.places}
    return dataclasses.replace(job, places=there, machine=probe(devices))


def halved(first: str, second: str, doubles: int = 2, singles: int = 4) -> Sharded:
    """A FLUX transformer with the double blocks and the rest on one card, and the single blocks on the other."""
    rest = ("time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out", "pos_embed")
    blocks = {f"transformer_blocks.{i}": first for i in range(doubles)}
    blocks |= {f"single_transformer_blocks.{i}": second for i in range(singles)}
    return Sharded(first, dict.fromkeys(rest, first) | blocks)


def spread(devices: list[str]) -> dict[str, Placement]:
    """Every stage uses both cards."""
    first, second = devices
    return {"text_encoder": Resident(first), "text_encoder_2": Resident(second),
            "transformer": halved(first, second), "vae": Resident(second)}


def allocated(devices: list[str]) -> list[int]:
    """Bytes on each card, once the threads that transformers loads with have let go of theirs."""
    gc.collect()
    for _ in range(40):
        if not any(found := on(devices)):
            break
        time.sleep(0.05)
    return found


def on(devices: list[str]) -> list[int]:
    """Bytes on each card now."""
    return [torch.accelerator.memory_allocated(device) for device in devices]


def test_three_stages_over_two_cards_make_the_picture_of_the_cpu(flux: Path, cards: Cards) -> None:
    expected = reference(flux)
    devices = cards(40 * MIB, 40 * MIB)
    left: list[Any] = []

    def emit(kind: str, data: Any) -> None:
        if kind == "flush":
            left.append((data["left"], *allocated(devices)))

    made = run_all(over(flux, devices, spread(devices)), emit=emit)
    assert np.abs(made.pictures[0].pixels.astype(int) - expected).max() <= (0 if devices[0].startswith("sim") else 1)
    assert left == [(0, 0, 0)] * 3
    assert all(stage.peak[device] > 0 for stage in made.stages[:2] for device in devices)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_nothing_is_left_on_a_card_after_an_exception_in_a_stage(flux: Path, cards: Cards, stage: str) -> None:
    devices = cards(40 * MIB, 40 * MIB)
    job, store = over(flux, devices, spread(devices)), MemoryStore(warn=print)
    model = {"encode": "text_encoder_2", "denoise": "transformer", "decode": "vae.decoder"}[stage]

    def fail(*anything: Any) -> None:
        raise ZeroDivisionError("in the middle")

    for part in job.stages:
        if part.name == stage:
            part.prepare = lambda pipe: attrgetter(model)(pipe).register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError) as kept:
        run_all(job, store=store)
    assert allocated(devices) == [0, 0] and kept.value is not None
    assert len(store.keys()) == ["encode", "denoise", "decode"].index(stage)


def test_a_stage_over_the_limit_fails_by_name_and_earlier_artifacts_survive(
    flux: Path, cards: Cards, sim: ModuleType
) -> None:
    devices = cards(2 * MIB, 600_000)
    everywhere = dict.fromkeys(("text_encoder", "text_encoder_2"), Resident(devices[0]))
    job = over(flux, devices, {**everywhere, "transformer": Resident(devices[1]), "vae": Resident(devices[0])})
    store = MemoryStore(warn=print)
    with pytest.raises(StageOutOfMemory, match=r"denoise ran out of memory .*sim:1 peaked at .* while loading: "):
        run_all(job, RunPolicy(degrade=False), store=store)
    assert len(store.keys()) == 1 and allocated(devices) == [0, 0]
    moved = job.moved("denoise", {"transformer": Place(Resident(devices[0]), torch.float32)})
    assert [stage.ran for stage in run_all(moved, store=store).stages] == [0, 1, 1]


def test_a_card_that_others_fill_after_the_plan_is_planned_for_anew(
    flux: Path, cards: Cards, sim: ModuleType
) -> None:
    devices = cards(4 * MIB, 4 * MIB)
    job = make_plan(Job("flux", [ASKED], model=flux, dtype={"": torch.float32}, devices=devices))
    alone = run_all(job)
    assert not alone.changes and job.places["denoise", "transformer"].placement == Resident(devices[0])
    # All of the card but half of what denoise needs is another's: a tenth of it in reserve would not do.
    need = job.needs["denoise"][devices[0]].total
    held = torch.empty(4 * MIB - need // 2, dtype=torch.uint8, device=devices[0])
    report = run_all(job)
    assert any("denoise placed anew" in change and "transformer sim:1" in change for change in report.changes)
    assert np.array_equal(report.pictures[0].pixels, alone.pictures[0].pixels)
    with pytest.raises(StageOutOfMemory, match=r"sim:0 peaked at .* [0-9.]+ [KM]iB free now and 4\.0 MiB when"):
        run_all(job, RunPolicy(degrade=False))
    del held


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX checkpoint with as few blocks as there can be."""
    return tiny.flux(tmp_path_factory.mktemp("least") / "flux", doubles=1, singles=1, text_layers=1)


@pytest.mark.parametrize("name", ["encode", "denoise", "decode"])
def test_every_failing_allocation_of_a_stage_is_survived(
    least: Path, cards: Cards, sim: ModuleType, name: str
) -> None:
    """Fail the first, second, third ... allocation until the stage passes: no hang, no leak, no wrong result.

    First of its loading, then of its run, again and again in the one stage that is loaded.
    """
    devices = cards(40 * MIB, 40 * MIB)
    first, second = devices
    job = over(least, devices, {**spread(devices), "transformer": halved(first, second, 1, 1)})
    index = ["encode", "denoise", "decode"].index(name)
    stage, store = job.stages[index], MemoryStore(warn=print)
    run_all(job, store=store)
    before = run_stage(job, job.stages[index - 1].name, store=store)[0] if index else State()
    inputs = dataclasses.replace(ASKED, steps=1).inputs

    def loads() -> State:
        with stage.loaded(job.places_of(stage.name)):
            return State()

    for device in devices if name != "decode" else [second]:
        tried, _ = survived(sim, device, loads, lambda: allocated(devices) == [0, 0])
        with stage.loaded(job.places_of(stage.name)) as loaded:
            expected = loaded.run(before, inputs).tensors()
            held = on(devices)
            failed, made = survived(sim, device, partial(loaded.run, before, inputs), partial(within, devices, held))
        print(f"{name} on {device}: {tried} allocations of loading failed one at a time, and {failed} of the run")
        assert tried > 5 and failed > 5
        assert all(torch.equal(found, expected[value]) for value, found in made.tensors().items())
        del loaded
        assert allocated(devices) == [0, 0]


def within(devices: list[str], held: list[int]) -> bool:
    return all(found <= most for found, most in zip(on(devices), held, strict=True))


def survived(
    sim: ModuleType, device: str, attempt: Callable[[], State], clean: Callable[[], bool]
) -> tuple[int, State]:
    """How many allocations of a card were made to fail, one at a time, until an attempt passed; and what it made."""
    for nth in count(1):
        sim.fail_allocation(device, nth)
        try:
            return nth - 1, attempt()
        except torch.OutOfMemoryError:
            pass
        finally:
            sim.reset()
        assert clean()
    raise AssertionError


def test_two_cards_of_12_mb_run_a_transformer_of_20_mb(tmp_path: Path, cards: Cards, sim: ModuleType) -> None:
    """The whole idea, a thousandfold smaller: neither card could hold it, and the plan deals it over both."""
    model = tiny.flux(tmp_path / "flux", doubles=6, singles=12, heads=7, shard="5MB")
    weight = sum(file.stat().st_size for file in (model / "transformer").glob("*.safetensors"))
    expected = reference(model)
    devices = cards(12_000_000, 12_000_000)
    job = make_plan(Job("flux", [ASKED], model=model, dtype={"": torch.float32}))
    made = run_all(job, emit=lambda kind, data: print(kind, dict(data)) if kind == "end" else None)
    denoise = made.stages[1]
    print(f"transformer of {weight:,} bytes: peaks {dict(denoise.peak)}")
    assert weight > 20_000_000 and np.array_equal(made.pictures[0].pixels, expected)
    assert all(weight * 0.3 < denoise.peak[device] < 12_000_000 for device in devices)
    assert all(stage.flushed.left == 0 for stage in made.stages)
