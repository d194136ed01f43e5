"""The plan of a job on one machine, by one process or by ranks, with what is said of cards that it leaves idle."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runner.distributed import rank_plans
from runner.distributed.idle import idle_cards, idle_lines
from runner.distributed.rank import usable_machine
from runner.distributed.rank_plans import RankPlan, used_by_ranks, used_devices
from runner.job import Job
from runner.planning import describe
from runner.planning.cache import PlanCache
from runner.planning.memory_limits import chosen, read_machine
from runner.planning.plan import Plan
from runner.planning.planner import make_plan
from runner.text import wrapped
from stages.errors import DoesNotFit, Fix, StagerunError, Word, as_keyword, worded
from stages.machine import Machine


@dataclass(frozen=True)
class Planned:
    """What one process would do, or each of several ranks."""

    plan: Plan
    """The plan of the process, or of the first rank."""
    ranks: tuple[RankPlan, ...] = ()
    """The plans of ranks; none where one process does it all, or several denoise together."""
    idle: tuple[str, ...] = ()
    """The cards that nobody uses."""
    hints: tuple[str, ...] = ()
    """What would use them."""

    @property
    def job(self) -> Job:
        """The job, less the requests that the model cannot make."""
        return self.plan.job

    def lines(self, *, verbose: bool = False, columns: int = 80, word: Word = as_keyword) -> Iterator[str]:
        """The plan for people, in lines of so many columns; `word` says what the job's fields are called."""
        if self.ranks:
            yield from rank_plans.lines(self.ranks, verbose=verbose, columns=columns, word=word)
        else:
            yield from describe.lines(self.plan, verbose=verbose, columns=columns, word=word)
        yield from self.remarks(columns, word)

    def remarks(self, columns: int, word: Word) -> Iterator[str]:
        """What is said of idle cards, in lines of so many columns."""
        for hint in self.hints:
            yield from wrapped(worded(hint, word), columns)

    def document(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        document = rank_plans.document(self.ranks) if self.ranks else describe.document(self.plan)
        return {**document, "idle": list(self.idle)}


def planned(
    job: Job, machine: str | None = None, count: int | None = None, *, hints: bool = True, shapes: bool = True
) -> Planned:
    """The job planned for a machine that need not be here, or for this one, by one process or by `count` ranks.

    With `shapes` from those that ship with the package where the model cannot be read. Without `hints` nothing is
    planned beyond that. Raises what `make_plan` raises, and InvalidInput for more ranks than cards.
    """
    cache, ranks = PlanCache(), tuple[RankPlan, ...]()
    if count is None or job.tensor_parallel is not None:
        plan = make_plan(job, machine=machine, download=False, cache=cache, shapes=shapes)
        there, used = plan.machine, used_devices([plan])
    else:
        there = machine_of(job, machine)
        ranks = _of_ranks(job, there, count, cache, hints=hints, shapes=shapes)
        plan, used = ranks[0].plan, used_by_ranks(ranks)
        hints = hints and not rank_plans.without_picture(ranks)
    lines = idle_lines(job, there, used, ranks=count, cache=cache, shapes=shapes) if hints else ()
    return Planned(plan, ranks, tuple(idle_cards(there, used)), tuple(lines))


def _of_ranks(
    job: Job, machine: Machine, count: int, cache: PlanCache, *, hints: bool, shapes: bool
) -> tuple[RankPlan, ...]:
    """The plans of ranks; DoesNotFit says whether one process with all of the cards would have room."""
    try:
        return tuple(rank_plans.rank_plans(job, machine, count, cache=cache, shapes=shapes))
    except DoesNotFit as error:
        if not hints:
            raise
        with suppress(StagerunError):
            make_plan(job, machine=machine, download=False, cache=cache, shapes=shapes)
            error.text += "\n-> it fits without `ranks`: one process with all of the cards"
            error.fixes = (Fix("ranks"),)
        raise


def machine_of(job: Job, machine: str | None) -> Machine:
    """The machine that a text spells, as far as the job may use it; this one for none."""
    return usable_machine(job) if machine is None else chosen(read_machine(machine), job.devices)
