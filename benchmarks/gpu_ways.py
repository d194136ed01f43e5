"""The ways to make a picture that benchmarks.gpu compares, each measured in a process of its own."""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import copies

if TYPE_CHECKING:
    import torch

    from runner import Plan

# Does some work and tells the bytes that it copied each way.
Count = Callable[[Callable[[], object]], dict[str, int]]

PROMPT, GUIDANCE, SEED = "a red circle on a blue background", 3.5, 0
# Seconds that a way leaves for what comes after the picture that is timed.
SPARE = 5.0


@dataclass(frozen=True)
class Way:
    """One way: its card has `limit` units of memory (None: all of it). It is not begun with fewer than `least` seconds
    left, and given up after `most`.
    """

    kind: str
    limit: int | None
    least: float
    most: float

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.kind}, {self.limit or 'no'} {'GiB' if self.limit else 'limit'}"


# Those that tell most come first: a run that is cut off has them.
WAYS = (
    Way("stages", 24, 45, 150),
    Way("resident pipeline", None, 45, 120),
    Way("model offload", 24, 60, 150),
    Way("stages", 16, 45, 150),
    Way("group offload", 16, 75, 150),
    Way("sequential offload", 16, 60, 110),
    Way("model offload", 16, 30, 90),
)


@dataclass(frozen=True)
class Job:
    """What every way does: a picture of `side` times `side` pixels, until a time of the day in seconds.

    Limits are counted in `unit` bytes; `count` tells what is copied, where anything can.
    """

    model: Path
    device: str
    dtype: "torch.dtype"
    side: int = 1024
    steps: int = 28
    tokens: int = 512
    unit: int = 2**30
    until: float = float("inf")
    count: Count | None = None

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.time()

    def late(self) -> bool:
        """Whether the picture that is timed must end where it is."""
        return self.left < SPARE


@dataclass
class Notes:
    """What is known of a way so far; on the disk as soon as it is known, as the process may be ended at any time."""

    path: Path | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def add(self, **facts: object) -> None:
        """Keep these facts, too."""
        self.known |= facts
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.known))
            os.replace(part, self.path)


class Clock:
    """When each step of a denoise was done, the card having done all that it was ordered."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self.marks: list[float] = []

    def start(self) -> None:
        """The denoise begins, unless it has begun."""
        if not self.marks:
            self.step()

    def step(self) -> None:
        """A step is done."""
        import torch

        torch.accelerator.synchronize()
        self.marks.append(time.perf_counter())
        if self._notes is not None:
            self._notes.add(steps=self.steps)

    @property
    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]

    def hear(self, kind: str, data: Mapping[str, Any]) -> None:
        """Listen to a run."""
        if kind == "item" and data["stage"] == "denoise":
            # Once more where a stage that ran out of memory is tried again.
            self.marks.clear()
            self.start()
        elif kind == "step":
            self.step()


def measure(way: Way, job: Job, notes: Notes) -> None:
    """Make one picture and note what it took, then two of one and two steps for the bytes that are copied."""
    from runner.interrupts import Interrupted
    from runner.shift import out_of_memory
    from stages.errors import BadResult, PlanError

    notes.add(status="loading")
    try:
        (staged if way.kind == "stages" else piped)(way, job, notes)
    except Interrupted:
        notes.add(status="cut off")
    except (PlanError, BadResult) as error:
        notes.add(status="no plan" if isinstance(error, PlanError) else "no picture", **told(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        notes.add(status="out of memory", peak=peak(job), **told(error))


def told(error: BaseException) -> dict[str, str]:
    """An error for the table, which has room for two sentences, and whole."""
    return {"why": ". ".join(str(error).splitlines()[0].split(". ")[:2]), "error": str(error)}


def cap(way: Way, job: Job) -> int | None:
    """Keep torch's allocator of this process under the way's limit; the bytes of it."""
    import torch

    if way.limit is None:
        return None
    limit = way.limit * job.unit
    total = torch.accelerator.get_memory_info(job.device)[1]
    if limit > total:
        raise ValueError(f"{job.device} has {total} bytes, fewer than the {limit} of {way.name!r}: leave it out")
    fraction = getattr(torch.get_device_module(torch.device(job.device).type), "set_per_process_memory_fraction", None)
    # A simulated card has its limit from whoever made it.
    if fraction is not None:
        fraction(limit / total, torch.device(job.device).index)
    return limit


def planned(job: Job, steps: int, limit: int | None) -> "Plan":
    """The plan for a picture under a limit, of which the runtime has its part as on a real card of that size."""
    from runner import Request, make_plan
    from stages.machine import probe

    (card,) = probe([job.device]).devices
    request = Request(PROMPT, job.side, job.side, steps, GUIDANCE, SEED, job.tokens)
    return make_plan(
        "flux", [request], model=job.model, devices=[job.device], dtype={"": job.dtype}, allow_offload="cpu",
        max_memory=None if limit is None else f"{limit - card.spare}b",
    )


def staged(way: Way, job: Job, notes: Notes) -> None:
    """Our own way; each run loads every weight once."""
    from runner import run_all

    limit, begin = cap(way, job), time.perf_counter()
    plan = planned(job, job.steps, limit)
    placed = {name: str(place.placement) for name, place in plan.places.items()}
    notes.add(placed=placed, table=plan.savings["transformer"].layers != frozenset(),
              status="making")
    clock, planning, begin = Clock(notes), time.perf_counter() - begin, time.perf_counter()
    report = run_all(plan, emit=clock.hear, stop=job.late)
    whole = time.perf_counter() - begin
    load = sum(stage.seconds["load"] + stage.seconds.get("table", 0.0) for stage in report.stages)
    notes.add(status="made", load=planning + load, image=whole - load, plan=planning, changes=list(report.changes),
              peak=max(max(stage.peak.values()) for stage in report.stages),
              parts={stage.stage: dict(stage.seconds) for stage in report.stages},
              **{stage.stage: stage.seconds["compute"] for stage in report.stages})
    del report
    short(job, notes, whole, lambda steps: run_all(planned(job, steps, limit)))


def piped(way: Way, job: Job, notes: Notes) -> None:
    """diffusers' own pipeline, put somewhere in one of its ways."""
    from diffusers import FluxPipeline

    from stages.stage import without_bars

    cap(way, job)
    begin = time.perf_counter()
    with without_bars():
        pipe = FluxPipeline.from_pretrained(job.model, dtype=job.dtype)
    pipe.set_progress_bar_config(disable=True)
    place(way.kind, pipe, job.device)
    notes.add(status="making", load=time.perf_counter() - begin)
    clock = Clock(notes)
    heard = pipe.transformer.register_forward_pre_hook(lambda module, inputs: clock.start())
    begin = time.perf_counter()
    drawn(pipe, job, job.steps, clock, job.late)
    end = time.perf_counter()
    heard.remove()
    notes.add(status="made" if len(clock.steps) == job.steps else "cut off", image=end - begin,
              encode=clock.marks[0] - begin, denoise=clock.marks[-1] - clock.marks[0], decode=end - clock.marks[-1],
              peak=peak(job))
    short(job, notes, end - begin, lambda steps: drawn(pipe, job, steps, Clock(), lambda: False))


