"""Diffusion models that are bigger than the cards, stage by stage, from Python:

    import stagerun

    pipe = stagerun.Pipeline("flux", max_memory={0: "14GiB", 1: "14GiB"})
    result = pipe("a fox", num_inference_steps=28, guidance_scale=3.5, height=1024, width=1024, seed=7)
    result.images[0].save("fox.png")

    Pipeline                  a model and how it runs, called with diffusers' names; gives a Result
    Job, Request, RunPolicy   what a run is asked for, as data
    make_plan                 a Job placed: print it before anything is loaded or downloaded
    run_all, run_stage        all pictures of a Plan, or one stage of it; the first gives a Report of Pictures
    spawn, run_on_ray         a Job done by several processes, or by a Ray cluster
    split_between_ranks, gather
                              for scripts of one's own under a launcher
    open_store                where the results of stages are kept: memory, a folder, a URL
    Live, Memory, Charts      what a notebook shows
    log_in                    asks for the token that a gated model needs, and only then
    FAMILIES                  the model families, with their defaults
    StagerunError             the root of all errors; each is one line that says what to do
    Interrupted               a run that Ctrl-C, a signal or on_step stopped: no error, but a KeyboardInterrupt

All of them come from the packages `runner` and `stages`, which stay where they are; this one has their public names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# In a notebook it sees to it that plans and results show themselves.
import runner

if TYPE_CHECKING:
    from runner.artifacts import Artifact, FolderStore, MemoryStore, Store, open_store
    from runner.distributed.api import run_on_ray, spawn
    from runner.distributed.process_group import RankProcesses
    from runner.distributed.split_gather import gather, split_between_ranks
    from runner.engine.report import Picture, Report
    from runner.engine.run import run_all, run_stage
    from runner.engine.signals import Interrupted
    from runner.job import Job, Output, RunPolicy
    from runner.notebook import Charts, Live, Memory
    from runner.pipeline.login import log_in
    from runner.pipeline.pipeline import Pipeline
    from runner.pipeline.result import Result
    from runner.pipeline.states import States
    from runner.planning.plan import Plan
    from runner.planning.planner import make_plan
    from runner.request import Request
    from stages.errors import (
        BadResult,
        DoesNotFit,
        Fix,
        InvalidInput,
        ModelError,
        NotPrecomputable,
        RankLost,
        StageOutOfMemory,
        StagerunError,
        StoreError,
    )
    from stages.families import FAMILIES, Family
    from stages.state import State

    __version__: str

__all__ = [
    "Artifact", "BadResult", "Charts", "DoesNotFit", "FAMILIES", "Family", "Fix", "FolderStore", "Interrupted",
    "InvalidInput", "Job", "Live", "Memory", "MemoryStore", "ModelError", "NotPrecomputable", "Output", "Picture",
    "Pipeline", "Plan", "RankLost", "RankProcesses", "Report", "Request", "Result", "RunPolicy", "StageOutOfMemory",
    "StagerunError", "State", "States", "Store", "StoreError", "gather", "log_in", "make_plan", "open_store",
    "run_all", "run_on_ray", "run_stage", "spawn", "split_between_ranks",
]

_HOMES = {
    "runner.artifacts": ("Artifact", "FolderStore", "MemoryStore", "Store", "open_store"),
    "runner.distributed.api": ("run_on_ray", "spawn"),
    "runner.distributed.process_group": ("RankProcesses",),
    "runner.distributed.split_gather": ("gather", "split_between_ranks"),
    "runner.engine.report": ("Picture", "Report"),
    "runner.engine.run": ("run_all", "run_stage"),
    "runner.engine.signals": ("Interrupted",),
    "runner.job": ("Job", "Output", "RunPolicy"),
    "runner.notebook": ("Charts", "Live", "Memory"),
    "runner.pipeline.login": ("log_in",),
    "runner.pipeline.pipeline": ("Pipeline",),
    "runner.pipeline.result": ("Result",),
    "runner.pipeline.states": ("States",),
    "runner.planning.plan": ("Plan",),
    "runner.planning.planner": ("make_plan",),
    "runner.request": ("Request",),
    "stages.errors": ("BadResult", "DoesNotFit", "Fix", "InvalidInput", "ModelError", "NotPrecomputable", "RankLost",
                      "StageOutOfMemory", "StagerunError", "StoreError"),
    "stages.families": ("FAMILIES", "Family"),
    "stages.state": ("State",),
}


def __getattr__(name: str) -> Any:
    # Lazy: what needs torch is imported when it is asked for.
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if name == "__version__":
        value: Any = runner.__version__
    elif home is not None:
        value = getattr(import_module(home), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
