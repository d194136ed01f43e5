"""One picture by two processes, each with its part of every layer, as by one process; and what cannot be cut."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner import Job, Plan, RankLost, RankProcesses, Report, Request, make_plan, run_all, run_stage, spawn
from runner.artifacts import Store, open_store
from runner.distributed.api import process_count
from runner.engine.keys import artifact_keys
from runner.engine.step_checkpoint import load_checkpoint
from runner.planning.describe import layout
from runner.planning.ladder import NoStrategyFits
from stages.errors import DoesNotFit, InvalidInput
from stages.families import FAMILIES
from stages.state import State
from tests import sparse, tiny_families
from tests.test_ranks import gone, when

PLACE = ["denoise=tensor_parallel"]
ASKED = [Request(prompt, 64, 48, 2, 3.5, 7 + at, 32, at) for at, prompt in enumerate(("a dog", "a cat", "a fox"))]
LONG = [replace(ASKED[0], steps=1000)]


def planned(model: Path, machine: str | None = None, name: str = "flux", **more: Any) -> Plan:
    family = FAMILIES[name]
    asked = Request("a dog", 256, 256, 2, family.guidance, 7, 32)
    devices = ["cpu"] if machine is None else []
    return make_plan(Job(name, [asked], model=model, devices=devices, **{"place": PLACE} | more), machine=machine)


@pytest.fixture(scope="module")
def alone(flux: Path) -> Report:
    """The three pictures by one process."""
    return run_all(make_plan(Job("flux", ASKED, model=flux, devices=["cpu"])))


def latents(store: Store, key: str) -> torch.Tensor:
    state = store.get(key)
    assert state is not None
    found = state.values["latents"]
    assert isinstance(found, torch.Tensor)
    return found


def check_equal(made: Report, store: Store, alone: Report) -> None:
    """Assert that latents differ by no more than rounding, and pixels by no more than one level."""
    assert made.keys == alone.keys
    for picture in made.pictures:
        other = alone.pictures[picture.index]
        key = alone.keys["denoise"][picture.index]
        assert torch.allclose(latents(store, key), latents(other.store, key), rtol=0, atol=1e-5)
        assert np.abs(picture.pixels.astype(int) - other.pixels).max() <= 1


def test_two_processes_make_the_pictures_of_one_and_agree_on_what_to_do(
    flux: Path, alone: Report, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path))
    said: list[tuple[str, Any]] = []
    common: dict[str, Any] = {"model": flux, "devices": ["cpu"], "store": tmp_path, "place": PLACE}
    with pytest.raises(KeyboardInterrupt), RankProcesses(2) as crew:
        made = spawn(Job("flux", ASKED, **common), ranks=crew, emit=lambda kind, data: said.append((kind, data)))
        check_equal(made, store, alone)
        denoise = made.stages[1]
        assert (denoise.ran, denoise.reused) == (3, 0) and denoise.peak.keys() == {"rank 0 cpu", "rank 1 cpu"}
        assert [kind for kind, _ in said].count("step") == 6
        # What is there already is the first rank's to know; a picture that comes to nothing does so on both.
        for index in (1, 2):
            store.drop(made.keys["denoise"][index])
            store.drop(made.keys["decode"][index])
        embeddings = store.get(made.keys["encode"][2])
        assert embeddings is not None
        broken = {name: torch.full_like(value, 3e38) if isinstance(value, torch.Tensor) else value
                  for name, value in embeddings.values.items()}
        store.put(made.keys["encode"][2], "encode", State(broken, embeddings.tags), {})
        made = spawn(Job("flux", ASKED, **common), ranks=crew)
        check_equal(made, store, alone)
        assert [failure.index for failure in made.failures] == [2] and "not finite" in made.failures[0].text
        assert [stage.ran for stage in made.stages] == [0, 2, 1] and made.stages[1].reused == 1
        # All stop after the same step, and what was done is kept.
        with when(crew, 1, "step", lambda pid: os.kill(os.getpid(), signal.SIGINT)):
            spawn(Job("flux", LONG, **common), ranks=crew)
    assert gone(crew)
    (key,) = artifact_keys(make_plan(Job("flux", LONG, model=flux, devices=["cpu"])))["denoise"]
    checkpoint = load_checkpoint(store, key)
    assert checkpoint is not None and 1 <= checkpoint.steps < 1000


@pytest.mark.slow
def test_a_killed_process_is_named_and_not_the_one_that_misses_it(flux: Path, tmp_path: Path) -> None:
    said = r"^rank 1 was killed by SIGKILL .* last in denoise, picture 1 of 1, step \d+ of 1000; what was finished"
    with RankProcesses(2) as crew:
        kill = when(crew, 1, "step", lambda pid: os.kill(pid, signal.SIGKILL))
        with pytest.raises(RankLost, match=said), kill:
            spawn(Job("flux", LONG, model=flux, devices=["cpu"], store=tmp_path, place=PLACE), ranks=crew)
    assert gone(crew)


def test_flux_fits_two_16_gb_cards_with_the_table_and_not_without(tmp_path: Path) -> None:
    model = sparse.flux_dev(tmp_path / "flux")
    plan = planned(model, "2x16GB")
    needs = plan.needs["denoise"]
    assert {card: round(need.weights / 1e9, 2) for card, need in needs.items()} == {"cuda:0": 8.64, "cuda:1": 8.64}
    assert str(plan.places["denoise", "transformer"].placement) == "cut over cuda:0, cuda:1"
    assert plan.device_map["transformer"] == {"": "cuda:0,cuda:1"} and plan.lanes == 1
    assert {card: sum(parts["transformer"].values()) for card, parts in layout(plan)["denoise"].items()} == {
        card: need.weights for card, need in needs.items()}
    says = r"14\.2 GiB of weights and .* in each of 2 processes; cuda:0 has 13\.9 GiB"
    with pytest.raises(NoStrategyFits, match=says):
        planned(model, "2x16GB", modulation_table=False)


def test_what_cannot_be_cut_is_refused_with_the_reason(flux: Path, tmp_path: Path) -> None:
    cases: list[tuple[type[ValueError], str, dict[str, Any]]] = [
        (DoesNotFit, "2 attention heads, which 3 cards .* with N of 2", {"machine": "3x16GB"}),
        (ValueError, "needs 2 cards, and there is cuda:0 ->", {"machine": "1x16GB"}),
        (ValueError, r"needs 3 cards, and there is 2 cards \(cuda:0, cuda:1\)",
         {"machine": "2x16GB", "place": ["denoise=tensor_parallel:3"]}),
        (ValueError, "needs 2 cards, and there is no card -> .* ranks", {}),
        (ValueError, "2 lanes and denoise=tensor_parallel contradict", {"machine": "2x16GB", "lanes": 2}),
        (ValueError, "write denoise=tensor_parallel", {"place": ["decode=tensor_parallel"]}),
    ]
    for kind, says, options in cases:
        with pytest.raises(kind, match=says):
            planned(flux, **options)
    with pytest.raises(DoesNotFit, match=r"no tensor parallel plan for SD3Transformer2DModel -> place='"):
        planned(tiny_families.sd3(tmp_path / "sd3"), "2x16GB", "sd3")
    plan = planned(flux, place=["denoise=tensor_parallel:2"])
    assert plan.needs["denoise"]["cpu"].weights == 2 * 211_264
    for call in (lambda: run_all(plan), lambda: run_stage(plan, "denoise", store=open_store("memory", warn=print))):
        with pytest.raises(ValueError, match=r"a process for each card -> stagerun\.spawn"):
            call()


def test_how_many_processes_a_job_takes() -> None:
    def count(ranks: int | None = None, **fields: Any) -> int:
        return process_count(Job("flux", ASKED, **{"place": PLACE} | fields), ranks)

    assert count(place=["encode=0", "denoise=tensor_parallel:4"]) == 4
    assert count(3) == 3 and count(devices=["cuda:0", "cuda:2"]) == 2
    assert count(place=[]) == 2 and count(1, place=[]) == 1
    with pytest.raises(InvalidInput, match=r"place='denoise=tensor_parallel:4' and ranks=2 contradict"):
        count(2, place=["denoise=tensor_parallel:4"])
    with pytest.raises(InvalidInput, match=r"there is one device -> .* ranks=2"):
        count(devices=["cpu"])
