"""What a notebook shows: a run while it goes on, its memory and charts, and plans, reports, artifacts as tables."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from runner.artifacts import Artifact, Where, open_store
from runner.media.previews import enlarged
from runner.reports import templates
from runner.reports.history import find_run, readable
from runner.reports.progress import Status, Summary
from runner.reports.report import stages_table
from runner.reports.templates import Thumbnail, thumbnail
from runner.text import gib, harmless, pictures
from stages.errors import InvalidInput
from stages.signatures import checked_class
from stages.wording import counted

if TYPE_CHECKING:
    # What needs torch is imported when it is asked for: every notebook imports this module before anything else.
    from torch import Tensor

    from runner.engine.report import Picture, Report, StageReport
    from runner.pipeline.result import Result
    from runner.pipeline.states import States
    from runner.planning.plan import Plan
    from runner.request import FilledRequest
    from stages.placement.placement import Placement
    from stages.placement.sharded import Sharded
    from stages.state import State

UPDATE_EVERY = 0.25
WIDTH = 860
SIDE, SMALL = 256, 128
MOST_PICTURES, MOST_TENSORS = 12, 20

html = partial(templates.call, "notebook.html.j2")


@checked_class
class Live:
    """An emit for the cell that makes it: `run_all(plan, emit=Live())`.

    It needs no widgets: what stands in the cell is replaced, at most four times a second.
    """

    def __init__(self) -> None:
        try:
            from IPython.display import display
        except ImportError as error:
            raise InvalidInput("Live shows a run in a notebook, and IPython is not installed -> pip install "
                               "'stagerun[notebook]', or leave emit=Live() out") from error

        self._status, self._summary = Status(), Summary()
        self._lines: list[str] = []
        self._preview: Thumbnail | None = None
        self._step, self._shown, self._now = 0, 0.0, ""
        self._handle = display(self, display_id=True)  # type: ignore[no-untyped-call]

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        self._status.see(kind, data)
        self._summary.see(kind, data)
        self._lines += self._summary.lines(kind, data)
        if kind == "preview":
            self._preview, self._step = thumbnail(enlarged(data["pixels"]()), SIDE), data["step"]
        elif kind == "end":
            self._preview = None
        self._now = "" if kind == "end" else self._status.line()
        if kind in ("run", "end", "preview", "warning") or time.monotonic() - self._shown >= UPDATE_EVERY:
            self._shown = time.monotonic()
            if self._handle is not None:
                self._handle.update(self)

    def __repr__(self) -> str:
        return "\n".join(map(harmless, [*self._lines, *([self._now] if self._now else [])]))

    def _repr_html_(self) -> str:
        return html("live", self._lines, self._now, self._preview, self._step)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one device in one stage. On the host they are those of the whole process, Python and torch included."""

    stage: str
    """The stage."""
    device: str
    """The device."""
    before: int
    """What was in use before the stage."""
    planned: int
    """What it was to take at most."""
    peak: int
    """What was in use at most."""
    after: int
    """What was in use after it."""


@checked_class
class Memory:
    """The memory of a run of `store`: on each device, in each stage, before it, planned, at most and after it."""

    HEAD = ("stage", "device", "before", "plan", "peak", "peak less before", "after")

    def __init__(self, store: Where, run: str) -> None:
        opened = open_store(store, readonly=True)
        self.run = run = find_run(opened, run)
        record = opened.load_run(run)
        with readable(run):
            self.rows = stage_memory(record)

    def __repr__(self) -> str:
        return f"Memory({self.run}, {', '.join(f'{row.stage} {row.device} {gib(row.peak)}' for row in self.rows)})"

    def _repr_html_(self) -> str:
        with readable(self.run):
            return html("memory", self.HEAD, [
                (row.stage, row.device, gib(row.before), gib(row.planned), gib(row.peak), gib(row.peak - row.before),
                 gib(row.after)) for row in self.rows])


@checked_class
class Charts:
    """The charts of the report of a run of `store`: where every block lay, memory over time, where the time went."""

    def __init__(self, store: Where, run: str) -> None:
        from runner.reports.charts.blocks import blocks
        from runner.reports.charts.gantt import gantt
        from runner.reports.charts.timeline import memory

        opened = open_store(store, readonly=True)
        self.run = run = find_run(opened, run)
        record = opened.load_run(run)
        with readable(run):
            drawings = [draw(record, WIDTH) for draw in (blocks, memory, gantt)]
        self._drawings = [drawing for drawing in drawings if drawing is not None]

    def __repr__(self) -> str:
        return f"Charts({self.run}, {len(self._drawings)} of them)"

    def _repr_html_(self) -> str:
        with readable(self.run):
            return html("charts", self._drawings, WIDTH)


