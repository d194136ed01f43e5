"""A stage: load its own components, run every request, let go of all of it."""

import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, PipelineState, SequentialPipelineBlocks
from torch import nn

from stages.checkpoint import Checkpoint, Component
from stages.errors import BadResult, LoadError
from stages.placement import Place, Places
from stages.state import State, Value

Emit = Callable[[str, Mapping[str, object]], None]
Inputs = Mapping[str, Value]


def silent(kind: str, data: Mapping[str, object]) -> None:
    """An `Emit` for those who do not listen."""


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
        return names | {"seed"} if "generator" in names else names

    @property
    def components(self) -> tuple[Component, ...]:
        """The components with weights, in the order of the pipeline; the first one takes the stage's inputs."""
        specs = self.blocks.expected_components
        known = [self.checkpoint.components[spec.name] for spec in specs if spec.name in self.checkpoint.components]
        return tuple(component for component in known if component.files)

    @contextmanager
    def loaded(self, places: Places, emit: Emit = silent) -> Iterator["Loaded"]:
        """Load the components to their places; on leaving, also by an exception, nothing of them is kept.

        Raises LoadError for a component that did not arrive whole.
        """
        home = places[self.components[0].name].placement.entry
        loaded = Loaded(self, self.blocks.init_pipeline(str(self.checkpoint.path)), places, home)
        try:
            for component in self.components:
                place = places[component.name]
                emit("load", {"stage": self.name, "component": component.name, "device": place.placement.entry,
                              "bytes": sum(file.stat().st_size for file in component.files)})
                loaded.adopt(component, load(component, place))
            loaded.complete()
            loaded.pipe.set_progress_bar_config(disable=True)
            self.prepare(loaded.pipe)
            yield loaded
        except BaseException as error:
            forget_frames(error)
            raise
        finally:
            loaded.release()

    def prepare(self, pipe: ModularPipeline) -> None:
        """Finish the loaded pipeline; a stage that has something to add overrides this."""

    def arguments(self, inputs: Inputs, emit: Emit) -> dict[str, Any]:
        """The inputs that this stage's blocks read."""
        return {name: value for name, value in inputs.items() if name in self.inputs and name != "seed"}

    def result(self, values: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
        """The values after the stage, as they are handed over."""
        return dict(values)


@dataclass
class Loaded:
    """A stage with its components in memory; owned by the `with` statement that made it."""

    stage: Stage
    pipe: Any
    places: Places
    home: str

    def __post_init__(self) -> None:
        self._models: list[weakref.ref[nn.Module]] = []

    def adopt(self, component: Component, model: nn.Module) -> None:
        """Take the one reference to a loaded model."""
        self.places[component.name].placement.attach(model, self.home)
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
                raise LoadError(
                    f"{name} of {self.stage.checkpoint.source} could not be loaded: look at the files in "
                    f"{self.stage.checkpoint.path / name}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The type that floats have on entry: that of the first component."""
        return self.places[self.stage.components[0].name].dtype

    def run(self, state: State, inputs: Inputs, emit: Emit = silent) -> State:
        """The state after this stage, for one request; values are on the host.

        Raises BadResult naming the stage and the value when a result is not finite.
        """
        arguments = self.stage.arguments(inputs, emit)
        before = PipelineState(
            values={name: self._entered(value) for name, value in state.values.items()},
            kwargs_mapping={tag: list(names) for tag, names in state.tags.items()},
        )
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

    def release(self) -> None:
        """Drop every component, so that no reference to this object or its pipeline keeps a model alive."""
        for name in list(self.pipe.components):
            setattr(self.pipe, name, None)
        self.pipe = None

    def leftovers(self) -> list[nn.Module]:
        """The models that somebody still holds after `release`."""
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


def load(component: Component, place: Place) -> nn.Module:
    """The component's model at its place; raises LoadError unless every parameter came from the files."""
    library = {"diffusers": diffusers, "transformers": transformers}[component.library]
    with without_bars():
        model, info = getattr(library, component.class_name).from_pretrained(
            component.folder, dtype=place.dtype, device_map=place.placement.device_map, use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"]) + [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise LoadError(
            f"{component.name}: {len(missing)} parameters are not in the files, first {missing[0]}: "
            f"download {component.folder} again"
        )
    return model.eval()


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the libraries' own progress bars off: progress is told through `emit`."""
    logs = [diffusers.utils.logging, transformers.utils.logging]
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def forget_frames(error: BaseException | None) -> None:
    """Clear what the frames of an error hold.

    A traceback keeps every frame alive, and with it the model that ran: in a notebook, until the next error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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
