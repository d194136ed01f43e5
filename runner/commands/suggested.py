"""A command that is to be suggested, planned as it would be if it were pasted."""

from runner.commands.distributed import check_ranks
from runner.commands.generate import planned_job, resumed_job
from runner.commands.options import FamilyOptions, PlanOptions, ResumeOptions, RunOptions
from runner.commands.parse import job_of
from runner.distributed.env import Rank
from runner.job import Job
from stages.errors import StagerunError


def leads_to_a_plan(options: RunOptions, family: str) -> bool:
    """Whether what the options of a family ask for can be planned, on the machine that would run it."""
    # Where something was refused by its plan, this is here already.
    from runner.distributed.plans import machine_of, planned
    from runner.distributed.rank import own_part
    from runner.planning.planner import make_plan

    try:
        job = _job(options, family)
        count = check_ranks(options)
        if isinstance(options, PlanOptions):
            planned(job, options.machine, count, hints=False)
        elif count is not None and job.tensor_parallel is None:
            first = own_part(machine_of(job, None), Rank(0, count, 0, count))
            make_plan(job, machine=first, download=False, shapes=False)
        else:
            make_plan(job, download=False, shapes=False)
    except StagerunError:
        return False
    return True


def _job(options: RunOptions, family: str) -> Job:
    match options:
        case ResumeOptions():
            return resumed_job(options.run, options)
        case PlanOptions():
            return planned_job(family, options)
        case FamilyOptions():
            return job_of(family, options, named=False)
    raise AssertionError(f"no command has {type(options).__name__}")
