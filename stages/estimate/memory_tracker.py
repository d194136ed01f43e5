"""The bytes that tensors take on each device, counted op by op without a device and without the tensors.

A model on the meta device does everything but compute, so its forward pass makes every activation in the order and
for as long as a real one does. What is counted is what an allocator without rounding would have handed out.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stages.errors import DoesNotFit

_CONVOLUTION = torch.ops.aten.convolution.default
_COPY = torch.ops.aten._to_copy.default
_LOOK = torch.ops.aten._local_scalar_dense.default
# These may read one device and write another.
_ACROSS = frozenset({_COPY, torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor})


class MixedDevices(DoesNotFit):
    """A placement that makes tensors of two devices meet in one operation."""


class MemoryTracker(TorchDispatchMode):
    """While entered: the bytes and the operations of what runs."""

    home: str
    """The device of what is made of nothing."""
    scratch: Mapping[str, float]
    """What a convolution takes on a device besides its operands, as a factor of their bytes."""
    now: Counter[str]
    """Bytes on each device."""
    peak: Counter[str]
    """The most bytes so far on each device."""
    flops: int
    """Floating point operations so far."""

    def __init__(self, home: str, scratch: Mapping[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.home, self.scratch = home, scratch
        self.now, self.peak, self.flops = Counter(), Counter(), 0
        self._held: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}
        # Drawn apart, so that nobody else's random numbers change.
        self._numbers = torch.rand(2**16, generator=torch.Generator().manual_seed(0))
        self._device: str | None = None
        self._within: list[str] = []
        self._counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out: Any
        if func is _COPY and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type != "meta":
            # A pipeline that reads a weight on the host gets any numbers.
            out = self.noise(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        elif func is _LOOK and args[0].is_meta and args[0].dtype == torch.bool:
            # Models look whether a mask may be left out; that it may not takes more memory.
            out = False
        else:
            out = func(*args, **kwargs)
        if self._counting:
            device = self._device or self._device_of_call(func, args)
            for tensor in tensors(out):
                self.hold(tensor, device, tensor.untyped_storage().nbytes())
            count = flop_registry.get(func._overloadpacket)
            if count is not None:
                self.flops += count(*args, **kwargs, out_val=out)
            if func is _CONVOLUTION:
                self.spike(device, int(self.scratch.get(device, 0.0) * (args[0].nbytes + out.nbytes)))
        return out

    def hold(self, tensor: torch.Tensor, device: str, size: int, peak: bool = True) -> None:
        """Count `size` bytes on a device for as long as the tensor's memory lives, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = device, size, weakref.ref(storage, lambda _: self._drop(key))
        self.now[device] += size
        if peak:
            self.spike(device, 0)

    def spike(self, device: str, size: int) -> None:
        """Count bytes that a device holds for a moment only."""
        self.peak[device] = max(self.peak[device], self.now[device] + size)

    def device_of(self, tensor: torch.Tensor) -> str:
        """The device that holds the tensor."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held[0] if held else self.home

    def move(self, tensor: torch.Tensor, device: str) -> torch.Tensor:
        """The tensor on another device: a `Transfer`."""
        if self.device_of(tensor) == device:
            return tensor
        with self.on(device):
            return tensor.clone()

    def place(self, module: nn.Module, device: str) -> None:
        """Have what a module makes out of nothing, such as positions, made on this device."""

        def enter(*call: Any) -> None:
            self._within.append(device)

        def leave(*call: Any) -> None:
            self._within.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        """Whatever is made meanwhile is made on this device."""
        before, self._device = self._device, device
        try:
            yield
        finally:
            self._device = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Whatever is made meanwhile is not counted."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def noise(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """Numbers between 0 and 1 on the host; the same ones over and over."""
        size = tuple(shape)
        count = math.prod(size)
        # Its own memory and no more: a view would count as much as what it looks at.
        return self._numbers.to(dtype).repeat(-(-count // len(self._numbers)))[:count].clone().reshape(size)

    def _drop(self, key: int) -> None:
        device, size, _ = self._held.pop(key)
        self.now[device] -= size

    def _device_of_call(self, func: Any, args: Any) -> str:
        found = [self._held[key][0] for tensor in tensors(args) if tensor.dim()
                 if (key := tensor.untyped_storage()._cdata) in self._held]
        if func not in _ACROSS and len(set(found)) > 1:
            raise MixedDevices(f"{func} would meet tensors of {' and '.join(sorted(set(found)))} in the same call")
        return found[0] if found else self._within[-1] if self._within else self.home


class FusedAttention(TorchFunctionMode):
    """Attention that makes nothing but its result, as every card's own kernels do.

    On the meta device torch would make the matrix of scores, too.
    """

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args):]))[:3]
        if not query.is_meta:
            return func(*args, **kwargs)
        self._tracker.flops += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def tensors(data: Any) -> Iterator[torch.Tensor]:
    """The tensors in an op's arguments or results."""
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, list | tuple):
        for item in data:
            yield from tensors(item)
