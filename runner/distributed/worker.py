"""A rank that `spawn` started: python -m runner.distributed.worker. It does job after job until nobody has one."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from runner.distributed.channel import Pipe
from runner.distributed.env import Rank, rank_of
from runner.distributed.heartbeat import Heartbeat
from runner.events import Emit, to_wire
from runner.job import Job
from runner.startup import hush, untracked
from stages.errors import StagerunError


def main() -> int:
    """Serve whoever holds the other end of the pipe; the exit code."""
    rank = rank_of()
    assert rank is not None, "whoever started this process said which rank it is"
    pipe = Pipe.inherited(rank)
    heartbeat = Heartbeat(pipe.beat)
    try:
        with heartbeat:
            serve(rank, pipe, heartbeat)
    except KeyboardInterrupt:
        return 130
    return 0


def serve(rank: Rank, pipe: Pipe, heartbeat: Heartbeat) -> None:
    """Do jobs until the pipe closes: the first rank those that it is sent, the others those that it publishes."""
    emit = events(pipe) if rank.first else remarks(rank, pipe)
    # All ranks import while the first one still waits for its job.
    heartbeat("begin", {"what": "importing torch and diffusers"})
    hush()
    with untracked():
        ranks: Any = import_module("runner.distributed.tensor_parallel")
        import torch
    threads = torch.get_num_threads()
    while True:
        with heartbeat.waiting():
            message = pipe.receive("job" if rank.first else "published")
        if message is None:
            return
        job = message if rank.first else message["job"]
        torch.set_num_threads(threads_for(job["devices"] or (), threads, rank))
        if rank.first:
            pipe.send("outcome", outcome(ranks, message, rank, pipe, heartbeat, emit))
        else:
            job = Job.from_json(message["job"])
            pipe.hand_in(ranks.worker_for(job, rank, pipe, heartbeat, emit).run_rank(message).to_json())


def threads_for(devices: Sequence[str], threads: int, rank: Rank) -> int:
    """How many of `threads` CPU threads a rank takes for a job.

    On a CPU sums are split by the number of threads, and pictures are to be those of one process bit for bit, so it
    takes them all.
    """
    from stages.machine import device_names

    on_cpu = device_names(["cpu"] if list(devices) == ["cpu"] else ()) == ["cpu"]
    return threads if on_cpu else max(1, threads // rank.local_size)


def outcome(
    ranks: Any, message: Mapping[str, Any], rank: Rank, pipe: Pipe, heartbeat: Heartbeat, emit: Emit
) -> dict[str, Any]:
    """What came of a job as JSON: the job as it was done and all results, or the error of the first rank."""
    try:
        job = Job.from_json(message)
        job, results = ranks.worker_for(job, rank, pipe, heartbeat, emit).run_rank0(job)
        return {"job": job.to_json(), "results": [result.to_json() for result in results]}
    except StagerunError as error:
        return {"error": error.to_json()}


def events(pipe: Pipe) -> Emit:
    """An emit that passes everything on."""
    return lambda kind, data: pipe.send("event", to_wire(kind, data))


def remarks(rank: Rank, pipe: Pipe) -> Emit:
    """An emit that passes on previews, and warnings with the number of the rank."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        if kind == "warning":
            data = {"text": f"rank {rank.rank}: {data['text']}"}
        if kind in ("warning", "preview"):
            pipe.send("event", to_wire(kind, data))

    return emit


if __name__ == "__main__":
    sys.exit(main())
