"""Making pictures from the command line: order, plan, run, save, tell."""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.artifacts.atomic_files import explained
from runner.artifacts.garbage import tidy
from runner.commands import distributed
from runner.commands.order import Order, check_engine, devices, order
from runner.commands.results import Results, Writer, say
from runner.commands.resumption import command, lasts, record_of, resumable
from runner.distributed.env import launched
from runner.events import Emit, json_lines, tee
from runner.media import paths
from runner.media.previews import Beside
from runner.planning import describe
from runner.planning.parallel import wished
from runner.reports.progress import Progress
from runner.reports.report import lines
from runner.request import read_whole
from runner.text import clean, shown
from stages.errors import ModelError, StageOutOfMemory
from stages.families import FAMILIES
from stages.models.lora import LoraRequest

if TYPE_CHECKING:
    from runner.artifacts import Store
    from runner.engine.run import Report
    from runner.engine.stage_runner import Failure
    from runner.planning.plan import Plan
    from stages.machine import Machine

TOLD = 20
LANES = 16


def make(family: str, said: Any) -> int:
    """Make the pictures that the options `said` ask for; the exit code. Standard output gets paths, or JSON."""
    check_family(family)
    check_engine(said)
    if said.ranks is not None or launched() is not None or wished(said.place) is not None:
        return distributed.make(family, said)
    asked = order(family, said)
    if said.engine == "ray":
        from runner.commands import clustered

        return clustered.produce(asked, said)
    return produce(asked, said)


def check_family(family: str) -> None:
    """Raise ValueError for a family that there is not."""
    if family not in FAMILIES:
        close = get_close_matches(family, FAMILIES, 1)
        raise ValueError(f"there is no family {shown(family)} -> choose from {', '.join(close or FAMILIES)}")


def produce(asked: Order, said: Any) -> int:
    """Make the pictures of an order; the exit code, 1 where some of them came to nothing."""
    begin = time.perf_counter()
    hush(said.verbose)
    progress = Progress(sys.stderr, verbosity=-1 if said.quiet else int(said.verbose))
    seconds: dict[str, float] = {}
    with logged(said.log, progress) as log, resumable(asked.run, asked.store, log) as emit:
        # Before the imports: an answer about a bucket or a package that is not there should not take seconds.
        store = opened(asked, said, emit)
        if asked.resumed:
            paths.tidy(asked.paths)
        with timed(seconds, "imports"), progress, untracked():
            emit("begin", {"what": "importing torch and diffusers"})
            from runner.engine.run import run_all
            from runner.planning.plan import fetched
        with timed(seconds, "plan"):
            job, asked = planned(asked, said, weights=False)
        complain(f"{line}" for line in asked.refused)
        if not said.quiet and (said.verbose or job.machine.cards):
            say(sys.stderr, describe.lines(job))
        if job.checkpoint.bytes_to_download:
            with timed(seconds, "download"):
                job = fetched(job)
        results = Results(asked, said, sys.stdout)
        writer = Writer(asked, said, tee(emit, Beside(asked.paths)), results.tell)
        with progress, advised(job, asked, said):
            report = run_all(
                job, store=store, emit=writer.hear, stop_after=said.stop_after, from_stage=said.from_stage,
                name=asked.run, record=record_of(asked, said, job), done=writer.keep, degrade=not said.no_degrade,
                step_every=asked.step_every, preview=asked.preview, sample_memory=said.sample_memory,
            )
            if asked.resumed:
                tidy(store, older=time.perf_counter() - begin)
    seconds |= {"pictures": writer.seconds, "total": time.perf_counter() - begin}
    return tell(report, [*report.failures, *writer.failures], results, seconds, said)


def tell(
    report: "Report", failures: Sequence["Failure"], results: Results, seconds: Mapping[str, float], said: Any
) -> int:
    """Say what a run did: where its time went on standard error, and its result on standard output; the exit code."""
    if not said.quiet:
        say(sys.stderr, lines(report, seconds))
    results.finish(report, failures, seconds)
    asked = results.asked
    if failures:
        again = f" -> {command(asked.run, asked.store)}" if lasts(asked.store) else ""
        say(sys.stderr, [f"error: {len(failures):,} of {len(asked.items):,} pictures failed{again}"])
    return 1 if failures or asked.refused else 0


def opened(asked: Order, said: Any, emit: Emit) -> "Store":
    """The store of an order; StoreError where there can be none, before anything is downloaded."""
    from runner.artifacts import open_store

    if said.artifacts is None:
        with explained(Path(asked.store), "make"):
            Path(asked.store).parent.mkdir(parents=True, exist_ok=True)
    return open_store(asked.store, warn=lambda text: emit("warning", {"text": text}), strict=said.strict)


