"""The plan: which model, which requests, and where every component goes, before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from runner.demo import CHECKPOINT
from runner.planning.cache import PlanCache
from runner.planning.ladder import Strategy
from runner.planning.memory_limits import limited, read_machine
from runner.planning.place_option import read_wishes
from runner.planning.placer import Need, Placer
from runner.planning.precompute import Saving
from runner.reports import notebook_html
from runner.request import Request, check_tokens, nearest
from stages.families import FAMILIES, Family
from stages.loading import lora_merge
from stages.machine import Machine, check_cards, probe
from stages.models.checkpoint import Checkpoint, check_family, find
from stages.models.lora import LoraRequest, find_lora, read_loras
from stages.models.weights import Weights
from stages.pipeline.split import require, split
from stages.pipeline.stage import Stage
from stages.placement.placement import Place, through_host
from stages.state import Value


@dataclass(frozen=True)
class Plan:
    """What a run will do: its model, its requests, its stages, and the place of every component.

    `needs` are the bytes on each device in each stage, `rungs` what was tried to place it, `reasons` why a component
    has its type, `savings` what the modulation table saves of it, `reads` the bytes that a pass of a stage
    reads from the disk.
    """

    family: Family
    checkpoint: Checkpoint
    requests: tuple[Request, ...]
    machine: Machine
    stages: tuple[Stage, ...]
    places: Mapping[str, Place]
    weights: Mapping[str, Weights]
    needs: Mapping[str, Mapping[str, Need]] = field(default_factory=dict)
    rungs: Mapping[str, tuple[Strategy, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    lanes: int = 1
    savings: Mapping[str, Saving] = field(default_factory=dict)
    reads: Mapping[str, int] = field(default_factory=dict)
    placer: Placer | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return notebook_html.plan_line(self)

    def _repr_html_(self) -> str:
        return notebook_html.plan_html(self)

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices that the run may use."""
        return tuple(device.name for device in self.machine.devices)

    @property
    def device_map(self) -> dict[str, dict[str, str]]:
        """The map of every component: its modules ("" stands for all others) and the devices that hold their weights.

        diffusers' own, `hf_device_map`, has one device for a component, and may lack one.
        """
        return {name: dict(place.placement.storage_devices) for name, place in self.places.items()}

    @property
    def cut(self) -> bool:
        """Whether the denoise is cut over cards, which takes a process for each."""
        return any(place.placement.processes > 1 for place in self.places.values())

    @property
    def tile(self) -> int | None:
        """The pixels along a side of the tiles that pictures are decoded in; None where they are decoded whole."""
        sides = (place.placement.tile for place in self.places.values())
        return next((side for side in sides if side is not None), None)


def make_plan(
    family: str,
    requests: Sequence[Request],
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    dtype: Mapping[str, torch.dtype] | None = None,
    devices: Sequence[str] = (),
    machine: str | Machine | None = None,
    max_memory: str | None = None,
    place: Sequence[str] = (),
    allow_offload: str | None = None,
    lanes: int | None = None,
    modulation_table: bool = True,
    peer_copies: bool = True,
    loras: Sequence[str | Path | LoraRequest] = (),
    weights: bool = True,
    lost: dict[int, str] | None = None,
    known: PlanCache | None = None,
) -> Plan:
    """Find and check the model, and place every component where it fits together with its activations.

    `dtype` maps component names to types ("" stands for all others). `machine` is one that need not be here, such as
    "2x16GB"; `max_memory`, `place` and `allow_offload` are those of the command line; `lanes` requests are denoised
    at once, by default one for each card that the denoiser is dealt over; without `modulation_table` all of the
    denoiser is loaded, and without `peer_copies` cards send each other everything through host memory. Weights that
    are not here are downloaded when all of them are placed; without `weights`, or for a machine that is not here,
    they stay where they are. `loras` are merged into the weights: files, folders or hub names, each with its scale
    behind an `=` unless it is 1. With `lost`, requests of a size that the model does not make are left out, and go
    there by index with the reason. What other plans of the same model found is `known`. Raises ModelError, DoesNotFit
    or ValueError.
    """
    chosen = family_of(family, model)
    for request in requests:
        check_tokens(chosen, request.text_tokens)
    there = read_machine(machine) if isinstance(machine, str) else machine or check_cards(probe(devices))
    if max_memory is not None:
        there = limited(there, max_memory)
    if there.here:
        require(chosen.requires)
    source = CHECKPOINT if chosen.repo == "demo" and model in (None, "demo") else model or chosen.repo
    named = find(source, revision=revision, components=())
    check_family(replace(named, source="demo") if source == CHECKPOINT else named, family=FAMILIES[family])
    checkpoint = find(source, revision=revision, weights=False)
    if loras:
        checkpoint = adapted(checkpoint, loras)
    if source == CHECKPOINT:
        checkpoint = replace(checkpoint, source="demo")
    stages = split(checkpoint, inputs_of(largest(requests)))
    multiple = stages[1].scale_factor * chosen.patch
    requests = fitting(requests, multiple, lost)
    most = largest(requests)
    placer = Placer(there, inputs_of(most), dtype or {}, read_wishes(place, stages), allow_offload, lanes,
                    smaller(most, multiple), modulation_table, len(requests))
    placed = placer.place(stages, known)
    places = placed.places if peer_copies else through_host(placed.places)
    plan = Plan(chosen, checkpoint, tuple(requests), there, stages, places, placed.weights, placed.needs,
                placed.rungs, placed.reasons, placed.lanes, placed.savings, placed.reads, placer)
    return fetched(plan) if weights and there.here else plan


