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

HERE = object()


@dataclass(frozen=True)
class Ref:
    """The value with this number."""

    at: int


@dataclass(frozen=True)
class Weight:
    """A parameter, by its name."""

    name: str


@dataclass(frozen=True, eq=False)
class Step:
    """One operation on conditioning: `args` hold `Ref`s and `Weight`s, `out` the numbers of its results.

    A `layer` is the name of a linear layer; a look at a value expects to see `seen`.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: tuple[int, ...]
    layer: str | None = None
    seen: Any = None

    def leaves(self) -> list[Any]:
        """Its arguments, flat."""
        return tree_flatten((self.args, dict(self.kwargs)))[0]

    def needs(self) -> set[int]:
        """The numbers of the values that it reads."""
        return {leaf.at for leaf in self.leaves() if isinstance(leaf, Ref)}

    def weights(self) -> list[str]:
        """The names of the parameters that it reads."""
        return [leaf.name for leaf in self.leaves() if isinstance(leaf, Weight)]

    def run(
        self, values: Mapping[int, torch.Tensor], weights: Mapping[str, torch.Tensor], entry: str,
        device: str | None = None, move: Transfer = direct,
    ) -> list[Any]:
        """Its results for the `values` so far; what it makes of nothing is made on `entry`.

        A layer is on `device`, where `move` brings what it reads.
        """

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return values[leaf.at] if device is None else move(values[leaf.at], device)
            if isinstance(leaf, Weight):
                return weights[leaf.name]
            return torch.device(entry) if leaf is HERE else leaf

        return tree_flatten(self.func(*tree_map(real, self.args), **tree_map(real, dict(self.kwargs))))[0]


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
    """A linear layer that sees only conditioning: the number, shape and type of its output."""

    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the output."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Program:
    """All of a call that depends on its conditioning alone, up to the last linear layers, which are `layers`.

    `inputs` says which leaf of the call is which value; `result` is what the call gives, on the meta device.
    `like` is another program that does the same, for calls that differ in their tokens.
    """

    likeness: Any
    inputs: Mapping[int, int]
    looks: tuple[Step, ...]
    steps: tuple[Step, ...]
    layers: Mapping[str, Layer]
    result: Any
    like: "Program | None" = None

    @property
    def kind(self) -> "Program":
        """The first program found that does the same."""
        return self.like or self

    @cached_property
    def reads(self) -> tuple[tuple[int, int], ...]:
        """The leaves of a call that its layers' outputs depend on, with their numbers, in the order of use."""
        leaves = {number: at for at, number in self.inputs.items()}
        order = (leaf.at for step in self.steps for leaf in step.leaves() if isinstance(leaf, Ref))
        return tuple((leaves[number], number) for number in dict.fromkeys(order) if number in leaves)

    def essence(self) -> Any:
        """Equal for programs that do the same, whatever else their calls are like."""
        numbers: dict[int, int] = {}

        def plain(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return Ref, numbers.setdefault(leaf.at, len(numbers))
            return type(leaf), id(leaf) if isinstance(leaf, torch.Tensor) else leaf

        return {name: (layer.shape, layer.dtype) for name, layer in self.layers.items()}, [
            (step.func, step.layer, [plain(leaf) for leaf in step.leaves()], [plain(Ref(at)) for at in step.out])
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
        if call.likeness != self.likeness:
            return False
        values = {number: call.leaves[at] for at, number in self.inputs.items()}
        for step in self.looks:
            results = step.run(values, {}, entry)
            if step.seen is not None and results != [step.seen]:
                return False
            values.update(zip(step.out, results, strict=True))
        return True


class Call:
    """The arguments of one call of a model, flat: `leaves`, and what calls have in common that go the same way."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if value is not model}
        self.leaves, self.form = tree_flatten(named)
        alike = [(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        self.likeness = self.form, tuple(alike)
        self.given = frozenset(_conditioning(named))
        self.rows = _rows(next(iter(named.values())))

    def entered(self) -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
        """The arguments with tokens on the meta device, and those of its leaves that are conditioning."""
        leaves = [
            leaf if not isinstance(leaf, torch.Tensor) else leaf.clone() if at in self.given else leaf.to("meta")
            for at, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(leaves, self.form), {at: leaves[at] for at in sorted(self.given)}


def _conditioning(named: Mapping[str, Any]) -> Iterator[int]:
    """The leaves that are tensors without a token axis; lists hold what differs in length, which is tokens."""
    at = 0
    for value in named.values():
        leaves = tree_flatten(value)[0]
        if not isinstance(value, list | tuple):
            yield from (at + i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.ndim <= 2)
        at += len(leaves)


def _rows(hidden: Any) -> int:
    return len(hidden) if isinstance(hidden, list | tuple | torch.Tensor) else 1
