"""What happens in a run, told through one callable: the kinds of events, and ways to pass them on."""

import base64
import json
import time
from collections.abc import Mapping
from threading import Lock
from typing import Any, TextIO

from stages.events import Emit, silent

__all__ = ["EVENTS", "Emit", "from_wire", "json_lines", "one_at_a_time", "silent", "tee", "to_wire"]

EVENTS: Mapping[str, Mapping[str, str]] = {
    "begin": {"what": "what is done before the first stage, such as planning",
              "workers": "of Ray alone: by stage, the worker that did it last"},
    "plan": {"text": "whether it fits, in a line"},
    "run": {"run": "its name", "requests": "how many", "model": "where it comes from", "seed": "of the first request"},
    "ranks": {"ranks": "how many share the run", "stage": "in which the last of them is; empty before the first",
              "done": "pictures of all ranks that are through it, parts of pictures counted"},
    "warning": {"text": "what to know"},
    "stage": {"stage": "its name", "requests": "how many", "reused": "how many of them the store has"},
    "table": {"stage": "its name", "layers": "how many were computed ahead", "bytes": "of the table",
              "seconds": "that it took"},
    "load": {"stage": "its name", "component": "that is loaded", "device": "where its inputs go", "bytes": "of files"},
    "loaded": {"stage": "its name", "seconds": "that all components took"},
    "readahead": {"stage": "the next one", "bytes": "of its files that are read into the page cache"},
    "item": {"stage": "its name", "index": "of the artifact, from 0", "of": "how many artifacts",
             "request": "the first that it is for"},
    "resumed": {"stage": "its name", "request": "that goes on", "step": "after which it goes on"},
    "step": {"stage": "its name", "step": "that is done, from 1", "steps": "of the loop", "index": "of the artifact",
             "of": "how many artifacts", "request": "the first that it is for",
             "timestep": "a function that gives that of the scheduler, where there is one",
             "latents": "a function that gives them on the host",
             "clean": "a function that gives what they would be if the last direction led to the end",
             "generator": "a function that gives the state of what the next steps draw noise from, if they draw any"},
    "preview": {"stage": "its name", "request": "that it is of", "step": "that is done", "steps": "of the loop",
                "pixels": "a function that gives them: uint8 [height, width, 3]"},
    "part": {"stage": "its name", "part": "compute, save, flush or table", "seconds": "that it took"},
    "failure": {"stage": "where", "request": "that came to nothing", "text": "why", "line": "of the prompt file",
                "id": "that the line gave"},
    "picture": {"path": "where it was written", "index": "of the request in the whole run", "seed": "of the request",
                "position": "of the request in the job", "kept": "whether the same picture was there already",
                "card": "what its metadata say", "line": "of the prompt file", "id": "that the line gave"},
    "flush": {"stage": "its name", "freed": "bytes given back", "left": "bytes above the baseline",
              "leftovers": "the largest tensors that are left"},
    "end": {"stage": "its name", "seconds": "by part", "peak": "bytes at most, by device"},
}


def tee(*emits: Emit) -> Emit:
    """One emit that tells all of `emits`."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        for each in emits:
            each(kind, data)

    return emit


def one_at_a_time(emit: Emit) -> Emit:
    """The same emit for several threads: who listens need not know of lanes."""
    lock = Lock()

    def serial(kind: str, data: Mapping[str, object]) -> None:
        with lock:
            emit(kind, data)

    return serial


def json_lines(stream: TextIO) -> Emit:
    """Writes every event as one JSON line with its `kind` and the `time` in seconds since 1970."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        facts = {name: value for name, value in data.items() if not callable(value)}
        stream.write(json.dumps({"time": round(time.time(), 3), "kind": kind, **facts}, default=str) + "\n")
        stream.flush()

    return emit


def to_wire(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """An event as JSON for another process: without functions, but with the pixels of a preview."""
    facts = {name: value for name, value in data.items() if not callable(value)}
    if kind == "preview":
        pixels = data["pixels"]()
        facts["pixels"] = [list(pixels.shape), base64.b64encode(pixels.tobytes()).decode()]
    return {"kind": kind, "data": facts}


def from_wire(event: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The kind and the data of an event that `to_wire` wrote."""
    kind, data = event["kind"], dict(event["data"])
    if kind == "preview":
        shape, text = data["pixels"]

        def pixels() -> Any:
            import numpy as np

            return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)

        data["pixels"] = pixels
    return kind, data
