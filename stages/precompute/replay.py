"""A model class without some of its linear layers: their outputs are replayed, and their weights stay on the disk."""

import inspect
import re
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import nn


class Source(Protocol):
    """Where the outputs of replayed layers come from."""

    def row(self, layer: str, device: torch.device) -> torch.Tensor:
        """The layer's output in the call that goes on, on `device`."""
        ...


class PrecomputedLinear(nn.Module):
    """In place of a linear layer: gives what it gave when its output was computed ahead."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.source: Source | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output that was computed ahead; `x` says no more than on which device it is wanted."""
        assert self.source is not None, f"{self.layer} was left on the disk, and no table was attached"
        return self.source.row(self.layer, x.device)


def precomputed(cls: Any, layers: Collection[str]) -> Any:
    """The model class with `PrecomputedLinear`s for the linear layers named, whose weights are not loaded then."""
    if not layers:
        return cls

    class Precomputed(cls):
        # What the files have and the model lacks is no surprise.
        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
            *(cls._keys_to_ignore_on_load_unexpected or ()),
            *(rf"^{re.escape(layer)}\.(weight|bias)$" for layer in layers),
        ]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            replace_linears(self, layers)

    # The library reads the signature to see which entries of the config the class takes, and knows models by name.
    Precomputed.__init__.__signature__ = inspect.signature(cls.__init__)  # type: ignore[attr-defined]
    Precomputed.__name__, Precomputed.__qualname__ = cls.__name__, cls.__qualname__
    return Precomputed


def replace_linears(model: nn.Module, layers: Collection[str]) -> None:
    """Put `PrecomputedLinear`s in place of the linear layers named."""
    for layer in layers:
        assert type(model.get_submodule(layer)) is nn.Linear, layer
        model.set_submodule(layer, PrecomputedLinear(layer))


def precomputed_linears(model: nn.Module) -> list[PrecomputedLinear]:
    """The model's `PrecomputedLinear`s."""
    return [module for module in model.modules() if isinstance(module, PrecomputedLinear)]
