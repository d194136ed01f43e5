"""The plan as people and programs read it, and as the record of a run keeps it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from runner.planning import disk
from runner.planning.outlook import outlook
from runner.planning.picture_time import picture_time
from runner.planning.placed import concurrency
from runner.planning.plan import Plan
from runner.planning.verdict import rough_range, verdict
from runner.text import gib, table, wrapped
from stages.errors import Word, as_keyword, worded
from stages.loading.load import host_bytes_while_loading
from stages.machine import UNCOUNTED, Machine

Layout = dict[str, dict[str, dict[str, dict[str, int]]]]
# What is in no block, in a layout.
REST = "outside blocks"
# More of them are not listed.
SIZES = 6


def lines(plan: Plan, *, verbose: bool = False, columns: int = 80, word: Word = as_keyword) -> list[str]:
    """The plan for people, in lines of so many columns: a verdict, a table per stage and device, what was decided.

    With `verbose` also the arithmetic behind it: host memory, limits, and what was tried and refused. `word` says what
    the job's fields are called.
    """
    found = disk.look(plan)
    told = [*choices(plan, verbose=verbose), *costs(plan, found, verbose=verbose)]
    told += refusals(plan) if verbose else ()
    return [*wrapped(verdict(plan), columns), *table([*needs(plan)], right=True),
            *(part for line in told for part in wrapped(worded(line, word), columns))]


def document(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object; bytes are whole numbers."""
    found = disk.look(plan)
    return {
        "verdict": verdict(plan),
        "model": plan.checkpoint.source,
        "family": plan.family.name,
        "shapes": plan.checkpoint.shapes or None,
        "devices": {device.name: {"total": device.total, "free": device.free, "room": device.room,
                                  "bfloat16": device.bfloat16} for device in plan.machine.devices},
        "assumed": list(plan.machine.assumed),
        "host": {**host(plan.machine),
                 "stages": {stage: asdict(need) for stage, need in host_needs(plan).items()}},
        "limits": dict(plan.machine.limits),
        "loras": loras(plan),
        "disk": {"free": found.free, "download": found.download, "rate": found.rate,
                 "stages": {stage: {"bytes": size, "seconds": found.seconds(size), "every_pass": plan.reads[stage]}
                            for stage, size in found.stored.items()}},
        "stages": {
            stage: {device: {"weights": need.weights, "activations": need.activations}
                    for device, need in needs.items()}
            for stage, needs in plan.needs.items()
        },
        "components": {
            plan.label(part): {"dtype": dtype_name(place.dtype), "placement": str(place.placement),
                               "bytes": plan.weights[part].total, "reason": plan.reasons.get(part, ""),
                               "device_map": plan.device_map[plan.label(part)]}
            for part, place in plan.places.items()
        },
        "refused": {stage: {strategy.name: strategy.refused for strategy in tried if strategy.refused}
                    for stage, tried in plan.strategies.items()},
        "modulation_table": {name: {"whole": saving.whole, "left": saving.left, "row": saving.row,
                                    "layers": sorted(saving.layers), "refused": saving.refused}
                             for name, saving in plan.savings.items()},
        "picture": picture(plan, found.rate),
        "tile": plan.tile,
        "tiles": plan.tiles,
        "lanes": plan.lanes,
    }


def host(machine: Machine) -> dict[str, int | None]:
    """The host's memory as JSON; None for what nobody said."""
    said = machine.counts_host
    return {"total": machine.host_total if said else None, "free": machine.host_free if said else None,
            "room": machine.host_room if said or machine.host_limit is not None else None}


def picture(plan: Plan, disk_rate: float | None) -> dict[str, Any] | None:
    """The time of a picture as JSON, in seconds and operations; None where it is not estimated."""
    found = picture_time(plan, disk_rate)
    return None if found is None else {"seconds": [found.shortest, found.longest], "steps": found.steps,
                                       "step_flops": found.step, "rests_on": list(found.rates)}


def loras(plan: Plan) -> list[dict[str, Any]]:
    """The LoRAs of a plan as JSON: where each is, its sha256 and its scale."""
    return [{"source": lora.source, "sha256": lora.digest, "scale": lora.scale} for lora in plan.checkpoint.loras]


def needs(plan: Plan) -> Iterator[tuple[str, ...]]:
    """The head and the rows of the table: bytes on each device in each stage."""
    yield "stage", "device", "weights", "activations", "free then"
    for stage, needs in plan.needs.items():
        for device, need in needs.items():
            room = plan.machine.room(device)
            counted = room is not None and room < UNCOUNTED // 2
            left = gib(room - need.total) if room is not None and counted else ""
            yield stage, device, gib(need.weights), gib(need.activations), left


def choices(plan: Plan, *, verbose: bool = True) -> Iterator[str]:
    """What was decided: type and placement of every component, the modulation table, tiles."""
    for part, place in plan.places.items():
        reason = plan.reasons.get(part, "") if verbose else ""
        why = f" ({reason})" if reason else ""
        yield (f"{plan.label(part)}: {gib(plan.weights[part].total)} in {dtype_name(place.dtype)}{why}, "
               f"{place.placement}")
    for lora, names in plan.checkpoint.loras.items():
        yield f"LoRA {lora.source} x {lora.scale:g}: merged into {' and '.join(names)} where weights are read"
    if plan.checkpoint.scheduler is not None:
        yield f"scheduler: {plan.checkpoint.scheduler} (asked for)"
    if verbose:
        yield from map(str, plan.savings.values())
    if plan.tile is not None:
        yield tiled(plan)
    if len(plan.requests) > 1:
        yield pace(plan)


