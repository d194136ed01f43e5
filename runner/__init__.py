"""How a run happens: plan, run, keep, report.

    from runner import Request, make_plan, run_all, run_stage
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.distributed.api import run_on_ray, spawn
    from runner.distributed.process_group import RankProcesses
    from runner.distributed.split_gather import gather, split_between_ranks
    from runner.distributed.watchdog import RankLost
    from runner.engine.run import Picture, Report, run_all, run_stage
    from runner.planning.plan import Plan, make_plan
    from runner.request import Request

__all__ = [
    "RankProcesses", "Picture", "Plan", "RankLost", "Report", "Request", "gather", "make_plan", "run_all",
    "run_on_ray", "run_stage", "spawn", "split_between_ranks",
]

_HOMES = {
    "RankProcesses": "distributed.process_group",
    "Picture": "engine.run",
    "Plan": "planning.plan",
    "RankLost": "distributed.watchdog",
    "Report": "engine.run",
    "Request": "request",
    "gather": "distributed.split_gather",
    "make_plan": "planning.plan",
    "run_all": "engine.run",
    "run_on_ray": "distributed.api",
    "run_stage": "engine.run",
    "spawn": "distributed.api",
    "split_between_ranks": "distributed.split_gather",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the command line imports this package and must answer before torch is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"runner.{_HOMES[name]}"), name)
    return value
