"""Weights that wait on the disk: read from their files when they are needed, one at a time, and never kept."""

from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import nn

from stages.errors import DoesNotFit
from stages.loading.load import set_tensor
from stages.loading.lora_merge import LoraMerger
from stages.models.checkpoint import Component
from stages.models.skeleton import skeleton
from stages.models.weights import StoredTensor, sources
from stages.placement.placement import DISK, Fetch, Place


class DiskWeights:
    """The weights of a component in its files, as the library loads them, with LoRAs merged into them."""

    def __init__(self, component: Component, model: nn.Module) -> None:
        """`model` is one of the component's class, loaded or not."""
        self._sources, self._merger = sources(component, model), LoraMerger(component)

    def __contains__(self, name: str) -> bool:
        return self._sources.get(name) is not None

    def read(self, name: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """A weight that the files hold as one tensor, on a device.

        On the host it is a window on its file, which takes memory only where there is room, unless its type there is
        another one.
        """
        source = self._sources[name]
        assert source is not None, f"{name} was planned to be read from a file that does not hold it as one tensor"
        with safe_open(source.path, "pt") as file:
            stored: torch.Tensor = file.get_tensor(source.name)
        return self._merger.merged(name, stored.to(dtype).to(device))


def from_disk(component: Component, model: nn.Module) -> Fetch:
    """A `Fetch` for the blocks of a loaded component that wait on the disk."""
    weights = DiskWeights(component, model)
    # The data of a tensor on the meta device cannot be set, and those of an empty one can.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            set_tensor(model, name, torch.empty(0, dtype=tensor.dtype))
    return lambda name, data: weights.read(name, data.dtype)


def bytes_read_per_pass(component: Component, place: Place) -> int:
    """Bytes read from the disk for a pass through a component; those of layers that are precomputed are not read.

    Raises DoesNotFit for a block with a tensor that the files do not hold as it is.
    """
    blocks = [name for name, device in place.placement.storage_devices.items() if device == DISK]
    return sum(source.entry.bytes for source in _read_in(blocks, component, place)) if blocks else 0


def _read_in(blocks: list[str], component: Component, place: Place) -> Iterator[StoredTensor]:
    model = skeleton(component)
    found = sources(component, model)
    for block in blocks:
        inside = model.get_submodule(block)
        for inner, _ in (*inside.named_parameters(), *inside.named_buffers()):
            if f"{block}.{inner}".rpartition(".")[0] in place.precomputed:
                continue
            source = found.get(f"{block}.{inner}")
            if source is None:
                raise DoesNotFit(f"{component.name}: {block}.{inner} is not in the files as it is, so its block "
                                 f"cannot wait on the disk: `allow_offload=cpu`, on a host with more memory")
            yield source
