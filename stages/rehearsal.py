"""A stage gone through without weights: what it will take on each device, before anything is loaded."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from stages.errors import LoadError
from stages.ledger import FusedAttention, Ledger
from stages.placement import Places, standing
from stages.stage import Inputs, Loaded, Stage, silent
from stages.standin import StandIn
from stages.state import State
from stages.weights import Weights, float32, skeleton

_ENTRANCES = ("forward", "encode", "decode")


@dataclass(frozen=True)
class Rehearsal:
    """What a stage takes besides its weights: peak bytes by device; and the operations in each block.

    `state` has the shapes of the state after the stage, and numbers that mean nothing.
    """

    peak: Mapping[str, int]
    work: Mapping[str, Mapping[str, int]]
    state: State


def rehearse(
    stage: Stage, places: Places, weights: Mapping[str, Weights], state: State, inputs: Inputs,
    scratch: Mapping[str, float],
) -> Rehearsal:
    """Go through `stage` once for one request; `scratch` is what a convolution takes on a device, as `Ledger` has it.

    Devices may be ones that are not here. Raises PlanError where a placement makes tensors of two devices meet.
    """
    with OnPaper(stage, places, weights, scratch) as paper, ExitStack() as modes:
        modes.enter_context(paper.ledger)
        modes.enter_context(FusedAttention(paper.ledger))
        modes.enter_context(torch.no_grad())
        after = paper.run(state, inputs)
        return Rehearsal(dict(paper.ledger.peak), paper.work, after)


class OnPaper(Loaded):
    """A stage with skeletons for components; what the pipeline itself makes is made on the host, and counted home."""

    def __init__(
        self, stage: Stage, places: Places, weights: Mapping[str, Weights], scratch: Mapping[str, float]
    ) -> None:
        super().__init__(stage, places, silent)
        self._weights = weights
        self.ledger = Ledger(super().home, scratch)
        self.work: dict[str, Counter[str]] = {component.name: Counter() for component in stage.components}

    def __enter__(self) -> "OnPaper":
        self.pipe = self.stage.blocks.init_pipeline(str(self.stage.checkpoint.path))
        for component in self.stage.components:
            place = self.places[component.name]
            model = on_host(skeleton(component, place.dtype))
            for layer in place.folded:
                hollow(model.get_submodule(layer))
            kept = float32(component, model, place.dtype)
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.data = tensor.data.float() if kept(name) else tensor.data
                self.ledger.hold(tensor, standing(name, place.placement.at_rest), 0)
            place.placement.attach(model, self.ledger.home, self.ledger.move)
            for name, device in place.placement.at_work.items():
                self.ledger.follow(model.get_submodule(name), device)
            repeats = Repeats(self.ledger, self.work[component.name])
            for block in filter(None, self._weights[component.name].blocks):
                repeats.listen(block, model.get_submodule(block))
            for entrance in _ENTRANCES:
                if hasattr(model, entrance):
                    setattr(model, entrance, self._border(model, getattr(model, entrance)))
            self.pipe.update_components(**{component.name: model})
        self.complete()
        self.pipe.set_progress_bar_config(disable=True)
        self.stage.prepare(self.pipe)
        return self

    @property
    def home(self) -> str:
        return "cpu"

    def complete(self) -> None:
        """Load what has no weights; a tokenizer that cannot be loaded here is stood in for."""
        try:
            super().complete()
        except LoadError:
            absent = [name for name in self.pipe.null_component_names if "tokenizer" in name or "processor" in name]
            self.pipe.update_components(**{name: StandIn() for name in absent})
            super().complete()

    def _entered(self, value: Any) -> Any:
        value = super()._entered(value)
        if isinstance(value, torch.Tensor):
            self.ledger.hold(value, self.ledger.home, value.untyped_storage().nbytes())
        return value

    def _border(self, model: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` on the meta device, with inputs from and outputs to the host, so that pipelines may look at them."""

        def entered(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_meta:
                return tensor
            shape = tensor.to("meta")
            self.ledger.hold(shape, self.ledger.card_of(tensor), 0)
            return shape

        def left(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                return tensor
            numbers = self.ledger.noise(tensor.shape, tensor.dtype)
            # For this moment both stand for one tensor.
            self.ledger.hold(numbers, self.ledger.card_of(tensor), tensor.nbytes, peak=False)
            return numbers

        # Pipelines read the signature to see what a denoiser takes.
        @wraps(call)
        def outer(*args: Any, **kwargs: Any) -> Any:
            if getattr(model, "at_work", False):
                return call(*args, **kwargs)
            with self.ledger.uncounted():
                args, kwargs = recursively_apply(entered, (args, kwargs))
            model.at_work = True
            out = call(*args, **kwargs)
            model.at_work = False
            del args, kwargs
            with self.ledger.uncounted():
                return recursively_apply(left, out)

        return outer


class Repeats:
    """Runs one block of a kind, and repeats what it cost for those that are alike: models are dozens of the same."""

    def __init__(self, ledger: Ledger, work: Counter[str]) -> None:
        self._ledger, self._work = ledger, work
        self._known: dict[Any, Cost] = {}

    def listen(self, name: str, block: nn.Module) -> None:
        """Count the operations of `block`, and run it only when there was none like it."""
        forward = block.forward
        kind = type(block), tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters())

        @wraps(forward)
        def outer(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            key = kind, form, tuple(self._likeness(leaf) for leaf in leaves)
            before = self._ledger.flops
            cost = self._known.get(key)
            if cost is None:
                out = self._run(key, leaves, lambda: forward(*args, **kwargs))
            else:
                out = cost.again(self._ledger, leaves)
            self._work[name] += self._ledger.flops - before
            return out

        block.forward = outer

    def _run(self, key: Any, leaves: list[Any], forward: Callable[[], Any]) -> Any:
        ledger = self._ledger
        flops, now, peak = ledger.flops, Counter(ledger.now), ledger.peak
        ledger.peak = Counter(now)
        out = forward()
        spikes = {card: ledger.peak[card] - now[card] for card in ledger.peak}
        ledger.peak |= peak
        results, form = tree_flatten(out)
        made = {id(leaf): leaf for leaf in results if isinstance(leaf, torch.Tensor)}
        made = {key: leaf for key, leaf in made.items() if not any(leaf is old for old in leaves)}
        stores = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in made.values()}
        if sum((ledger.now - now).values()) == sum(stores.values()):
            # Otherwise the block keeps something for later, such as a cache of keys, or gives views of its inputs.
            self._known[key] = Cost(spikes, ledger.flops - flops, [_result(leaf, leaves, ledger) for leaf in results],
                                    form)
        return out

    def _likeness(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return tuple(leaf.shape), leaf.dtype, self._ledger.card_of(leaf)
        return leaf if isinstance(leaf, bool | int | float | str | None) else type(leaf)


@dataclass(frozen=True)
class Cost:
    """What a block took: bytes above those at its entry by card, operations, and what its results are like."""

    spikes: Mapping[str, int]
    flops: int
    results: list[Any]
    form: Any

    def again(self, ledger: Ledger, leaves: list[Any]) -> Any:
        """Count the cost once more; the results for the inputs `leaves`."""
        for card, size in self.spikes.items():
            ledger.spike(card, size)
        ledger.flops += self.flops
        stores: dict[int, torch.Tensor] = {}
        return tree_unflatten([result.made(ledger, leaves, stores) for result in self.results], self.form)


@dataclass(frozen=True)
class Given:
    """A result that is one of the inputs, or no tensor."""

    at: int | None
    value: Any

    def made(self, ledger: Ledger, leaves: list[Any], stores: dict[int, torch.Tensor]) -> Any:
        return self.value if self.at is None else leaves[self.at]


@dataclass(frozen=True)
class Made:
    """A result that a block makes; `store` tells results apart that share their memory."""

    card: str
    store: int
    bytes: int
    view: tuple[Any, Any, int]
    dtype: torch.dtype

    def made(self, ledger: Ledger, leaves: list[Any], stores: dict[int, torch.Tensor]) -> torch.Tensor:
        if self.store not in stores:
            with ledger.on(self.card):
                stores[self.store] = torch.empty(self.bytes // self.dtype.itemsize, dtype=self.dtype, device="meta")
        return stores[self.store].as_strided(*self.view)


def _result(leaf: Any, leaves: list[Any], ledger: Ledger) -> Given | Made:
    at = next((index for index, old in enumerate(leaves) if old is leaf), None)
    if at is not None or not isinstance(leaf, torch.Tensor):
        return Given(at, None if isinstance(leaf, torch.Tensor) else leaf)
    storage = leaf.untyped_storage()
    view = leaf.size(), leaf.stride(), int(leaf.storage_offset())
    return Made(ledger.card_of(leaf), storage._cdata, storage.nbytes(), view, leaf.dtype)


def hollow(linear: Any) -> None:
    """Take the weights of a linear layer, whose output will come from elsewhere."""
    width = linear.out_features
    linear.register_parameter("weight", None)
    linear.register_parameter("bias", None)
    linear.forward = lambda x: x.new_empty((*x.shape[:-1], width))


def on_host(model: nn.Module) -> nn.Module:
    """The skeleton, which says that it is on the host unless it is at work: pipelines put their tensors there."""
    kind = type(model)

    def device(self: Any) -> torch.device:
        return torch.device("meta" if getattr(self, "at_work", False) else "cpu")

    model.__class__ = type(kind.__name__, (kind,), {"device": property(device)})
    return model
