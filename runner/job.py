"""The job: all that a run is asked for, in one type that the command line, Python, ranks, Ray and records share."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from runner import job_fields as fields_of
from runner.inputs import STEPS, check_whole
from runner.placement_options import MemoryLimits, PlaceRequest, tensor_parallel_processes
from runner.request import FilledRequest, Request
from stages.errors import InvalidInput
from stages.families import FAMILIES, Family
from stages.models.lora import LoraRequest, read_loras
from stages.models.scheduler import SchedulerRequest
from stages.signatures import checked_class
from stages.wording import counted

if TYPE_CHECKING:
    import torch
    from pydantic import TypeAdapter

VERSION = 2
STAGES = ("encode", "denoise", "decode")
STEP_EVERY = 10.0

StageName = Literal["encode", "denoise", "decode"]


@checked_class
@dataclass(frozen=True)
class RunPolicy:
    """How a run goes about its job, whatever the job is. Raises InvalidInput for what cannot be."""

    stop_after: StageName | None = None
    """The run ends behind this stage."""
    from_stage: StageName | None = None
    """This stage and those behind it are computed anew."""
    step_every: float = STEP_EVERY
    """Seconds after which an unfinished denoise is kept; 0 for after every step."""
    degrade: bool = True
    """Whether a stage that runs out of memory is tried once more with one thing changed."""
    preview: int = 0
    """Steps from one rough picture to the next; 0 for none."""
    sample_memory: bool = False
    """Whether memory is recorded ten times a second, not at events alone."""
    strict: bool = False
    """Whether a damaged artifact is refused instead of computed again."""

    def __post_init__(self) -> None:
        last = fields_of.one_of("stop_after", self.stop_after, (None, *STAGES)) or STAGES[-1]
        first = fields_of.one_of("from_stage", self.from_stage, (None, *STAGES)) or STAGES[0]
        if STAGES.index(first) > STAGES.index(last):
            raise InvalidInput(f"`from_stage={first}` comes after `stop_after={last}` -> leave one of them out")
        object.__setattr__(self, "step_every", fields_of.seconds("step_every", self.step_every))
        check_whole("preview", self.preview, 0, STEPS)
        for name in ("degrade", "sample_memory", "strict"):
            fields_of.flag(name, getattr(self, name))


@checked_class
@dataclass(frozen=True)
class Output:
    """Which files the pictures of a run go to. Raises InvalidInput for what cannot be."""

    paths: tuple[str, ...] = ()
    """One for each request; none where nothing is to be written."""
    overwrite: bool = False
    """Whether files that are there are replaced."""
    metadata: bool = True
    """Whether a picture's file says how it was made."""
    folder: str = ""
    """The folder that all of them lie in, or below; empty where that is not said."""

    def __post_init__(self) -> None:
        given = fields_of.several("paths", self.paths)
        object.__setattr__(self, "paths", tuple(fields_of.path("paths", each) for each in given))
        object.__setattr__(self, "folder", fields_of.path("folder", self.folder))
        for name in ("overwrite", "metadata"):
            fields_of.flag(name, getattr(self, name))


@dataclass(frozen=True)
class Label:
    """What a line of a prompt file calls its pictures."""

    line: int = 0
    """The number of the line, from 1; 0 for a request that is of no file."""
    id: str | None = None
    """The id that the line gave."""


@dataclass(frozen=True, order=True)
class RefusedLine:
    """A line of a prompt file that makes no picture, and why."""

    line: int
    """The number of the line, from 1."""
    text: str
    """The reason."""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Origin:
    """What a job repeats: its model must be the same."""

    what: str
    """Such as "the picture"."""
    identity: str
    """The model's identity then."""
    advice: str
    """What to do where it is another now."""


