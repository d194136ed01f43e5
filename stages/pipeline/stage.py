"""A stage: load its own components, run every request, let go of all of it."""

import copy
import logging
import traceback
import weakref
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, PipelineState, SequentialPipelineBlocks
from torch import nn

from stages.errors import BadResult, ModelError
from stages.events import Emit, silent
from stages.loading.disk_weights import DiskWeights
from stages.loading.load import load
from stages.models.checkpoint import Checkpoint, Component
from stages.pipeline.step_hook import StepCheckpoint
from stages.placement.placement import DISK, Places, from_host
from stages.state import State, Value

Inputs = Mapping[str, Value]

# Every nesting level of blocks logs the whole traceback of an error that is raised all the same.
logging.getLogger(ModularPipeline.__module__).addFilter(lambda record: "Error in block" not in record.getMessage())


class Stage:
    """One of the three parts of a run, not yet loaded.

    `reads` and `tags` name the values that later stages read: nothing else crosses the border.
    """

    name: ClassVar[str]

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: SequentialPipelineBlocks,
        reads: Collection[str],
        tags: Collection[str],
    ) -> None:
        self.checkpoint, self.blocks, self.reads, self.tags = checkpoint, blocks, frozenset(reads), frozenset(tags)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(c.name for c in self.components)})"

    @property
    def inputs(self) -> frozenset[str]:
        """The names that the stage's pipeline blocks read; "seed" stands for a generator."""
        names = frozenset(name for name in self.blocks.input_names if name)
        names |= {"seed"} if "generator" in names else set()
        return names | {"guidance_scale"} if self.guided else names

    @property
    def guided(self) -> bool:
        """Whether guidance reaches the blocks through a component, the guider, instead of an input."""
        return any(spec.name == "guider" for spec in self.blocks.expected_components)

    @property
    def components(self) -> tuple[Component, ...]:
        """The components with weights, in the order of the pipeline; the first one takes the stage's inputs."""
        specs = self.blocks.expected_components
        known = [self.checkpoint.components[spec.name] for spec in specs if spec.name in self.checkpoint.components]
        return tuple(component for component in known if component.files)

    def loaded(self, places: Places, emit: Emit = silent) -> "Loaded":
        """The stage with its components at their places, for a `with` statement.

        Entering raises ModelError for a component that did not arrive whole; on leaving, also by an exception,
        nothing of them is kept.
        """
        return Loaded(self, places, emit)

    def prepare(self, pipe: ModularPipeline) -> None:
        """Finish the loaded pipeline; a stage that has something to add overrides this."""

    def arguments(self, pipe: Any, inputs: Inputs, emit: Emit) -> dict[str, Any]:
        """The inputs that this stage's blocks read."""
        return {name: value for name, value in inputs.items() if name in self.blocks.input_names}

    def result(self, values: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
        """The values after the stage, as they are handed over."""
        return dict(values)

    def divisible(self, pipe: Any) -> bool:
        """Whether a request that stopped midway can go on from there, to the same last bit."""
        return False

    def resume_from(self, midway: StepCheckpoint | None) -> None:
        """Make the next request of this thread go on from there."""
        assert midway is None, f"{self.name} has no middle"

    def forget(self) -> None:
        """Drop what the last request of this thread left in the stage."""


class Loaded:
    """A stage with its components in memory, for as long as its `with` statement lasts."""

    def __init__(self, stage: Stage, places: Places, emit: Emit) -> None:
        self.stage, self.places = stage, places
        self.pipe: Any = None
        self._emit = emit
        self._models: list[weakref.ref[nn.Module]] = []
        self._lanes: list[Loaded] = []

    def __enter__(self) -> "Loaded":
        self.pipe = self.stage.blocks.init_pipeline(str(self.stage.checkpoint.path))
        try:
            for component in self.stage.components:
                place = self.places[component.name]
                self._emit("load", {"stage": self.stage.name, "component": component.name,
                                    "device": place.placement.entry,
                                    "bytes": sum(file.stat().st_size for file in component.files)})
                self.adopt(component, load(component, place))
            self.complete()
            self.pipe.set_progress_bar_config(disable=True)
            self.stage.prepare(self.pipe)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for one in (self, *self._lanes):
            for name in list(one.pipe.components):
                setattr(one.pipe, name, None)
            one.pipe = None
        self._lanes.clear()
        self.stage.forget()
        if error is not None:
            detach(error)

    @property
    def home(self) -> str:
        """The device that takes the stage's inputs: that of the first component."""
        return self.places[self.stage.components[0].name].placement.entry

    def adopt(self, component: Component, model: nn.Module) -> None:
        """Take the one reference to a loaded model."""
        placement = self.places[component.name].placement
        on_disk = DISK in placement.storage_devices.values()
        placement.attach(model, self.home, fetch=DiskWeights(component, model).fetch if on_disk else from_host)
        self.pipe.update_components(**{component.name: model})
        self._models.append(weakref.ref(model))

    def complete(self) -> None:
        """Load what has no weights (tokenizers, schedulers), and check that nothing is missing."""
        rest = [name for name in self.pipe.null_component_names if name in self.pipe.pretrained_component_names]
        for name in rest:
            # load_components reads a dict as "per component" and hands plain values to every tokenizer, so it is
            # called for one name at a time; it only logs its failures, so the result is looked at.
            self.pipe.load_components(names=[name])
            if name in self.pipe.null_component_names:
                raise ModelError(
                    f"{name} of {self.stage.checkpoint.source} could not be loaded: look at the files in "
                    f"{self.stage.checkpoint.path / name}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The type that floats have on entry: that of the first component."""
        return self.places[self.stage.components[0].name].dtype

    @property
    def divisible(self) -> bool:
        """Whether a request that stopped midway can go on from there, to the same last bit."""
        return self.stage.divisible(self.pipe)

    def lane(self) -> "Loaded":
        """The same models under a pipeline of its own, whose requests another thread may run at the same time."""
        other = copy.copy(self)
        other.pipe = self.stage.blocks.init_pipeline(str(self.stage.checkpoint.path))
        # Schedulers and guiders count steps; everything else is only read.
        mine = {name: part if isinstance(part, nn.Module) or name.startswith("tokenizer") else copy.deepcopy(part)
                for name, part in self.pipe.components.items()}
        other.pipe.update_components(**mine)
        other.pipe.set_progress_bar_config(disable=True)
        self.stage.prepare(other.pipe)
        self._lanes.append(other)
        return other

    def run(self, state: State, inputs: Inputs, emit: Emit = silent, midway: StepCheckpoint | None = None) -> State:
        """The state after this stage, for one request, from its beginning or from `midway`; values are on the host.

        Raises BadResult naming the stage and the value when a result is not finite.
        """
        try:
            return self._run(state, inputs, emit, midway)
        finally:
            self.stage.forget()

    def _run(self, state: State, inputs: Inputs, emit: Emit, midway: StepCheckpoint | None) -> State:
        arguments = self.stage.arguments(self.pipe, inputs, emit)
        if self.stage.guided:
            # A guider decides in encode whether there are negative embeddings, and in denoise what they do; families
            # ship it on or off, so it is always set.
            scale = {"guidance_scale": inputs["guidance_scale"]} if guides(inputs) else {}
            self.pipe.update_components(guider=self.pipe.guider.new(enabled=guides(inputs), **scale))
        before = PipelineState(
            values={name: self._entered(value) for name, value in state.values.items()},
            kwargs_mapping={tag: list(names) for tag, names in state.tags.items()},
        )
        self.stage.resume_from(midway)
        after = self.pipe(state=before, **arguments)
        made = set(self.stage.blocks.intermediate_output_names)
        values = self.stage.result({n: v for n, v in after.values.items() if n in made}, inputs)
        tags = {tag: tuple(dict.fromkeys(names)) for tag, names in after.kwargs_mapping.items()}
        kept = {n for n in values if n in self.stage.reads or any(n in tags.get(t, ()) for t in self.stage.tags)}
        kept |= {n for n in values if not self.stage.reads}
        new = State({name: to_host(value) for name, value in values.items()}, tags).only(kept)
        check_finite(self.stage.name, new)
        passed = state.only([n for n in state.values if n in self.stage.reads])
        return passed.merged(new)

    def leftovers(self) -> list[nn.Module]:
        """The models that somebody still holds after the `with` statement."""
        return [model for reference in self._models if (model := reference()) is not None]

    def _entered(self, value: Any) -> Any:
        # Pipeline blocks neither move nor cast what comes in.
        if isinstance(value, torch.Tensor):
            return value.to(self.home, self.dtype if value.is_floating_point() else None)
        if isinstance(value, dict):
            return {key: self._entered(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._entered(item) for item in value)
        return value


def guides(inputs: Inputs) -> bool:
    """Whether the inputs ask for guidance away from the negative prompt; a scale of 1 or less does not."""
    scale = inputs.get("guidance_scale")
    return isinstance(scale, int | float) and scale > 1


def detach(error: BaseException) -> None:
    """Make an error forget the frames that it passed, and keep their description as a note.

    A traceback holds every frame, and each frame its function with what that encloses: in torch, the module that
    ran. In a notebook the model would stay until the next error; clearing the frames' variables is not enough.
    """
    link: BaseException | None = error
    while link is not None:
        if link.__traceback__ is not None:
            error.add_note("".join(traceback.format_tb(link.__traceback__)).rstrip())
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None
        link = link.__cause__ or link.__context__


def to_host(value: Any) -> Value:
    """A value as it crosses a border: tensors on the host, types by name."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu")
    if isinstance(value, dict):
        return {str(key): to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return str(value) if isinstance(value, torch.dtype | torch.device) else value


def check_finite(stage: str, state: State) -> None:
    """Raise BadResult if a tensor of the state holds a NaN or an infinity."""
    for name, tensor in state.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadResult(
                f"{stage}: {name} has {bad} non-finite of {tensor.numel()} values ({tensor.dtype}): "
                f"run again with --dtype float32 (or bfloat16 where it was float16)"
            )
