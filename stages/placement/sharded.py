"""A component dealt over several devices, block by block."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from stages.models.weights import Weights
from stages.placement.placement import DISK, Fetch, Placement, device_of, from_host
from stages.placement.transfers import Crossing, Transfer


@dataclass(frozen=True, repr=False)
class Sharded(Placement):
    """Blocks on a device each; all that is in no block is on one of them, where a pass starts and ends."""

    device: str
    """The device of all that is in no block."""
    devices: Mapping[str, str]
    """The device of every block, by module name in execution order."""
    rest: tuple[str, ...] = ()
    """The names that cover all that is in no block, as `remainder` gives them."""

    def __str__(self) -> str:
        return ",".join(f"{device}:{len(list(run))}" for device, run in groupby(self.devices.values()))

    @property
    def entry(self) -> str:
        return self.device

    @property
    def compute_devices(self) -> dict[str, str]:
        return {"": self.device, **self.devices}

    @property
    def device_map(self) -> dict[str, str]:
        # No name may hold another's: accelerate first moves what stands under the outer one to its device.
        return {**dict.fromkeys(self.rest, self.device), **self.devices}

    def share(self, weights: Weights) -> dict[str, int]:
        found = Counter({self.device: sum(weights.rest.values())})
        for block, size in weights.blocks.items():
            found[self.storage_devices[block]] += size
        return dict(found)

    def attach(self, model: nn.Module, home: str, transfer: Transfer | None = None, fetch: Fetch = from_host) -> None:
        transfer, storage_devices = transfer or self.transfer, self.storage_devices
        # accelerate puts tensors of modules that hold blocks on a card of its choice.
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if device_of(name, storage_devices) != DISK:
                tensor.data = transfer(tensor.data, device_of(name, storage_devices))
        around = dict.fromkeys(_outside(model, self.devices), self.device)
        Crossing(model, {"": self.device, **around, **self.devices}, home, transfer)

    def renamed(self, names: Mapping[str, str]) -> "Sharded":
        devices = {block: names.get(device, device) for block, device in self.devices.items()}
        return replace(self, device=names.get(self.device, self.device), devices=devices)

    @property
    def concurrency(self) -> int:
        return len(set(self.devices.values()))


def remainder(model: nn.Module, blocks: Collection[str]) -> tuple[str, ...]:
    """The names that cover all of the model that is in no block: modules, and tensors of modules that hold blocks."""
    above = _above(blocks)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return (*_outside(model, blocks), *(name for name in names if name.rpartition(".")[0] in above))


def _outside(model: nn.Module, blocks: Collection[str]) -> tuple[str, ...]:
    """The outermost modules that neither are blocks nor hold some; in place of a list or dict, what it holds.

    Nobody calls lists and dicts.
    """
    above, found = _above(blocks), []
    for name, module in model.named_modules():
        if name not in above and name not in blocks and name.rpartition(".")[0] in above:
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                above.add(name)
            else:
                found.append(name)
    return tuple(found)


def _above(blocks: Collection[str]) -> set[str]:
    """The names of the modules that hold blocks."""
    return {""} | {name[:at] for name in blocks for at, letter in enumerate(name) if letter == "."}
