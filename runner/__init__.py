"""How a run happens: plan, run, keep, report.

    from runner import Job, Request, make_plan, run_all, run_stage
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.distributed.api import run_on_ray, spawn
    from runner.distributed.process_group import RankProcesses
    from runner.distributed.split_gather import gather, split_between_ranks
    from runner.engine.report import Picture, Report
    from runner.engine.run import run_all, run_stage
    from runner.job import Job, RunPolicy
    from runner.planning.plan import Plan
    from runner.planning.planner import make_plan
    from runner.request import Request
    from stages.errors import RankLost, StagerunError

    __version__: str

__all__ = [
    "Job", "Picture", "Plan", "RankLost", "RankProcesses", "Report", "Request", "RunPolicy", "StagerunError", "gather",
    "make_plan", "run_all", "run_on_ray", "run_stage", "spawn", "split_between_ranks",
]

_HOMES = {
    "Job": "runner.job",
    "Picture": "runner.engine.report",
    "Plan": "runner.planning.plan",
    "RankLost": "stages.errors",
    "RankProcesses": "runner.distributed.process_group",
    "Report": "runner.engine.report",
    "Request": "runner.request",
    "RunPolicy": "runner.job",
    "StagerunError": "stages.errors",
    "gather": "runner.distributed.split_gather",
    "make_plan": "runner.planning.planner",
    "run_all": "runner.engine.run",
    "run_on_ray": "runner.distributed.api",
    "run_stage": "runner.engine.run",
    "spawn": "runner.distributed.api",
    "split_between_ranks": "runner.distributed.split_gather",
}


def __getattr__(name: str) -> Any:
    # Lazy, because the command line imports this package and must answer before torch is imported.
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stagerun")
    except PackageNotFoundError as error:
        raise AttributeError("stagerun is not installed, so nothing says its version") from error


if "IPython" in sys.modules:
    from IPython import get_ipython

    # In a notebook, plans and reports are to show themselves as soon as this package is there.
    if (_shell := get_ipython()) is not None:
        from runner.reports.notebook import register
        from runner.startup import hush_notebook

        hush_notebook()
        register(_shell)
