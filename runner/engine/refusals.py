"""What a run cannot be made of, said before anything is loaded."""

from collections.abc import Callable
from typing import Any

from runner import job_fields
from runner.engine.stage_runner import Collectives
from runner.events import Emit
from runner.planning.plan import Plan
from stages.errors import InvalidInput, ModelError
from stages.wording import kind_of


def check_runnable(plan: Plan, collectives: Collectives | None, stage: str = "denoise") -> None:
    """Raise InvalidInput for a plan of which this process cannot run the stage alone, or not here.

    Raises ModelError for one whose model could not be read.
    """
    if not isinstance(plan, Plan):
        raise InvalidInput(f"{kind_of(plan)} is no plan -> make_plan(job) makes one of a Job")
    if not plan.machine.here:
        raise InvalidInput("this is a plan for cards that are not here: plan without `machine` to run")
    if plan.checkpoint.shapes:
        raise ModelError(f"this plan is made of shapes alone, and nothing is run from them: {plan.checkpoint.unread}")
    if plan.checkpoint.bytes_to_download:
        raise InvalidInput(f"{plan.checkpoint.bytes_to_download} bytes of weights are not here: plan with "
                           f"`download=True` to run")
    if stage == "denoise" and plan.processes > 1 and collectives is None:
        raise InvalidInput("denoise=tensor_parallel takes a process for each card -> stagerun.spawn(plan.job, "
                           "ranks=2)")


def check_listeners(
    emit: Emit, done: Callable[[Any], None] | None = None, stop: Callable[[], bool] | None = None
) -> None:
    """Raise InvalidInput for listeners that cannot be called."""
    job_fields.function("emit", emit, "kind, data")
    if done is not None:
        job_fields.function("done", done, "picture")
    if stop is not None:
        job_fields.function("stop", stop, "")
