"""`runner resume`: on with a run that was interrupted, that failed, or whose pictures are gone."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from runner.commands.make import hush, produce
from runner.commands.order import STAGES, default_store, devices, read_every, read_preview
from runner.commands.resumption import order_of
from runner.reports.history import find_run
from stages.errors import StoreError

MEANS = ("max_memory", "place", "allow_offload", "lanes", "step_every")


def resume(run: str, said: Any) -> int:
    """Finish the run named `run`, or the `last` one; the exit code. `said` may place it anew, or compute a stage anew.

    Raises StoreError where the store has no such run, ModelError where its model is another now.
    """
    if said.quiet and said.verbose:
        raise ValueError("--quiet and --verbose contradict each other -> leave one of them out")
    hush(said.verbose)
    where = said.artifacts or str(default_store())
    if where == "memory":
        raise StoreError("a run in memory ends with its process -> name the store with --artifacts DIR")
    from runner.artifacts import open_store

    store = open_store(where, readonly=True)
    name = find_run(store, run)
    asked, options = order_of(name, store.load_run(name), where)
    if said.device or said.gpus:
        options |= {"device": said.device, "gpus": said.gpus}
    options |= {name: value for name in MEANS if (value := getattr(said, name))}
    options |= {name: options[name] or getattr(said, name) for name in ("overwrite", "no_degrade")}
    last = options["stop_after"] or "decode"
    if said.from_stage and STAGES.index(said.from_stage) > STAGES.index(last):
        raise ValueError(f"--from {said.from_stage} comes after {last}, where run {name} stops -> leave it out")
    asked = replace(asked, devices=devices(options["device"] or (), options["gpus"]),
                    preview=read_preview(options["preview"]), step_every=read_every(options["step_every"]))
    return produce(asked, SimpleNamespace(**{**vars(said), **options}))