def stage_memory(record: Mapping[str, Any]) -> list[StageMemory]:
    """The memory of each stage on each device, from a run's record; of a machine with cards, on its cards alone."""
    timeline, plan = record["timeline"], record["plan"]
    found = []
    for stage, peaks in timeline["peaks"].items():
        samples = [sample for sample in timeline["samples"] if sample[1] == stage]
        for at, device in enumerate(timeline["devices"] or ["cpu"]):
            used = [sample[4] if device == "cpu" else sample[3][at] for sample in samples]
            need = plan["stages"][stage].get(device, {"weights": 0, "activations": 0})
            found.append(StageMemory(stage, device, used[0], need["weights"] + need["activations"], peaks[device],
                                     used[-1]))
    return found


def plan_html(plan: "Plan") -> str:
    """The table of what goes where, and under it what was decided and refused."""
    from runner.planning import describe

    head, *rows = describe.needs(plan)
    return html("plan", plan.checkpoint.source, pictures(len(plan.requests)), head, rows, [*describe.choices(plan)],
                [*describe.refusals(plan)])


def stage_html(stage: "StageReport") -> str:
    """Seconds by part, peaks, and what the flush gave back."""
    head, *rows = stages_table([stage], flushes=True)
    return html("table", head, rows)


def report_html(report: "Report") -> str:
    """The stages, and the first pictures as thumbnails."""
    first = report.pictures[:MOST_PICTURES]
    head, *rows = stages_table(report.stages, flushes=True)
    return html("report", report.run, pictures(len(report.pictures)), head, rows,
                [(one.index, _shot(one, SMALL), one.request.prompt) for one in first],
                len(report.pictures) - len(first))


def picture_html(picture: "Picture") -> str:
    """A thumbnail over its prompt, size and seed."""
    return html("captioned", picture.index, _shot(picture, SIDE), picture.request.prompt, _facts(picture.request))


def result_html(result: "Result") -> str:
    """The first pictures as thumbnails, each over its prompt, size and seed."""
    import numpy as np

    first = list(zip(result.requests, result.images, strict=True))[:MOST_PICTURES]
    return html("result", [(asked.index, thumbnail(np.asarray(image), SIDE), asked.prompt, _facts(asked))
                           for asked, image in first], len(result.requests) - len(first))


def states_html(states: "States") -> str:
    """The tables of the first states."""
    return "".join(map(state_html, list(states)[:MOST_PICTURES]))


def artifact_html(artifact: Artifact) -> str:
    """What a stored state is, and the names, types and shapes of its tensors."""
    rows = [(name, spec["dtype"], "x".join(map(str, spec["shape"])) or "-")
            for name, spec in list(artifact.tensors.items())[:MOST_TENSORS]]
    return html("artifact", artifact.stage, artifact.key, gib(artifact.bytes), rows, len(artifact.tensors) - len(rows))


def state_html(state: "State") -> str:
    """The types, shapes and extremes of its tensors."""
    rows = [(name, f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}", _extremes(tensor))
            for name, tensor in state.tensors().items()]
    return html("table", ["tensor", "type and shape", "from, to"], rows, words=3)


def placement_html(placement: "Placement") -> str:
    """Where the weights of a component are."""
    return html("placement", str(placement), [])


def sharded_html(placement: "Sharded") -> str:
    """Where the blocks of a component are, and how many are on each device."""
    counts = Counter(placement.storage_devices[block] for block in placement.devices)
    return html("placement", str(placement), [(device, counted(count, "block")) for device, count in counts.items()])


def _facts(asked: "FilledRequest") -> str:
    return f"{asked.width}x{asked.height}, {asked.steps} steps, seed {asked.seed}"


def _shot(picture: "Picture", side: int) -> Thumbnail | None:
    state = picture.store.get(picture.key)
    return None if state is None else thumbnail(state.tensors()["pixels"].numpy(), side)


def _extremes(tensor: "Tensor") -> str:
    return ", ".join(f"{value.item():.4g}" for value in (tensor.min(), tensor.max())) if tensor.numel() else ""


# By module and name, so that nothing need be imported to show it.
HTML: Mapping[tuple[str, str], Callable[[Any], str]] = {
    ("runner.artifacts.manifest", "Artifact"): artifact_html,
    ("runner.engine.report", "Picture"): picture_html,
    ("runner.engine.report", "Report"): report_html,
    ("runner.engine.report", "StageReport"): stage_html,
    ("runner.pipeline.result", "Result"): result_html,
    ("runner.pipeline.states", "States"): states_html,
    ("runner.planning.plan", "Plan"): plan_html,
    ("stages.placement.placement", "Resident"): placement_html,
    ("stages.placement.sharded", "Sharded"): sharded_html,
    ("stages.placement.streaming", "Streamed"): sharded_html,
    ("stages.placement.tensor_parallel", "TensorParallel"): placement_html,
    ("stages.state", "State"): state_html,
}


def register(shell: Any) -> None:
    """Have IPython's shell show the types above as HTML."""
    formatter = shell.display_formatter.formatters["text/html"]
    for (module, name), show in HTML.items():
        formatter.for_type_by_name(module, name, show)
