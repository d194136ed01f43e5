"""Where one component's weights live: on one device, or dealt over several."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn

from stages.errors import DoesNotFit
from stages.models.weights import Weights
from stages.placement.transfers import Crossing, Transfer, direct, via_host

DISK = "disk"
# Gives the weight of this name as it waits, from what stands in its place meanwhile.
Fetch = Callable[[str, torch.Tensor], torch.Tensor]


def waiting(name: str, data: torch.Tensor) -> torch.Tensor:
    """A weight that waits in host memory."""
    return data


class Placement(Protocol):
    """A way to place a component: which device its inputs enter, how it is loaded, what is hooked afterwards."""

    @property
    def entry(self) -> str:
        """The device that takes the component's inputs."""
        ...

    @property
    def compute_devices(self) -> dict[str, str]:
        """Module name to the device that it computes on; "" stands for the model."""
        ...

    @property
    def storage_devices(self) -> dict[str, str]:
        """Module name to the device that holds its weights between calls; "" stands for the model."""
        ...

    @property
    def device_map(self) -> dict[str, str]:
        """`storage_devices` as `from_pretrained` takes it, for the components that a library loads."""
        ...

    @property
    def transfer(self) -> Transfer:
        """How tensors get from card to card."""
        ...

    def share(self, weights: Weights) -> dict[str, int]:
        """The bytes of the component that each device holds between calls."""
        ...

    def attach(self, model: nn.Module, home: str, move: Transfer | None = None, fetch: Fetch = waiting) -> None:
        """Make the loaded model take inputs from, and give outputs to, the device `home`.

        `move` copies, instead of `way`; `fetch` reads weights that wait on the disk.
        """
        ...


@dataclass(frozen=True)
class Resident:
    """The whole component on one device; a VAE with a `tile` decodes in tiles of so many pixels a side.

    With `via_host`, what crosses from card to card goes through host memory.
    """

    device: str
    tile: int | None = None
    via_host: bool = False

    def __repr__(self) -> str:
        return f"Resident({self})"

    def __str__(self) -> str:
        return self.device if self.tile is None else f"{self.device} in tiles of {self.tile} pixels"

    @property
    def entry(self) -> str:
        return self.device

    @property
    def compute_devices(self) -> dict[str, str]:
        return {"": self.device}

    @property
    def storage_devices(self) -> dict[str, str]:
        return self.compute_devices

    @property
    def device_map(self) -> dict[str, str]:
        return self.compute_devices

    @property
    def transfer(self) -> Transfer:
        return via_host if self.via_host else direct

    processes = 1
    concurrency = 1

    def tiled(self, side):
        return replace(self, tile=side)

    def for_rank(self, rank):
        return self

    def renamed(self, names):
        return replace(self, device=names.get(self.device, self.device))

    def through_host(self):
        return replace(self, via_host=True)

    def share(self, weights: Weights) -> dict[str, int]:
        return {self.device: weights.total}

    def attach(self, model: nn.Module, home: str, move: Transfer | None = None, fetch: Fetch = waiting) -> None:
        if self.tile is not None:
            cut(model, self.tile)
        if torch.device(home) != torch.device(self.device):
            Crossing(model, {"": self.device}, home, move or self.transfer)


