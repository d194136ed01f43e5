"""The modulation table: layers that see only conditioning, computed ahead instead of kept on the cards.

The requests' denoise loops are gone through without a denoiser: what its calls will be given is known before it is
loaded. Draw Things and DiffusionKit do this for FLUX on Apple machines, and SGLang, vLLM-Omni and ComfyUI for one
model each; asked for in huggingface/diffusers#9197. Here the layers are found, for any model and every placement.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stages.errors import NotPrecomputable
from stages.loading.disk_weights import DiskWeights
from stages.models.checkpoint import Component
from stages.models.skeleton import skeleton
from stages.pipeline.stage import Inputs, Loaded, Stage
from stages.placement.placement import Place, Places, device_of
from stages.precompute.program import Call, Layer, Program
from stages.precompute.recorder import CallRecorder, RecordedCall
from stages.precompute.replay import precomputed_linears
from stages.state import State

# FLUX.1 takes 2.1 MB for a step and a prompt in bfloat16, so this is about 36 prompts of 28 steps.
LIMIT = 2 * 2**30
_ALIGN = 64


@dataclass(frozen=True)
class Layout:
    """Where the outputs of layers stand in a row, which is a tensor of bytes."""

    layers: Mapping[str, tuple[int, Layer]]
    """The first byte of each layer's output, and its shape and type."""
    size: int
    """Bytes of a row."""

    @classmethod
    def of(cls, layers: Mapping[str, Layer]) -> "Layout":
        """The layers one after the other."""
        placed, size = {}, 0
        for name, layer in layers.items():
            placed[name] = size, layer
            size += -(-layer.bytes // _ALIGN) * _ALIGN
        return cls(placed, size)

    def view(self, row: torch.Tensor, name: str) -> torch.Tensor:
        """The layer's output in a row."""
        start, layer = self.layers[name]
        return row[start:start + layer.bytes].view(layer.dtype).view(layer.shape)


@dataclass(frozen=True)
class TableChunk:
    """The part of the table that is there: what some of the requests need."""

    calls: Mapping[int, Sequence[RecordedCall]] = field(default_factory=dict)
    """The calls of each request, in their order."""
    rows: Mapping[Any, torch.Tensor] = field(default_factory=dict)
    """The row of each call by its key, on the host."""
    layouts: Mapping[Program, Layout] = field(default_factory=dict)
    """How the rows of a program's calls are laid out."""


class Cursor(threading.local):
    """Where a thread is in the table."""

    chunk: TableChunk
    """The chunk with its request."""
    calls: Sequence[RecordedCall] = ()
    """The calls of its request."""
    at: int = -1
    """Which of them goes on."""
    differs: torch.Tensor | None = None
    """Whether a call was given something else than was recorded; on the device, and looked at when all are over."""
    copies: dict[torch.device, torch.Tensor]
    """The row of the call that goes on, by device."""

    def __init__(self) -> None:
        self.copies = {}

    def next(self, leaves: Sequence[Any]) -> None:
        """Go on to the next call, which is given these leaves."""
        self.at, self.copies = self.at + 1, {}
        assert self.at < len(self.calls), f"the denoiser was called more than {len(self.calls)} times"
        call = self.calls[self.at]
        for (at, _), recorded in zip(call.program.reads, call.given, strict=True):
            # Copied and compared in order, and looked at when the loop is over: the host never waits within a step.
            differs = (leaves[at] != recorded.to(leaves[at].device, non_blocking=True)).any()
            self.differs = differs if self.differs is None else self.differs | differs.to(self.differs.device)

    def check(self) -> None:
        """Assert that the loop that ended made the calls that the table was computed for."""
        assert self.at + 1 == len(self.calls), f"{self.at + 1} calls of the denoiser, {len(self.calls)} expected"
        assert self.differs is None or not bool(self.differs), "the denoiser was given what the table was not"


@dataclass
class ModulationTable:
    """The table of a run, made for some of the requests at a time: when one is not in it, the next ones take turns."""

    stage: Stage
    """The stage of the denoiser."""
    places: Places
    """The place of the denoiser."""
    layers: frozenset[str]
    """The layers whose outputs are in it."""
    order: Sequence[int]
    """The requests in their order."""
    ask: Callable[[int], tuple[State, Inputs]]
    """Gives the state and the inputs of a request."""
    limit: int = LIMIT
    """The most bytes of rows at a time."""
    programs: list[Program] = field(default_factory=list)
    """The programs found so far."""

    def __post_init__(self) -> None:
        self._cursor, self._lock, self._chunk = Cursor(), threading.Lock(), TableChunk()

    @property
    def bytes(self) -> int:
        """Bytes of the rows that are there."""
        return sum(row.nbytes for row in self._chunk.rows.values())

    @contextmanager
    def attached(self, loaded: Loaded) -> Iterator[None]:
        """Inside, the precomputed model of the loaded stage has its layers' outputs from here."""
        (component,) = self.stage.components
        model = getattr(loaded.pipe, component.name)
        found = precomputed_linears(model)
        assert {replay.layer for replay in found} == self.layers
        for replay in found:
            replay.source = self
        hook = model.register_forward_pre_hook(self._begin_call, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()
            for replay in found:
                replay.source = None

    @contextmanager
    def request(self, index: int, done: int = 0) -> Iterator[None]:
        """Whatever calls the model inside, in this thread, is the loop of this request, from step `done` on."""
        chunk, cursor = self.chunk_for(index), self._cursor
        cursor.chunk, cursor.calls, cursor.differs = chunk, chunk.calls[index], None
        cursor.at = sum(call.step < done for call in cursor.calls) - 1
        try:
            yield
            cursor.check()
        finally:
            cursor.calls, cursor.differs, cursor.copies = (), None, {}

    def chunk_for(self, index: int) -> TableChunk:
        """The rows for this request and some of those after it, computed unless they are there."""
        with self._lock:
            if index not in self._chunk.calls:
                # The old rows are gone before there are new ones.
                self._chunk = TableChunk()
                self._chunk = self.compute(self.order[self.order.index(index):])
            return self._chunk

    def row(self, layer: str, device: torch.device) -> torch.Tensor:
        """The layer's output in the call that goes on, on `device`."""
        cursor = self._cursor
        call = cursor.calls[cursor.at]
        if device not in cursor.copies:
            row = cursor.chunk.rows[call.key]
            # From pinned memory the host need not wait for the card.
            cursor.copies[device] = row.clone() if device.type == "cpu" else row.pin_memory().to(
                device, non_blocking=True)
        return cursor.chunk.layouts[call.program.canonical].view(cursor.copies[device], layer)

    def compute(self, order: Sequence[int]) -> TableChunk:
        """The rows for the first of these requests, and for as many of the next ones as the limit allows."""
        (component,) = self.stage.components
        calls: dict[int, Sequence[RecordedCall]] = {}
        distinct: dict[Any, RecordedCall] = {}
        size = 0
        recorder = CallRecorder(self.stage, self.places, self.programs, self.layers)
        for index in order:
            recorded = recorder.record(*self.ask(index))
            new = {call.key: call for call in recorded if call.key not in distinct}
            size += sum(Layout.of(call.program.layers).size for call in new.values())
            if calls and size > self.limit:
                break
            calls[index] = recorded
            distinct |= new
        rows: dict[Any, torch.Tensor] = {}
        programs = dict.fromkeys(call.program.canonical for call in distinct.values())
        for program in programs:
            mine = {key: call for key, call in distinct.items() if call.program.canonical is program}
            rows |= compute_rows(component, self.places[component.name], program, mine)
        return TableChunk(calls, rows, {program: Layout.of(program.layers) for program in programs})

    def _begin_call(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._cursor.next(Call(model, args, kwargs).leaves)


def compute_rows(
    component: Component, place: Place, program: Program, calls: Mapping[Any, RecordedCall]
) -> dict[Any, torch.Tensor]:
    """The row of each of these calls of a program, by its key.

    They are computed step by step, so that each weight is read once and then dropped. Raises NotPrecomputable for a
    weight that the files do not hold as it is.
    """
    layout = Layout.of(program.layers)
    rows = {key: torch.empty(layout.size, dtype=torch.uint8) for key in calls}
    entry, devices, transfer = place.placement.entry, place.placement.compute_devices, place.placement.transfer
    values = [{number: tensor.to(entry) for (_, number), tensor in zip(program.reads, call.given, strict=True)}
              for call in calls.values()]
    model = skeleton(component, place.dtype)
    disk, dtypes = DiskWeights(component, model), {name: weight.dtype for name, weight in model.named_parameters()}
    with torch.no_grad():
        for step, done in zip(program.steps, program.last_uses(), strict=True):
            # A layer computes where it would if it were loaded.
            device = None if step.layer is None else device_of(step.layer, devices)
            if absent := [name for name in step.weights() if name not in disk]:
                raise NotPrecomputable(f"{absent[0]} is not in the files under this name: run with "
                                       f"`modulation_table=False`")
            weights = {name: disk.read(name, dtypes[name], device or device_of(name, devices))
                       for name in step.weights()}
            # One call at a time, with the rows that it will have: a product of more rows rounds otherwise.
            for row, known in zip(rows.values(), values, strict=True):
                known.update(zip(step.out, step.run(known, weights, entry, device, transfer), strict=True))
                if step.layer is not None and step.layer in layout.layers:
                    layout.view(row, step.layer).copy_(known[step.out[0]])
                for number in done:
                    del known[number]
    return rows
