"""The command line of `runner runs`; nothing heavy is imported before it is checked."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from runner.commands.help import Command, Group

app = typer.Typer(cls=Group, rich_markup_mode="rich",
                  help="The runs of a store: what they were asked, what they did, and what they left.")
Store = Annotated[str | None, typer.Option("--artifacts", metavar="DIR|URL", help="The store.",
                                               show_default="in the user's cache")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Run = Annotated[str, typer.Argument(metavar="RUN|last", help="A run's name, or the start of it.")]


@app.command("ls", cls=Command)
def list_runs(
    artifacts: Store = None,
    json: AsJson = False,
    last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the N last ones.", show_default="all")
    ] = None,
) -> Callable[[], None]:
    """List the runs, the first started first."""
    from runner.commands.runs import ls

    return partial(ls, artifacts, as_json=json, last=last)


@app.command("show", cls=Command)
def show_run(run: Run, artifacts: Store = None, json: AsJson = False) -> Callable[[], None]:
    """Show what a run was asked, what is finished of it, and its warnings."""
    from runner.commands.runs import show

    return partial(show, run, artifacts, as_json=json)


@app.command("rm", cls=Command)
def remove_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|last", help="Names, or their starts.")],
    artifacts: Store = None,
    json: AsJson = False,
) -> Callable[[], None]:
    """Forget runs. What they made stays until gc."""
    from runner.commands.runs import rm

    return partial(rm, runs, artifacts, as_json=json)


@app.command("gc", cls=Command)
def collect_garbage(
    artifacts: Store = None,
    json: AsJson = False,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Such as 90s, 30m, 1h, 7d, 0.")] = "1h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> Callable[[], None]:
    """Remove the artifacts that no run names, and what killed processes left."""
    from runner.commands.runs import gc

    return partial(gc, artifacts, as_json=json, older=older_than, dry=dry_run)


@app.command("verify", cls=Command)
def verify_store(artifacts: Store = None, json: AsJson = False) -> Callable[[], None]:
    """Read every byte of the store, and name what is damaged."""
    from runner.commands.runs import verify

    return partial(verify, artifacts, as_json=json)
