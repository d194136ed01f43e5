"""A stage that is to be placed: what it starts from, what it weighs, and what it needs at places."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from runner.planning.cache import PlanCache
from runner.planning.placed import Need
from stages.estimate.dry_run import Estimate
from stages.loading.lora_merge import bytes_to_merge
from stages.models.skeleton import skeleton
from stages.models.weights import Weights
from stages.pipeline.stage import Stage
from stages.placement.placement import DISK, Place, Placement
from stages.placement.transfers import PATTERN_BYTES
from stages.state import State


@dataclass(frozen=True)
class StageTask:
    """A stage to be placed."""

    stage: Stage
    """The stage."""
    state: State
    """What it starts from: shapes, and numbers that mean nothing."""
    types: Mapping[str, torch.dtype]
    """The types of its components."""
    weights: Mapping[str, Weights]
    """What its components weigh."""
    precomputed: Mapping[str, frozenset[str]]
    """By component, the layers that the modulation table stands in for."""
    row: int
    """Bytes of the table that a call of the denoiser reads."""
    known: PlanCache
    """What other plans found out."""

    def first_blocks(self) -> Iterator[str]:
        """The blocks with the first weight of a component: where that is, a pipeline puts what it gives the model."""
        for component in self.stage.components:
            first = next(name for name, _ in skeleton(component, self.types[component.name]).named_parameters())
            yield from (block for block in self.weights[component.name].blocks if first.startswith(f"{block}."))

    def places(self, placements: Mapping[str, Placement]) -> dict[str, Place]:
        """The components at these placements."""
        return {name: Place(placements[name], dtype, self.precomputed.get(name, frozenset()))
                for name, dtype in self.types.items()}

    def needs(self, places: Mapping[str, Place], estimate: Estimate) -> dict[str, Need]:
        """Bytes on each device at these places."""
        shares = Counter[str]()
        for name, weights in self.weights.items():
            shares.update(places[name].placement.share(weights))
        devices = sorted({*shares, *estimate.peak}, key=device_order)
        merging = Counter[str]()
        for component in self.stage.components:
            if component.loras:
                held = places[component.name].placement.share(self.weights[component.name])
                merging |= Counter(dict.fromkeys(held, bytes_to_merge(component)))
        cards = {card for place in places.values() for card in place.placement.compute_devices.values()} - {"cpu"}
        checked = dict.fromkeys(cards, PATTERN_BYTES) if len(cards) > 1 else {}
        # Nothing computes while weights are loaded.
        return {name: Need(shares[name], max(estimate.peak.get(name, 0), merging[name]), checked.get(name, 0))
                for name in devices}


def device_order(device: str) -> tuple[bool, int, str]:
    """Where a device stands in tables: cards by their numbers, then what is not a card."""
    return device in ("cpu", DISK), len(device), device


def branches(weights: Weights) -> list[str]:
    """The blocks outside the row, such as `layers`, that has most bytes."""
    rows = Counter[str]()
    for name, size in weights.blocks.items():
        rows[name.rpartition(".")[0]] += size
    heaviest = rows.most_common(1)[0][0]
    return [name for name in weights.blocks if name.rpartition(".")[0] != heaviest]
