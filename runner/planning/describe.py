"""The plan as people and programs read it, before a byte is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runner.planning import disk
from runner.text import gib

if TYPE_CHECKING:
    from runner.planning.plan import Plan


def lines(plan: "Plan") -> list[str]:
    """The plan as a table: per stage and device weights, activations and what stays free; then what was decided."""
    return [*aligned([*needs(plan)]), *choices(plan), *costs(plan, disk.look(plan)), *refusals(plan)]


def document(plan: "Plan") -> dict[str, Any]:
    """The plan as one JSON object; bytes are whole numbers."""
    found = disk.look(plan)
    return {
        "model": plan.checkpoint.source,
        "family": plan.family.name,
        "devices": {device.name: {"total": device.total, "free": device.free, "room": device.room,
                                  "bfloat16": device.bfloat16} for device in plan.machine.devices},
        "host": {"total": plan.machine.host_total, "free": plan.machine.host_free, "room": plan.machine.host_room,
                 "stages": {stage: asdict(need) for stage, need in hosts(plan).items()}},
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
            name: {"dtype": str(place.dtype).removeprefix("torch."), "placement": str(place.placement),
                   "bytes": plan.weights[name].total, "reason": plan.reasons.get(name, ""),
                   "device_map": plan.device_map[name]}
            for name, place in plan.places.items()
        },
        "refused": {stage: {rung.name: rung.refused for rung in rungs if rung.refused}
                    for stage, rungs in plan.rungs.items()},
        "modulation_table": {name: {"whole": saving.whole, "left": saving.left, "row": saving.row,
                                    "layers": sorted(saving.layers), "refused": saving.refused}
                             for name, saving in plan.savings.items()},
        "tile": plan.tile,
        "lanes": plan.lanes,
    }


def loras(plan: "Plan") -> list[dict[str, Any]]:
    """The LoRAs of a plan as JSON: where each is, its sha256 and its scale."""
    return [{"source": lora.source, "sha256": lora.digest, "scale": lora.scale} for lora in plan.checkpoint.loras]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def needs(plan: "Plan") -> Iterator[tuple[str, ...]]:
    """The head and the rows of the table: bytes on each device in each stage."""
    yield "stage", "device", "weights", "activations", "free then"
    for stage, needs in plan.needs.items():
        for device, need in needs.items():
            room = plan.machine.room(device)
            left = "" if room is None else gib(room - need.total)
            yield stage, device, gib(need.weights), gib(need.activations), left


def choices(plan: "Plan") -> Iterator[str]:
    """What was decided: type and placement of every component, the modulation table, tiles."""
    for name, place in plan.places.items():
        dtype, reason = str(place.dtype).removeprefix("torch."), plan.reasons.get(name, "")
        why = f" ({reason})" if reason else ""
        yield f"{name}: {gib(plan.weights[name].total)} in {dtype}{why}, {place.placement}"
    for lora, names in plan.checkpoint.loras.items():
        yield f"LoRA {lora.source} x {lora.scale:g}: merged into {' and '.join(names)} where weights are read"
    yield from map(str, plan.savings.values())
    if plan.tile is not None:
        yield f"decoded in tiles of {plan.tile} pixels, because the whole picture does not fit"
    if len(plan.requests) > 1:
        yield pace(plan)


def pace(plan: "Plan") -> str:
    """How several pictures go through the denoiser, and why so."""
    from runner.planning.placer import busy

    if plan.lanes > 1:
        told = f"{plan.lanes} pictures in flight, so that no card waits for another"
    elif busy({part.name: plan.places[part.name] for part in plan.stages[1].components}) < 2:
        told = "one picture at a time, as one device does all of the work"
    elif plan.placer is not None and plan.placer.lanes is not None:
        told = "one picture at a time, as was asked"
    else:
        told = "one picture at a time, as the activations of two do not fit beside the weights"
    return f"denoise: {told}; each in a pass of its own, as in a shared one its bits may depend on the others"


def costs(plan: "Plan", found: disk.Disk) -> Iterator[str]:
    """What the plan takes besides the devices: host memory, disk, the time to load; and the limits that were given."""
    if limits := plan.machine.limits:
        yield f"limits: {', '.join(f'{device} {gib(size)} ({size} bytes)' for device, size in limits.items())}"
    host = (f"{stage} {gib(need.loading)}" + (f" ({gib(need.held)} held)" if need.held else "")
            for stage, need in hosts(plan).items())
    if plan.machine.cards:
        told = f"host memory while loading, at most: {', '.join(host)}"
        yield f"{told}, with pages of files, which the system can drop; {gib(plan.machine.host_free)} free"
    download = f"{gib(found.download)} to download" if found.download else "nothing to download"
    short = " (NOT ENOUGH)" if found.download > found.free else ""
    yield f"disk: {download}, {gib(found.free)} free{short}"
    if found.rate is not None:
        times = (f"{stage} {gib(size)} in {found.seconds(size):.1f} s" for stage, size in found.stored.items())
        yield f"loading: {', '.join(times)}, at {gib(int(found.rate))}/s from the disk"
    for stage, size in plan.reads.items():
        if size:
            each = "" if found.rate is None else f", {found.seconds(size):.1f} s each time"
            yield f"{stage} reads {gib(size)} from the disk for every pass{each}"


@dataclass(frozen=True)
class Host:
    """Host memory in a stage: bytes that are `held` by weights that wait, and at most while `loading`."""

    held: int
    loading: int


def hosts(plan: "Plan") -> dict[str, Host]:
    """What each stage takes of the host's memory besides its devices; nothing is besides where the host is one."""
    from stages.loading.load import host_bytes_while_loading

    found: dict[str, Host] = {}
    if not plan.machine.cards:
        return found
    for stage in plan.stages:
        held = loading = 0
        for component in stage.components:
            placement = plan.places[component.name].placement
            held += placement.share(plan.weights[component.name]).get("cpu", 0)
            loading = max(loading, held + host_bytes_while_loading(component, placement))
        found[stage.name] = Host(held, loading)
    return found


def refusals(plan: "Plan") -> Iterator[str]:
    """Why each rung that was refused does not fit."""
    for stage, rungs in plan.rungs.items():
        for rung in rungs:
            if rung.refused:
                yield f"{stage} not {rung.name}: {rung.refused}"
