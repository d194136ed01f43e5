"""The plan: which model, which requests, and where every component goes, before anything is loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.job import Job
from runner.planning.ladder import Strategy
from runner.planning.placed import Need, Part
from runner.planning.placer import Placer
from runner.planning.precompute import TableSaving
from runner.planning.work import Work
from runner.request import FilledRequest
from runner.text import clean, pictures
from stages.families import Family
from stages.machine import Machine
from stages.models.checkpoint import Checkpoint
from stages.models.weights import Weights
from stages.pipeline.stage import Stage
from stages.placement.placement import Place
from stages.placement.tiling import Tiling


@dataclass(frozen=True)
class Plan:
    """What a run will do: its model, its requests, its stages, and the place of every component.

    What is said by part is keyed by (stage, component).
    """

    job: Job
    """What was asked for, less the requests that the model cannot make."""
    checkpoint: Checkpoint
    """The model, with the LoRAs that are merged into it."""
    machine: Machine
    """The devices, with the limits that the job sets."""
    stages: tuple[Stage, ...]
    """Encode, denoise and decode."""
    places: Mapping[Part, Place]
    """Where each component goes, by part."""
    weights: Mapping[Part, Weights]
    """What each component weighs, by part."""
    needs: Mapping[str, Mapping[str, Need]] = field(default_factory=dict)
    """By stage and device, the bytes that it takes."""
    strategies: Mapping[str, tuple[Strategy, ...]] = field(default_factory=dict)
    """By stage, the ways to place it that were tried; the last one is taken."""
    reasons: Mapping[Part, str] = field(default_factory=dict)
    """By part, why it has its type."""
    lanes: int = 1
    """Requests that are denoised at a time."""
    savings: Mapping[str, TableSaving] = field(default_factory=dict)
    """By component, what the modulation table saves."""
    reads: Mapping[str, int] = field(default_factory=dict)
    """By stage, the bytes that every pass reads from the disk."""
    work: Mapping[str, Work] = field(default_factory=dict)
    """By stage, what the largest picture computes, copies and reads."""
    describe: Callable[["Plan"], Sequence[str]] = field(default=lambda plan: [repr(plan)], repr=False, compare=False)
    """Gives its lines as people read them: what `print` shows of it."""
    placer: Placer | None = field(default=None, repr=False, compare=False)
    """What placed the components, to place them anew."""

    def __repr__(self) -> str:
        stages = (f"{stage} on {' and '.join(device for device, need in needs.items() if need.total)}"
                  for stage, needs in self.needs.items())
        what = (self.family.name, clean(self.checkpoint.source), pictures(len(self.requests)))
        return f"Plan({', '.join((*what, *stages))})"

    def __str__(self) -> str:
        return "\n".join(self.describe(self))

    @property
    def family(self) -> Family:
        """The model family, with the defaults of its checkpoint."""
        return self.job.defaults

    @property
    def requests(self) -> tuple[FilledRequest, ...]:
        """The pictures."""
        return self.job.requests

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices that the run may use."""
        return tuple(device.name for device in self.machine.devices)

    @property
    def device_map(self) -> dict[str, dict[str, str]]:
        """The map of every component: its modules ("" stands for all others) and the devices that hold their weights.

        diffusers' own, `hf_device_map`, has one device for a component, and may lack one.
        """
        return {self.label(part): dict(place.placement.storage_devices) for part, place in self.places.items()}

    @property
    def processes(self) -> int:
        """How many processes denoise together: more than one where the denoiser is tensor parallel."""
        return max((place.placement.processes for place in self.places.values()), default=1)

    @property
    def tiling(self) -> Tiling | None:
        """Which pictures are decoded in tiles; None where all are decoded whole."""
        found = (place.placement.tiling for (stage, _), place in self.places.items() if stage == "decode")
        return next(filter(None, found), None)

    def tile_of(self, request: FilledRequest) -> int | None:
        """The pixels along a side of the tiles that a picture is decoded in; None where it is decoded whole."""
        return None if self.tiling is None else self.tiling.tile(request.width, request.height)

    @property
    def tiles(self) -> dict[str, int | None]:
        """The same by size (WxH) of the pictures, the smallest first."""
        sizes = sorted(sizes_of(self.requests), key=lambda size: (size[0] * size[1], size))
        tiling = self.tiling
        return {f"{width}x{height}": None if tiling is None else tiling.tile(width, height) for width, height in sizes}

    @property
    def tile(self) -> int | None:
        """The pixels along a side of the tiles that some pictures are decoded in; None where all are decoded whole."""
        return next(filter(None, self.tiles.values()), None)

    def label(self, part: Part) -> str:
        """The name of a component, with its stage where there is another of this name."""
        stage, component = part
        return component if sum(name == component for _, name in self.places) == 1 else f"{stage}.{component}"

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def places_of(self, stage: str) -> dict[str, Place]:
        """The places of a stage's components, by component."""
        return {component: place for (name, component), place in self.places.items() if name == stage}

    def moved(self, stage: str, places: Mapping[str, Place]) -> "Plan":
        """The plan with components of a stage at other places."""
        return replace(self, places={**self.places, **{(stage, name): place for name, place in places.items()}})

    def only(self, positions: Sequence[int]) -> "Plan":
        """The plan for the requests at these positions alone."""
        return replace(self, job=self.job.only(positions))


def sizes_of(requests: Iterable[FilledRequest]) -> tuple[tuple[int, int], ...]:
    """The sizes of pictures, as (width, height), each once."""
    return tuple(dict.fromkeys((request.width, request.height) for request in requests))


def most_bytes(prompts: Iterable[str]) -> str:
    """The prompt of most bytes."""
    return max(prompts, key=lambda prompt: len(prompt.encode()))


def largest(
    requests: Sequence[FilledRequest], longest_of: Callable[[Iterable[str]], str] = most_bytes
) -> FilledRequest:
    """A request that takes at least as much memory as any of these: the most pixels, tokens, words and guidance.

    `longest_of` says which of several prompts takes most.
    """
    widest = max(requests, key=lambda request: request.width * request.height)
    longest = longest_of(request.prompt for request in requests)
    negative = longest_of(request.negative_prompt or "" for request in requests)
    guidance = max((request.guidance for request in requests if request.guidance is not None), default=None)
    tokens = max(request.text_tokens for request in requests)
    steps = max(request.steps for request in requests)
    return replace(widest, prompt=longest, negative_prompt=negative or None, guidance=guidance, text_tokens=tokens,
                   steps=steps)
