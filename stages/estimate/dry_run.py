"""A stage gone through without weights: what it will take on each device, before anything is loaded."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers import BatchEncoding

from stages.estimate.block_memo import BlockMemo, Costs
from stages.estimate.memory_tracker import FusedAttention, MemoryTracker
from stages.models.checkpoint import Component
from stages.models.skeleton import copy_skeleton, skeleton
from stages.models.weights import Weights
from stages.pipeline.stage import Inputs, Loaded, Stage, moved_to
from stages.pipeline.suspects import suspected
from stages.placement.placement import Place, Places, device_of
from stages.state import State

# The methods through which pipelines call models.
_ENTRANCES = ("forward", "encode", "decode")
# A step finds what the one before it left, and solvers of a high order what up to four did.
_STEPS = 6


@dataclass(frozen=True)
class Estimate:
    """What a stage takes for one request."""

    peak: Mapping[str, int]
    """The most bytes besides the weights, by device."""
    work: Mapping[str, Mapping[str, int]]
    """Floating point operations by component and block."""
    flops: int
    """All floating point operations, also of what is in no block."""
    passes: Mapping[str, int]
    """How often each component is called."""
    steps: int
    """The steps of a denoise that were gone through; 0 for a stage without."""
    state: State
    """The state after the stage: its shapes are right, its numbers mean nothing."""


def dry_run(
    stage: Stage, places: Places, weights: Mapping[str, Weights], state: State, inputs: Inputs,
    scratch: Mapping[str, float], costs: Costs | None = None,
) -> Estimate:
    """Go through a stage once, for one request, on devices that need not be here.

    `weights` are those of its components by name; `scratch` is what a convolution takes on a device, as a factor of
    its operands. `costs` of blocks are those of other dry runs of the same model, and get those of this one. Raises
    MixedDevices where a placement makes tensors of two devices meet.
    """
    home, work = stage.home(places), {component.name: Counter[str]() for component in stage.components}
    tracker, passes = MemoryTracker(home, scratch), Counter[str]()
    models = {}
    for component in stage.components:
        place = places[component.name]
        known = {} if costs is None else costs.setdefault((component.name, place.dtype, place.precomputed), {})
        memo = BlockMemo(tracker, work[component.name], known)
        model = models[component.name] = tracked(component, place, weights[component.name], home, memo, tracker)
        model.register_forward_pre_hook(lambda *call, name=component.name: passes.update([name]))
    to_host = moved_to("cpu", places[stage.components[0].name].dtype)

    def receive(tensor: torch.Tensor) -> torch.Tensor:
        # What the pipeline itself has stays on the host, and counts for the device that it would be on.
        received = to_host(tensor)
        tracker.hold(received, home, received.untyped_storage().nbytes())
        return received

    loaded = Loaded(stage, stage.pipeline(models, FakeTokenizer), receive, places)
    with suspected(stage), tracker, FusedAttention(tracker), torch.no_grad(), stage.shortened(_STEPS):
        after = loaded.run(state, inputs)
        steps = min(_STEPS, int(str(inputs["num_inference_steps"]))) if stage.name == "denoise" else 0
        return Estimate(dict(tracker.peak), work, tracker.flops, passes, steps, after)


@contextmanager
def one_thread() -> Iterator[None]:
    """Dry runs compute next to nothing: threads would wait for each other for longer than they work."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def tracked(
    component: Component, place: Place, weights: Weights, home: str, memo: BlockMemo, tracker: MemoryTracker
) -> nn.Module:
    """The component's skeleton at its place, so that what a pipeline does with it is tracked."""
    placement = place.placement
    entrances = _Entrances(tracker)
    model: nn.Module = copy_skeleton(skeleton(component, place.dtype), entrances.device)
    for layer in place.precomputed:
        _drop_weights(model.get_submodule(layer))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tracker.hold(tensor, device_of(name, placement.storage_devices), 0)
    placement.attach(model, home, tracker.move)
    for name, device in placement.compute_devices.items():
        tracker.place(model.get_submodule(name), device)
    for block in filter(None, weights.blocks):
        memo.wrap(block, model.get_submodule(block), device_of(block, placement.storage_devices))
    # Later steps call it as the first ones did; at other places the same call has another cost.
    BlockMemo(tracker, Counter(), {}).wrap(component.name, model, "")
    for name in _ENTRANCES:
        if hasattr(model, name):
            setattr(model, name, entrances.wrapped(getattr(model, name)))
    return model


def _drop_weights(linear: Any) -> None:
    """Take the weights of a linear layer, whose output will come from elsewhere."""
    width = linear.out_features
    linear.register_parameter("weight", None)
    linear.register_parameter("bias", None)
    linear.forward = lambda x: x.new_empty((*x.shape[:-1], width))


class _Entrances:
    """The methods through which a pipeline calls one model: it is on the host, and the model on the meta device."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker, self._inside = tracker, False

    def device(self) -> str:
        """Where the model says that it is: pipelines put their tensors there, and the model itself its own."""
        return "meta" if self._inside else "cpu"

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The method with inputs from and outputs to the host, so that pipelines may look at them."""

        # Pipelines read the signature to see what a denoiser takes.
        @wraps(call)
        def entrance(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            with self._tracker.uncounted():
                args, kwargs = recursively_apply(self._entered, (args, kwargs))
            self._inside = True
            try:
                out = call(*args, **kwargs)
            finally:
                self._inside = False
            del args, kwargs
            with self._tracker.uncounted():
                return recursively_apply(self._left, out)

        return entrance

    def _entered(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        shape = tensor.to("meta")
        self._tracker.hold(shape, self._tracker.device_of(tensor), 0)
        return shape

    def _left(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        numbers = self._tracker.noise(tensor.shape, tensor.dtype)
        # For this moment both stand for one tensor.
        self._tracker.hold(numbers, self._tracker.device_of(tensor), tensor.nbytes, peak=False)
        return numbers


class FakeTokenizer:
    """In place of a tokenizer that cannot be loaded here, as only the number of tokens matters.

    It answers as tokenizers and processors do, with as many tokens as there is room for, none of them padding.
    """

    model_max_length = 77
    added_tokens_encoder: Mapping[str, int] = {}

    def __call__(self, text: Any = None, max_length: int | None = None, **options: Any) -> BatchEncoding:
        rows, length = 1 if isinstance(text, str) else len(text), max_length or self.model_max_length
        ones = torch.ones((rows, length), dtype=torch.int64)
        return BatchEncoding({"input_ids": ones, "attention_mask": ones.clone()})

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        """The messages as tokens, or as they are."""
        return self(messages, **options) if tokenize else str(messages)

    def tokenize(self, text: str) -> list[str]:
        """No words, as pipelines look among them for those that a textual inversion added."""
        return []

    def num_special_tokens_to_add(self) -> int:
        """None."""
        return 0

    def decode(self, tokens: torch.Tensor) -> str:
        """No text."""
        return ""

    def batch_decode(self, tokens: torch.Tensor, **options: Any) -> list[str]:
        """No text for each row."""
        return [""] * len(tokens)
