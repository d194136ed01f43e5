"""How a run happens: plan, run, keep, report.

    from runner import Request, make_plan, run_all, run_stage
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.planning.plan import Plan, make_plan
    from runner.ranks.crew import Crew
    from runner.ranks.gathering import gather, split_between_ranks
    from runner.ranks.spawning import run_on_ray, spawn
    from runner.ranks.watch import RankLost
    from runner.request import Request
    from runner.run import Picture, Report, run_all, run_stage

__all__ = [
    "Crew", "Picture", "Plan", "RankLost", "Report", "Request", "gather", "make_plan", "run_all", "run_on_ray",
    "run_stage", "spawn", "split_between_ranks",
]

_HOMES = {
    "Crew": "ranks.crew",
    "Picture": "run",
    "Plan": "planning.plan",
    "RankLost": "ranks.watch",
    "Report": "run",
    "Request": "request",
    "gather": "ranks.gathering",
    "make_plan": "planning.plan",
    "run_all": "run",
    "run_on_ray": "ranks.spawning",
    "run_stage": "run",
    "spawn": "ranks.spawning",
    "split_between_ranks": "ranks.gathering",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the command line imports this package and must answer before torch is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"runner.{_HOMES[name]}"), name)
    return value
