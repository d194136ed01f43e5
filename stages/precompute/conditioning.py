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
from stages.precompute.replay import fold, precomputed_linears
from stages.precompute.trace import Trace


def program_of(model: nn.Module, call: Call, layers: Collection[str] | None = None) -> Program:
    """What `model`, a skeleton, computes from the call's conditioning alone, up to `layers`.

    These are by default all linear layers that the model can do without. Raises NotPrecomputable where `layers` see
    more than conditioning, or where it cannot be told without the weights.
    """
    tracing, inputs, result = _traced(model, call)
    chosen = _spare(model, call, tracing) if layers is None else frozenset(layers)
    if more := sorted(chosen - tracing.layers.keys()):
        raise NotPrecomputable(f"{more[0]} and {len(more) - 1} other layers see more than conditioning in this call: "
                               f"run with --no-modulation-table")
    looks = [step for step in tracing.steps if step.seen is not None]
    ends = [step for step in tracing.steps if step.layer in chosen]
    return Program(
        call.likeness, inputs, leading_to(tracing.steps, looks), leading_to(tracing.steps, ends),
        {name: layer for name, layer in tracing.layers.items() if name in chosen},
        tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, result),
    )


def _spare(model: nn.Module, call: Call, tracing: Trace) -> frozenset[str]:
    """The recorded layers, but for inner ones where the model looks at those otherwise than by calling them."""
    last = _last(tracing.steps)
    whole = {name: model.get_submodule(name) for name in tracing.layers.keys() - last}
    fold(model, whole)
    for replay in precomputed_linears(model):
        replay.source = MetaOutputs(tracing.layers)
    try:
        _traced(model, call, tracing)
    except (AttributeError, StopIteration):
        return last
    finally:
        for name, layer in whole.items():
            model.set_submodule(name, layer)
    return frozenset(tracing.layers)


@dataclass(frozen=True)
class MetaOutputs:
    """Outputs of layers on the meta device: a `Source`."""

    layers: Mapping[str, Layer]

    def row(self, layer: str, device: torch.device) -> torch.Tensor:
        return torch.empty(self.layers[layer].shape, dtype=self.layers[layer].dtype, device="meta")


def _traced(
    model: nn.Module, call: Call, before: Trace | None = None
) -> tuple[Trace, dict[int, int], Any]:
    """A recorded call: the numbers of its conditioning by leaf, and its result."""
    kwargs, given = call.entered()
    tracing = Trace(model, given.values(), call.rows, before)
    replaced: list[Any] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.forward = partial(tracing.linear, name, module)  # type: ignore[method-assign]
            replaced.append(module)
    for name, block in _blocks(model):
        block.forward = tracing.repeating(name, block, block.forward)
        replaced.append(block)
    try:
        with torch.no_grad(), tracing:
            result = model(**kwargs)
    except (RuntimeError, NotImplementedError) as error:
        raise NotPrecomputable(f"{type(model).__name__} looks at what its weights make of the conditioning "
                         f"({' '.join(str(error).split()):.150})") from error
    finally:
        for module in replaced:
            del module.forward
    return tracing, {at: number for number, at in enumerate(given)}, result


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
