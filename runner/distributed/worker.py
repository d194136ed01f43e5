"""A rank that `spawn` started: python -m runner.distributed.worker. It does job after job until nobody has one."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from runner.distributed.channel import Pipe
from runner.distributed.env import Rank, launched
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.rank import RankWorker
from runner.distributed.task import read_options, read_task
from runner.events import Emit, tee
from stages.errors import BadResult, DoesNotFit, ModelError, StoreError

REFUSALS: tuple[type[Exception], ...] = (ModelError, DoesNotFit, StoreError, BadResult, ValueError)


def main() -> int:
    """Serve whoever holds the other end of the pipe; the exit code."""
    rank, pipe = launched(), Pipe.inherited()
    assert rank is not None, "whoever started this process said which rank it is"
    pulse = Heartbeat(pipe.beat)
    try:
        with pulse:
            serve(rank, pipe, pulse)
    except KeyboardInterrupt:
        return 130
    return 0


def serve(rank: Rank, pipe: Pipe, pulse: Heartbeat) -> None:
    """Do jobs until the pipe closes: the first rank those that it is sent, the others those that it publishes."""
    if not rank.first:
        prepare(pulse)
    while True:
        with pulse.waiting():
            job = pipe.receive("job" if rank.first else "task")
        if job is None:
            return
        if not rank.first:
            pipe.hand_in(RankWorker(rank, pipe, pulse, tee(pulse, warning(rank, pipe))).follow(job))
        elif "family" in job:
            pipe.send("result", {"code": command(job, rank, pipe, pulse)})
        else:
            pipe.send("result", call(job, rank, pipe, pulse))


def prepare(pulse: Heartbeat) -> None:
    """Import what is heavy: the other ranks do it while the first one still looks at the order."""
    from runner.commands.make import untracked

    pulse("begin", {"what": "importing torch and diffusers"})
    with untracked():
        import_module("runner.engine.run")


def command(job: Mapping[str, Any], rank: Rank, pipe: Pipe, pulse: Heartbeat) -> int:
    """A command line's job: what there is to say is said here; the exit code."""
    from runner.commands.cli import respond
    from runner.commands.distributed import speak
    from runner.commands.order import order

    said = read_options(job["said"])
    return respond(lambda: speak(order(job["family"], said), said, rank, pipe, pulse), verbose=said.verbose)


def call(job: Mapping[str, Any], rank: Rank, pipe: Pipe, pulse: Heartbeat) -> dict[str, Any]:
    """A Python call's job: all shares, or what was refused before any rank began."""
    from runner.commands.make import opened

    prepare(pulse)

    def emit(kind: str, data: Mapping[str, object]) -> None:
        pipe.send("event", {"kind": kind, "data": {name: x for name, x in data.items() if not callable(x)}})

    task = read_task(job)
    try:
        store = opened(task.order, task.said, emit)
        return {"shares": RankWorker(rank, pipe, pulse, tee(pulse, emit)).lead(task, store)[1]}
    except REFUSALS as error:
        kind = next(kind for kind in REFUSALS if isinstance(error, kind))
        return {"refused": {"kind": kind.__name__, "text": str(error)}}


def warning(rank: Rank, pipe: Pipe) -> Emit:
    """An emit that passes on warnings, and nothing else, with the number of the rank."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        if kind == "warning":
            pipe.send("event", {"kind": kind, "data": {"text": f"rank {rank.rank}: {data['text']}"}})

    return emit


if __name__ == "__main__":
    sys.exit(main())
