"""A stage: load its own components, run every request, let go of all of it."""

import copy
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, PipelineState, SequentialPipelineBlocks
from torch import nn

from stages.errors import BadResult
from stages.events import Emit, silent
from stages.loading.disk_weights import from_disk
from stages.loading.load import load
from stages.models.checkpoint import Checkpoint, Component
from stages.models.own_caches import keep_by_itself
from stages.pipeline.build import build_pipeline
from stages.pipeline.step_hook import StepCheckpoint
from stages.placement.placement import DISK, Places, from_host
from stages.state import State, Value, to_host

# By diffusers' names; "seed" stands for a generator.
Inputs = Mapping[str, Value]


class Stage:
    """One of the three parts of a run, not yet loaded."""

    name: ClassVar[str]

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: SequentialPipelineBlocks,
        reads: Collection[str],
        tags: Collection[str],
    ) -> None:
        """`reads` and `tags` name the values that later stages read: nothing else crosses the border."""
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
    def schedules(self) -> bool:
        """Whether the blocks read a scheduler."""
        return any(spec.name == "scheduler" for spec in self.blocks.expected_components)

    @property
    def components(self) -> tuple[Component, ...]:
        """The components with weights, in the order of the pipeline; the first one takes the stage's inputs."""
        specs = self.blocks.expected_components
        known = [self.checkpoint.components[spec.name] for spec in specs if spec.name in self.checkpoint.components]
        return tuple(component for component in known if component.files)

    def home(self, places: Places) -> str:
        """The device that takes the stage's inputs: that of the first component."""
        return places[self.components[0].name].placement.entry

    def loaded(self, places: Places, emit: Emit = silent) -> "Loading":
        """The stage with its components at their places, for a `with` statement that gives it as `Loaded`.

        Entering raises ModelError for a component that did not arrive whole; on leaving, also by an exception,
        nothing of them is kept.
        """
        return Loading(self, places, emit)

    def pipeline(
        self, components: Mapping[str, object], tokenizer: Callable[[], object] | None = None
    ) -> ModularPipeline:
        """The stage's pipeline around these components, as `build_pipeline` has it."""
        pipe = build_pipeline(self.blocks, self.checkpoint, components, tokenizer)
        self.prepare(pipe)
        return pipe

    def prepare(self, pipe: ModularPipeline) -> None:
        """Finish a pipeline; a stage that has something to add overrides this."""

    def arguments(self, pipe: ModularPipeline, inputs: Inputs) -> dict[str, Any]:
        """The inputs that this stage's blocks read."""
        return {name: value for name, value in inputs.items() if name in self.blocks.input_names}

    def result(self, values: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
        """The values after the stage, as they are handed over."""
        return dict(values)

    def doubts(self, made: State, inputs: Inputs) -> Iterator[str]:
        """What is odd about a result that is handed over all the same."""
        return iter(())

    def resumable(self, pipe: ModularPipeline) -> bool:
        """Whether a request that stopped between two steps can go on from there, to the same last bit."""
        return False

    @contextmanager
    def request(
        self, pipe: ModularPipeline, arguments: Mapping[str, Any], emit: Emit, resume_from: StepCheckpoint | None
    ) -> Iterator[None]:
        """While this thread's pipeline works on a request with these arguments inside, `emit` is told of its steps."""
        assert resume_from is None, f"{self.name} has no steps to go on from"
        yield

    @contextmanager
    def shortened(self, steps: int) -> Iterator[None]:
        """Inside, this thread's loops go through so many of their steps at most: enough to know what all take."""
        yield


class Loading:
    """A `with` statement for as long as which the components of a stage are in memory."""

    def __init__(self, stage: Stage, places: Places, emit: Emit) -> None:
        self._stage, self._places, self._emit = stage, places, emit
        self._home = stage.home(places)

    def __enter__(self) -> "Loaded":
        models: dict[str, nn.Module] = {}
        try:
            for component in self._stage.components:
                models[component.name] = self._load(component)
            dtype = self._places[self._stage.components[0].name].dtype
            receive = moved_to(self._home, dtype)
            self._loaded = Loaded(self._stage, self._stage.pipeline(models), receive, self._places)
        except BaseException as error:
            models.clear()
            forget_frames(error)
            raise
        return self._loaded

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._loaded.close()
        if error is not None:
            forget_frames(error)

    def _load(self, component: Component) -> nn.Module:
        place = self._places[component.name]
        self._emit("load", {"stage": self._stage.name, "component": component.name, "device": place.placement.entry,
                            "bytes": sum(file.stat().st_size for file in component.files)})
        model = load(component, place)
        keep_by_itself(model)
        on_disk = DISK in place.placement.storage_devices.values()
        place.placement.attach(model, self._home, fetch=from_disk(component, model) if on_disk else from_host)
        return model


class Loaded:
    """A stage with a pipeline that runs requests, one at a time in each thread."""

    def __init__(
        self, stage: Stage, pipe: ModularPipeline, receive: Callable[[torch.Tensor], torch.Tensor],
        places: Places | None = None,
    ) -> None:
        """`receive` gives a tensor as the stage takes it: pipeline blocks neither move nor cast what comes in.

        `places` are those of the components that something must be done with before each request, if there are any.
        """
        self.stage, self.pipe, self._receive, self._places = stage, pipe, receive, places or {}
        models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        self._models, self._lanes = [weakref.ref(model) for model in models], list[Loaded]()

    def close(self) -> None:
        """Let go of the components, also in all lanes."""
        for loaded in (self, *self._lanes):
            for name in list(loaded.pipe.components):
                setattr(loaded.pipe, name, None)
            loaded.pipe = None
        self._lanes.clear()

    def leftovers(self) -> list[nn.Module]:
        """The models that somebody still holds after `close`."""
        return [model for reference in self._models if (model := reference()) is not None]

    @property
    def resumable(self) -> bool:
        """Whether a request that stopped between two steps can go on from there, to the same last bit."""
        return self.stage.resumable(self.pipe)

    def lane(self) -> "Loaded":
        """The same models under a pipeline of its own, whose requests another thread may run at the same time."""
        # Schedulers and guiders count steps; everything else is only read.
        parts = {name: part if isinstance(part, nn.Module) or name.startswith("tokenizer") else copy.deepcopy(part)
                 for name, part in self.pipe.components.items()}
        self._lanes.append(Loaded(self.stage, self.stage.pipeline(parts), self._receive, self._places))
        return self._lanes[-1]

    def run(
        self, state: State, inputs: Inputs, emit: Emit = silent, resume_from: StepCheckpoint | None = None
    ) -> State:
        """The state after this stage, for one request, from its beginning or a checkpoint; values are on the host.

        Raises BadResult naming the stage and the value when a result is not finite.
        """
        for name in (component.name for component in self.stage.components if component.name in self._places):
            self._places[name].placement.prepare(self.pipe.components[name], inputs)
        arguments = self.stage.arguments(self.pipe, inputs)
        if self.stage.guided:
            # A guider decides in encode whether there are negative embeddings, and in denoise what they do; families
            # ship it on or off, so it is always set.
            scale = {"guidance_scale": inputs["guidance_scale"]} if guides(inputs) else {}
            self.pipe.update_components(guider=self.pipe.guider.new(enabled=guides(inputs), **scale))
        before = PipelineState(
            values={name: self._received(value) for name, value in state.values.items()},
            kwargs_mapping={tag: list(names) for tag, names in state.tags.items()},
        )
        with self.stage.request(self.pipe, arguments, emit, resume_from):
            after = self.pipe(state=before, **arguments)
        made = self._handed_over(after, inputs)
        check_finite(self.stage.name, made)
        # A rehearsal, to which nobody listens, has shapes alone.
        for text in () if emit is silent else self.stage.doubts(made, inputs):
            emit("warning", {"text": text})
        return state.only(state.values.keys() & self.stage.reads).merged(made)

    def _received(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._receive(value)
        if isinstance(value, dict):
            return {key: self._received(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._received(item) for item in value)
        return value

    def _handed_over(self, after: PipelineState, inputs: Inputs) -> State:
        """What the stage made, and later stages read; all of it where there is no later stage."""
        names = set(self.stage.blocks.intermediate_output_names)
        values = self.stage.result({n: value for n, value in after.values.items() if n in names}, inputs)
        tags = {tag: tuple(dict.fromkeys(tagged)) for tag, tagged in after.kwargs_mapping.items()}
        made = State({name: to_host(value) for name, value in values.items()}, tags)
        read = self.stage.reads.union(*(tags.get(tag, ()) for tag in self.stage.tags))
        return made.only(values.keys() & read if self.stage.reads else values)


def moved_to(device: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives a tensor on a device, and floats in a type."""
    return lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None)


def guides(inputs: Inputs) -> bool:
    """Whether the inputs ask for guidance away from the negative prompt; a scale of 1 or less does not."""
    scale = inputs.get("guidance_scale")
    return isinstance(scale, int | float) and scale > 1


def forget_frames(error: BaseException) -> None:
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


def check_finite(stage: str, state: State) -> None:
    """Raise BadResult if a tensor of the state holds a NaN or an infinity."""
    for name, tensor in state.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadResult(
                f"{stage}: {name} has {bad} non-finite of {tensor.numel()} values ({tensor.dtype}): "
                f"run again with `dtype=float32` (or bfloat16 where it was float16)"
            )
