"""A run as a notebook shows it: one line that moves, the lines that stay, and the last rough picture."""

import time
from collections.abc import Mapping
from typing import Any

from runner.markup import FAINT, block, image, said
from runner.previews import enlarged
from runner.progress import Status, Summary

APART = 0.25


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
