"""A run as a notebook shows it: while it goes on, and what its record says of memory and time."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.media.previews import enlarged
from runner.reports.charts.blocks import blocks
from runner.reports.charts.gantt import gantt
from runner.reports.charts.style import STYLE
from runner.reports.charts.timeline import memory
from runner.reports.markup import FAINT, block, image, said, table
from runner.reports.memory_table import measured
from runner.reports.progress import Status, Summary
from runner.text import gib

if TYPE_CHECKING:
    from runner.artifacts import Store

APART = 0.25
WIDTH = 860


class Live:
    """An emit for the cell that makes it: `run_all(plan, emit=Live())`.

    It needs no widgets: what stands in the cell is replaced, at most four times a second.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self._status, self._summary = Status(), Summary()
        self._lines: list[str] = []
        self._preview, self._shown, self._at = "", 0.0, ""
        self._handle = display(self, display_id=True)  # type: ignore[no-untyped-call]

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        self._status.see(kind, data)
        self._summary.see(kind, data)
        self._lines += self._summary.lines(kind, data)
        if kind == "preview":
            self._preview = image(enlarged(data["pixels"]()), 256, f"after step {data['step']}")
        elif kind == "end":
            self._preview = ""
        self._at = "" if kind == "end" else self._status.line()
        if kind in ("run", "end", "preview", "warning") or time.monotonic() - self._shown >= APART:
            self._shown = time.monotonic()
            if self._handle is not None:
                self._handle.update(self)

    def __repr__(self) -> str:
        return "\n".join([*self._lines, *([self._at] if self._at else [])])

    def _repr_html_(self) -> str:
        faint = f'<span style="{FAINT}">{said(self._at)}</span>' if self._at else ""
        return block(*map(said, self._lines), faint, self._preview)


class Memory:
    """The memory of a run of `store`: on each device, in each stage, before it, planned, at most and after it."""

    HEAD = ("stage", "device", "before", "plan", "peak", "peak less before", "after")

    def __init__(self, store: "Store", run: str) -> None:
        self.run, self.rows = run, measured(store.load_run(run))

    def __repr__(self) -> str:
        return f"Memory({self.run}, {', '.join(f'{row.stage} {row.device} {gib(row.peak)}' for row in self.rows)})"

    def _repr_html_(self) -> str:
        rows = [(said(row.stage), said(row.device), gib(row.before), gib(row.planned), gib(row.peak),
                 gib(row.peak - row.before), gib(row.after)) for row in self.rows]
        return block(table(self.HEAD, rows, words=2))


class Charts:
    """The charts of the report of a run of `store`: where every block lay, memory over time, where the time went."""

    def __init__(self, store: "Store", run: str) -> None:
        self.run = run
        record = store.load_run(run)
        self._drawings = [drawing for draw in (blocks, memory, gantt) if (drawing := draw(record, WIDTH)) is not None]

    def __repr__(self) -> str:
        return f"Charts({self.run}, {len(self._drawings)} of them)"

    def _repr_html_(self) -> str:
        parts = "".join(f'<div style="margin:16px 0">{drawing}</div>' for drawing in self._drawings)
        # The colors follow the reader's device, and the page around need not.
        return (f'<style>{STYLE}</style><div class="stagerun" style="background:var(--paper);padding:8px 16px;'
                f'max-width:{WIDTH}px">{parts}</div>')
