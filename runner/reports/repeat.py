"""The command lines that do a recorded job again, or go on with it, as they can be pasted. No torch."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.job import STEP_EVERY, Job
from runner.media.paths import MANY, ONE
from runner.request import COUNT
from runner.text import quoted
from stages.errors import InvalidInput
from stages.placement.tiling import Tiling


def line(*words: str) -> str:
    """The words behind the program's name as a line for a shell."""
    program = ["stagerun"] if Path(sys.argv[0]).name == "stagerun" else ["python", "-m", "runner"]
    return " ".join(map(quoted, [*program, *words]))


def recorded(record: Mapping[str, Any], store: str) -> Job | None:
    """The job that a record keeps, in the store that it is in now; None where it keeps none that can be read."""
    document = record.get("job")
    if not isinstance(document, Mapping):
        return None
    try:
        return replace(Job.from_json(document), store=store)
    except InvalidInput:
        return None


def resume_line(run: str, store: str, usual: str) -> str:
    """What to type to go on with a run; the `usual` store need not be said."""
    return line("resume", run, *store_words(store, usual))


def repeat_line(job: Job, usual: str) -> str:
    """What to type to do a job once more, with files of its own where its pictures are still there.

    The `usual` store need not be said. What no options can say, such as several prompts, is repeated by the record of
    its run.
    """
    words = words_of(job, usual)
    return line(*words) if words is not None else line("resume", job.run, "--from", "encode",
                                                       *store_words(job.store, usual))


def further_line(job: Job, usual: str) -> str | None:
    """What to type to go on behind the stage that a job stops after; None where it does not, or no options say it."""
    if job.policy.stop_after is None:
        return None
    words = words_of(replace(job, policy=replace(job.policy, stop_after=None)), usual)
    return None if words is None else line(*words)


def words_of(job: Job, usual: str) -> list[str] | None:
    """The words behind the program's that ask for the job; None where options cannot say it."""
    first = job.requests[0]
    alike = all(replace(each, seed=first.seed, index=first.index) == first for each in job.requests)
    listed = any(label.line for label in job.labels) or len(job.requests) > COUNT
    if not alike or listed or first.prompt == "-" or first.text_tokens != job.defaults.text_tokens:
        return None
    if any("{" in path or "}" in path for path in job.output.paths):
        return None
    return [job.family, *(word for pair in (*_asked(job), *_placed(job), *_kept(job, usual)) for word in pair)]


def _asked(job: Job) -> Iterator[tuple[str, ...]]:
    first, seeds = job.requests[0], [request.seed for request in job.requests]
    yield "--prompt", first.prompt
    if first.negative_prompt is not None:
        yield "--negative-prompt", first.negative_prompt
    if job.model is not None:
        yield "--model", job.model
    if job.revision is not None:
        yield "--revision", job.revision
    for lora in job.loras:
        yield "--lora", f"{lora.source}={_number(lora.scale)}"
    if job.scheduler is not None:
        yield "--scheduler", str(job.scheduler)
    yield "--size", f"{first.width}x{first.height}"
    yield "--steps", str(first.steps)
    if first.guidance is not None:
        yield "--guidance", _number(first.guidance)
    counted = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    yield "--seed", str(seeds[0]) if counted else ",".join(map(str, seeds))
    if counted and len(seeds) > 1:
        yield "--count", str(len(seeds))
    types = list(job.dtype.values())
    usual = max(types, key=types.count, default=None)
    if usual is not None:
        yield "--dtype", usual
    for component, dtype in job.dtype.items():
        if dtype != usual:
            yield "--dtype", f"{component}={dtype}" if component else dtype


def _placed(job: Job) -> Iterator[tuple[str, ...]]:
    if job.devices and all(device.isdecimal() for device in job.devices):
        yield "--gpus", ",".join(job.devices)
    else:
        yield from (("--device", device) for device in job.devices)
    if job.max_memory.by_device:
        yield "--max-memory", str(job.max_memory)
    for place in job.place:
        yield "--place", str(place)
    if job.allow_offload is not None:
        yield "--allow-offload", job.allow_offload
    if job.lanes is not None:
        yield "--lanes", str(job.lanes)
    if job.tile is not None:
        tiling, first = Tiling(job.tile, job.whole) if job.tile else None, job.requests[0]
        yield "--tile", str(tiling.tile(first.width, first.height) or 0 if tiling else 0)
    if not job.modulation_table:
        yield ("--no-modulation-table",)
    if not job.peer_copies:
        yield ("--no-p2p",)


def _kept(job: Job, usual: str) -> Iterator[tuple[str, ...]]:
    policy = job.policy
    if policy.step_every != STEP_EVERY:
        yield "--step-every", _number(policy.step_every)
    if policy.preview:
        yield "--preview", str(policy.preview)
    for option, said in (("--no-degrade", not policy.degrade), ("--sample-memory", policy.sample_memory),
                         ("--strict", policy.strict), ("--no-metadata", not job.output.metadata)):
        if said:
            yield (option,)
    yield from (pair for pair in (store_words(job.store, usual),) if pair)
    if policy.stop_after is not None:
        yield "--stop-after", policy.stop_after
    else:
        yield "--out", _out(job)


def _out(job: Job) -> str:
    """Where pictures go to that replace none: to their own file where it is gone, else beside it by the run's name."""
    paths = [Path(path) for path in job.output.paths]
    if len(paths) == 1 and not os.path.lexists(paths[0]):
        return str(paths[0])
    if len(paths) == 1:
        return str(paths[0].with_name(f"{paths[0].stem}-{{run}}{paths[0].suffix}"))
    usual = Path(ONE if len(job.requests) == 1 else MANY)
    folder = Path(job.output.folder) if job.output.folder else paths[0].parent if paths else Path()
    return str(folder / f"{usual.stem}-{{run}}{paths[0].suffix if paths else usual.suffix}")


def store_words(store: str, usual: str) -> tuple[str, ...]:
    """The words that name a store, none for the `usual` one."""
    return () if store in ("", usual) else ("--artifacts", store)


def _number(value: float) -> str:
    """A number in plain digits."""
    return f"{value:.9f}".rstrip("0").rstrip(".")
