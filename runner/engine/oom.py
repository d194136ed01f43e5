"""After a stage ran out of memory: what is said of it, and the one thing that is changed before it is tried again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from runner.planning.ladder import NoStrategyFits
from runner.planning.plan import Plan, sizes_of
from runner.planning.tiles import smaller_tiles
from runner.request import FilledRequest
from runner.text import gib
from stages.machine import Device, memory_users, probe
from stages.placement.tiling import Tiling

# Of each card, the part that is kept in reserve besides when a stage is placed anew: one of so many.
MORE = 10


def describe_oom(plan: Plan, stage: str, doing: str, peak: Mapping[str, int], error: BaseException) -> str:
    """What was planned, what was taken and who has the rest, for a stage whose `error` came while `doing` something.

    `peak` is in bytes by device. To be asked for when the stage's models are gone: what is free then, and was not when
    planned, is others'.
    """
    needs = plan.needs.get(stage, {})
    parts = []
    for device in probe(list(peak)).devices:
        planned = f", at most {gib(needs[device.name].total)} planned" if device.name in needs else ""
        others = memory_users(device.name)
        users = f", others there: {'; '.join(others)}" if others else ""
        before = plan.machine[device.name].free
        parts.append(f"{device.name} peaked at {peak[device.name] / 2**30:.2f} GiB{planned}, {gib(_free(device))} "
                     f"free now and {gib(before)} when planned{users}")
    return (f"{stage} ran out of memory ({'; '.join(parts)}) while {doing}: {str(error).splitlines()[0]} "
            f"The artifacts of earlier stages are kept.")


def degrade(plan: Plan, stage: str, left: Sequence[FilledRequest]) -> tuple[Plan, str] | None:
    """The plan with exactly one thing changed that makes `stage` take less, and what it is; None for no way left.

    `left` are the requests that it did not do. Fewer lanes first, then smaller tiles for the decoder where the job
    says nothing of tiles, then a tenth of every card more in reserve. Where others took that much of a card since the
    plan was made, the reserve comes first: it is of what is free now.
    """
    now = {device.name: device.free for device in probe(plan.devices).devices}
    free = {card.name: min(card.free, now[card.name]) for card in plan.machine.cards}
    crowded = any(card.free - free[card.name] > card.total // MORE for card in plan.machine.cards)
    if crowded and (moved := _placed_anew(plan, stage, free)) is not None:
        return moved
    if stage == "denoise" and plan.lanes > 1:
        return replace(plan, lanes=1), f"one request at a time instead of {plan.lanes}"
    if stage == "decode" and plan.job.tile is None:
        return _tiled(plan, left)
    return None if crowded else _placed_anew(plan, stage, free)


def _tiled(plan: Plan, left: Sequence[FilledRequest]) -> tuple[Plan, str] | None:
    """The decoder in tiles, or in smaller ones; the pictures that are left differ in their last bits."""
    tile = next(iter(smaller_tiles(plan.tile or 0, sizes_of(left))), None)
    vae = plan.stage("decode").components[0].name
    place = plan.places["decode", vae]
    tiled = place.placement if tile is None else place.placement.tiled(Tiling(tile))
    if tiled == place.placement:
        return None
    return plan.moved("decode", {vae: replace(place, placement=tiled)}), f"decoding in tiles of {tile} pixels"


def _placed_anew(plan: Plan, stage: str, free: Mapping[str, int]) -> tuple[Plan, str] | None:
    """The stage placed anew, in no more than what is `free` of each card less a tenth of it."""
    tight = replace(plan.machine, devices=tuple(
        replace(device, free=free.get(device.name, device.free) - device.total // MORE,
                limit=None if device.limit is None else device.limit - device.total // MORE)
        for device in plan.machine.devices
    ))
    if plan.placer is None or not plan.machine.cards:
        return None
    try:
        placed = replace(plan.placer, machine=tight).place(plan.stages)
    except NoStrategyFits:
        return None
    moved = {component: place if plan.job.peer_copies else replace(place, placement=place.placement.through_host())
             for (name, component), place in placed.places.items() if name == stage}
    if moved == plan.places_of(stage):
        return None
    spare = ", ".join(f"{gib(card.total // MORE)} of {card.name}" for card in plan.machine.cards)
    text = f"{stage} placed anew with {spare} more in reserve: " + ", ".join(
        f"{name} {place.placement}" for name, place in moved.items())
    return replace(plan.moved(stage, moved), needs={**plan.needs, stage: placed.needs[stage]}), text


def _free(device: Device) -> int:
    """What nobody uses, and what this process only keeps in reserve."""
    return device.free + (0 if device.is_host else torch.accelerator.memory_reserved(device.name)
                          - torch.accelerator.memory_allocated(device.name))
