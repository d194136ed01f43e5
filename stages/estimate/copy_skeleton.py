"""A skeleton once more, for those who change it: to copy one takes a third of the time that it takes to make one."""

import copy
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size, frozenset)


def copy_skeleton(model: nn.Module) -> Any:
    """The model with modules and buffers of its own, and the same parameters."""
    copies: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
    copies |= {id(buffer): buffer.clone() for buffer in model.buffers()}
    modules = list(model.modules())
    copies |= {id(module): object.__new__(type(module)) for module in modules}
    for module in modules:
        copies[id(module)].__dict__.update({name: _copied(value, copies) for name, value in vars(module).items()})
    return copies[id(model)]


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """As `copy.deepcopy` has it, but fast for what modules are mostly made of."""
    if isinstance(value, _PLAIN):
        return value
    if type(value) is dict:
        return {name: copies[id(part)] if id(part) in copies else _copied(part, copies)
                for name, part in value.items()}
    if isinstance(value, dict | set | list) and not value:
        return type(value)()
    return copy.deepcopy(value, copies)
