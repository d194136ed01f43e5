"""When two modules are alike: made of the same parts, so that what goes through one need not go through the other."""

from typing import Any

from torch import nn


def structure_key(module: nn.Module) -> Any:
    """Equal for modules of the same classes with parameters of the same shapes and types, under the same names."""
    parameters = tuple((name, weight.shape, weight.dtype) for name, weight in module._parameters.items()
                       if weight is not None)
    return type(module), parameters, tuple((name, structure_key(child)) for name, child in module.named_children())
