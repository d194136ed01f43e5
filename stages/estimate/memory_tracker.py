"""The bytes that tensors take on each card, counted op by op without a card and without the tensors.

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
    """While entered: current and peak bytes by card, and floating point operations, of what runs.

    `scratch` says how much of its operands a convolution takes besides them on a card, as a factor.
    """

    def __init__(self, home: str, scratch: Mapping[str, float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.home, self.flops = home, 0
        self.now, self.peak = Counter[str](), Counter[str]()
        self.scratch = scratch
        self._held: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}
        # Drawn apart, so that nobody else's random numbers change.
        self._numbers = torch.rand(2**16, generator=torch.Generator().manual_seed(0))
        self._card: str | None = None
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
            card = self._card or self._card_of_call(func, args)
            for tensor in tensors(out):
                self.hold(tensor, card, tensor.untyped_storage().nbytes())
            count = flop_registry.get(func._overloadpacket)
            if count is not None:
                self.flops += count(*args, **kwargs, out_val=out)
            if func is _CONVOLUTION:
                self.spike(card, int(self.scratch.get(card, 0.0) * (args[0].nbytes + out.nbytes)))
        return out

    def hold(self, tensor: torch.Tensor, card: str, size: int, peak: bool = True) -> None:
        """Count `size` bytes on a card for as long as the tensor's memory lives, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = card, size, weakref.ref(storage, lambda _: self._drop(key))
        self.now[card] += size
        if peak:
            self.spike(card, 0)

    def spike(self, card: str, size: int) -> None:
        """Count bytes that a card holds for a moment only."""
        self.peak[card] = max(self.peak[card], self.now[card] + size)

    def card_of(self, tensor: torch.Tensor) -> str:
        """The card that holds the tensor."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held[0] if held else self.home

    def move(self, tensor: torch.Tensor, card: str) -> torch.Tensor:
        """The tensor on another card: a `Transfer`."""
        if self.card_of(tensor) == card:
            return tensor
        with self.on(card):
            return tensor.clone()

    def follow(self, module: nn.Module, card: str) -> None:
        """Have what `module` makes out of nothing, such as positions, made on this card."""
        module.register_forward_pre_hook(lambda *call: self._within.append(card))
        module.register_forward_hook(lambda *call: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._within.pop()

    @contextmanager
    def on(self, card: str) -> Iterator[None]:
        """Whatever is made meanwhile is made on this card."""
        before, self._card = self._card, card
        try:
            yield
        finally:
            self._card = before

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
        card, size, _ = self._held.pop(key)
        self.now[card] -= size

    def _card_of_call(self, func: Any, args: Any) -> str:
        found = [self._held[key][0] for tensor in tensors(args) if tensor.dim()
                 if (key := tensor.untyped_storage()._cdata) in self._held]
        if func not in _ACROSS and len(set(found)) > 1:
            raise MixedDevices(f"{func} would meet tensors of {' and '.join(sorted(set(found)))} in the same call")
        return found[0] if found else self._within[-1] if self._within else self.home


class FusedAttention(TorchFunctionMode):
    """Attention that makes nothing but its result, as every card's own kernels do; on meta, torch would show the
    score matrix."""

    def __init__(self, ledger: MemoryTracker) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args):]))[:3]
        if not query.is_meta:
            return func(*args, **kwargs)
        self._ledger.flops += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def tensors(data: Any) -> Iterator[torch.Tensor]:
    """The tensors in an op's arguments or results."""
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, list | tuple):
        for item in data:
            yield from tensors(item)