@checked_class
@dataclass(frozen=True)
class Job:
    """What a run is asked for.

    From Python each field may also be given as the text that the command line takes for it, lists for tuples, `dtype`
    as one type for all components, `place` as {stage: where}, and `max_memory` as bytes, or as {device: bytes or
    text}. A request may be its prompt alone, or a mapping of what it says; the family fills in the rest, and requests
    that have no numbers of their own are numbered. Raises InvalidInput for what cannot be.
    """

    family: str
    """The model family, such as "flux"."""
    requests: tuple[FilledRequest, ...] = ()
    """The pictures, at least one."""
    model: str | None = None
    """A checkpoint other than the family's: a hub id, a folder, or "demo"."""
    revision: str | None = None
    """A commit, tag or branch of a model of the hub."""
    loras: tuple[LoraRequest, ...] = ()
    """LoRAs that are merged into the weights."""
    scheduler: SchedulerRequest | None = None
    """What takes the place of the model's scheduler."""
    dtype: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The name of a type by component; "" stands for all others."""
    devices: tuple[str, ...] = ()
    """The devices to use, in this order; none: all cards there are, or the CPU."""
    max_memory: MemoryLimits = field(default_factory=MemoryLimits)
    """The most that may be used of devices."""
    place: tuple[PlaceRequest, ...] = ()
    """Where stages and components should go; the plan decides about the rest."""
    allow_offload: Literal["cpu", "disk"] | None = None
    """Whether blocks that fit no card may wait in host memory, and on the disk where they must."""
    lanes: int | None = None
    """Requests that are denoised at a time; None: as many as keep the cards busy."""
    tile: int | None = None
    """Pixels along a side of the tiles that pictures are decoded in; 0: whole. None: only those that do not fit whole,
    in the largest tiles that fit."""
    whole: int = 0
    """Pixels up to which pictures are decoded whole although `tile` says tiles; in the record of a run, as planned."""
    modulation_table: bool = True
    """Whether layers that see only conditioning are computed ahead and left out."""
    peer_copies: bool = True
    """Whether cards copy to each other directly; otherwise through host memory."""
    store: str = ""
    """A folder or URL for artifacts, or "memory"; empty: `run_all` keeps them in memory, several processes in the
    user's own folder."""
    run: str = ""
    """The name of the run; empty for a new one."""
    policy: RunPolicy = field(default_factory=RunPolicy)
    """How the run goes about it."""
    output: Output = field(default_factory=Output)
    """The files that pictures go to."""
    labels: tuple[Label, ...] = ()
    """What lines of a prompt file call the requests, one for each; none where there is no file."""
    refused: tuple[RefusedLine, ...] = ()
    """Lines of a prompt file that make no picture."""
    origin: Origin | None = None
    """What the job repeats, if it does."""
    resumed: bool = False
    """Whether the run goes on with one from before, and may find its pictures there."""

    if TYPE_CHECKING:
        # What may be given for the fields; they are kept in the types above.
        def __init__(
            self,
            family: str,
            requests: Iterable[Request | str | Mapping[str, Any]] | Request | str | Mapping[str, Any] = (),
            model: str | os.PathLike[str] | None = None,
            revision: str | None = None,
            loras: Iterable[LoraRequest | str | os.PathLike[str]] = (),
            scheduler: SchedulerRequest | Mapping[str, Any] | str | object | None = None,
            dtype: Mapping[str, str | torch.dtype] | str | torch.dtype | None = None,
            devices: Iterable[str] | str = (),
            max_memory: MemoryLimits | Mapping[str | int, str | int] | str | int | None = None,
            place: Iterable[PlaceRequest | str] | PlaceRequest | Mapping[str, str | int] | str = (),
            allow_offload: Literal["cpu", "disk"] | None = None,
            lanes: int | None = None,
            tile: int | str | None = None,
            whole: int = 0,
            modulation_table: bool = True,
            peer_copies: bool = True,
            store: str | os.PathLike[str] = "",
            run: str = "",
            policy: RunPolicy = ...,
            output: Output = ...,
            labels: Iterable[Label] = (),
            refused: Iterable[RefusedLine] = (),
            origin: Origin | None = None,
            resumed: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        for name, value in self._kept().items():
            object.__setattr__(self, name, value)
        if not self.requests:
            raise InvalidInput('`requests` are none -> say what to draw, such as ["a red circle"]')
        object.__setattr__(self, "requests", fields_of.filled(self.requests, self.defaults))
        for each, lists in (("labels", self.labels), ("`output` paths", self.output.paths)):
            if len(lists) not in (0, len(self.requests)):
                raise InvalidInput(f"{counted(len(self.requests), 'request')} and {len(lists)} {each} -> one for "
                                   f"each, or none")

    def _kept(self) -> dict[str, Any]:
        """The fields in the form in which they are kept; InvalidInput for what they cannot be."""
        given: Any = self
        return {
            "family": fields_of.family(given.family),
            "requests": fields_of.numbered(given.requests),
            "model": fields_of.path("model", given.model, optional=True),
            "revision": None if given.revision is None else fields_of.text("revision", given.revision),
            "loras": read_loras(fields_of.several("loras", given.loras, str | os.PathLike | LoraRequest)),
            "scheduler": None if given.scheduler is None else SchedulerRequest.read(given.scheduler),
            "dtype": fields_of.types(given.dtype),
            "devices": fields_of.devices(given.devices),
            "max_memory": fields_of.limits(given.max_memory),
            "place": fields_of.places(given.place, STAGES),
            "allow_offload": fields_of.one_of("allow_offload", given.allow_offload, (None, "cpu", "disk")),
            "lanes": fields_of.lanes(given.lanes),
            "tile": fields_of.tile(given.tile),
            "whole": fields_of.pixels("whole", given.whole),
            "modulation_table": fields_of.flag("modulation_table", given.modulation_table),
            "peer_copies": fields_of.flag("peer_copies", given.peer_copies),
            "store": fields_of.path("store", given.store),
            "run": fields_of.run(given.run),
            "policy": fields_of.of_type("policy", given.policy, RunPolicy),
            "output": fields_of.of_type("output", given.output, Output),
            "labels": fields_of.all_of("labels", given.labels, Label),
            "refused": fields_of.all_of("refused", given.refused, RefusedLine),
            "origin": None if given.origin is None else fields_of.of_type("origin", given.origin, Origin),
            "resumed": fields_of.flag("resumed", given.resumed),
        }

    @property
    def defaults(self) -> Family:
        """The family with the defaults of its checkpoint: the demo has its own."""
        return FAMILIES["demo" if self.model == "demo" else self.family]

    @property
    def listed(self) -> bool:
        """Whether the pictures come from the lines of a file, of which some may be refused."""
        return bool(self.refused) or bool(self.labels and self.labels[0].line)

    @property
    def tensor_parallel(self) -> int | None:
        """The processes that are to denoise together, 0: one for each card; None where it is one alone."""
        return tensor_parallel_processes(self.place)

    @property
    def positions(self) -> dict[int, int]:
        """By the index of a request in the whole run, its position in the job."""
        return {request.index: position for position, request in enumerate(self.requests)}

    def only(self, positions: Sequence[int]) -> "Job":
        """The job with the requests at these positions alone."""
        def part(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[at] for at in positions) if values else ()

        return replace(self, requests=part(self.requests), labels=part(self.labels),
                       output=replace(self.output, paths=part(self.output.paths)))

    def without(self, lost: Mapping[int, str]) -> "Job":
        """The job less the requests with these indices, whose lines are refused for these reasons."""
        kept = [at for at, request in enumerate(self.requests) if request.index not in lost]
        lines = [RefusedLine(self.label(at).line, lost[request.index]) for at, request in enumerate(self.requests)
                 if request.index in lost]
        if not kept:
            raise InvalidInput(f"no line is left: {next(iter(lost.values()))}")
        return replace(self.only(kept), refused=tuple(sorted({*self.refused, *lines})))

    def label(self, position: int) -> Label:
        """What the line of a request calls it."""
        return self.labels[position] if self.labels else Label()

    def absolute(self) -> "Job":
        """The job as processes in other folders understand it: with whole paths."""
        store = self.store if "://" in self.store or self.store in ("", "memory") else os.path.abspath(self.store)
        loras = tuple(replace(lora, source=absolute(lora.source)) for lora in self.loras)
        paths = tuple(map(os.path.abspath, self.output.paths))
        folder = os.path.abspath(self.output.folder) if self.output.folder else ""
        return replace(self, store=store, loras=loras, model=None if self.model is None else absolute(self.model),
                       output=replace(self.output, paths=paths, folder=folder))

    def to_json(self) -> dict[str, Any]:
        """The job as JSON."""
        document: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return {"version": VERSION, **document}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Job":
        """The job that `to_json` wrote; InvalidInput, with the field, where it cannot be."""
        from pydantic import ValidationError

        version = document.get("version") if isinstance(document, Mapping) else None
        if type(version) is not int or version != VERSION:
            raise InvalidInput(f"version {version!r}, where this program reads {VERSION}")
        try:
            text = json.dumps({name: value for name, value in document.items() if name != "version"})
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"no JSON: {error}") from error
        try:
            job = _adapter().validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            ours = first.get("ctx", {}).get("error")
            where = ".".join(map(str, first["loc"]))
            why = ours.text if isinstance(ours, InvalidInput) else first["msg"]
            raise InvalidInput(f"{where}: {why}" if where else why) from error
        if (unknown := fields_of.unknown(json.loads(text), job.to_json())) is not None:
            raise InvalidInput(f"{unknown}: no field of a job")
        return job


def absolute(name: str) -> str:
    """A model or a LoRA as processes in other folders understand it: the path of what is here, or its hub name."""
    return os.path.abspath(name) if os.path.exists(name) else name


@cache
def _adapter() -> "TypeAdapter[Job]":
    # Imported where a job is written or read alone: a command line answers before.
    from pydantic import TypeAdapter

    return TypeAdapter(Job)
