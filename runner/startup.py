"""What a process does before it imports the libraries: their warnings are held back, and their objects not tracked."""

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def hush(verbose: bool = False) -> None:
    """Keep the libraries' own warnings and progress bars off the terminal, unless everything is asked for."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "warning" if verbose else "error")
    if not verbose:
        warnings.simplefilter("ignore")


def hush_notebook() -> None:
    """Keep out of a notebook what the libraries say of themselves when they are imported; other warnings stay."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # tqdm's, where there are no widgets: its bars are text then.
    warnings.filterwarnings("ignore", "IProgress not found")
    # Ray's, which asks for the same widgets.
    logging.getLogger("ray.widgets").setLevel(logging.WARNING)


@contextmanager
def untracked() -> Iterator[None]:
    """Leave what the block makes out of garbage collection.

    Imports make 360,000 objects that stay: collecting among them costs 0.7 s while they are made, and 0.2 s at every
    flush.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
