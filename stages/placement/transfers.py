"""What crosses from card to card inside one model, no more than once, and whether it arrives.

accelerate's hooks send every argument of every block again; here a tensor that a pass needs on another card
(the conditioning vector, the rotary embeddings) is copied there once and the copy lives as long as its source.

Some machines garble what one card sends another (a wrong IOMMU setting, risers, virtual machines), without an error:
the picture is noise and the exit code 0. Through host memory everything arrives.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import permutations
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from stages.placement import device_turns

# Bytes of the pattern that shows whether copies arrive.
PATTERN_BYTES = 2**20
# Gives the tensor on a device.
Transfer = Callable[[torch.Tensor, str], torch.Tensor]


def direct(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A `Transfer` as torch copies."""
    return tensor.to(device)


def via_host(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A `Transfer` through host memory: for cards that garble what they send each other."""
    return tensor if tensor.device == torch.device(device) else tensor.to("cpu").to(device)


class Crossing:
    """Hooks on one model: the inputs of each named module go to its device, the model's outputs go home."""

    def __init__(self, model: nn.Module, devices: Mapping[str, str], home: str, transfer: Transfer = direct) -> None:
        self._transfer, self._devices = transfer, {*devices.values(), home}
        self._copies: dict[tuple[int, str, int], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        for name, device in devices.items():
            model.get_submodule(name).register_forward_pre_hook(self._enter(device), with_kwargs=True)
        model.register_forward_hook(self._leave(home))

    def _enter(self, device: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            device_turns.enter(device)
            return self._sent(args, device), self._sent(kwargs, device)

        return hook

    def _leave(self, home: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            home_again = self._sent(output, home)
            # What a model gives may live for long (the hidden states of an encoder), and no block reads it any more.
            recursively_apply(self._forget, output)
            device_turns.leave()
            return home_again

        return hook

    def _sent(self, data: Any, device: str) -> Any:
        return recursively_apply(lambda tensor: self._copy(tensor, device), data)

    def _copy(self, tensor: torch.Tensor, device: str) -> torch.Tensor:
        # Threads have streams of their own: a copy that another one ordered may not be there yet.
        key = (id(tensor), device, threading.get_ident())
        known = self._copies.get(key)
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        copy = self._transfer(tensor, device)
        if copy is not tensor:
            # The copy goes when its source goes: an id may be used again, and activations must not pile up.
            source = weakref.ref(tensor, lambda _: self._copies.pop(key, None))
            self._copies[key] = source, tensor._version, copy
        return copy

    def _forget(self, tensor: torch.Tensor) -> torch.Tensor:
        for device in self._devices:
            self._copies.pop((id(tensor), device, threading.get_ident()), None)
        return tensor


def corrupted_pairs(devices: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of cards, as (from, to), between which a patterned mebibyte does not arrive as it was sent."""
    return [pair for pair in permutations(devices, 2) if not _arrives(*pair)]


def _arrives(source: str, target: str) -> bool:
    """Whether copies arrive, of two patterns, so that what was there before is no excuse."""
    return all(torch.equal(pattern.to(source).to(target).to("cpu"), pattern) for pattern in _patterns())


def _patterns() -> Iterator[torch.Tensor]:
    counted = torch.arange(PATTERN_BYTES, dtype=torch.int64)
    for odd in (2654435761, 40503):
        yield (counted * odd >> 7).remainder(251).to(torch.uint8)
