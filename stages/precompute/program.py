"""What a denoiser computes from its conditioning alone, as steps that can be repeated for any call.

Timestep, guidance and pooled prompt have no token axis. What is computed from them and from weights, and meets no
token on the way, is a program of its own; linear layers are steps of it as a whole. No layer is known by name.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stages.placement.transfers import Transfer, direct

# Among the arguments of a step: the device that takes the model's inputs.
ENTRY = object()


@dataclass(frozen=True)
class ValueRef:
    """Among the arguments of a step: a value that is conditioning, or was computed from it."""

    number: int
    """Values are numbered in the order in which they come up."""


@dataclass(frozen=True)
class WeightRef:
    """Among the arguments of a step: a parameter."""

    name: str
    """Its name."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation on conditioning."""

    func: Callable[..., Any]
    """The operation."""
    args: tuple[Any, ...]
    """Its arguments, with `ValueRef`s and `WeightRef`s in place of tensors."""
    kwargs: Mapping[str, Any]
    """Its arguments by name."""
    out: tuple[int, ...]
    """The numbers of its results."""
    layer: str | None = None
    """The name of the linear layer that it is, if it is one."""
    seen: Any = None
    """What the model saw, where it looks at a value; others that see the same go on as it does."""

    def leaves(self) -> list[Any]:
        """Its arguments, flat."""
        return tree_flatten((self.args, dict(self.kwargs)))[0]

    def needs(self) -> set[int]:
        """The numbers of the values that it reads."""
        return {leaf.number for leaf in self.leaves() if isinstance(leaf, ValueRef)}

    def weights(self) -> list[str]:
        """The names of the parameters that it reads."""
        return [leaf.name for leaf in self.leaves() if isinstance(leaf, WeightRef)]

    def run(
        self, values: Mapping[int, torch.Tensor], weights: Mapping[str, torch.Tensor], entry: str,
        device: str | None = None, transfer: Transfer = direct,
    ) -> list[Any]:
        """Its results for the `values` so far; what it makes of nothing is made on the device `entry`.

        A layer is on `device`, where `transfer` brings what it reads.
        """

        def resolved(leaf: Any) -> Any:
            if isinstance(leaf, ValueRef):
                return values[leaf.number] if device is None else transfer(values[leaf.number], device)
            if isinstance(leaf, WeightRef):
                return weights[leaf.name]
            return torch.device(entry) if leaf is ENTRY else leaf

        return tree_flatten(self.func(*tree_map(resolved, self.args), **tree_map(resolved, dict(self.kwargs))))[0]


def leading_to(steps: Sequence[Step], ends: Collection[Step]) -> tuple[Step, ...]:
    """The steps that `ends` need, and those, in their order."""
    needed, wanted = set[int](), frozenset(ends)
    found = []
    for step in reversed(steps):
        if step in wanted or needed.intersection(step.out):
            found.append(step)
            needed |= step.needs()
    return tuple(reversed(found))


@dataclass(frozen=True)
class Layer:
    """The output of a linear layer that sees only conditioning."""

    number: int
    """Its number among the values."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: torch.dtype
    """Its type."""

    @property
    def bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Program:
    """All of a call that depends on its conditioning alone, up to the last linear layers."""

    call_kind: Any
    """What all calls have in common that it fits, as far as their form tells: `Call.kind`."""
    inputs: Mapping[int, int]
    """The number of the value that is a leaf of the call, by the position of the leaf."""
    looks: tuple[Step, ...]
    """The steps that lead to the model's looks at values, and those."""
    steps: tuple[Step, ...]
    """The steps that lead to the layers, and those."""
    layers: Mapping[str, Layer]
    """The last linear layers by name."""
    result: Any
    """What the call gives, on the meta device."""
    same_as: "Program | None" = None
    """The first program found that does the same, for calls that differ in their tokens."""

    @property
    def canonical(self) -> "Program":
        """The first program found that does the same."""
        return self.same_as or self

    @cached_property
    def reads(self) -> tuple[tuple[int, int], ...]:
        """The leaves of a call that its layers' outputs depend on, with their numbers, in the order of use."""
        leaves = {number: at for at, number in self.inputs.items()}
        order = (leaf.number for step in self.steps for leaf in step.leaves() if isinstance(leaf, ValueRef))
        return tuple((leaves[number], number) for number in dict.fromkeys(order) if number in leaves)

    def signature(self) -> Any:
        """Equal for programs that do the same, whatever else their calls are like."""
        numbers: dict[int, int] = {}

        def comparable(leaf: Any) -> Any:
            if isinstance(leaf, ValueRef):
                return ValueRef, numbers.setdefault(leaf.number, len(numbers))
            return type(leaf), id(leaf) if isinstance(leaf, torch.Tensor) else leaf

        return {name: (layer.shape, layer.dtype) for name, layer in self.layers.items()}, [
            (step.func, step.layer, [comparable(leaf) for leaf in step.leaves()],
             [comparable(ValueRef(number)) for number in step.out])
            for step in self.steps
        ]

    def last_uses(self) -> list[tuple[int, ...]]:
        """For each step, the values that no later step reads."""
        done: list[tuple[int, ...]] = []
        later: set[int] = set()
        for step in reversed(self.steps):
            ending = (step.needs() | set(step.out)) - later
            done.append(tuple(ending))
            later |= ending
        return done[::-1]

    def fits(self, call: "Call", entry: str) -> bool:
        """Whether the call, with its tensors on `entry`, would go the same way through the model."""
        if call.kind != self.call_kind:
            return False
        values = {number: call.leaves[at] for at, number in self.inputs.items()}
        for step in self.looks:
            results = step.run(values, {}, entry)
            if step.seen is not None and results != [step.seen]:
                return False
            values.update(zip(step.out, results, strict=True))
        return True


class Call:
    """The arguments of one call of a model, flat."""

    leaves: list[Any]
    """The arguments, in the order of the forward's own."""
    kind: Any
    """What calls have in common of which all go the same way through the model, unless it looks at a value."""
    conditioning: frozenset[int]
    """The positions of the leaves that are tensors without a token axis."""
    batch: int
    """How many requests are in the call."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if value is not model}
        self.leaves, self._form = tree_flatten(named)
        self.kind = self._form, tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
                                      for leaf in self.leaves)
        self.conditioning = frozenset(_without_tokens(named))
        hidden = next(iter(named.values()))
        self.batch = len(hidden) if isinstance(hidden, list | tuple | torch.Tensor) else 1

    def for_trace(self) -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
        """The arguments with tokens on the meta device, and the conditioning among them by position."""
        leaves = list(self.leaves)
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                leaves[at] = leaf.clone() if at in self.conditioning else leaf.to("meta")
        return tree_unflatten(leaves, self._form), {at: leaves[at] for at in sorted(self.conditioning)}


def _without_tokens(named: Mapping[str, Any]) -> Iterator[int]:
    """The leaves that are tensors without a token axis; lists hold what differs in length, which is tokens."""
    at = 0
    for value in named.values():
        leaves = tree_flatten(value)[0]
        if not isinstance(value, list | tuple):
            yield from (at + i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.ndim <= 2)
        at += len(leaves)
