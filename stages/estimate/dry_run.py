"""A stage gone through without weights: what it will take on each device, before anything is loaded."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn

from stages.errors import ModelError
from stages.estimate.block_memo import BlockMemo, Costs
from stages.estimate.fake_tokenizer import FakeTokenizer
from stages.estimate.memory_tracker import FusedAttention, MemoryTracker
from stages.events import silent
from stages.models.skeleton import copy_skeleton, skeleton
from stages.models.weights import Weights
from stages.pipeline.stage import Inputs, Loaded, Stage
from stages.placement.placement import Places, device_of
from stages.state import State

_ENTRANCES = ("forward", "encode", "decode")


@dataclass(frozen=True)
class Estimate:
    """What a stage takes besides its weights: peak bytes by device; and the operations in each block.

    `state` has the shapes of the state after the stage, and numbers that mean nothing.
    """

    peak: Mapping[str, int]
    work: Mapping[str, Mapping[str, int]]
    state: State


def dry_run(
    stage: Stage, places: Places, weights: Mapping[str, Weights], state: State, inputs: Inputs,
    scratch: Mapping[str, float], costs: Costs | None = None,
) -> Estimate:
    """Go through `stage` once for one request; `scratch` is what a convolution takes on a device.

    Devices may be ones that are not here. `costs` of blocks are those of other rehearsals of the same model, and get
    those of this one. Raises MixedDevices where a placement makes tensors of two devices meet.
    """
    with DryRunStage(stage, places, weights, scratch, {} if costs is None else costs) as paper, ExitStack() as modes:
        modes.enter_context(paper.ledger)
        modes.enter_context(FusedAttention(paper.ledger))
        modes.enter_context(torch.no_grad())
        after = paper.run(state, inputs)
        return Estimate(dict(paper.ledger.peak), paper.work, after)


@contextmanager
def one_thread() -> Iterator[None]:
    """Rehearsals compute next to nothing: threads would wait for each other for longer than they work."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


class DryRunStage(Loaded):
    """A stage with skeletons for components; what the pipeline itself makes is made on the host, and counted home."""

    def __init__(
        self, stage: Stage, places: Places, weights: Mapping[str, Weights], scratch: Mapping[str, float],
        costs: Costs,
    ) -> None:
        super().__init__(stage, places, silent)
        self._weights, self._costs = weights, costs
        self.ledger = MemoryTracker(super().home, scratch)
        self.work: dict[str, Counter[str]] = {component.name: Counter() for component in stage.components}

    def __enter__(self) -> "DryRunStage":
        self.pipe = self.stage.blocks.init_pipeline(str(self.stage.checkpoint.path))
        for component in self.stage.components:
            place = self.places[component.name]
            model = on_host(copy_skeleton(skeleton(component, place.dtype), lambda: "cpu"))
            for layer in place.precomputed:
                drop_weights(model.get_submodule(layer))
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                self.ledger.hold(tensor, device_of(name, place.placement.storage_devices), 0)
            place.placement.attach(model, self.ledger.home, self.ledger.move)
            for name, device in place.placement.compute_devices.items():
                self.ledger.follow(model.get_submodule(name), device)
            known = self._costs.setdefault((component.name, place.dtype, place.precomputed), {})
            repeats = BlockMemo(self.ledger, self.work[component.name], known)
            for block in filter(None, self._weights[component.name].blocks):
                repeats.listen(block, model.get_submodule(block), device_of(block, place.placement.storage_devices))
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
        except ModelError:
            absent = [name for name in self.pipe.null_component_names if "tokenizer" in name or "processor" in name]
            self.pipe.update_components(**{name: FakeTokenizer() for name in absent})
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
            if getattr(model, "running", False):
                return call(*args, **kwargs)
            with self.ledger.uncounted():
                args, kwargs = recursively_apply(entered, (args, kwargs))
            model.running = True
            out = call(*args, **kwargs)
            model.running = False
            del args, kwargs
            with self.ledger.uncounted():
                return recursively_apply(left, out)

        return outer


def drop_weights(linear: Any) -> None:
    """Take the weights of a linear layer, whose output will come from elsewhere."""
    width = linear.out_features
    linear.register_parameter("weight", None)
    linear.register_parameter("bias", None)
    linear.forward = lambda x: x.new_empty((*x.shape[:-1], width))


def on_host(model: nn.Module) -> nn.Module:
    """The skeleton, which says that it is on the host unless it is at work: pipelines put their tensors there."""
    kind = type(model)

    def device(self: Any) -> torch.device:
        return torch.device("meta" if getattr(self, "running", False) else "cpu")

    # The libraries look classes up by their full names.
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), {"device": property(device), **named})
    return model
