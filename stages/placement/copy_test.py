"""Copies between cards, tried before anything relies on them.

Some machines garble what one card sends another (a wrong IOMMU setting, risers, virtual machines), without an error:
the picture is noise and the exit code 0. Through host memory everything arrives.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import permutations

import torch

from stages.events import Emit
from stages.placement.placement import Place, Places, Resident, Sharded
from stages.placement.transfers import direct

SIZE = 2**20


def corrupted_pairs(devices: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of cards, as (from, to), between which a patterned mebibyte does not arrive as it was sent."""
    return [pair for pair in permutations(devices, 2) if not _arrives(*pair)]


def all_via_host(places: Places) -> dict[str, Place]:
    """The same places, with everything that crosses between cards going through host memory."""
    return {
        name: replace(place, placement=replace(place.placement, via_host=True))
        if isinstance(place.placement, Resident | Sharded) else place
        for name, place in places.items()
    }


def verified(places: Places, emit: Emit) -> Places:
    """The places of one stage as they may be relied on: through the host, with a warning, where copies are garbled."""
    relied = (place.placement for place in places.values() if place.placement.transfer is direct)
    cards = sorted({card for placement in relied for card in placement.compute_devices.values() if card != "cpu"})
    bad = corrupted_pairs(cards)
    if not bad:
        return places
    pairs = ", ".join(f"{source} to {target}" for source, target in bad)
    emit("warning", {"text": f"copies from {pairs} arrive garbled, so they go through host memory, which is slower: "
                             f"turn the IOMMU off, or set NCCL_P2P_DISABLE=1 where other programs use these cards"})
    return all_via_host(places)


def _arrives(source: str, target: str) -> bool:
    """Whether copies arrive, of two patterns, so that what was there before is no excuse."""
    return all(torch.equal(pattern.to(source).to(target).to("cpu"), pattern) for pattern in _patterns())


def _patterns() -> Iterator[torch.Tensor]:
    counted = torch.arange(SIZE, dtype=torch.int64)
    for odd in (2654435761, 40503):
        yield (counted * odd >> 7).remainder(251).to(torch.uint8)
