"""Where every component lies: a map that lacks none, unlike the one of diffusers' own pipelines."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxPipeline

from runner import Job, Plan, Request, make_plan, run_all
from runner.engine.memory import Meter
from runner.planning import describe
from stages.placement.placement import device_of
from tests import tiny

Cards = Callable[..., list[str]]
CAP = 1_700_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose T5 and whose transformer are each larger than a card."""
    folder = tmp_path_factory.mktemp("large") / "flux"
    return tiny.flux(folder, heads=3, doubles=3, singles=6, text=96, text_layers=7, shard="1MB")


def planned(model: Path) -> Plan:
    return make_plan(Job("flux", [Request("a red circle", 64, 48, 1, 3.5, 7, 32)], model=model,
                         dtype={"": torch.float32}, modulation_table=False))


def test_the_balanced_map_of_diffusers_lacks_a_component_and_ours_does_not(
    large: Path, cards: Cards, sim: ModuleType
) -> None:
    """Its list of what goes to the CPU holds one component: the second one replaces the first."""
    devices = cards(CAP, CAP)
    sizes = {folder.name: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in
             large.iterdir() if folder.is_dir()}
    heavy = {name for name, size in sizes.items() if size > CAP}
    assert heavy == {"transformer", "text_encoder_2"} and sum(sizes[name] for name in heavy) < 4 * CAP
    pipe = FluxPipeline.from_pretrained(large, device_map="balanced", max_memory={0: CAP, 1: CAP})
    theirs = pipe.hf_device_map
    (lost,) = heavy - theirs.keys()
    assert {theirs[name] for name in heavy - {lost}} == {"cpu"}
    assert {parameter.device.type for parameter in getattr(pipe, lost).parameters()} == {"cpu"}
    del pipe
    plan = planned(large)
    assert plan.device_map.keys() == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    for name in heavy:
        assert set(plan.device_map[name].values()) == set(devices)
    assert all("cpu" not in devices.values() for devices in plan.device_map.values())
    there = {name: part["device_map"] for name, part in describe.document(plan)["components"].items()}
    assert there == plan.device_map


def where(model: torch.nn.Module) -> dict[str, str]:
    """The device of every parameter; a model that nobody holds any more is gone from its cards."""
    return {name: str(parameter.device) for name, parameter in model.named_parameters()}


def test_the_map_is_where_the_weights_are(large: Path, cards: Cards) -> None:
    cards(CAP, CAP)
    plan = planned(large)
    for stage in plan.stages:
        meter = Meter(plan.devices)
        with stage.loaded(plan.places_of(stage.name)) as loaded:
            found = {component.name: where(loaded.pipe.components[component.name]) for component in stage.components}
        for component, parameters in found.items():
            assert all(device_of(name, plan.device_map[component]) == device for name, device in parameters.items())
        assert meter.flush().left == 0
    report = run_all(plan)
    assert report.device_map == plan.device_map and len(report.pictures) == 1
