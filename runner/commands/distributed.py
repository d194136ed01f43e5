"""Several processes behind one command line: ranks of its own, ranks that a launcher started, and Ray."""

import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from runner.commands import option_values
from runner.commands.options import RunOptions
from runner.commands.refusal import as_option, complain
from runner.commands.results import Results
from runner.distributed import api
from runner.distributed.channel import Launcher
from runner.distributed.env import Rank
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.results import joined
from runner.distributed.watchdog import TIMEOUT
from runner.engine.report import Report
from runner.engine.session import open_job_store, prepared
from runner.events import Emit, one_at_a_time, tee
from runner.job import Job
from runner.media.previews import PreviewFiles
from runner.startup import untracked
from runner.terminal import say
from runner.text import clean, shown
from stages.errors import InvalidInput, RankLost, StagerunError

# Does a job and gives the report of it; seconds of parts outside of the stages go into the mapping.
Engine = Callable[[Job, Emit, Results, dict[str, float]], Report]


def on_ranks(options: RunOptions, job: Job, emit: Emit, results: Results, seconds: dict[str, float]) -> Report:
    """Do a job with ranks of this command's own, all of which end with it."""
    count = check_ranks(options)
    report = api.spawn(job, count, emit=emit, timeout=rank_timeout(options), verbose=options.verbose)
    complain(report.job.refused)
    return report


def on_ray(options: RunOptions, job: Job, emit: Emit, results: Results, seconds: dict[str, float]) -> Report:
    """Do a job with workers of a Ray cluster; its pictures are written here."""
    report = api.run_on_ray(job, emit=emit, verbose=options.verbose)
    complain(report.job.refused)
    return report


def join(
    rank: Rank, options: RunOptions, parse: Callable[[], Job], produce: Callable[[Job, Engine], int]
) -> int:
    """Be one of the ranks that a launcher started; the exit code.

    The first of them parses the command line and says how all of it goes; the others take what it publishes, and say
    warnings alone.
    """
    if check_ranks(options) is not None:
        raise InvalidInput(f"--ranks {shown(str(options.ranks))}: a launcher started {rank.size} ranks already -> "
                           f"leave it out")
    timeout = rank_timeout(options)
    channel: Launcher | None = None
    try:
        # Refused by the first rank before anything heavy is imported.
        job = _shared(prepared(parse())) if rank.first else None
        channel = Launcher(rank, _tell_lost, timeout)
        return _joined(rank, channel, job, produce)
    except StagerunError as error:
        if rank.first and not isinstance(error, RankLost):
            # Or the others would take it for lost, when the launcher stops them.
            (channel or Launcher(rank, _tell_lost, timeout)).leave()
        raise
    except KeyboardInterrupt as stopped:
        if rank.first:
            raise
        number = getattr(stopped, "signal", signal.SIGINT)
        raise SystemExit(128 + number) from None


def _shared(job: Job) -> Job:
    """The job; InvalidInput where its store cannot be shared."""
    if job.store == "memory":
        raise InvalidInput("ranks share a store, and each has a memory of its own -> `store=DIR`, or leave it out")
    return job


def _joined(rank: Rank, channel: Launcher, job: Job | None, produce: Callable[[Job, Engine], int]) -> int:
    """Do the first rank's job, or what it publishes; the exit code."""
    heartbeat = Heartbeat(channel.beat)
    try:
        with heartbeat:
            if job is not None:
                return produce(job, partial(_as_rank0, rank, channel, heartbeat))
            with heartbeat.waiting():
                message = channel.receive_job()
            with untracked():
                from runner.distributed.tensor_parallel import worker_for
            job = Job.from_json(message["job"])
            warnings = _warnings_of(rank)
            emit = tee(warnings, PreviewFiles(tuple(map(Path, job.output.paths)), warnings))
            result = worker_for(job, rank, channel, heartbeat, emit).run_rank(message)
        # After the last beat: the first rank may leave as soon as it has all results, and the store with it.
        channel.hand_in(result.to_json())
        return 0
    except KeyboardInterrupt:
        # A launcher stops all ranks when it lost one.
        culprit = channel.culprit()
        if culprit is not None:
            raise RankLost(culprit) from None
        raise


def check_ranks(options: RunOptions) -> int | None:
    """How many ranks the options ask for, if they do; InvalidInput for what is no number of them, and no timeout."""
    rank_timeout(options)
    return None if options.ranks is None else option_values.ranks(options.ranks)


def rank_timeout(options: RunOptions) -> float:
    """Seconds in which a rank may do nothing."""
    text = options.rank_timeout
    return TIMEOUT if text is None else option_values.rank_timeout(text)


def _as_rank0(
    rank: Rank, channel: Launcher, heartbeat: Heartbeat, job: Job, emit: Emit, results: Results,
    seconds: dict[str, float],
) -> Report:
    with untracked():
        emit("begin", {"what": "importing torch and diffusers"})
        from runner.distributed.tensor_parallel import worker_for
    # How far the others are is told by the thread that hears of them.
    emit = one_at_a_time(emit)
    channel.follow(emit)
    made, found = worker_for(job, rank, channel, heartbeat, emit).run_rank0(job)
    complain(made.refused)
    return joined(made, found, open_job_store(made, emit))


def _warnings_of(rank: Rank) -> Emit:
    """An emit that says warnings, and nothing else, with the number of the rank."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        if kind == "warning":
            say(sys.stderr, [f"warning: {clean(f'rank {rank.rank}: ' + str(data['text']))}"])

    return emit


def _tell_lost(error: RankLost) -> None:
    say(sys.stderr, [f"error: {clean(error.message(as_option))}"])
