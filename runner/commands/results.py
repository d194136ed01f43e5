"""What standard output says of a run: the paths of its pictures, or JSON."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from runner.commands.refusal import as_option
from runner.engine.report import Failure, Report
from runner.job import Job, RefusedLine
from runner.media.writer import label
from runner.reports.report import document
from runner.terminal import say_exactly, say_json
from stages.errors import worded


class Results:
    """An emit that gives `stream` the paths of a job's pictures, in order and at the end, or one JSON object.

    For a prompt file it gives each path as soon as the file is there, unless it is a terminal, which shows the
    progress until then; or, as JSON, a line for each picture, one for each failure and a last one for the run.
    """

    def __init__(self, job: Job, stream: TextIO, *, as_json: bool) -> None:
        self._stream, self._json, self._listed = stream, as_json, job.listed
        indices = (request.index for request in job.requests)
        self._paths = dict(zip(indices, job.output.paths, strict=False)) if job.output.paths else {}
        self._held: dict[int, Mapping[str, Any]] = {}
        self._refused: set[RefusedLine] = set()
        self._written: dict[int, tuple[str, int]] = {}

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind != "picture":
            return
        # Ranks and Ray are given whole paths.
        path = self._paths.get(data["index"], data["path"])
        self._written[data["position"]] = path, data["seed"]
        labels = {name: data[name] for name in ("line", "id") if name in data}
        if self._json and self._listed:
            self._line("picture", {"path": path, **labels, **data["card"]})
        elif self._listed and not self._stream.isatty():
            say_exactly(self._stream, [path])
        else:
            self._held[data["position"]] = {"path": path, **(data["card"] if self._json else {})}

    @property
    def written(self) -> list[tuple[str, int]]:
        """The paths and the seeds of the pictures that were written, in their order."""
        return [self._written[at] for at in sorted(self._written)]

    def refuse(self, lines: Iterable[RefusedLine]) -> None:
        """Tell of lines that make no picture, once."""
        for line in lines:
            if self._json and line not in self._refused:
                self._line("failed", {"line": line.line, "text": worded(line.text, as_option)})
            self._refused.add(line)

    def finish(
        self, report: Report, failures: Sequence[Failure], seconds: Mapping[str, float], *, told: bool = False
    ) -> None:
        """Say the rest; paths that somebody was `told` already are not said again."""
        self.refuse(report.job.refused)
        held = [self._held[at] for at in sorted(self._held)]
        if self._json:
            self._document(document(report, held, [_failed(report.job, failure) for failure in failures], seconds))
        elif report.job.output.paths or report.job.store == "memory":
            if told:
                return
            say_exactly(self._stream, [str(picture["path"]) for picture in held])
        else:
            say_exactly(self._stream, _artifacts(report))

    def _document(self, whole: Mapping[str, Any]) -> None:
        if not self._listed:
            say_json(self._stream, whole)
            return
        for failure in whole["failed"]:
            self._line("failed", failure)
        self._line("run", {name: value for name, value in whole.items() if name not in ("pictures", "failed")})

    def _line(self, kind: str, data: Mapping[str, Any]) -> None:
        say_json(self._stream, {"kind": kind, **data})


def _failed(job: Job, failure: Failure) -> dict[str, Any]:
    return {**label(job, failure.index), "index": job.requests[failure.index].index, "stage": failure.stage,
            "text": worded(failure.text, as_option)}


def _artifacts(report: Report) -> list[str]:
    """The manifests of the stage that the run stopped after."""
    lost = {failure.index for failure in report.failures}
    last = report.keys[report.stages[-1].stage]
    keys = dict.fromkeys(key for at, key in enumerate(last) if at not in lost)
    store = report.job.store
    root = store.rstrip("/") if "://" in store else str(Path(store))
    return [f"{root}/stages/{key}.json" for key in keys]
