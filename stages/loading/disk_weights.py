"""Weights that wait on the disk: read from their files for every call of their block, and never kept."""

from collections.abc import Collection, Iterator

import torch
from safetensors import safe_open
from torch import nn

from stages.errors import DoesNotFit
from stages.loading.load import put
from stages.loading.lora_merge import LoraMerger
from stages.models.checkpoint import Component
from stages.models.skeleton import skeleton
from stages.models.weights import StoredTensor, sources
from stages.placement.placement import DISK, Place


class DiskWeights:
    """The files of a loaded component, as `fetch` for the blocks of it that wait on the disk."""

    def __init__(self, component: Component, model: nn.Module) -> None:
        self._sources, self._merger = sources(component, model), LoraMerger(component)
        # The data of a tensor on the meta device cannot be set, and those of an empty one can.
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                put(model, name, torch.empty(0, dtype=tensor.dtype))

    def fetch(self, name: str, data: torch.Tensor) -> torch.Tensor:
        """The weight of this name as the library loads it; `data` is the empty one that stands in its place.

        It is a window on its file, so host memory holds it only where there is room, unless its type is another one.
        """
        source = self._sources[name]
        assert source is not None, f"{name} was planned to be read from a file that does not hold it as one tensor"
        with safe_open(source.path, "pt") as file:
            stored: torch.Tensor = file.get_tensor(source.name)
        return self._merger.merged(name, stored.to(data.dtype))


def reading(component: Component, place: Place) -> int:
    """Bytes read from the disk for a pass through a component; those of layers that are precomputed are not read.

    Raises DoesNotFit for a block with a tensor that the files do not hold as it is.
    """
    blocks = [name for name, device in place.placement.storage_devices.items() if device == DISK]
    return sum(source.entry.bytes for source in _shelved(component, blocks, place.precomputed)) if blocks else 0


def _shelved(component: Component, blocks: Collection[str], precomputed: Collection[str]) -> Iterator[StoredTensor]:
    model = skeleton(component)
    found = sources(component, model)
    for block in blocks:
        inside = model.get_submodule(block)
        for inner, _ in (*inside.named_parameters(), *inside.named_buffers()):
            if f"{block}.{inner}".rpartition(".")[0] in precomputed:
                continue
            source = found.get(f"{block}.{inner}")
            if source is None:
                raise DoesNotFit(f"{component.name}: {block}.{inner} is not in the files as it is, so its block "
                                f"cannot wait on the disk: --allow-offload cpu, on a host with more memory")
            yield source
