"""Ray as the engine of a command line."""

import os
import sys
import time
from dataclasses import replace
from typing import Any

from runner.commands.make import advised, complain, hush, logged, opened, planned, tell, timed, untracked
from runner.commands.order import Order
from runner.commands.results import Results, Writer
from runner.commands.resumption import absolute as there
from runner.commands.resumption import record_of, resumable
from runner.distributed.task import Task
from runner.reports.progress import Progress


def produce(asked: Order, said: Any) -> int:
    """Make the pictures of an order on Ray; the exit code, 1 where some of them came to nothing."""
    begin = time.perf_counter()
    hush(said.verbose)
    asked = absolute(asked)
    progress = Progress(sys.stderr, verbosity=-1 if said.quiet else int(said.verbose))
    seconds: dict[str, float] = {}
    with logged(said.log, progress) as log, resumable(asked.run, asked.store, log) as emit:
        store = opened(asked, said, emit)
        with timed(seconds, "imports"), progress, untracked():
            emit("begin", {"what": "importing torch, diffusers and ray"})
            from runner.distributed.ray import cluster
        out = sys.stdout
        with cluster.connected(verbose=said.verbose) as ray:
            with timed(seconds, "plan"):
                job, asked = planned(asked, said, machine=cluster.machine(ray, asked.devices))
            complain(f"{line}" for line in asked.refused)
            results = Results(asked, said, out)
            writer = Writer(asked, said, emit, results.tell)
            with progress, advised(job, asked, said):
                report = cluster.run_all(ray, Task(asked, said), job, store=store, emit=writer.hear, done=writer.keep,
                                         record=record_of(asked, said, job))
    seconds |= {"pictures": writer.seconds, "total": time.perf_counter() - begin}
    return tell(report, [*report.failures, *writer.failures], results, seconds, said)


def absolute(asked: Order) -> Order:
    """The order as processes in other folders understand it."""
    model = asked.model
    return replace(asked, store=asked.store if "://" in asked.store else os.path.abspath(asked.store),
                   model=None if model is None else there(model),
                   loras=tuple(replace(lora, source=there(lora.source)) for lora in asked.loras))
