"""Tensor parallelism: a denoiser whose linear layers are cut over several cards, each in a process of its own.

diffusers cuts the layers that a model class's own plan names, and keeps the others whole on every card. The largest of
those see only conditioning: with the modulation table in their place FLUX.1 takes 8.6 GB of each of two cards instead
of 15.2.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import ParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from stages.errors import DoesNotFit
from stages.models.checkpoint import Component
from stages.models.skeleton import skeleton
from stages.models.weights import Weights, sizes
from stages.placement.placement import Fetch, Placement, from_host
from stages.placement.transfers import Transfer


@dataclass(frozen=True, repr=False)
class TensorParallel(Placement):
    """A component cut over several devices, with a process for each."""

    devices: tuple[str, ...]
    """The device of each process."""
    bytes_per_device: int
    """Bytes of the component on each of them."""
    rank: int = 0
    """The number of this process."""

    def __repr__(self) -> str:
        return f"TensorParallel({', '.join(self.devices)})"

    def __str__(self) -> str:
        return f"cut over {', '.join(self.devices)}"

    @property
    def entry(self) -> str:
        return self.devices[self.rank]

    @property
    def compute_devices(self) -> dict[str, str]:
        return {"": self.entry}

    @property
    def storage_devices(self) -> dict[str, str]:
        return {"": ",".join(self.devices)}

    def share(self, weights: Weights) -> dict[str, int]:
        return {device: count * self.bytes_per_device for device, count in Counter(self.devices).items()}

    def attach(self, model: nn.Module, home: str, transfer: Transfer | None = None, fetch: Fetch = from_host) -> None:
        # Reading the parts puts parameters on the device, and nothing else.
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.entry)

    def renamed(self, names: Mapping[str, str]) -> "TensorParallel":
        return replace(self, devices=tuple(names.get(device, device) for device in self.devices))

    @property
    def loads_directly(self) -> bool:
        return False

    def model_class(self, cls: Any) -> Any:
        return _divided(cls, self)

    @property
    def processes(self) -> int:
        return len(self.devices)

    def for_rank(self, rank: int) -> "TensorParallel":
        return replace(self, rank=rank)


def bytes_per_device(component: Component, dtype: torch.dtype, precomputed: Collection[str], count: int) -> int:
    """The bytes of a component on each of `count` cards that it is cut over, without the layers `precomputed`.

    Raises DoesNotFit where it cannot be cut, or not into so many parts.
    """
    model: Any = skeleton(component, dtype)
    plan = getattr(model, "_tp_plan", None)
    if not plan:
        raise DoesNotFit(f"{component.name} cannot be cut over cards: diffusers {diffusers.__version__} has no tensor "
                         f"parallel plan for {component.class_name} -> `place=denoise=sharded`")
    heads = int(model.config.num_attention_heads)
    if heads % count:
        fitting = ", ".join(str(part) for part in range(2, heads + 1) if heads % part == 0)
        raise DoesNotFit(f"{component.name} has {heads} attention heads, which {count} cards cannot share evenly "
                         f"-> `place=denoise=tensor_parallel:N` with N of {fitting or 'none'}")
    try:
        specs = tensor_parallel.resolve_tp_shard_specs(model, plan, count)
    except ValueError as error:
        raise DoesNotFit(f"{component.name} cannot be cut over {count} cards: {error}") from error
    divided = {name for name, spec in specs.items() if spec.dim is not None}
    assert not any(name.rpartition(".")[0] in precomputed for name in divided), "a layer is both cut and precomputed"
    return sum(size // count if name in divided else size for name, size in sizes(model)
               if name.rpartition(".")[0] not in precomputed)


def _divided(cls: Any, placement: TensorParallel) -> Any:
    """`cls` so that `from_pretrained` reads this process's part of every tensor; torch.distributed is initialized."""
    mesh = init_device_mesh(torch.device(placement.entry).type, (len(placement.devices),))

    class Divided(cls):
        @classmethod
        def from_pretrained(kind, folder: Any, *, device_map: Any, **options: Any) -> Any:
            with _any_device():
                return super().from_pretrained(folder, parallel_config=TensorParallelConfig(mesh=mesh), **options)

        def _resolve_parallel_config(self, config: Any) -> Any:
            # diffusers' own takes the card with the number of the rank, and finds no device on a host without cards.
            config = ParallelConfig(tensor_parallel_config=config)
            config.setup(placement.rank, len(placement.devices), torch.device(placement.entry), mesh=mesh)
            self._parallel_config = config
            return config

    # The library knows models by name.
    Divided.__name__, Divided.__qualname__ = cls.__name__, cls.__qualname__
    return Divided


@contextmanager
def _any_device() -> Iterator[None]:
    """Let diffusers cut for a CPU too: it lists the kinds of devices that it was tried on."""
    known = tensor_parallel._SUPPORTED_TP_DEVICES
    tensor_parallel._SUPPORTED_TP_DEVICES = (*known, "cpu")
    try:
        yield
    finally:
        tensor_parallel._SUPPORTED_TP_DEVICES = known
