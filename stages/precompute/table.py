"""The modulation table: layers that see only conditioning, computed ahead instead of kept on the cards.

The requests' denoise loops are gone through without a denoiser: what its calls would be told is known before it is
loaded. Draw Things and DiffusionKit do this for FLUX on Apple machines, and SGLang, vLLM-Omni and ComfyUI for one
model each; asked for in huggingface/diffusers#9197. Here the layers are found, for any model and every placement.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from stages.errors import NotPrecomputable
from stages.loading.lora_merge import LoraMerger
from stages.models.checkpoint import Component
from stages.models.safetensors_header import read_header
from stages.models.skeleton import skeleton
from stages.pipeline.stage import Inputs, Loaded, Stage
from stages.placement.placement import Place, Places, device_of
from stages.precompute.program import Call, Layer, Program, Step
from stages.precompute.recorder import RecordedCall, Recorder
from stages.precompute.replay import precomputed_linears
from stages.state import State

# FLUX.1 takes 2.1 MB for a step and a prompt in bfloat16, so this is about 36 prompts of 28 steps.
LIMIT = 2 * 2**30
_ALIGN = 64

Ask = Callable[[int], tuple[State, Inputs]]


@dataclass(frozen=True)
class Layout:
    """Where each layer's output stands in a row: its first byte, shape and type."""

    at: Mapping[str, tuple[int, Layer]]
    size: int

    @classmethod
    def of(cls, layers: Mapping[str, Layer]) -> "Layout":
        """The layers one after the other."""
        at, size = {}, 0
        for name, layer in layers.items():
            at[name] = size, layer
            size += -(-layer.bytes // _ALIGN) * _ALIGN
        return cls(at, size)

    def view(self, row: torch.Tensor, name: str) -> torch.Tensor:
        """The layer's output in a row of bytes."""
        start, layer = self.at[name]
        return row[start:start + layer.bytes].view(layer.dtype).view(layer.shape)


@dataclass(frozen=True)
class TableChunk:
    """The rows for some requests: for each request its calls, and by what they were told the row of a call."""

    calls: Mapping[int, Sequence[RecordedCall]]
    rows: Mapping[Any, torch.Tensor]
    layouts: Mapping[Program, Layout]


class Cursor(threading.local):
    """Where a thread is: its request's calls, the number of the one that goes on, and its row on each device."""

    chapter: TableChunk
    calls: Sequence[RecordedCall] = ()
    at: int = -1
    copies: dict[torch.device, torch.Tensor]
    differs: torch.Tensor | None = None

    def __init__(self) -> None:
        self.copies = {}

    def check(self) -> None:
        """Assert that the loop that ended made the calls that the table was computed for."""
        assert self.at + 1 == len(self.calls), f"{self.at + 1} calls of the denoiser, {len(self.calls)} expected"
        assert self.differs is None or not bool(self.differs), "the denoiser was told what the table was not"


@dataclass
class ModulationTable:
    """The table of a run: the outputs of `layers` for every call of the denoise loops of its requests.

    Rows are on the host, at most `limit` bytes of them at a time: when a request has none, those of the next
    requests are made, and the old ones are dropped. `order` is the order of the requests, and `ask` tells of one.
    """

    stage: Stage
    places: Places
    layers: frozenset[str]
    order: Sequence[int]
    ask: Ask
    limit: int = LIMIT
    programs: list[Program] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reading, self._turn = Cursor(), threading.Lock()
        self._chapter = TableChunk({}, {}, {})

    @property
    def bytes(self) -> int:
        """Bytes of the rows that are there."""
        return sum(row.nbytes for row in self._chapter.rows.values())

    @contextmanager
    def attached(self, loaded: Loaded) -> Iterator[None]:
        """The precomputed model of the loaded stage reads its layers' outputs here in the block."""
        (component,) = self.stage.components
        model = getattr(loaded.pipe, component.name)
        found = precomputed_linears(model)
        assert {replay.layer for replay in found} == self.layers
        for replay in found:
            replay.source = self
        hook = model.register_forward_pre_hook(self._turn_page, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()
            for replay in found:
                replay.source = None

    @contextmanager
    def request(self, index: int, done: int = 0) -> Iterator[None]:
        """Whatever calls the model inside, in this thread, is the loop of this request, from step `done` on."""
        chapter, here = self.open(index), self._reading
        here.chapter, here.calls, here.differs = chapter, chapter.calls[index], None
        here.at = sum(told.step < done for told in here.calls) - 1
        try:
            yield
            here.check()
        finally:
            here.calls, here.differs, here.copies = (), None, {}

    def open(self, index: int) -> TableChunk:
        """The rows for this request and the ones after it, computed unless they are there."""
        with self._turn:
            if index not in self._chapter.calls:
                self._chapter = TableChunk({}, {}, {})
                self._chapter = self._written(self.order[self.order.index(index):])
            return self._chapter

    def row(self, layer: str, device: torch.device) -> torch.Tensor:
        """The layer's output in the call that goes on."""
        here = self._reading
        told = here.calls[here.at]
        if device not in here.copies:
            row = here.chapter.rows[told.key]
            # From pinned memory the host need not wait for the card.
            here.copies[device] = row.clone() if device.type == "cpu" else row.pin_memory().to(
                device, non_blocking=True)
        return here.chapter.layouts[told.program.kind].view(here.copies[device], layer)

    def _turn_page(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        here = self._reading
        here.at, here.copies = here.at + 1, {}
        assert here.at < len(here.calls), f"the denoiser was called more than {len(here.calls)} times"
        leaves = Call(model, args, kwargs).leaves
        told = here.calls[here.at]
        for (at, _), given in zip(told.program.reads, told.given, strict=True):
            # Looked at when the loop is over: the host never waits for the card within a step.
            differs = (leaves[at] != given.to(leaves[at].device)).any()
            here.differs = differs if here.differs is None else here.differs | differs.to(here.differs.device)

    def _written(self, order: Sequence[int]) -> TableChunk:
        calls: dict[int, Sequence[RecordedCall]] = {}
        rows: dict[Any, RecordedCall] = {}
        size = 0
        with Recorder(self.stage, self.places, self.programs, self.layers) as recorder:
            for index in order:
                told = recorder.record(*self.ask(index))
                new = {one.key: one for one in told if one.key not in rows}
                size += sum(Layout.of(one.program.layers).size for one in new.values())
                if calls and size > self.limit:
                    break
                calls[index] = told
                rows |= new
        layouts: dict[Program, Layout] = {}
        made: dict[Any, torch.Tensor] = {}
        (component,) = self.stage.components
        for found in dict.fromkeys(told.program.kind for told in rows.values()):
            layouts[found] = Layout.of(found.layers)
            mine = {key: told for key, told in rows.items() if told.program.kind is found}
            made |= computed(component, self.places[component.name], found, mine)
        return TableChunk(calls, made, layouts)


def computed(
    component: Component, place: Place, found: Program, told: Mapping[Any, RecordedCall]
) -> dict[Any, torch.Tensor]:
    """The row of every call told of, by its key: step by step, so that each weight is read once and then dropped."""
    layout = Layout.of(found.layers)
    rows = {key: torch.empty(layout.size, dtype=torch.uint8) for key in told}
    entry, move = place.placement.entry, place.placement.transfer
    values = [{number: tensor.to(entry) for (_, number), tensor in zip(found.reads, one.given, strict=True)}
              for one in told.values()]
    reader = Reader(component, place)
    with torch.no_grad():
        for step, done in zip(found.steps, found.last_uses(), strict=True):
            weights, device = reader.read(step)
            # One call at a time, with the rows that it will have: a product of more rows rounds otherwise.
            for row, known in zip(rows.values(), values, strict=True):
                known.update(zip(step.out, step.run(known, weights, entry, device, move), strict=True))
                if step.layer is not None and step.layer in layout.at:
                    layout.view(row, step.layer).copy_(known[step.out[0]])
                for number in done:
                    del known[number]
    return rows


class Reader:
    """Reads single weights of a component from its files, as loading it would."""

    def __init__(self, component: Component, place: Place) -> None:
        self._files = {name: path for path in component.files for name in read_header(path)}
        self._types = {name: weight.dtype for name, weight in skeleton(component, place.dtype).named_parameters()}
        self._place, self._merger = place, LoraMerger(component)

    def read(self, step: Step) -> tuple[dict[str, torch.Tensor], str | None]:
        """The weights that a step needs, and the device that it computes on if it is a layer."""
        placement = self._place.placement
        device = None if step.layer is None else device_of(step.layer, placement.compute_devices)
        weights = {}
        for name in step.weights():
            if name not in self._files:
                raise NotPrecomputable(f"{name} is not in the files under this name: run with --no-modulation-table")
            with safe_open(self._files[name], "pt") as file:
                stored = file.get_tensor(name)
            weight = stored.to(self._types[name]).to(device or device_of(name, placement.compute_devices))
            weights[name] = self._merger.merged(name, weight)
        return weights, device
