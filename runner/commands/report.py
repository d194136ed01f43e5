"""`runner report`: the page of a run, written to a file."""

import sys
from pathlib import Path

from runner.commands.runs import opened
from runner.media.paths import write
from runner.reports.history import find_run, readable
from runner.terminal import say_exactly
from runner.text import shown
from stages.errors import InvalidInput


def write_report(run: str, out: str | None, artifacts: str | None, *, overwrite: bool) -> None:
    """Write the page of a run in the store, or of its last one, and print its path."""
    path = None if out is None else checked(out)
    # After what can be refused without it.
    from runner.reports.page import page

    store = opened(artifacts, readonly=True)
    name = find_run(store, run)
    path = path or Path(f"{name}.html")
    record = store.load_run(name)
    with readable(name):
        text = page(name, record, store)
    write(path, text.encode(), overwrite=overwrite)
    say_exactly(sys.stdout, [str(path)])


def checked(out: str) -> Path:
    """Where a page goes to; InvalidInput for what is no name of one."""
    if not out.lower().endswith((".html", ".htm")) or not out.isprintable():
        raise InvalidInput(f"`out` {shown(out)} must end in .html")
    return Path(out)
