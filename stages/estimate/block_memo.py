"""Blocks that are alike gone through once: a model is dozens of the same, and going through one takes milliseconds."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from stages.estimate.memory_tracker import MemoryTracker

# What a block does itself in a call.
Forward = Callable[[], Any]
# By what calls have in common that cost the same, for each component as it is placed.
Costs = dict[Any, dict[Any, "Cost"]]


def structure_key(module: nn.Module) -> Any:
    """Equal for modules of the same classes with parameters of the same shapes and types, under the same names.

    What goes through one of them need not go through the other.
    """
    parameters = tuple((name, weight.shape, weight.dtype) for name, weight in module._parameters.items()
                       if weight is not None)
    return type(module), parameters, tuple((name, structure_key(child)) for name, child in module.named_children())


def intercept(block: nn.Module, answer: Callable[[Forward, Any, list[Any]], Any]) -> None:
    """Have `answer` give what a block gives in each call.

    It gets what the block itself would do, what the call has in common with those of like blocks, and its inputs,
    flat.
    """
    forward, structure = block.forward, structure_key(block)

    @wraps(forward)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        inputs, form = tree_flatten((args, kwargs))
        return answer(partial(forward, *args, **kwargs), (structure, form), inputs)

    block.forward = intercepted


def position(result: Any, inputs: Sequence[Any]) -> int | None:
    """Which of a block's inputs a result of it is, if it is one."""
    return next((at for at, given in enumerate(inputs) if given is result), None)


class BlockMemo:
    """Runs one block of a kind, and repeats what it cost for those that are alike."""

    def __init__(self, tracker: MemoryTracker, work: Counter[str], known: dict[Any, "Cost"]) -> None:
        """Operations of each block are added to `work`; costs go to, and come from, `known`."""
        self._tracker, self._work, self._known = tracker, work, known

    def wrap(self, name: str, block: nn.Module, storage: str) -> None:
        """Count the operations of a block with weights on the device `storage`, and run it unless it is known."""
        intercept(block, partial(self._answer, name, storage))

    def _answer(self, name: str, storage: str, forward: Forward, kind: Any, inputs: list[Any]) -> Any:
        only = self._only_device(storage, inputs)
        key = kind, *self._likeness(storage, inputs, only)
        before = self._tracker.flops
        cost = self._known.get(key)
        results = self._run(key, inputs, only, forward) if cost is None else cost.again(self._tracker, inputs, only)
        self._work[name] += self._tracker.flops - before
        return results

    def _run(self, key: Any, inputs: list[Any], only: str | None, forward: Forward) -> Any:
        tracker = self._tracker
        flops, now, peak = tracker.flops, Counter(tracker.now), tracker.peak
        tracker.peak = Counter(now)
        out = forward()
        spikes = tracker.peak - now
        tracker.peak |= peak
        results, form = tree_flatten(out)
        made = [leaf for leaf in results if isinstance(leaf, torch.Tensor) and position(leaf, inputs) is None]
        kept = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in made}
        touched = {*spikes, *map(tracker.device_of, made)}
        # A block that keeps something for later, such as a cache of keys, or gives views of its inputs, is gone
        # through each time; so is one that is all on one device and makes something on another.
        if (only is None or touched <= {only}) and sum((tracker.now - now).values()) == sum(kept.values()):
            self._known[key] = Cost(
                {None if only else device: size for device, size in spikes.items()}, tracker.flops - flops,
                [_result(leaf, inputs, tracker, only) for leaf in results], form)
        return out

    def _only_device(self, storage: str, inputs: list[Any]) -> str | None:
        """The device that a block and all its inputs are on, if it is one: its cost would be that of any other."""
        devices = {storage, *(self._tracker.device_of(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor))}
        return devices.pop() if len(devices) == 1 else None

    def _likeness(self, storage: str, inputs: list[Any], only: str | None) -> tuple[Any, ...]:
        def alike(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return tuple(leaf.shape), leaf.dtype, None if only else self._tracker.device_of(leaf)
            return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)

        scratch = self._tracker.scratch
        place = scratch.get(only, 0.0) if only else (storage, tuple(scratch.items()))
        return place, tuple(map(alike, inputs))


@dataclass(frozen=True)
class Cost:
    """What a block took; the device None is the only one that it and its inputs are on."""

    spikes: Mapping[str | None, int]
    """The most bytes above those at its entry, by device."""
    flops: int
    """Floating point operations."""
    results: Sequence["_Input | _Made"]
    """What its results are like, flat."""
    form: Any
    """How they are nested."""

    def again(self, tracker: MemoryTracker, inputs: list[Any], only: str | None) -> Any:
        """Count the cost once more, of a block that is all on the device `only`; the results for these inputs."""
        for device in list(tracker.now):
            tracker.spike(device, self.spikes.get(None if device == only else device, 0))
        tracker.flops += self.flops
        stores: dict[int, torch.Tensor] = {}
        return tree_unflatten([result.make(tracker, inputs, only, stores) for result in self.results], self.form)


@dataclass(frozen=True)
class _Input:
    """A result that is one of the inputs, or no tensor."""

    at: int | None
    """Which of the inputs it is."""
    value: Any
    """What it is, where it is none of them."""

    def make(
        self, tracker: MemoryTracker, inputs: list[Any], only: str | None, stores: dict[int, torch.Tensor]
    ) -> Any:
        return self.value if self.at is None else inputs[self.at]


@dataclass(frozen=True)
class _Made:
    """A result that a block makes."""

    device: str | None
    """The device that it is on."""
    store: int
    """What results have in common that share their memory."""
    bytes: int
    """Bytes of that memory."""
    view: tuple[Any, Any, int]
    """Size, strides and offset of the tensor in it."""
    dtype: torch.dtype
    """Its type."""

    def make(
        self, tracker: MemoryTracker, inputs: list[Any], only: str | None, stores: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        if self.store not in stores:
            with tracker.on(self.device or only or tracker.home):
                stores[self.store] = torch.empty(self.bytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return stores[self.store].as_strided(*self.view)


def _result(leaf: Any, inputs: list[Any], tracker: MemoryTracker, only: str | None) -> _Input | _Made:
    at = position(leaf, inputs)
    if at is not None or not isinstance(leaf, torch.Tensor):
        return _Input(at, None if isinstance(leaf, torch.Tensor) else leaf)
    storage = leaf.untyped_storage()
    view = leaf.size(), leaf.stride(), int(leaf.storage_offset())
    return _Made(None if only else tracker.device_of(leaf), storage._cdata, storage.nbytes(), view, leaf.dtype)
