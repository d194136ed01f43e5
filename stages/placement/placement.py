"""Where one component's weights live and where it computes: what a way of placing it must say, and the simplest one.

Other ways have a file each: over several devices (`sharded`), with blocks that wait in host memory or on the disk
(`streaming`), cut over several processes (`tensor_parallel`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from stages.events import Emit
from stages.models.weights import Weights
from stages.placement.device_turns import takes_turns
from stages.placement.tiling import Tiling, set_tile
from stages.placement.transfers import Crossing, Transfer, corrupted_pairs, direct, via_host

DISK = "disk"
# Gives the weight of this name as it waits between calls, from what stands in its place in the module meanwhile.
Fetch = Callable[[str, torch.Tensor], torch.Tensor]


def from_host(name: str, data: torch.Tensor) -> torch.Tensor:
    """A `Fetch` of weights that wait in host memory, where the module itself has them."""
    return data


@dataclass(frozen=True, repr=False)
class Placement(ABC):
    """A way to place a component. What is not abstract is right for one process with one device."""

    via_host: bool = field(default=False, kw_only=True)
    """Whether what crosses from card to card goes through host memory."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    @property
    @abstractmethod
    def entry(self) -> str:
        """The device that takes the component's inputs."""

    @property
    @abstractmethod
    def compute_devices(self) -> Mapping[str, str]:
        """Module name to the device that it computes on; "" stands for the model."""

    @abstractmethod
    def share(self, weights: Weights) -> dict[str, int]:
        """The bytes of the component that each device holds between calls; "cpu" is host memory."""

    @abstractmethod
    def attach(self, model: nn.Module, home: str, transfer: Transfer | None = None, fetch: Fetch = from_host) -> None:
        """Make the loaded model take inputs from, and give outputs to, the device `home`.

        `transfer` copies from device to device instead of the placement's own; `fetch` reads weights that wait on
        the disk.
        """

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> "Placement":
        """The same placement where devices have other names, as in a process that sees a part of them."""

    @property
    def storage_devices(self) -> Mapping[str, str]:
        """Module name to the device that holds its weights between calls; "" stands for the model."""
        return self.compute_devices

    @property
    def device_map(self) -> Mapping[str, str]:
        """`storage_devices` as `from_pretrained` takes it, for the components that a library loads."""
        return self.compute_devices

    @property
    def loads_directly(self) -> bool:
        """Whether each tensor is read from its file to its device as it is, and not by the component's library."""
        return True

    def model_class(self, cls: Any) -> Any:
        """The class that the library loads in place of the component's own."""
        return cls

    @property
    def transfer(self) -> Transfer:
        """How tensors get from device to device."""
        return via_host if self.via_host else direct

    def through_host(self) -> "Placement":
        """The same placement, with what crosses between cards going through host memory."""
        return replace(self, via_host=True)

    @property
    def tiling(self) -> Tiling | None:
        """Which pictures a VAE decodes in tiles; None where it takes all of them whole."""
        return None

    def tiled(self, tiling: Tiling | None) -> "Placement":
        """The same placement of a VAE that decodes some pictures in tiles, if it can."""
        return self

    def prepare(self, model: Any, inputs: Mapping[str, Any]) -> None:  # noqa: B027  # most have nothing to do
        """Make the loaded model ready for a picture with these inputs, under diffusers' names."""

    @property
    def concurrency(self) -> int:
        """How many requests in flight keep all of the devices busy."""
        return 1

    @property
    def processes(self) -> int:
        """How many processes it takes."""
        return 1

    def for_rank(self, rank: int) -> "Placement":
        """The same placement as the process of this rank has it."""
        return self


@dataclass(frozen=True, repr=False)
class Resident(Placement):
    """The whole component on one device."""

    device: str
    """The device."""
    tiling: Tiling | None = None
    """Which pictures a VAE decodes in tiles; None where it takes all of them whole."""

    def __str__(self) -> str:
        return self.device if self.tiling is None else f"{self.device} {self.tiling}"

    @property
    def entry(self) -> str:
        return self.device

    @property
    def compute_devices(self) -> dict[str, str]:
        return {"": self.device}

    def share(self, weights: Weights) -> dict[str, int]:
        return {self.device: weights.total}

    def attach(self, model: nn.Module, home: str, transfer: Transfer | None = None, fetch: Fetch = from_host) -> None:
        if torch.device(home) != torch.device(self.device):
            Crossing(model, {"": self.device}, home, transfer or self.transfer)
        else:
            takes_turns(model, self.device)

    def renamed(self, names: Mapping[str, str]) -> "Resident":
        return replace(self, device=names.get(self.device, self.device))

    def tiled(self, tiling: Tiling | None) -> "Resident":
        return replace(self, tiling=tiling)

    def prepare(self, model: Any, inputs: Mapping[str, Any]) -> None:
        if self.tiling is not None:
            set_tile(model, self.tiling.tile(inputs["width"], inputs["height"]))


@dataclass(frozen=True)
class Place:
    """Where a component goes, and in which shape."""

    placement: Placement
    """Where its weights live and where it computes."""
    dtype: torch.dtype
    """The type of its weights."""
    precomputed: frozenset[str] = frozenset()
    """The layers that stay on the disk, because the modulation table stands in for them."""


# By the name of the component.
Places = Mapping[str, Place]


def device_of(name: str, devices: Mapping[str, str]) -> str:
    """The device of a tensor: that of the longest module name in the map that it stands under."""
    while name not in devices and name:
        name = name.rpartition(".")[0]
    return devices[name]


def through_host(places: Places) -> dict[str, Place]:
    """The same places, with everything that crosses between cards going through host memory."""
    return {name: replace(place, placement=place.placement.through_host()) for name, place in places.items()}


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
    return through_host(places)