@dataclass(frozen=True)
class Sharded:
    """Blocks dealt over `devices`; everything else, named in `rest`, stays on `entry`, where a pass starts and ends.

    The blocks named in `cpu_blocks` wait in host memory and those in `disk_blocks` on the disk: they are on their
    device only while they compute. With `via_host`, what crosses from card to card goes through host memory.
    """

    entry: str
    devices: Mapping[str, str]
    rest: tuple[str, ...] = ()
    cpu_blocks: frozenset[str] = frozenset()
    via_host: bool = False
    disk_blocks: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Sharded({self})"

    def __str__(self) -> str:
        dealt = ",".join(f"{device}:{len(list(run))}" for device, run in groupby(self.devices.values()))
        told = [f"{len(blocks)} of them {how}" for how, blocks in
                (("streamed", self.cpu_blocks), ("read from the disk", self.disk_blocks)) if blocks]
        return f"{dealt} ({', '.join(told)})" if told else dealt

    @property
    def compute_devices(self) -> dict[str, str]:
        return {"": self.entry, **self.devices}

    @property
    def storage_devices(self) -> dict[str, str]:
        return self.compute_devices | dict.fromkeys(self.cpu_blocks, "cpu") | dict.fromkeys(self.disk_blocks, DISK)

    @property
    def device_map(self) -> dict[str, str]:
        # No name may hold another's: accelerate first moves what stands under the outer one to its device.
        waiting = dict.fromkeys(self.cpu_blocks, "cpu") | dict.fromkeys(self.disk_blocks, "meta")
        return {**dict.fromkeys(self.rest, self.entry), **self.devices, **waiting}

    @property
    def transfer(self) -> Transfer:
        return via_host if self.via_host else direct

    processes = 1
    tile = None

    @property
    def concurrency(self):
        return 1 if self.cpu_blocks or self.disk_blocks else len(set(self.devices.values()))

    def tiled(self, side):
        return self

    def for_rank(self, rank):
        return self

    def renamed(self, names):
        return replace(self, entry=names.get(self.entry, self.entry), devices={b: names.get(d, d) for b, d in self.devices.items()})

    def through_host(self):
        return replace(self, via_host=True)

    def share(self, weights: Weights) -> dict[str, int]:
        found = Counter({self.entry: sum(weights.rest.values())})
        for block, size in weights.blocks.items():
            found[self.storage_devices[block]] += size
        return dict(found)

    def attach(self, model: nn.Module, home: str, move: Transfer | None = None, fetch: Fetch = waiting) -> None:
        move, storage_devices = move or self.transfer, self.storage_devices
        # accelerate puts tensors of modules that hold blocks on a card of its choice.
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if device_of(name, storage_devices) != DISK:
                tensor.data = move(tensor.data, device_of(name, storage_devices))
        around = dict.fromkeys(outside(model, self.devices), self.entry)
        Crossing(model, {"": self.entry, **around, **self.devices}, home, move)
        turns = {device: threading.Lock() for device in self.devices.values()}
        for block in self.cpu_blocks | self.disk_blocks:
            device = self.devices[block]
            stream(model, block, device, move, fetch if block in self.disk_blocks else waiting, turns[device])


@dataclass(frozen=True)
class Place:
    """A component's placement and the type of its weights; the layers named in `precomputed` stay on the disk."""

    placement: Placement
    dtype: torch.dtype
    precomputed: frozenset[str] = frozenset()


Places = Mapping[str, Place]


def outside(model: nn.Module, blocks: Collection[str]) -> tuple[str, ...]:
    """The outermost modules that neither are blocks nor hold some; of lists and dicts, which nobody calls, what they
    hold."""
    above, found = _above(blocks), []
    for name, module in model.named_modules():
        if name not in above and name not in blocks and name.rpartition(".")[0] in above:
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                above.add(name)
            else:
                found.append(name)
    return tuple(found)


def remainder(model: nn.Module, blocks: Collection[str]) -> tuple[str, ...]:
    """The names that cover all of the model that is in no block: modules, and tensors of modules that hold blocks."""
    above = _above(blocks)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return (*outside(model, blocks), *(name for name in names if name.rpartition(".")[0] in above))


def device_of(name: str, devices: Mapping[str, str]) -> str:
    """The device of a tensor: that of the longest module name in the map that it stands under."""
    while name not in devices and name:
        name = name.rpartition(".")[0]
    return devices[name]


def _above(blocks: Collection[str]) -> set[str]:
    return {""} | {name[:at] for name in blocks for at, letter in enumerate(name) if letter == "."}


def stream(model: nn.Module, name: str, device: str, move: Transfer, fetch: Fetch, turn: threading.Lock) -> None:
    """Make a block that waits elsewhere have its weights on `device` for each call; they are copied there, never back.

    `fetch` gives a weight as it waits. Blocks that share a `turn` are never on the device at the same time.
    """
    block = model.get_submodule(name)
    tensors = {f"{name}.{inner}": tensor for inner, tensor in (*block.named_parameters(), *block.named_buffers())}
    put_off: list[tuple[torch.Tensor, torch.Tensor]] = []

    def arrive(*call: Any) -> None:
        # Lanes share the block: the next one waits until this one is done.
        turn.acquire()
        for full, tensor in tensors.items():
            put_off.append((tensor, tensor.data))
            tensor.data = move(fetch(full, tensor.data), device)

    def leave(*call: Any) -> None:
        for tensor, data in put_off:
            tensor.data = data
        put_off.clear()
        turn.release()

    block.register_forward_pre_hook(arrive)
    block.register_forward_hook(leave, always_call=True)


def cut(model: Any, side: int) -> None:
    """Make a VAE work in tiles of `side` pixels; DoesNotFit for one whose tiles have no size to set."""
    if hasattr(model, "tile_sample_min_height"):
        model.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    elif hasattr(model, "tile_latent_min_size"):
        scale = model.tile_sample_min_size // model.tile_latent_min_size
        model.tile_sample_min_size, model.tile_latent_min_size = side, side // scale
        model.enable_tiling()
    else:
        raise DoesNotFit(f"{type(model).__name__} cannot decode in tiles: choose a smaller --size")
