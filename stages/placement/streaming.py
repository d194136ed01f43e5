"""Blocks that wait in host memory or on the disk, and are on their device only while they compute."""

import threading
import weakref
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from stages.placement.placement import DISK, Fetch, from_host
from stages.placement.sharded import Sharded
from stages.placement.transfers import Transfer


@dataclass(frozen=True, repr=False)
class Streamed(Sharded):
    """As sharded, with some of the blocks elsewhere between their calls."""

    cpu_blocks: frozenset[str] = frozenset()
    """The blocks that wait in host memory."""
    disk_blocks: frozenset[str] = frozenset()
    """The blocks that wait on the disk."""

    def __str__(self) -> str:
        waiting = [f"{len(blocks)} of them {how}" for how, blocks in
                   (("streamed", self.cpu_blocks), ("read from the disk", self.disk_blocks)) if blocks]
        return f"{super().__str__()} ({', '.join(waiting)})" if waiting else super().__str__()

    @property
    def storage_devices(self) -> dict[str, str]:
        return self.compute_devices | dict.fromkeys(self.cpu_blocks, "cpu") | dict.fromkeys(self.disk_blocks, DISK)

    @property
    def device_map(self) -> dict[str, str]:
        waiting = dict.fromkeys(self.cpu_blocks, "cpu") | dict.fromkeys(self.disk_blocks, "meta")
        return super().device_map | waiting

    def attach(self, model: nn.Module, home: str, transfer: Transfer | None = None, fetch: Fetch = from_host) -> None:
        super().attach(model, home, transfer, fetch)
        # No two streamed blocks are on a device at the same time, also where several lanes run through them.
        locks = {device: threading.Lock() for device in self.devices.values()}
        for name in self.cpu_blocks | self.disk_blocks:
            device = self.devices[name]
            _stream(model.get_submodule(name), name, device, transfer or self.transfer,
                    fetch if name in self.disk_blocks else from_host, locks[device])

    @property
    def concurrency(self) -> int:
        return 1


def _stream(
    block: nn.Module, name: str, device: str, transfer: Transfer, fetch: Fetch, lock: threading.Lock
) -> None:
    """Have a block's weights on `device` during each call of it, alone with the `lock`.

    They are copied there, never back.
    """
    tensors = {f"{name}.{inner}": tensor for inner, tensor in (*block.named_parameters(), *block.named_buffers())}
    # A block that holds itself would stay in memory until somebody collects garbage.
    assert isinstance(block.forward, MethodType)
    forward, weak_block = block.forward.__func__, weakref.ref(block)

    def streamed(*args: Any, **kwargs: Any) -> Any:
        with lock:
            waiting = [(tensor, tensor.data) for tensor in tensors.values()]
            try:
                for full_name, tensor in tensors.items():
                    tensor.data = transfer(fetch(full_name, tensor.data), device)
                return forward(weak_block(), *args, **kwargs)
            finally:
                for tensor, data in waiting:
                    tensor.data = data

    block.forward = streamed
