"""`runner inspect`: what a stage handed over, value by value."""

import sys
from typing import TYPE_CHECKING

from runner.commands.settings import usual_store
from runner.reports.history import find_run
from runner.reports.repeat import line
from runner.terminal import say, warn
from runner.text import clean, gib, table
from stages.errors import InvalidInput

if TYPE_CHECKING:
    from runner.artifacts.inspection import TensorSummary
    from runner.artifacts.manifest import Artifact
    from stages.state import State

HEAD = ("name", "shape", "type", "min", "max", "mean", "non-finite")


def inspect(what: str, folder: str | None) -> None:
    """Print what the artifact `what` holds: a path in a store, a key or the start of one, or RUN:STAGE."""
    from runner.artifacts import open_store
    from runner.artifacts.inspection import is_path_or_url, open_artifact

    where = folder if folder is not None else usual_store()
    store = None if is_path_or_url(what) else open_store(where, warn=warn, readonly=True)
    run, colon, stage = what.partition(":")
    # The name of a run has a dash, which a key has not.
    if store is not None and not colon and (run == "last" or "-" in run):
        find_run(store, run)
        named = () if folder is None else ("--artifacts", folder)
        raise InvalidInput(f"a run has artifacts of each stage -> {line('inspect', f'{run}:denoise', *named)}, or of "
                           f"{run}:encode or {run}:decode")
    if store is not None and colon:
        what = f"{find_run(store, run)}:{stage}"
    # What is not finite is what people come to see.
    say(sys.stdout, lines(*open_artifact(what, store)))


def lines(artifact: "Artifact", state: "State") -> list[str]:
    """A line for the artifact, a table of its tensors, and its other values."""
    from runner.artifacts.inspection import describe

    tensors = table([HEAD, *(cells(row) for row in describe(state))])
    plain = [f"{name} = {value!r:.100}" for name, value in state.values.items() if _is_plain(value)]
    return [f"{artifact.stage} {artifact.key} ({gib(artifact.bytes)})", *tensors, *(clean(line) for line in plain)]


def cells(row: "TensorSummary") -> tuple[str, ...]:
    """One tensor's line of the table."""
    numbers = ("-" if number is None else f"{number:.6g}" for number in (row.min, row.max, row.mean))
    return (clean(row.name), "x".join(map(str, row.shape)) or "-", row.dtype, *numbers, str(row.nonfinite))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
