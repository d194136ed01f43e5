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
from typing import TYPE_CHECKING, Any, TextIO

from runner import names, tables, together
from runner.durable import explained
from runner.events import Emit, Tolerant, json_lines, tee
from runner.order import Order, devices, order
from runner.picture import card_of, png
from runner.previews import Beside
from runner.progress import Progress
from runner.ranks import launched
from runner.report import document, lines
from runner.request import shown
from stages.errors import LoadError
from stages.families import FAMILIES

if TYPE_CHECKING:
    from runner.artifacts import ArtifactStore
    from runner.plan import Plan
    from runner.run import Report
    from stages.machine import Machine


def make(family: str, said: Any) -> None:
    """Make the pictures that the options `said` ask for; their paths, or one JSON object, go to standard output."""
    if said.ranks is not None or launched() is not None:
        return together.make(family, said)
    begin = time.perf_counter()
    asked = order(family, said)
    hush(said.verbose)
    progress = Progress(sys.stderr, verbosity=-1 if said.quiet else int(said.verbose))
    seconds: dict[str, float] = {}
    with logged(said.log, progress) as emit:
        # Before the imports: an answer about a bucket or a package that is not there should not take seconds.
        store = opened(asked, said, emit)
        with timed(seconds, "imports"), progress, untracked():
            emit("begin", {"what": "importing torch and diffusers"})
            from runner.plan import fetched
            from runner.run import run_all
        with timed(seconds, "plan"):
            job = planned(asked, said, weights=False)
        if not said.quiet and (said.verbose or job.machine.cards):
            say(sys.stderr, tables.lines(job))
        if job.checkpoint.absent:
            with timed(seconds, "download"):
                job = fetched(job)
        with progress:
            told = tee(emit, Beside(asked.paths))
            report = run_all(
                job, store=store, emit=told, stop_after=said.stop_after, from_stage=said.from_stage, name=asked.run,
                preview=asked.preview, sample_memory=said.sample_memory,
            )
            with timed(seconds, "pictures"):
                cards = save(report, asked, said, told)
    seconds["total"] = time.perf_counter() - begin
    tell(report, asked, cards, seconds, said)


def tell(
    report: "Report", asked: Order, cards: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], said: Any
) -> None:
    """Say what a run did: where its time went on standard error, and its result on standard output."""
    if not said.quiet:
        say(sys.stderr, lines(report, seconds))
    result = [json.dumps(document(report, asked.paths, cards, seconds), ensure_ascii=False)]
    say(sys.stdout, result if said.json else results(report, asked))


def opened(asked: Order, said: Any, emit: Emit) -> "ArtifactStore":
    """The store of an order; StoreError where there can be none, before anything is downloaded."""
    from runner.artifacts import open_store

    if said.artifacts is None:
        with explained(Path(asked.store), "make"):
            Path(asked.store).parent.mkdir(parents=True, exist_ok=True)
    return open_store(asked.store, warn=lambda text: emit("warning", {"text": text}), strict=said.strict)


def foresee(family: str, said: Any) -> None:
    """Print the plan that the options `said` lead to."""
    if family not in FAMILIES:
        close = get_close_matches(family, FAMILIES, 1)
        raise ValueError(f"there is no family {shown(family)} -> choose from {', '.join(close or FAMILIES)}")
    hush(said.verbose)
    asked = order(family, replace(said, prompt=said.prompt or "a picture", stop_after="encode"))
    job = planned(asked, said, machine=said.machine, weights=False)
    say(sys.stdout, [json.dumps(tables.document(job))] if said.json else tables.lines(job))


def diagnose(*, as_json: bool, gpus: str | None) -> None:
    """Print what is well and what is not with this machine; LoadError where something is not."""
    hush(verbose=False)
    from runner import doctor

    checks = doctor.examine(devices((), gpus))
    say(sys.stdout, [json.dumps(doctor.document(checks))] if as_json else doctor.lines(checks))
    if not doctor.healthy(checks):
        bad = [check.name for check in checks if not check.ok]
        raise LoadError(f"not well: {', '.join(bad)} -> the lines above say what to do")


def planned(asked: Order, said: Any, machine: "str | Machine | None" = None, *, weights: bool = True) -> "Plan":
    """The plan of an order, its `weights` downloaded; LoadError where it should repeat a picture of another model."""
    import torch

    from runner.remedy import plan_or_remedy

    job = plan_or_remedy(
        asked.family,
        asked.requests,
        model=asked.model,
        revision=asked.revision,
        dtype={component: getattr(torch, name) for component, name in asked.dtype.items()},
        devices=asked.devices,
        machine=machine,
        max_memory=said.max_memory,
        place=said.place or (),
        allow_offload=said.allow_offload,
        modulation_table=not said.no_modulation_table,
        peer_copies=not said.no_p2p,
        weights=weights,
    )
    for component in asked.dtype.keys() - {"", *job.places}:
        close = get_close_matches(component, job.places, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(job.places)}"
        raise ValueError(f"--dtype: the model has no component {shown(component)} -> {hint}")
    if asked.like is not None and asked.like.identity != job.checkpoint.identity:
        raise LoadError(
            f"the picture was made by {asked.like.identity}, but {asked.like.model} is now {job.checkpoint.identity} "
            f"-> name a model with --model to repeat it with other pixels"
        )
    return job


def save(report: "Report", asked: Order, said: Any, emit: Emit) -> list[dict[str, Any]]:
    """Write every picture of a run; what their metadata say."""
    cards = []
    for picture, path in zip(report.pictures, asked.paths, strict=True):
        cards.append(card_of(picture.request, picture.facts))
        names.write(path, png(picture.pixels, None if said.no_metadata else cards[-1]), overwrite=said.overwrite)
        emit("picture", {"path": str(path), "index": picture.index, "seed": picture.request.seed})
    return cards


def results(report: "Report", asked: Order) -> list[str]:
    """The paths that a run is about: its pictures, or the artifacts of the stage that it stopped after."""
    if asked.paths or asked.store == "memory":
        return [str(path) for path in asked.paths]
    last = report.keys[report.stages[-1].stage]
    root = asked.store.rstrip("/") if "://" in asked.store else str(Path(asked.store))
    return [f"{root}/stages/{key}.json" for key in dict.fromkeys(last)]


def hush(verbose: bool) -> None:
    """Keep the libraries' own warnings and progress bars off the terminal, unless everything is asked for."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "warning" if verbose else "error")
    if not verbose:
        warnings.simplefilter("ignore")


def say(stream: TextIO, told: Iterable[str]) -> None:
    """Write lines to a stream that may be gone."""
    out = Tolerant(stream)
    out.write("".join(f"{line}\n" for line in told))
    out.flush()


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
