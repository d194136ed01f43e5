"""Locks between processes: files in the tmp/ of a store, let go by the system when their holder dies.

They save work and guard nothing: where there can be no lock, and after an hour of waiting, work goes on without.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.artifacts.atomic_files import TMP, folder

LOCK = ".lock"
PATIENCE = 3600.0
_POLL = 0.05
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def exclusive(root: Path, name: str, doing: str, *, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `name` for the block alone; `warn` hears of a long wait for another, who is `doing` something."""
    try:
        with folder(root, TMP) as tmp:
            handle = _waited(tmp, f"{name}{LOCK}", doing, warn)
    except OSError:
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            _let_go(root, name, handle)


@contextmanager
def shared(root: Path, name: str) -> Iterator[None]:
    """Hold the lock `name` for the block, together with others who hold it so."""
    handle = None
    with suppress(OSError), folder(root, TMP) as tmp:
        # A look at the lock holds it for an instant.
        while (handle := _try_lock(tmp, f"{name}{LOCK}", fcntl.LOCK_SH)) is None:
            time.sleep(_POLL)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unlink(root, name)
            os.close(handle)


def is_held(root: Path, name: str) -> bool | None:
    """Whether a process holds the lock `name`; None where there can be no lock."""
    try:
        with folder(root, TMP) as tmp:
            handle = os.open(f"{name}{LOCK}", _LOOK, dir_fd=tmp)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _waited(tmp: int, name: str, doing: str, warn: Callable[[str], None]) -> int | None:
    start, warned = time.monotonic(), False
    while (waited := time.monotonic() - start) < PATIENCE:
        handle = _try_lock(tmp, name, fcntl.LOCK_EX)
        if handle is not None:
            return handle
        if waited > 1 and not warned:
            warn(f"another process is {doing}: waiting for it")
            warned = True
        time.sleep(_POLL)
    warn(f"another process has been {doing} for {PATIENCE:.0f} s: going on without waiting")
    return None


def _try_lock(tmp: int, name: str, how: int) -> int | None:
    handle, held = os.open(name, _LOCK, 0o600, dir_fd=tmp), False
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
        # The last holder unlinks the file before it lets go: a lock on an unlinked file excludes nobody.
        held = os.fstat(handle).st_nlink > 0
    except BlockingIOError:
        held = False
    finally:
        if not held:
            os.close(handle)
    return handle if held else None


def _let_go(root: Path, name: str, handle: int) -> None:
    with suppress(OSError):
        _unlink(root, name)
    os.close(handle)


def _unlink(root: Path, name: str) -> None:
    with folder(root, TMP) as tmp:
        os.unlink(f"{name}{LOCK}", dir_fd=tmp)
