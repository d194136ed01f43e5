"""Making pictures from the command line: parse, plan, run, tell."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.artifacts import open_store
from runner.artifacts.garbage import tidy
from runner.commands import distributed
from runner.commands.options import FamilyOptions, PlanOptions, ResumeOptions, RunOptions
from runner.commands.parse import check_display, check_engine, job_of, resumed
from runner.commands.refusal import as_option, complain, in_options, lasts, resumable
from runner.commands.results import Results
from runner.commands.settings import unsaid_store
from runner.distributed.env import launched
from runner.engine.report import Failure, Report
from runner.engine.session import open_job_store, recorded_job
from runner.events import Emit, json_lines, tee
from runner.job import Job
from runner.job_defaults import default_store
from runner.machine_option import MachineOption
from runner.media.paths import remove_orphans
from runner.media.previews import PreviewFiles
from runner.media.writer import PictureWriter, labelled
from runner.reports.history import find_run
from runner.reports.progress import Progress
from runner.reports.repeat import resume_line
from runner.reports.report import SHOWN, closing, lines
from runner.startup import hush, untracked
from runner.terminal import columns, say
from runner.text import pictures, shown
from stages.errors import InvalidInput, StoreError


def make(family: str, options: FamilyOptions) -> int:
    """Make the pictures that the options ask for; the exit code. Standard output gets paths, or JSON."""
    rank = launched()
    check_engine(options, launched=rank is not None)
    distributed.check_ranks(options)
    if rank is not None:
        return distributed.join(rank, options, partial(job_of, family, options), partial(produce, options=options))
    return produce(job_of(family, options), engine_of(options), options=options)


def resume(run: str, options: ResumeOptions) -> int:
    """Finish the run named `run`, or the `last` one; the exit code.

    Raises StoreError where the store has no such run, ModelError where its model is another now.
    """
    check_display(options)
    check_engine(options, launched=False)
    distributed.check_ranks(options)
    return produce(resumed_job(run, options), engine_of(options), options=options)


def resumed_job(run: str, options: ResumeOptions) -> Job:
    """The job of a run of the store, with what the options change of it."""
    where = options.artifacts or str(default_store())
    if where == "memory":
        raise StoreError("a run in memory ends with its process -> name the store with `store=DIR`")
    store = open_store(where, readonly=True)
    return resumed(recorded_job(store, find_run(store, run), where), options)


def engine_of(options: RunOptions) -> distributed.Engine:
    """Who does the job: this process, ranks of its own, or a Ray cluster."""
    if options.engine == "ray":
        return partial(distributed.on_ray, options)
    return partial(_alone_or_ranks, options)


def _alone_or_ranks(options: RunOptions, job: Job, emit: Emit, results: Results, seconds: dict[str, float]) -> Report:
    together = distributed.check_ranks(options) is not None or job.tensor_parallel is not None
    return (distributed.on_ranks if together else in_this_process)(options, job, emit, results, seconds)


def produce(job: Job, engine: distributed.Engine, *, options: RunOptions) -> int:
    """Have the engine make the pictures of a job; the exit code, 1 where some of them came to nothing."""
    begin = time.perf_counter()
    hush(options.verbose)
    progress = Progress(sys.stderr, verbosity=-1 if options.quiet else int(options.verbose))
    results = Results(job, sys.stdout, as_json=options.json)
    seconds: dict[str, float] = {}
    with logged(options.log, tee(in_options(progress), results)) as log, resumable(job.run, job.store, log) as emit:
        if job.resumed:
            remove_orphans(job.output.paths)
        with progress:
            report = engine(job, tee(emit, PreviewFiles(tuple(map(Path, job.output.paths)), emit)), results, seconds)
    seconds["total"] = time.perf_counter() - begin
    # Whoever sees both streams sees each path once.
    told = (not options.quiet and sys.stderr.isatty() and sys.stdout.isatty() and not options.json
            and len(results.written) <= SHOWN)
    if not options.quiet:
        say(sys.stderr, [*(lines(report, seconds, columns(sys.stderr)) if options.verbose else ()),
                         *closing(report, results.written, seconds, paths=told or options.json)])
    results.finish(report, report.failures, seconds, told=told)
    if report.failures:
        again = f" -> {resume_line(job.run, job.store, unsaid_store())}" if lasts(job.store) else ""
        say(sys.stderr, [f"error: {len(report.failures):,} of {pictures(len(report.job.requests))} failed{again}"])
    return 1 if report.failures or report.job.refused else 0


def in_this_process(options: RunOptions, job: Job, emit: Emit, results: Results, seconds: dict[str, float]) -> Report:
    """Do a job here, stage by stage."""
    # Before the imports: an answer about a bucket or a package that is not there should not take seconds.
    store, begin = open_job_store(job, emit), time.perf_counter()
    with timed(seconds, "imports"), untracked():
        emit("begin", {"what": "importing torch and diffusers"})
        from runner.distributed.plans import planned
        from runner.engine.run import run_all
        from runner.planning.planner import fetched
        from runner.planning.verdict import verdict
    with timed(seconds, "plan"):
        found = planned(job, hints=not options.quiet, shapes=False)
    plan = found.plan
    complain(plan.job.refused)
    results.refuse(plan.job.refused)
    if options.verbose:
        say(sys.stderr, found.lines(verbose=True, columns=columns(sys.stderr), word=as_option))
    else:
        emit("plan", {"text": verdict(plan)})
        if not options.quiet:
            say(sys.stderr, found.remarks(columns(sys.stderr), as_option))
    if plan.checkpoint.bytes_to_download:
        with timed(seconds, "download"):
            plan = fetched(plan)
    failures: list[Failure] = []
    writer = PictureWriter(plan.job, emit, lambda position, text: failures.append(Failure(position, "decode", text)))
    report = run_all(plan, store=store, emit=labelled(plan.job, emit),
                     done=writer.write if plan.job.output.paths else None)
    if job.resumed:
        tidy(store, min_age=time.perf_counter() - begin)
    seconds["pictures"] = writer.seconds
    return replace(report, failures=(*report.failures, *failures))


def planned_job(family: str, options: PlanOptions) -> Job:
    """The job that a plan is asked for, whose pictures need no names, nor a prompt."""
    prompt = options.prompt or ("a picture" if options.prompt_file is None else None)
    prompts = None if prompt is None else [prompt]
    return job_of(family, replace(options, words=None, prompts=prompts), named=False)


def show_plan(family: str, options: PlanOptions) -> None:
    """Print the plan that the options lead to."""
    hush(options.verbose)
    check_engine(options, launched=False)
    count = distributed.check_ranks(options)
    if options.machine is not None:
        # Before anything heavy is imported.
        MachineOption.read(options.machine)
    job = planned_job(family, options)
    from runner.distributed.plans import planned

    # Ray deals out the cards of its cluster, which are not those of this plan.
    found = planned(job, options.machine, count, hints=options.engine != "ray")
    complain(found.job.refused)
    if options.json:
        say(sys.stdout, [json.dumps(found.document())])
    else:
        say(sys.stdout, found.lines(verbose=options.verbose, columns=columns(sys.stdout), word=as_option))


@contextmanager
def logged(path: str | None, emit: Emit) -> Iterator[Emit]:
    """The emit, and with it the file of --log."""
    if path is None:
        yield emit
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        raise InvalidInput(f"--log {shown(path)}: {error.strerror}") from error
    write = json_lines(file)

    def logged_too(kind: str, data: Mapping[str, Any]) -> None:
        emit(kind, data)
        try:
            write(kind, data)
        except OSError as error:
            raise StoreError(f"cannot write `log` {path}: {error.strerror} -> make room, or leave it out") from error

    try:
        yield logged_too
    finally:
        # What it still holds failed to be written before, and was told of.
        with suppress(OSError):
            file.close()


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Put the time of the block into `seconds[part]`."""
    begin = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - begin