def fetched(plan: Plan) -> Plan:
    """The same plan with the model's weights on this machine: downloaded, where they are not; ModelError if not."""
    if not plan.checkpoint.bytes_to_download:
        return plan
    # Of the commit that was planned for, whatever has become of its branch.
    checkpoint = find(plan.checkpoint.source, revision=plan.checkpoint.path.name)
    if plan.checkpoint.loras:
        checkpoint = checkpoint.with_loras(plan.checkpoint.loras)
    return replace(plan, checkpoint=checkpoint, stages=split(checkpoint, inputs_of(largest(plan.requests))))


def adapted(checkpoint: Checkpoint, wanted: Sequence[str | Path | LoraRequest]) -> Checkpoint:
    """The checkpoint with these LoRAs; ModelError for one that is not there, or not made for it."""
    loras = [find_lora(each, checkpoint.pipeline) for each in read_loras(wanted)]
    if twice := [lora.source for lora in loras if loras.count(lora) > 1]:
        raise ValueError(f"--lora {twice[0]} is named twice -> name it once, with the sum of its scales")
    with_them = checkpoint.with_loras({lora: lora_merge.components_reached(lora, checkpoint) for lora in loras})
    for component in with_them.components.values():
        if component.loras:
            lora_merge.check_loras(component)
    return with_them


def largest(requests: Sequence[Request]) -> Request:
    """A request that takes at least as much memory as any of these: the most pixels, tokens, words and guidance."""
    widest = max(requests, key=lambda request: request.width * request.height)
    longest = max((request.prompt for request in requests), key=lambda prompt: len(prompt.encode()))
    negative = max((request.negative_prompt or "" for request in requests), key=lambda prompt: len(prompt.encode()))
    guidance = max((request.guidance for request in requests if request.guidance is not None), default=None)
    tokens = max(request.text_tokens for request in requests)
    # A second step finds what the first one left; later ones find the same.
    steps = min(2, max(request.steps for request in requests))
    return replace(widest, prompt=longest, negative_prompt=negative or None, guidance=guidance, text_tokens=tokens,
                   steps=steps)


def smaller(request: Request, multiple: int) -> dict[str, float]:
    """Smaller sizes of the same shape, the largest first, with their part of the request's pixels."""
    found = {}
    for part in (0.875, 0.75, 0.625, 0.5, 0.375, 0.25):
        width, height = (int(side * part) // multiple * multiple for side in (request.width, request.height))
        if width and height:
            found[f"{width}x{height}"] = width * height / (request.width * request.height)
    return found


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
    if request.negative_prompt is not None:
        inputs["negative_prompt"] = request.negative_prompt
    return inputs if request.guidance is None else inputs | {"guidance_scale": request.guidance}


def fitting(requests: Sequence[Request], multiple: int, lost: dict[int, str] | None) -> Sequence[Request]:
    """The requests whose size the model would not silently round; the others go to `lost`.

    Raises ValueError for the first of those without `lost`, or where no request is left.
    """
    kept = []
    for request in requests:
        if request.width % multiple == request.height % multiple == 0:
            kept.append(request)
            continue
        below, above = nearest((request.width, request.height), multiple)
        text = (f"--size {request.width}x{request.height}: this model makes multiples of {multiple}; nearest are "
                f"{below[0]}x{below[1]} and {above[0]}x{above[1]}")
        if lost is None:
            raise ValueError(text)
        lost[request.index] = text
    if not kept:
        raise ValueError(f"no line is left: {next(iter((lost or {}).values()))}")
    return kept
