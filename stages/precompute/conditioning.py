"""Which of a denoiser's layers see only conditioning, found by going through its skeleton: none is known by name."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from stages.errors import NotPrecomputable
from stages.precompute.program import Call, Layer, Program, Step, leading_to
from stages.precompute.replay import precomputed_linears, replace_linears
from stages.precompute.trace import Trace


def program_of(model: nn.Module, call: Call, layers: Collection[str] | None = None) -> Program:
    """What a skeleton computes from the conditioning of the call alone, up to `layers`.

    These are by default all linear layers that the model can do without. Raises NotPrecomputable where `layers` see
    more than conditioning, or where it cannot be told without the weights.
    """
    trace, inputs, result = _traced(model, call)
    chosen = _replaceable(model, call, trace) if layers is None else frozenset(layers)
    if more := sorted(chosen - trace.layers.keys()):
        raise NotPrecomputable(f"{more[0]} and {len(more) - 1} other layers see more than conditioning in this call: "
                               f"run with `modulation_table=False`")
    looks = [step for step in trace.steps if step.seen is not None]
    ends = [step for step in trace.steps if step.layer in chosen]
    return Program(
        call.kind, inputs, leading_to(trace.steps, looks), leading_to(trace.steps, ends),
        {name: layer for name, layer in trace.layers.items() if name in chosen},
        tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, result),
    )


def _replaceable(model: nn.Module, call: Call, trace: Trace) -> frozenset[str]:
    """The recorded layers, but for inner ones where the model looks at those otherwise than by calling them."""
    last = _last(trace.steps)
    inner = {name: model.get_submodule(name) for name in trace.layers.keys() - last}
    replace_linears(model, inner)
    for replay in precomputed_linears(model):
        replay.source = MetaOutputs(trace.layers)
    try:
        _traced(model, call, trace)
    except (AttributeError, StopIteration):
        return last
    finally:
        for name, layer in inner.items():
            model.set_submodule(name, layer)
    return frozenset(trace.layers)


@dataclass(frozen=True)
class MetaOutputs:
    """A `Source` of outputs on the meta device."""

    layers: Mapping[str, Layer]
    """The layers by name."""

    def row(self, layer: str, device: torch.device) -> torch.Tensor:
        return torch.empty(self.layers[layer].shape, dtype=self.layers[layer].dtype, device="meta")


def _traced(model: nn.Module, call: Call, before: Trace | None = None) -> tuple[Trace, dict[int, int], Any]:
    """A recorded call: the numbers of its conditioning by position, and its result.

    With a trace of a call `before`, blocks that it went through are passed over.
    """
    kwargs, conditioning = call.for_trace()
    trace = Trace(model, conditioning.values(), call.batch, before)
    replaced: list[Any] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.forward = partial(trace.linear, name, module)  # type: ignore[method-assign]
            replaced.append(module)
    for name, block in _blocks(model):
        trace.wrap(name, block)
        replaced.append(block)
    try:
        with torch.no_grad(), trace:
            result = model(**kwargs)
    except (RuntimeError, NotImplementedError) as error:
        raise NotPrecomputable(f"{type(model).__name__} looks at what its weights make of the conditioning "
                               f"({' '.join(str(error).split()):.150})") from error
    finally:
        for module in replaced:
            del module.forward
    return trace, {at: number for number, at in enumerate(conditioning)}, result


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost lists of modules, of which many may be alike."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{other}.") for other in lists):
            for index, block in enumerate(model.get_submodule(name).children()):
                yield f"{name}.{index}", block


def _last(steps: Sequence[Step]) -> frozenset[str]:
    """The linear layers whose output no other of them needs."""
    behind: dict[int, frozenset[str]] = {}
    inner: set[str] = set()
    for step in steps:
        before = frozenset[str]().union(*(behind.get(number, frozenset()) for number in step.needs()))
        if step.layer is not None:
            inner |= before
            before = frozenset({step.layer})
        behind.update(dict.fromkeys(step.out, before))
    return frozenset(step.layer for step in steps if step.layer is not None and step.layer not in inner)
