"""How a call shows that it goes on: in a cell of a notebook, on a terminal, or not at all."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from runner.events import Emit, silent
from runner.reports.notebook import Live
from runner.reports.progress import Progress


@contextmanager
def shown(progress: bool | None) -> Iterator[Emit]:
    """An emit for the block: where `progress` is None it shows something if somebody can see it replaced."""
    notebook = in_notebook()
    if progress is False or (progress is None and not notebook and not sys.stderr.isatty()):
        yield silent
    elif notebook:
        yield Live()
    else:
        with Progress(sys.stderr) as told:
            yield told


def in_notebook() -> bool:
    """Whether this process works for a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")