def place(kind: str, pipe: Any, device: str) -> None:
    """Put a pipeline somewhere."""
    import torch

    if kind == "resident pipeline":
        pipe.to(device)
    elif kind == "model offload":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "sequential offload":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        assert kind == "group offload", kind
        module = torch.get_device_module(torch.device(device).type)
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level",
                                  use_stream=hasattr(module, "Stream"))
    gc.collect()


def drawn(pipe: Any, job: Job, steps: int, clock: Clock, late: Callable[[], bool]) -> None:
    """A picture of a pipeline, which must be one; it ends after the current step when it is `late`."""
    import numpy as np
    import torch

    from stages.errors import BadResult

    def ended(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        clock.step()
        pipe._interrupt = late()
        return values

    picture = pipe(
        PROMPT, width=job.side, height=job.side, num_inference_steps=steps, guidance_scale=GUIDANCE,
        max_sequence_length=job.tokens, generator=torch.Generator("cpu").manual_seed(SEED), output_type="np",
        callback_on_step_end=ended,
    ).images[0]
    if not np.isfinite(picture).all() or picture.min() == picture.max():
        raise BadResult("the picture is not finite, or has one color")


def short(job: Job, notes: Notes, whole: float, draw: Callable[[int], object]) -> None:
    """Note the bytes copied for images of one and of two steps, and what that makes for all steps, if there is time.

    `whole` are the seconds of the picture that was timed.
    """
    steps, status = notes.known["steps"], notes.known["status"]
    if job.count is None:
        return
    needed = 2 * (whole - sum(steps)) + 3 * max(steps) + SPARE
    if job.left < needed:
        notes.add(why=f"{job.left:.0f} s left, and watching the copies takes {needed:.0f}")
        return
    notes.add(status=f"{status}, watching copies")
    one, two = (job.count(partial(draw, steps)) for steps in (1, 2))
    notes.add(status=status, watched={"1": one, "2": two}, copied=copies.extended(one, two, job.steps))


def peak(job: Job) -> int:
    """The most bytes allocated on the card so far."""
    import torch

    return int(torch.accelerator.max_memory_allocated(job.device))


def step_seconds(known: Mapping[str, Any]) -> float | None:
    """The median of all steps but the first; None where there was no second one."""
    steps = known.get("steps", [])[1:]
    return statistics.median(steps) if steps else None
