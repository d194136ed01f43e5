"""Jobs done by several processes: ranks of this host, or workers of a Ray cluster.

The process that asks for ranks need not import torch, and has no context on any card.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runner.distributed.process_group import RankProcesses
from runner.distributed.results import RankResult, joined
from runner.distributed.watchdog import TIMEOUT
from runner.engine.report import Failure, Picture, Report
from runner.engine.session import open_job_store, prepared
from runner.events import Emit, silent
from runner.inputs import check_whole
from runner.job import STAGES, Job
from runner.job_fields import function
from runner.media.writer import PictureWriter
from runner.placement_options import PROCESSES
from stages.errors import InvalidInput, from_json
from stages.signatures import checked_call
from stages.wording import kind_of

Done = Callable[[Picture], None]


@checked_call
def spawn(
    job: Job, ranks: int | RankProcesses | None = None, *, emit: Emit = silent, done: Done | None = None,
    timeout: float = TIMEOUT, verbose: bool = False,
) -> Report:
    """Do a job with several processes of this host, each with its own cards; the report of all of it.

    `ranks` are as many new processes (by default 2, or those of a denoise that is tensor parallel), or RankProcesses
    that are at work already. Pictures go to the files that the job's output names; `done` is told of each in the end.
    Raises what `make_plan` and `run_all` raise, and RankLost, naming rank, stage and step, for a rank that was killed,
    failed, left early or does nothing for `timeout` seconds.
    """
    check_job(job)
    _check_listeners(emit, done)
    if job.store == "memory":
        raise InvalidInput("ranks share a store, and each has a memory of its own -> `store=DIR`, or leave it out")
    if not isinstance(ranks, RankProcesses):
        with RankProcesses(process_count(job, ranks), timeout=timeout, verbose=verbose) as processes:
            return spawn(job, processes, emit=emit, done=done)
    outcome = ranks.run(prepared(job).to_json(), emit)
    if "error" in outcome:
        raise from_json(outcome["error"])
    made = Job.from_json(outcome["job"])
    results = [RankResult.from_json(result) for result in outcome["results"]]
    report = joined(made, results, open_job_store(made, emit))
    if done is not None:
        for picture in report.pictures:
            done(picture)
    return report


@checked_call
def run_on_ray(job: Job, *, emit: Emit = silent, done: Done | None = None, verbose: bool = False) -> Report:
    """Do a job with workers of a Ray cluster, or of a Ray of this machine's own; the report of all of it.

    The job's store is a folder or URL that all nodes see; `done` is told of each picture as soon as it is there; by
    default it goes to the file that the job's output names, if it names any. Raises what `run_all` raises, and
    InvalidInput where Ray is not installed.
    """
    check_job(job)
    _check_listeners(emit, done)
    if job.store == "memory":
        raise InvalidInput("Ray needs a store that all its workers share -> `store=DIR` or a URL")
    if job.tensor_parallel is not None:
        raise InvalidInput("Ray and denoise=tensor_parallel contradict each other -> leave one of them out")
    # After what can be refused without them: torch and Ray take seconds.
    from runner.distributed.ray import cluster

    failed: list[tuple[int, str]] = []
    if done is None and job.output.paths:
        done = PictureWriter(job, emit, lambda at, text: failed.append((job.requests[at].index, text))).write
    report = cluster.run_job(prepared(job), emit=emit, done=done, verbose=verbose)
    lost = (Failure(report.job.positions[index], STAGES[-1], text) for index, text in failed)
    return replace(report, failures=(*report.failures, *lost))


def check_job(job: Any) -> None:
    """Raise InvalidInput for anything else than a job."""
    if not isinstance(job, Job):
        raise InvalidInput(f"{kind_of(job)} is no job -> Job(\"flux\", ...), a plan's plan.job, or a "
                           f"pipeline's pipe.job_for(...)")


def _check_listeners(emit: Emit, done: Done | None) -> None:
    function("emit", emit, "kind, data")
    if done is not None:
        function("done", done, "picture")


def process_count(job: Job, ranks: int | None) -> int:
    """How many processes a job takes; InvalidInput where different counts are asked for, or one alone."""
    if ranks is not None:
        check_whole("ranks", ranks, 1, PROCESSES)
    asked = job.tensor_parallel
    if asked is None:
        return 2 if ranks is None else ranks
    if ranks is not None and asked not in (0, ranks):
        raise InvalidInput(f"`place=denoise=tensor_parallel:{asked}` and `ranks={ranks}` contradict each other -> "
                           f"leave one of them out")
    found = asked or ranks or len(job.devices) or _devices()
    if found < 2:
        raise InvalidInput("`place=denoise=tensor_parallel` needs several cards, and there is one device -> leave it "
                           "out; on a CPU, `ranks=2` says how many processes")
    return found


def _devices() -> int:
    from stages.machine import device_names

    return len(device_names())
