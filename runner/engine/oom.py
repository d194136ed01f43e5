"""After a stage ran out of memory: the one thing that is changed before it is tried once more."""

from collections.abc import Mapping
from dataclasses import replace

from runner.planning.ladder import NoStrategyFits
from runner.planning.placer import TILES
from runner.planning.plan import Plan
from runner.text import gib
from stages.machine import probe

MORE = 10


def relieved(plan: Plan, stage: str) -> tuple[Plan, str] | None:
    """The plan with exactly one thing changed that makes `stage` take less, and what it is; None for no way left.

    Fewer lanes first, then smaller tiles for the decoder, then a tenth of every card more in reserve. Where others
    took that much of a card since the plan was made, the reserve comes first: it is of what is free now.
    """
    now = {device.name: device.free for device in probe(plan.devices).devices}
    left = {card.name: min(card.free, now[card.name]) for card in plan.machine.cards}
    crowded = any(card.free - left[card.name] > card.total // MORE for card in plan.machine.cards)
    if crowded and (moved := _reserved(plan, stage, left)) is not None:
        return moved
    if stage == "denoise" and plan.lanes > 1:
        return replace(plan, lanes=1), f"one request at a time instead of {plan.lanes}"
    if stage == "decode":
        return _tiled(plan)
    return None if crowded else _reserved(plan, stage, left)


def _tiled(plan: Plan) -> tuple[Plan, str] | None:
    """The decoder in tiles, or in smaller ones; it is a picture that differs in its last bits."""
    side = plan.tile or max(max(request.width, request.height) for request in plan.requests)
    tile = next((tile for tile in TILES if tile < side), None)
    vae = plan.stages[-1].components[0].name
    placement = plan.places[vae].placement
    if tile is None or placement.tiled(tile) == placement:
        return None
    place = replace(plan.places[vae], placement=placement.tiled(tile))
    return replace(plan, places={**plan.places, vae: place}), f"decoding in tiles of {tile} pixels"


def _reserved(plan: Plan, stage: str, left: Mapping[str, int]) -> tuple[Plan, str] | None:
    """The stage placed anew, in no more than what is `left` of each card less a tenth of it."""
    tight = replace(plan.machine, devices=tuple(
        replace(device, free=left.get(device.name, device.free) - device.total // MORE,
                limit=None if device.limit is None else device.limit - device.total // MORE)
        for device in plan.machine.devices
    ))
    if plan.placer is None or not plan.machine.cards:
        return None
    try:
        placed = replace(plan.placer, machine=tight).place(plan.stages)
    except NoStrategyFits:
        return None
    (mine,) = (one for one in plan.stages if one.name == stage)
    moved = {part.name: placed.places[part.name] for part in mine.components}
    if all(plan.places[name] == place for name, place in moved.items()):
        return None
    spare = ", ".join(f"{gib(card.total // MORE)} of {card.name}" for card in plan.machine.cards)
    text = f"{stage} placed anew with {spare} more in reserve: " + ", ".join(
        f"{name} {place.placement}" for name, place in moved.items())
    return replace(plan, places={**plan.places, **moved}, needs={**plan.needs, stage: placed.needs[stage]}), text
