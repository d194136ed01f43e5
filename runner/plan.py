"""The plan: which model, which requests, and where every component goes, before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from runner.demo import CHECKPOINT
from runner.request import Request, nearest
from stages.checkpoint import Checkpoint, check, find
from stages.dtypes import choose
from stages.errors import PlanError
from stages.families import FAMILIES, Family
from stages.files import read_json
from stages.machine import Machine, probe
from stages.placement import Place, Resident
from stages.split import require, split
from stages.stage import Stage
from stages.state import Value
from stages.weights import Weights, weigh


@dataclass(frozen=True)
class Plan:
    """What a run will do: its model, its requests, its stages, and the place of every component."""

    family: Family
    checkpoint: Checkpoint
    requests: tuple[Request, ...]
    machine: Machine
    stages: tuple[Stage, ...]
    places: Mapping[str, Place]
    weights: Mapping[str, Weights]

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices that the run may use."""
        return tuple(device.name for device in self.machine.devices)


def make_plan(
    family: str,
    requests: Sequence[Request],
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    dtype: Mapping[str, torch.dtype] | None = None,
    devices: Sequence[str] = (),
) -> Plan:
    """Find and check the model, and place every component.

    `dtype` maps component names to types ("" stands for all others). Raises LoadError, PlanError or ValueError.
    """
    chosen = family_of(family, model)
    require(chosen.requires)
    source = CHECKPOINT if chosen.repo == "demo" and model in (None, "demo") else model or chosen.repo
    check(find(source, revision=revision, components=()), family=chosen)
    checkpoint = find(source, revision=revision)
    if source == CHECKPOINT:
        checkpoint = replace(checkpoint, source="demo")
    check_sizes(requests, size_multiple(checkpoint, chosen))
    machine = probe(devices)
    stages = split(checkpoint, inputs_of(requests[0]))
    places, weights = _place(stages, machine, dtype or {})
    return Plan(chosen, checkpoint, tuple(requests), machine, stages, places, weights)


def family_of(name: str, model: str | Path | None) -> Family:
    """The family by name; the demo checkpoint has defaults of its own."""
    return FAMILIES["demo" if model == "demo" else name]


def inputs_of(request: Request) -> dict[str, Value]:
    """The request under diffusers' names; "seed" stands for the generator."""
    inputs: dict[str, Value] = {
        "prompt": request.prompt,
        "max_sequence_length": request.text_tokens,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "seed": request.seed,
    }
    return inputs if request.guidance is None else inputs | {"guidance_scale": request.guidance}


def size_multiple(checkpoint: Checkpoint, family: Family) -> int:
    """What width and height must be a multiple of: the VAE's scale factor times the transformer's patch."""
    config = read_json(checkpoint.components["vae"].folder / "config.json")
    return int(2 ** (len(config["block_out_channels"]) - 1)) * family.patch


def check_sizes(requests: Sequence[Request], multiple: int) -> None:
    """Raise ValueError for a size that the model would silently round."""
    for request in requests:
        if request.width % multiple or request.height % multiple:
            below, above = nearest((request.width, request.height), multiple)
            raise ValueError(
                f"--size {request.width}x{request.height}: this model makes multiples of {multiple}; "
                f"nearest are {below[0]}x{below[1]} and {above[0]}x{above[1]}"
            )


def _place(
    stages: Sequence[Stage], machine: Machine, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, Place], dict[str, Weights]]:
    device = max(machine.devices, key=lambda device: device.free)
    places, weights = {}, {}
    for stage in stages:
        for component in stage.components:
            dtype = dtypes.get(component.name) or dtypes.get("") or choose(component, device)
            places[component.name] = Place(Resident(device.name), dtype)
            weights[component.name] = weigh(component, dtype)
        need = sum(weights[component.name].total for component in stage.components)
        if need > device.free:
            raise PlanError(f"{stage.name} needs {need / 2**30:.1f} GiB; {device.name} has "
                            f"{device.free / 2**30:.1f} GiB free")
    return places, weights
