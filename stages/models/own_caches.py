"""What upstream keeps of a model in caches of its classes, kept by the model itself instead."""

import weakref
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any

from torch import nn

# A plan is of one size: what is kept of several would come on top.
KEPT = 1


def keep_by_itself(model: nn.Module) -> None:
    """Give a model's modules caches of their own in place of those that their classes have for all.

    Qwen-Image keeps its positions by `lru_cache` on methods: the module, and tensors on its card, would stay for as
    long as the process lives.
    """
    # Not for longer: a skeleton has a class of its own, which holds what it is made for.
    known: dict[type, list[tuple[str, Any]]] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            known[kind] = [*_kept_methods(kind)]
        for name, method in known[kind]:
            # A method of the module itself would hold it until somebody collects garbage.
            own: Any = MethodType(method, weakref.proxy(module))
            setattr(module, name, lru_cache(maxsize=KEPT)(own))


def _kept_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The methods of a class whose results are kept, by name, as they are without that."""
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if hasattr(value, "__wrapped__") and any(hasattr(each, "cache_clear") for each in _within(value)):
                yield name, value.__wrapped__


def _within(value: Any) -> Iterator[Any]:
    """A method, and what it encloses: diffusers has its caches behind a function."""
    yield value
    if isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or ())
