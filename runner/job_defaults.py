"""What a job gets where it says nothing: a name for its run, and a place for its artifacts."""

import os
import secrets
import time
from pathlib import Path

from stages.errors import InvalidInput


def new_run() -> str:
    """A name for a run that no other has."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def default_store() -> Path:
    """The folder where artifacts are kept unless a job says otherwise: in the user's cache."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~")
    if not os.path.isabs(cache_home) and not os.path.isabs(home):
        raise InvalidInput("there is no home folder to keep artifacts in -> `store=DIR`, or `store=memory`")
    return (Path(cache_home) if os.path.isabs(cache_home) else Path(home) / ".cache") / "stagerun" / "store"
