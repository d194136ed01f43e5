"""What plans of one model found out on the way, for others of it that differ in their options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from runner.planning.precompute import TableSaving
from stages.estimate.block_memo import Costs
from stages.estimate.dry_run import Estimate
from stages.state import State

Found = TypeVar("Found")


@dataclass
class PlanCache:
    """It holds the states after stages, so nobody keeps it for longer than plans are made."""

    estimates: list[tuple[Any, State, Estimate]] = field(default_factory=list)
    """What was asked, the state that a stage started from, and what it takes."""
    savings: list[tuple[Any, State, TableSaving]] = field(default_factory=list)
    """The same of modulation tables."""
    rehearsals: list[tuple[Any, State, None]] = field(default_factory=list)
    """The same of rehearsals that went well."""
    costs: Costs = field(default_factory=dict)
    """What single blocks cost."""


def recalled(
    known: list[tuple[Any, State, Found]], asked: Any, state: State, find: Callable[[], Found]
) -> Found:
    """What is known for `asked` in this very state, or else what `find` gives, which is known from then on."""
    for before, there, found in known:
        if before == asked and (there is state or not (there.values or state.values)):
            return found
    found = find()
    known.append((asked, state, found))
    return found
