"""How a run happens: plan, run, keep, report.

    from runner import Request, make_plan, run_all, run_stage
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.crew import Crew
    from runner.gathering import gather, split_between_ranks
    from runner.plan import Plan, make_plan
    from runner.request import Request
    from runner.run import Picture, Report, run_all, run_stage
    from runner.spawning import run_on_ray, spawn
    from runner.watch import RankLost

__all__ = [
    "Crew", "Picture", "Plan", "RankLost", "Report", "Request", "gather", "make_plan", "run_all", "run_on_ray",
    "run_stage", "spawn", "split_between_ranks",
]

_HOMES = {"Crew": "crew", "Picture": "run", "Plan": "plan", "RankLost": "watch", "Report": "run", "Request": "request",
          "gather": "gathering", "make_plan": "plan", "run_all": "run", "run_on_ray": "spawning", "run_stage": "run",
          "spawn": "spawning", "split_between_ranks": "gathering"}


def __getattr__(name: str) -> Any:
    # Lazy, because the command line imports this package and must answer before torch is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"runner.{_HOMES[name]}"), name)
    return value
