"""Records what a skeleton computes from its conditioning alone while it is gone through."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stages.estimate.block_memo import Forward, intercept, position
from stages.estimate.memory_tracker import tensors
from stages.precompute.program import ENTRY, Layer, Step, ValueRef, WeightRef, leading_to

# The operation with which a model looks at a value.
_LOOK = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Pattern:
    """What a block recorded, to be recorded again for those that are alike."""

    name: str
    """The name of the block."""
    first: int
    """The number of the first value that came up in it."""
    end: int
    """The number of the first value that came up after it."""
    steps: Sequence[Step]
    """Its steps."""
    results: Sequence[tuple[int | None, Any, int | None]]
    """Its results, flat: the position of the input that each is, itself, and its number if it is conditioning."""
    form: Any
    """How the results are nested."""


class Trace(TorchDispatchMode):
    """While entered: records what is computed from conditioning and the parameters of a model alone.

    Conditioning is real until it meets a weight, and on the meta device from then on, as tokens always are.
    """

    steps: list[Step]
    """The steps so far."""
    layers: dict[str, Layer]
    """The linear layers among them."""

    def __init__(
        self, model: nn.Module, conditioning: Collection[torch.Tensor], batch: int, before: "Trace | None" = None
    ) -> None:
        """`batch` requests are in the call; blocks that a trace `before` went through are passed over, unrecorded."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps, self.layers = [], {}
        self._batch, self._recording = batch, True
        self._weights = {id(weight): name for name, weight in model.named_parameters()}
        # The tensors are kept, so that no other one takes the id.
        self._values: dict[int, tuple[int, torch.Tensor]] = {}
        self._count = 0
        # By what calls of blocks have in common: with the numbers of the values that they read, and without.
        self._patterns: dict[Any, Pattern] = {}
        self._known: dict[Any, Pattern] = {} if before is None else before._known
        self._passing = before is not None
        self._written: dict[int, torch.UntypedStorage] = {}
        for tensor in conditioning:
            self._number(tensor)

    def linear(self, name: str, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """In place of a linear layer's own forward."""
        again = name in self.layers
        if again or x.ndim != 2 or x.shape[0] > self._batch or id(x) not in self._values or not self._is_known(x):
            # A product costs a dozen steps on the meta device, and what comes of tokens shows its shape.
            if x.is_meta and not self._is_known(x):
                return x.new_empty((*x.shape[:-1], module.out_features))
            return functional.linear(x, module.weight, module.bias)
        args = self._referring((x, module.weight, module.bias))
        self._recording = False
        out = functional.linear(x.to("meta"), module.weight, module.bias)
        self._recording = True
        number = self._number(out)
        self.layers[name] = Layer(number, tuple(out.shape), out.dtype)
        self.steps.append(Step(functional.linear, args, {}, (number,), name))
        return out

    def wrap(self, name: str, block: nn.Module) -> None:
        """Have a block run only when none like it ran before: models are dozens of the same."""
        intercept(block, partial(self._answer, name))

    def _answer(self, name: str, forward: Forward, kind: Any, inputs: list[Any]) -> Any:
        likeness = kind, tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.is_meta, self._number_of(leaf) is None)
            if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs
        )
        key = likeness, tuple(self._number_of(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor))
        if self._passing and likeness in self._known:
            return self._results(self._known[likeness], inputs, self._count)
        if key in self._patterns:
            return self._again(self._patterns[key], name, inputs)
        start, first, written = len(self.steps), self._count, len(self._written)
        out = forward()
        pattern = self._pattern(name, first, self.steps[start:], inputs, out)
        if pattern is not None and len(self._written) == written:
            self._patterns[key] = self._known[likeness] = pattern
        return out

    def _pattern(self, name: str, first: int, steps: list[Step], inputs: list[Any], out: Any) -> Pattern | None:
        """The block's pattern, unless it does what another one of its kind may do otherwise."""
        results, form = tree_flatten(out)
        if any(isinstance(result, torch.Tensor) and not result.is_meta for result in results):
            return None
        weights = (weight for step in steps for weight in step.weights())
        if any(step.seen is not None for step in steps) or not all(w.startswith(f"{name}.") for w in weights):
            return None
        found = [(position(result, inputs), result,
                  self._number_of(result) if isinstance(result, torch.Tensor) else None) for result in results]
        # What leads to no layer and to no result is of use to nobody.
        numbers = {number for _, _, number in found}
        ends = [step for step in steps if step.layer is not None or not numbers.isdisjoint(step.out)]
        return Pattern(name, first, self._count, leading_to(steps, ends), found, form)

    def _again(self, pattern: Pattern, name: str, inputs: list[Any]) -> Any:
        """Record for the block `name` what the pattern's block recorded; the block's results."""
        shift = self._count - pattern.first

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, ValueRef):
                return ValueRef(leaf.number + shift) if leaf.number >= pattern.first else leaf
            return WeightRef(name + leaf.name.removeprefix(pattern.name)) if isinstance(leaf, WeightRef) else leaf

        for step in pattern.steps:
            layer = None if step.layer is None else name + step.layer.removeprefix(pattern.name)
            out = tuple(number + shift for number in step.out)
            if step.layer is not None and layer is not None:
                self.layers[layer] = replace(self.layers[step.layer], number=out[0])
            args, kwargs = tree_map(moved, (step.args, dict(step.kwargs)))
            self.steps.append(replace(step, args=args, kwargs=kwargs, out=out, layer=layer))
        self._count += pattern.end - pattern.first
        return self._results(pattern, inputs, shift)

    def _results(self, pattern: Pattern, inputs: list[Any], shift: int) -> Any:
        """What a block like the pattern's gives for these inputs: its numbers are higher by `shift`."""
        results, before = [], self._recording
        # To make them is no step of the model's.
        self._recording = False
        for at, result, number in pattern.results:
            made = inputs[at] if at is not None else result
            if at is None and isinstance(result, torch.Tensor):
                made = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
                if number is not None:
                    self._values[id(made)] = number + shift if number >= pattern.first else number, made
                else:
                    self._values.pop(id(made), None)
            results.append(made)
        self._recording = before
        return tree_unflatten(results, pattern.form)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recording:
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        operands = list(tensors((args, tuple(kwargs.values()))))
        known = all(map(self._is_known, operands)) and torch.Tag.nondeterministic_seeded not in func.tags
        used = args, kwargs
        on_meta = {tensor.is_meta for tensor in operands}
        names_device = any(isinstance(argument, torch.device) for argument in (*args, *kwargs.values()))
        if True in on_meta and (False in on_meta or names_device):
            used = tree_map(_to_meta, used)
        out = func(*used[0], **used[1])
        if func._schema.is_mutable:
            return self._write(func, args, kwargs, out, used)
        if known:
            self._record(func, args, kwargs, out)
        elif func is _LOOK:
            raise RuntimeError("a value made of tokens is looked at")
        else:
            self._disown(out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        args, kwargs = self._referring((args, kwargs))
        if func is _LOOK:
            self.steps.append(Step(func, args, kwargs, (), seen=out))
            return
        results = tree_flatten(out)[0]
        if all(isinstance(result, torch.Tensor) for result in results):
            self.steps.append(Step(func, args, kwargs, tuple(self._number(result) for result in results)))

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any, used: Any) -> Any:
        """What was written to is no conditioning any more: a step is repeated for many calls, in any order."""
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._disown(args[index] if index < len(args) else kwargs.get(argument.name))
        # An operand that was real stays the object that the model knows.
        return args[0] if args and out is not args[0] and out is used[0][0] else out

    def _disown(self, data: Any) -> None:
        """These tensors are no conditioning, also where they are real."""
        for leaf in tensors(data):
            if self._is_known(leaf) or not leaf.is_meta:
                storage = leaf.untyped_storage()
                self._written[storage._cdata] = storage

    def _is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is conditioning, a weight, or a constant of the model's."""
        if tensor.untyped_storage()._cdata in self._written:
            return False
        return id(tensor) in self._values or id(tensor) in self._weights or not tensor.is_meta

    def _number(self, tensor: torch.Tensor) -> int:
        """The number of a value that is conditioning, which it gets where it has none."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = self._count, tensor
            self._count += 1
        return self._values[id(tensor)][0]

    def _number_of(self, tensor: torch.Tensor) -> int | None:
        return self._values[id(tensor)][0] if id(tensor) in self._values and self._is_known(tensor) else None

    def _referring(self, data: Any) -> Any:
        """The arguments of a step, with references in place of what another call has otherwise."""

        def refer(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._weights:
                return WeightRef(self._weights[id(leaf)])
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._values:
                return ValueRef(self._values[id(leaf)][0])
            return ENTRY if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        return tree_map(refer, data)


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf
