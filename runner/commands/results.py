"""What a run gives: every picture written as soon as it is there, and what standard output says of it."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from runner.commands.order import Order
from runner.events import Emit, Tolerant
from runner.media import paths
from runner.media.image import card_of, png, shows
from runner.reports.report import document

if TYPE_CHECKING:
    from runner.engine.run import Picture, Report
    from runner.engine.stage_runner import Failure

Tell = Callable[[int, Mapping[str, Any]], None]


class Writer:
    """Writes the pictures of an order; `tell` hears of each, with its position and what its metadata say.

    `failures` are those whose names were taken meanwhile, `seconds` the time that all of it took.
    """

    def __init__(self, asked: Order, said: Any, emit: Emit, tell: Tell) -> None:
        self._asked, self._emit, self._tell = asked, emit, tell
        self._metadata, self._overwrite = not said.no_metadata, said.overwrite
        self._at = {item.request.index: at for at, item in enumerate(asked.items)}
        self.failures: list[Failure] = []
        self.seconds = 0.0

    def keep(self, picture: "Picture") -> None:
        """Write a picture, or leave the same one that is there to a resumed run; StoreError where it cannot be."""
        from runner.engine.stage_runner import Failure

        begin = time.perf_counter()
        at = self._at[picture.index]
        path, card = self._asked.paths[at], card_of(picture.request, picture.facts)
        try:
            kept = self._written(path, picture, card)
        except ValueError as error:
            if len(self._asked.items) == 1 or type(error) is not ValueError:
                raise
            self.failures.append(Failure(at, "decode", str(error)))
            self.hear("failure", {"stage": "decode", "request": at, "text": str(error)})
        else:
            self._emit("picture", {"path": str(path), "index": picture.index, "seed": picture.request.seed,
                                   "kept": kept})
            self._tell(at, card)
        self.seconds += time.perf_counter() - begin

    def hear(self, kind: str, data: Mapping[str, object]) -> None:
        """The emit of the run: the same events, a failure with the line and id that it concerns."""
        request = data.get("request")
        known = kind == "failure" and isinstance(request, int)
        self._emit(kind, {**data, **label(self._asked, request)} if known and isinstance(request, int) else data)

    def _written(self, path: Path, picture: "Picture", card: Mapping[str, Any]) -> bool:
        pixels = picture.read()
        if self._asked.resumed and os.path.lexists(path) and shows(path, pixels):
            return True
        paths.write(path, png(pixels, card if self._metadata else None), overwrite=self._overwrite)
        return False


class Results:
    """What `stream` gets of an order: the paths of its pictures, in order and at the end, or one JSON object.

    For a prompt file it gets each path as soon as the file is there, unless it is a terminal, which shows the progress
    until then; or, as JSON, a line for each picture, one for each failure and a last one for the run.
    """

    def __init__(self, asked: Order, said: Any, stream: TextIO) -> None:
        self.asked, self._stream, self._json = asked, stream, bool(said.json)
        self._held: dict[int, Mapping[str, Any]] = {}
        if self._json:
            for line in asked.refused:
                self._line("failed", {"line": line.line, "text": line.text})

    def tell(self, at: int, card: Mapping[str, Any]) -> None:
        """Take in that picture number `at` of the order is written."""
        path = str(self.asked.paths[at])
        if self._json and self.asked.listed:
            self._line("picture", {"path": path, **label(self.asked, at), **card})
        elif self.asked.listed and not self._stream.isatty():
            say(self._stream, [path])
        else:
            self._held[at] = {"path": path, **(card if self._json else {})}

    def finish(self, report: "Report", failures: "Sequence[Failure]", seconds: Mapping[str, float]) -> None:
        """Say the rest."""
        held = [self._held[at] for at in sorted(self._held)]
        if self._json:
            self._document(document(report, held, [self._failure(failure) for failure in failures], seconds))
        elif self.asked.paths or self.asked.store == "memory":
            say(self._stream, [str(told["path"]) for told in held])
        else:
            say(self._stream, self._artifacts(report))

    def _failure(self, failure: "Failure") -> dict[str, Any]:
        index = self.asked.items[failure.index].request.index
        return {**label(self.asked, failure.index), "index": index, "stage": failure.stage, "text": failure.text}

    def _document(self, whole: Mapping[str, Any]) -> None:
        if not self.asked.listed:
            say(self._stream, [json.dumps(whole, ensure_ascii=False)])
            return
        for told in whole["failed"]:
            self._line("failed", told)
        self._line("run", {name: value for name, value in whole.items() if name not in ("pictures", "failed")})

    def _artifacts(self, report: "Report") -> list[str]:
        """The manifests of the stage that the run stopped after."""
        lost = {failure.index for failure in report.failures}
        last = report.keys[report.stages[-1].stage]
        keys = dict.fromkeys(key for at, key in enumerate(last) if at not in lost)
        store = self.asked.store
        root = store.rstrip("/") if "://" in store else str(Path(store))
        return [f"{root}/stages/{key}.json" for key in keys]

    def _line(self, kind: str, data: Mapping[str, Any]) -> None:
        say(self._stream, [json.dumps({"kind": kind, **data}, ensure_ascii=False)])


def label(asked: Order, at: int) -> dict[str, Any]:
    """The line and the id of picture number `at` of the order, where it has them."""
    item = asked.items[at]
    return {**({"line": item.line} if item.line else {}), **({"id": item.id} if item.id is not None else {})}


def say(stream: TextIO, told: Iterable[str]) -> None:
    """Write lines to a stream that may be gone."""
    out = Tolerant(stream)
    out.write("".join(f"{line}\n" for line in told))
    out.flush()