def foresee(family: str, said: Any) -> None:
    """Print the plan that the options `said` lead to."""
    check_family(family)
    hush(said.verbose)
    prompt = said.prompt or ("a picture" if said.prompt_file is None else None)
    asked = order(family, replace(said, prompt=prompt, stop_after="encode"))
    job, asked = planned(asked, said, machine=said.machine, weights=False)
    complain(f"{line}" for line in asked.refused)
    say(sys.stdout, [json.dumps(describe.document(job))] if said.json else describe.lines(job))


def diagnose(*, as_json: bool, gpus: str | None) -> None:
    """Print what is well and what is not with this machine; ModelError where something is not."""
    hush(verbose=False)
    from runner.commands import doctor

    checks = doctor.examine(devices((), gpus))
    say(sys.stdout, [json.dumps(doctor.document(checks))] if as_json else doctor.lines(checks))
    if not doctor.healthy(checks):
        bad = [check.name for check in checks if not check.ok]
        raise ModelError(f"not well: {', '.join(bad)} -> the lines above say what to do")


def planned(
    asked: Order, said: Any, machine: "str | Machine | None" = None, *, weights: bool = True
) -> tuple["Plan", Order]:
    """The plan of an order, its `weights` downloaded, and the order less the lines that the model cannot make.

    Raises ModelError where it should repeat what another model made.
    """
    from runner.planning.suggestions import plan_or_remedy

    lost: dict[int, str] = {}
    job = plan_or_remedy(asked.family, asked.requests, machine=machine, weights=weights,
                         lost=lost if asked.listed else None, **options_of(asked, said))
    for component in asked.dtype.keys() - {"", *job.places}:
        close = get_close_matches(component, job.places, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(job.places)}"
        raise ValueError(f"--dtype: the model has no component {shown(component)} -> {hint}")
    if asked.origin is not None and asked.origin.identity != job.checkpoint.identity:
        raise ModelError(
            f"{asked.origin.what} was made by {asked.origin.identity}, but {asked.model or job.family.repo} is now "
            f"{job.checkpoint.identity} -> {asked.origin.advice}"
        )
    return job, replace(asked.without(lost), loras=known(job))


def known(job: "Plan") -> tuple[LoraRequest, ...]:
    """The LoRAs of a plan, so that whoever goes on with it takes the same files."""
    return tuple(LoraRequest(lora.source, lora.scale, lora.digest) for lora in job.checkpoint.loras)


def options_of(asked: Order, said: Any) -> dict[str, Any]:
    """The options of `make_plan` that an order and its command line mean."""
    import torch

    return {
        "model": asked.model,
        "revision": asked.revision,
        "dtype": {component: getattr(torch, name) for component, name in asked.dtype.items()},
        "devices": asked.devices,
        "max_memory": said.max_memory,
        "place": said.place or (),
        "allow_offload": said.allow_offload,
        "modulation_table": not said.no_modulation_table,
        "peer_copies": not said.no_p2p,
        "loras": asked.loras,
        "lanes": None if said.lanes is None else read_whole("lanes", said.lanes, 1, LANES),
    }


@contextmanager
def advised(job: "Plan", asked: Order, said: Any) -> Iterator[None]:
    """A stage that runs out of memory in the block for good leaves with options that would help it."""
    try:
        yield
    except StageOutOfMemory as error:
        from runner.commands.advice import ways_out
        from runner.planning.options import fixes_of

        ways = ways_out(job, error.stage, options_of(asked, said), degraded=not said.no_degrade)
        error.alternatives = tuple(map(fixes_of, ways))
        raise


def complain(bad: Iterable[str]) -> None:
    """Say what is left out of a run, the first of it by name."""
    told = list(bad)
    more = [f"error: and {len(told) - TOLD:,} more lines"] if len(told) > TOLD else []
    say(sys.stderr, [*(f"error: {clean(line)}" for line in told[:TOLD]), *more])


def hush(verbose: bool) -> None:
    """Keep the libraries' own warnings and progress bars off the terminal, unless everything is asked for."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "warning" if verbose else "error")
    if not verbose:
        warnings.simplefilter("ignore")


@contextmanager
def logged(path: str | None, emit: Emit) -> Iterator[Emit]:
    """The emit, and with it the file of --log."""
    if path is None:
        yield emit
        return
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        raise ValueError(f"--log {shown(path)}: {error.strerror}") from error
    with file:
        yield tee(emit, json_lines(file))


@contextmanager
def untracked() -> Iterator[None]:
    """Leave what the block makes out of garbage collection.

    Imports make 360,000 objects that stay: collecting among them costs 0.7 s while they are made, and 0.2 s at every
    flush.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Put the time of the block into `seconds[part]`."""
    begin = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - begin
