"""The ways to make a picture that benchmarks.gpu compares, each measured in a process of its own."""

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import copies
from benchmarks.gpu_workload import SPARE, Clock, Notes, Way, Workload

if TYPE_CHECKING:
    from runner import Plan

PROMPT, GUIDANCE, SEED = "a red circle on a blue background", 3.5, 0


def measure(way: Way, work: Workload, notes: Notes) -> None:
    """Make one picture and note what it took, then two of one and two steps for the bytes that are copied."""
    from runner.engine.signals import Interrupted
    from stages.errors import BadResult, DoesNotFit
    from stages.out_of_memory import is_out_of_memory

    notes.add(status="loading")
    try:
        (staged if way.kind == "stages" else piped)(way, work, notes)
    except Interrupted:
        notes.add(status="cut off")
    except (DoesNotFit, BadResult) as error:
        notes.add(**ended(notes, "no plan" if isinstance(error, DoesNotFit) else "no picture", error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        notes.add(**({"peak": peak(work)} | notes.known | ended(notes, "out of memory", error)))


def ended(notes: Notes, status: str, error: BaseException) -> dict[str, str]:
    """What an error makes of a way, in two sentences and whole; a picture that was made stays made."""
    status = "made" if notes.known["status"].startswith("made") else status
    return {"status": status, "why": ". ".join(str(error).splitlines()[0].split(". ")[:2]), "error": str(error)}


def cap(way: Way, work: Workload) -> int | None:
    """Keep torch's allocator of this process under the way's limit; the bytes of it."""
    import torch

    if way.limit is None:
        return None
    limit = way.limit * work.unit
    total = torch.accelerator.get_memory_info(work.device)[1]
    if limit > total:
        raise ValueError(f"{work.device} has {total} bytes, fewer than the {limit} of {way.name!r}: leave it out")
    module = torch.get_device_module(torch.device(work.device).type)
    fraction = getattr(module, "set_per_process_memory_fraction", None)
    # A simulated card has its limit from whoever made it.
    if fraction is not None:
        fraction(limit / total, torch.device(work.device).index)
    return limit


def planned(work: Workload, steps: int, limit: int | None) -> "Plan":
    """The plan for a picture under a limit, of which the runtime has its part as on a real card of that size."""
    from runner import Job, Request, make_plan
    from stages.machine import probe

    (card,) = probe([work.device]).devices
    request = Request(PROMPT, work.side, work.side, steps, GUIDANCE, SEED, work.tokens)
    return make_plan(Job("flux", [request], model=work.model, devices=[work.device],
                         dtype={"": work.dtype}, allow_offload="cpu",
                         max_memory=None if limit is None else f"{limit - card.spare}b"))


def staged(way: Way, work: Workload, notes: Notes) -> None:
    """Our own way; each run loads every weight once."""
    from runner import run_all

    limit, begin = cap(way, work), time.perf_counter()
    plan = planned(work, work.steps, limit)
    placed = {plan.label(part): str(place.placement) for part, place in plan.places.items()}
    notes.add(status="making", placed=placed, table=bool(plan.savings["transformer"].layers))
    clock, planning, begin = Clock(notes), time.perf_counter() - begin, time.perf_counter()
    report = run_all(plan, emit=clock.hear, stop=work.late)
    whole = time.perf_counter() - begin
    load = sum(stage.seconds["load"] + stage.seconds.get("table", 0.0) for stage in report.stages)
    notes.add(status="made", load=planning + load, image=whole - load, plan=planning, changes=list(report.changes),
              peak=max(max(stage.peak.values()) for stage in report.stages),
              parts={stage.stage: dict(stage.seconds) for stage in report.stages},
              **{stage.stage: stage.seconds["compute"] for stage in report.stages})
    del report
    short(work, notes, planning + whole, lambda steps: run_all(planned(work, steps, limit)))


def piped(way: Way, work: Workload, notes: Notes) -> None:
    """diffusers' own pipeline, put somewhere in one of its ways."""
    from diffusers import FluxPipeline

    from stages.loading.load import without_bars

    cap(way, work)
    begin = time.perf_counter()
    with without_bars():
        pipe = FluxPipeline.from_pretrained(work.model, dtype=work.dtype)
    pipe.set_progress_bar_config(disable=True)
    place(way.kind, pipe, work.device)
    notes.add(status="making", load=time.perf_counter() - begin)
    clock = Clock(notes)
    heard = pipe.transformer.register_forward_pre_hook(lambda module, inputs: clock.start())
    begin = time.perf_counter()
    drawn(pipe, work, work.steps, clock, work.late)
    end = time.perf_counter()
    heard.remove()
    notes.add(status="made" if len(clock.steps) == work.steps else "cut off", image=end - begin,
              encode=clock.marks[0] - begin, denoise=clock.marks[-1] - clock.marks[0], decode=end - clock.marks[-1],
              peak=peak(work))
    short(work, notes, end - begin, lambda steps: drawn(pipe, work, steps, Clock(), lambda: False))


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


def drawn(pipe: Any, work: Workload, steps: int, clock: Clock, late: Callable[[], bool]) -> None:
    """A picture of a pipeline, which must be one; it ends after the current step when it is `late`."""
    import numpy as np
    import torch

    from stages.errors import BadResult

    def heard(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        clock.step()
        pipe._interrupt = late()
        return values

    picture = pipe(
        PROMPT, width=work.side, height=work.side, num_inference_steps=steps, guidance_scale=GUIDANCE,
        max_sequence_length=work.tokens, generator=torch.Generator("cpu").manual_seed(SEED), output_type="np",
        callback_on_step_end=heard,
    ).images[0]
    if not np.isfinite(picture).all() or picture.min() == picture.max():
        raise BadResult("the picture is not finite, or has one color")


def short(work: Workload, notes: Notes, whole: float, draw: Callable[[int], object]) -> None:
    """Note the bytes copied for images of one and of two steps, and what that makes for all steps, if there is time.

    `whole` are the seconds of the picture that was timed.
    """
    steps, status = notes.known["steps"], notes.known["status"]
    if work.count is None:
        return
    needed = 2 * (whole - sum(steps)) + 3 * max(steps) + SPARE
    if work.left < needed:
        notes.add(why=f"{work.left:.0f} s left, and watching the copies takes {needed:.0f}")
        return
    notes.add(status=f"{status}, watching copies")
    one, two = (work.count(partial(draw, steps)) for steps in (1, 2))
    notes.add(status=status, watched={"1": one, "2": two}, copied=copies.extended(one, two, work.steps))


def peak(work: Workload) -> int:
    """The most bytes allocated on the card so far."""
    import torch

    return int(torch.accelerator.max_memory_allocated(work.device))
