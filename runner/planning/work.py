"""The work of a picture: what it computes on each device, and what is copied and read for it, as dry runs count it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stages.estimate.dry_run import Estimate
from stages.models.weights import Weights
from stages.placement.placement import Places, device_of


@dataclass(frozen=True)
class Work:
    """What one picture takes in a stage."""

    flops: Mapping[tuple[str, torch.dtype], int]
    """Floating point operations by device and type."""
    copied: int = 0
    """Bytes of weights that are copied from host memory to a card, each time they are needed."""
    read: int = 0
    """Bytes of weights that are read from the disk, each time they are needed."""

    @property
    def total(self) -> int:
        """Floating point operations on all devices."""
        return sum(self.flops.values())


def work_of(
    places: Places, weights: Mapping[str, Weights], estimate: Estimate, reads: Mapping[str, int], steps: int
) -> Work:
    """The work of a stage at these places for a picture of so many steps; `reads` are bytes of a pass by component.

    What is in no block counts for the device that takes the inputs. Processes that compute together share it equally.
    """
    # A dry run goes through some of the steps, all of which are alike.
    whole = steps / estimate.steps if estimate.steps else 1.0
    found, copied, read = Counter[tuple[str, torch.dtype]](), 0.0, 0.0
    for name, place in places.items():
        placement, passes = place.placement, estimate.passes[name]
        for block, count in estimate.work[name].items():
            found[device_of(block, placement.compute_devices), place.dtype] += count
        cards = {device for device in placement.compute_devices.values() if device != "cpu"}
        copied += passes * placement.share(weights[name]).get("cpu", 0) if cards else 0
        read += passes * reads[name]
    first = next(iter(places.values()))
    found[first.placement.entry, first.dtype] += estimate.flops - found.total()
    return Work({key: int(count * whole) for key, count in found.items()}, int(copied * whole), int(read * whole))
