"""How a run happens: plan, run, keep, report.

    from runner import Request, make_plan, run_all, run_stage
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.distributed.api import run_on_ray, spawn
    from runner.distributed.process_group import RankProcesses
    from runner.distributed.split_gather import gather, split_between_ranks
    from runner.engine.run import Picture, Report, run_all, run_stage
    from runner.planning.plan import Plan, make_plan
    from runner.request import Request
    from stages.errors import RankLost

__all__ = [
    "RankProcesses", "Picture", "Plan", "RankLost", "Report", "Request", "gather", "make_plan", "run_all",
    "run_on_ray", "run_stage", "spawn", "split_between_ranks",
]

_HOMES = {
    "RankProcesses": "runner.distributed.process_group",
    "Picture": "runner.engine.run",
    "Plan": "runner.planning.plan",
    "RankLost": "stages.errors",
    "Report": "runner.engine.run",
    "Request": "runner.request",
    "gather": "runner.distributed.split_gather",
    "make_plan": "runner.planning.plan",
    "run_all": "runner.engine.run",
    "run_on_ray": "runner.distributed.api",
    "run_stage": "runner.engine.run",
    "spawn": "runner.distributed.api",
    "split_between_ranks": "runner.distributed.split_gather",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the command line imports this package and must answer before torch is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


if "IPython" in sys.modules:
    from IPython import get_ipython

    # In a notebook, plans and reports are to show themselves as soon as this package is there.
    if (_shell := get_ipython()) is not None:
        from runner.reports.notebook import register

        register(_shell)
