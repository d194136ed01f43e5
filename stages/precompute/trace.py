"""Records what a skeleton computes from its conditioning alone while it is gone through."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stages.estimate.memory_tracker import tensors
from stages.estimate.structure_key import structure_key
from stages.precompute.program import HERE, Layer, Ref, Step, Weight, leading_to

_LOOK = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Pattern:
    """What a block recorded: values `first` up to `end`, its steps, and its results.

    A result is the leaf of the inputs that it is, or a tensor and its number if it is conditioning.
    """

    name: str
    first: int
    end: int
    steps: Sequence[Step]
    results: Sequence[tuple[int | None, Any, int | None]]
    form: Any


class Trace(TorchDispatchMode):
    """While entered: records what is computed from the tensors `given` and the parameters of `model` alone.

    Conditioning is real until it meets a weight, and on the meta device from then on, as tokens always are.
    """

    def __init__(
        self, model: nn.Module, given: Collection[torch.Tensor], rows: int, before: "Trace | None" = None
    ) -> None:
        """With one `before`, blocks that it went through are passed over, and their steps are not recorded."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.layers: dict[str, Layer] = {}
        self._rows, self._recording = rows, True
        self._weights = {id(weight): name for name, weight in model.named_parameters()}
        # The tensors are kept, so that no other one takes the id.
        self._values: dict[int, tuple[int, torch.Tensor]] = {}
        self._count = 0
        self._alike: dict[Any, Pattern] = {}
        self._seen: dict[Any, Pattern] = {} if before is None else before._seen
        self._passing = before is not None
        self._written: dict[int, torch.UntypedStorage] = {}
        for tensor in given:
            self._number(tensor)

    def linear(self, name: str, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """In place of a linear layer's own forward."""
        once = name not in self.layers
        if not once or x.ndim != 2 or x.shape[0] > self._rows or id(x) not in self._values or not self._known(x):
            # A product costs a dozen steps on the meta device, and what comes of tokens shows its shape.
            if x.is_meta and not self._known(x):
                return x.new_empty((*x.shape[:-1], module.out_features))
            return functional.linear(x, module.weight, module.bias)
        args = self._referred((x, module.weight, module.bias))
        self._recording = False
        out = functional.linear(x.to("meta"), module.weight, module.bias)
        self._recording = True
        number = self._number(out)
        self.layers[name] = Layer(number, tuple(out.shape), out.dtype)
        self.steps.append(Step(functional.linear, args, {}, (number,), name))
        return out

    def repeating(self, name: str, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that runs only when none like it ran before: models are dozens of the same."""
        kind = structure_key(block)

        @wraps(forward)
        def outer(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            likeness = kind, form, tuple(
                (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.is_meta, self._number_of(leaf) is None)
                if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
            )
            key = likeness, tuple(self._number_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
            if self._passing and likeness in self._seen:
                return self._results(self._seen[likeness], leaves, self._count)
            if key in self._alike:
                return self._again(self._alike[key], name, leaves)
            start, first, written = len(self.steps), self._count, len(self._written)
            out = forward(*args, **kwargs)
            pattern = self._pattern(name, first, self.steps[start:], leaves, out)
            if pattern is not None and len(self._written) == written:
                self._alike[key] = self._seen[likeness] = pattern
            return out

        return outer

    def _pattern(self, name: str, first: int, steps: list[Step], leaves: list[Any], out: Any) -> "Pattern | None":
        """The block's pattern, unless it does what another one of its kind may do otherwise."""
        results, form = tree_flatten(out)
        if any(isinstance(result, torch.Tensor) and not result.is_meta for result in results):
            return None
        weights = (weight for step in steps for weight in step.weights())
        if any(step.seen is not None for step in steps) or not all(w.startswith(f"{name}.") for w in weights):
            return None
        found = [(next((at for at, leaf in enumerate(leaves) if leaf is result), None), result,
                  self._number_of(result) if isinstance(result, torch.Tensor) else None) for result in results]
        # What leads to no layer and to no result is of use to nobody.
        numbers = {number for _, _, number in found}
        ends = [step for step in steps if step.layer is not None or not numbers.isdisjoint(step.out)]
        return Pattern(name, first, self._count, leading_to(steps, ends), found, form)

    def _again(self, like: "Pattern", name: str, leaves: list[Any]) -> Any:
        """What the pattern's block recorded, for the block `name`."""
        shift = self._count - like.first

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return Ref(leaf.at + shift) if leaf.at >= like.first else leaf
            return Weight(name + leaf.name.removeprefix(like.name)) if isinstance(leaf, Weight) else leaf

        for step in like.steps:
            layer = None if step.layer is None else name + step.layer.removeprefix(like.name)
            out = tuple(number + shift for number in step.out)
            if step.layer is not None and layer is not None:
                self.layers[layer] = replace(self.layers[step.layer], at=out[0])
            args, kwargs = tree_map(moved, (step.args, dict(step.kwargs)))
            self.steps.append(replace(step, args=args, kwargs=kwargs, out=out, layer=layer))
        self._count += like.end - like.first
        return self._results(like, leaves, shift)

    def _results(self, like: "Pattern", leaves: list[Any], shift: int) -> Any:
        """What a block like the pattern's gives for the inputs `leaves`: its numbers are higher by `shift`."""
        results, before = [], self._recording
        # To make them is no step of the model's.
        self._recording = False
        for at, result, number in like.results:
            made = leaves[at] if at is not None else result
            if at is None and isinstance(result, torch.Tensor):
                made = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
                if number is not None:
                    self._values[id(made)] = number + shift if number >= like.first else number, made
                else:
                    self._values.pop(id(made), None)
            results.append(made)
        self._recording = before
        return tree_unflatten(results, like.form)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recording:
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        operands = list(tensors((args, tuple(kwargs.values()))))
        known = all(map(self._known, operands)) and torch.Tag.nondeterministic_seeded not in func.tags
        used = args, kwargs
        places = {tensor.is_meta for tensor in operands}
        if True in places and (False in places or any(isinstance(x, torch.device) for x in (*args, *kwargs.values()))):
            used = tree_map(_on_meta, used)
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

    def _disown(self, data: Any) -> None:
        """These tensors are no conditioning, also where they are real."""
        for leaf in tensors(data):
            if self._known(leaf) or not leaf.is_meta:
                storage = leaf.untyped_storage()
                self._written[storage._cdata] = storage

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        args, kwargs = self._referred((args, kwargs))
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

    def _known(self, tensor: torch.Tensor) -> bool:
        if tensor.untyped_storage()._cdata in self._written:
            return False
        return id(tensor) in self._values or id(tensor) in self._weights or not tensor.is_meta

    def _number(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._values:
            self._values[id(tensor)] = self._count, tensor
            self._count += 1
        return self._values[id(tensor)][0]

    def _number_of(self, tensor: torch.Tensor) -> int | None:
        return self._values[id(tensor)][0] if id(tensor) in self._values and self._known(tensor) else None

    def _referred(self, data: Any) -> Any:
        def refer(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._weights:
                return Weight(self._weights[id(leaf)])
            if isinstance(leaf, torch.Tensor) and id(leaf) in self._values:
                return Ref(self._values[id(leaf)][0])
            return HERE if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

        return tree_map(refer, data)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf
