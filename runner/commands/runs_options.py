"""The command line of `runner runs`; nothing heavy is imported before it is checked."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import typer

from runner.commands.help import Command, Group

app = typer.Typer(cls=Group, rich_markup_mode="rich",
                  help="The runs of a store: what they were asked, what they did, and what they left.")
Store = Annotated[str | None, typer.Option("--artifacts", metavar="DIR|URL", help="The store.",
                                               show_default="in the user's cache")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Status = Literal["done", "interrupted", "failed", "running", "damaged"]
Run = Annotated[str, typer.Argument(metavar="RUN|last", help="A run's name, or the start of it.")]


@app.command("ls", cls=Command)
def list_runs(
    artifacts: Store = None,
    json: AsJson = False,
    last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the N newest.", show_default="all")
    ] = None,
    status: Annotated[Status | None, typer.Option(help="Only those that stand so.", show_default="all")] = None,
    match: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only those with TEXT in prompt, model or name.")
    ] = None,
) -> Callable[[], None]:
    """List the runs, the newest first: prompts, pictures, and the bytes that each holds alone and shares."""
    from runner.commands.runs import ls

    return partial(ls, artifacts, as_json=json, last=last, status=status, match=match)


@app.command("show", cls=Command)
def show_run(run: Run, artifacts: Store = None, json: AsJson = False) -> Callable[[], None]:
    """Show what a run was asked, what is finished of it, its pictures, and the commands that repeat it and go on."""
    from runner.commands.runs import show

    return partial(show, run, artifacts, as_json=json)


@app.command("rm", cls=Command)
def remove_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN|last", help="Names, or their starts.")],
    artifacts: Store = None,
    json: AsJson = False,
) -> Callable[[], None]:
    """Forget runs, and say what they held. That stays until gc; prune does both."""
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


@app.command("prune", cls=Command)
def prune_runs(
    artifacts: Store = None,
    json: AsJson = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Runs that began so long ago, such as 12h, 30d, 8w.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Runs that are not among the N newest.")
    ] = None,
    free: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Only as many, oldest first, as free so much: 10GiB.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove them; without it nothing is removed.")] = False,
) -> Callable[[], None]:
    """Show which runs would go, and what that frees; with --yes remove them and what they alone hold."""
    from runner.commands.space import prune_runs

    return partial(prune_runs, artifacts, as_json=json, older=older_than, keep=keep, free=free, yes=yes)


@app.command("du", cls=Command)
def disk_usage(artifacts: Store = None, json: AsJson = False) -> Callable[[], None]:
    """Show where the bytes are: by run, by stage, shared, garbage, and the hub's cache of models."""
    from runner.commands.space import du

    return partial(du, artifacts, as_json=json)


@app.command("verify", cls=Command)
def verify_store(artifacts: Store = None, json: AsJson = False) -> Callable[[], None]:
    """Read every byte of the store, and name what is damaged."""
    from runner.commands.runs import verify

    return partial(verify, artifacts, as_json=json)
