"""What crosses from card to card inside one model, and no more than once.

accelerate's hooks send every argument of every block again; here a tensor that a pass needs on another card
(the conditioning vector, the rotary embeddings) is copied there once and the copy lives as long as its source.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn


class Crossing:
    """Hooks on one model: the inputs of each named module go to its device, the model's outputs go home."""

    def __init__(self, model: nn.Module, devices: Mapping[str, str], home: str) -> None:
        self._copies: dict[tuple[int, torch.device], tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        for name, device in devices.items():
            model.get_submodule(name).register_forward_pre_hook(self._enter(torch.device(device)), with_kwargs=True)
        model.register_forward_hook(self._leave(torch.device(home)))

    def _enter(self, device: torch.device) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return self._sent(args, device), self._sent(kwargs, device)

        return hook

    def _leave(self, home: torch.device) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return self._sent(output, home)

        return hook

    def _sent(self, data: Any, device: torch.device) -> Any:
        return recursively_apply(lambda tensor: self._copy(tensor, device), data)

    def _copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        known = self._copies.get(key)
        if known is not None and known[0]() is tensor:
            return known[1]
        copy = tensor.to(device)
        # The copy goes when its source goes: an id may be used again, and activations must not pile up.
        self._copies[key] = weakref.ref(tensor, lambda _: self._copies.pop(key, None)), copy
        return copy
