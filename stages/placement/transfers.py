"""What crosses from card to card inside one model, and no more than once.

accelerate's hooks send every argument of every block again; here a tensor that a pass needs on another card
(the conditioning vector, the rotary embeddings) is copied there once and the copy lives as long as its source.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from stages.placement import device_turns

Transfer = Callable[[torch.Tensor, str], torch.Tensor]


def direct(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on `device`, copied as torch copies."""
    return tensor.to(device)


def via_host(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on `device`, copied through host memory: for cards that garble what they send each other."""
    return tensor if tensor.device == torch.device(device) else tensor.to("cpu").to(device)


class Crossing:
    """Hooks on one model: the inputs of each named module go to its device, the model's outputs go home."""

    def __init__(self, model: nn.Module, devices: Mapping[str, str], home: str, move: Transfer = direct) -> None:
        self._move = move
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
        copy = self._move(tensor, device)
        if copy is not tensor:
            # The copy goes when its source goes: an id may be used again, and activations must not pile up.
            source = weakref.ref(tensor, lambda _: self._copies.pop(key, None))
            self._copies[key] = source, tensor._version, copy
        return copy