def tiled(plan: Plan) -> str:
    """Which sizes are decoded in tiles, and why so."""
    why = "as was asked" if plan.job.tile is not None else "because the whole picture does not fit"
    some, whole = ([size for size, tile in plan.tiles.items() if bool(tile) is so] for so in (True, False))
    text = f"decoded in tiles of {plan.tile} pixels, {why}"
    return f"{text}: {_listed(some)}; whole: {_listed(whole)}" if whole else text


def _listed(sizes: Sequence[str]) -> str:
    """Sizes, or the first and the last of many."""
    return ", ".join(sizes) if len(sizes) <= SIZES else f"{sizes[0]} to {sizes[-1]} ({len(sizes):,} sizes)"


def pace(plan: Plan) -> str:
    """How several pictures go through the denoiser, and why so."""
    if plan.lanes > 1:
        text = f"{plan.lanes} pictures in flight, so that no card waits for another"
    elif concurrency(plan.places_of("denoise")) < 2:
        text = "one picture at a time, as one device does all of the work"
    elif plan.placer is not None and plan.placer.lanes is not None:
        text = "one picture at a time, as was asked"
    else:
        text = "one picture at a time, as the activations of two do not fit beside the weights"
    return f"denoise: {text}; each in a pass of its own, as in a shared one its bits may depend on the others"


def costs(plan: Plan, found: disk.Disk, *, verbose: bool = True) -> Iterator[str]:
    """What the plan takes besides the devices: host memory, disk, the time to load; and the limits that were given."""
    if verbose and (limits := plan.machine.limits):
        yield f"limits: {', '.join(f'{device} {gib(size)} ({size} bytes)' for device, size in limits.items())}"
    loading = (f"{stage} {gib(need.loading)}" + (f" ({gib(need.held)} held)" if need.held else "")
               for stage, need in host_needs(plan).items())
    if verbose and plan.machine.cards:
        text = f"host memory while loading, at most: {', '.join(loading)}"
        free = f"; {gib(plan.machine.host_free)} free" if plan.machine.counts_host else ""
        yield f"{text}, with pages of files, which the system can drop{free}"
    download = f"{gib(found.download)} to download" if found.download else "nothing to download"
    short = " (NOT ENOUGH)" if found.free is not None and found.download > found.free else ""
    yield f"disk: {download}{'' if found.free is None else f', {gib(found.free)} free{short}'}"
    if (whole := found.seconds(sum(found.stored.values()))) is not None:
        yield f"loading: roughly {rough_range(whole)} for {gib(sum(found.stored.values()))} from the disk"
    if verbose and found.rate is not None:
        parts = ", ".join(f"{stage} {gib(size)}" for stage, size in found.stored.items())
        yield f"loading by stage: {parts}; the disk gave {gib(int(found.rate))}/s just now"
    yield from outlook(plan, found.rate)
    for stage, size in plan.reads.items():
        if size:
            seconds = found.seconds(size)
            each = "" if seconds is None else f", roughly {rough_range(seconds)} each time"
            yield f"{stage} reads {gib(size)} from the disk for every pass{each}"


@dataclass(frozen=True)
class HostNeed:
    """Bytes of host memory in a stage."""

    held: int
    """Of weights that wait there."""
    loading: int
    """At most while components are loaded."""


def host_needs(plan: Plan) -> dict[str, HostNeed]:
    """What each stage takes of the host's memory besides its devices; nothing is besides where the host is one."""
    found: dict[str, HostNeed] = {}
    if not plan.machine.cards:
        return found
    for stage in plan.stages:
        held = loading = 0
        for component in stage.components:
            part = stage.name, component.name
            placement = plan.places[part].placement
            held += placement.share(plan.weights[part]).get("cpu", 0)
            loading = max(loading, held + host_bytes_while_loading(component, placement))
        found[stage.name] = HostNeed(held, loading)
    return found


def refusals(plan: Plan) -> Iterator[str]:
    """Why each strategy that was refused does not fit."""
    for stage, tried in plan.strategies.items():
        for strategy in tried:
            if strategy.refused:
                yield f"{stage} not {strategy.name}: {strategy.refused}"


def layout(plan: Plan) -> Layout:
    """Bytes by stage, device, component and block, in the order of execution; what is in no block is one entry."""
    found: Layout = {}
    for stage in plan.stages:
        devices = found[stage.name] = dict[str, dict[str, dict[str, int]]]()
        for component in stage.components:
            weights = plan.weights[stage.name, component.name]
            placement = plan.places[stage.name, component.name].placement
            if placement.processes > 1:
                for device, size in placement.share(weights).items():
                    devices.setdefault(device, {})[component.name] = {component.name: size}
                continue
            held_by = placement.storage_devices
            parts = {REST: sum(weights.rest.values()), **weights.blocks}
            for block, size in parts.items():
                if size:
                    there = devices.setdefault(held_by.get(block, held_by[""]), {})
                    there.setdefault(component.name, {})[block or component.name] = size
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
