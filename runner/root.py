"""The folder of a store: opened and checked once, swept of what killed processes left, and its locks."""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.durable import PART, TMP, explained, folder, owner
from stages.errors import StoreError

LOCK = ".lock"
ORPHAN_AFTER = 3600.0
PATIENCE = 3600.0
_POLL = 0.05
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_root(path: Path, layout: Collection[str], *, readonly: bool) -> Path:
    """The folder `path`, its symlinks resolved once, holding `layout` and tmp/; StoreError where it cannot be a store.

    Only its last part is made where it is missing. With `readonly` nothing is made or written.
    """
    root = Path(os.path.realpath(path))
    with explained(root, "open"):
        if not os.path.lexists(root):
            if readonly:
                raise StoreError(f"there is no artifact store {root}")
            if not root.parent.is_dir():
                raise StoreError(f"cannot make {root}: {root.parent} does not exist, make it first")
            with folder(root.parent, root.name, make=True):
                pass
        if not root.is_dir():
            raise StoreError(f"{root} is not a folder: choose another --artifacts")
        _check_ours(root, layout)
        for inside in () if readonly else (*layout, TMP):
            with folder(root, inside, make=True):
                _check_writable(root / inside)
    if not readonly:
        sweep(root)
    return root


def sweep(root: Path) -> None:
    """Remove what killed processes left in tmp/: older than an hour, and held by nobody."""
    with explained(root / TMP, "sweep"), folder(root, TMP) as tmp:
        for name in os.listdir(tmp):
            if name.endswith((PART, LOCK)):
                with suppress(FileNotFoundError, BlockingIOError):
                    _remove_orphan(tmp, name)


@contextmanager
def alone(root: Path, name: str, *, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `name` in tmp/ for the block; `waiting` hears of a long wait.

    It saves work and guards nothing: where there can be no lock, and after an hour of waiting, the block runs anyway.
    """
    try:
        with folder(root, TMP) as tmp:
            handle = _locked(tmp, name, waiting)
    except OSError:
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError), folder(root, TMP) as tmp:
                os.unlink(name, dir_fd=tmp)
            os.close(handle)


def _locked(tmp: int, name: str, waiting: Callable[[str], None]) -> int | None:
    start, told = time.monotonic(), False
    while (waited := time.monotonic() - start) < PATIENCE:
        handle = _try_lock(tmp, name)
        if handle is not None:
            return handle
        if waited > 1 and not told:
            waiting("another process is computing the same artifact: waiting for it")
            told = True
        time.sleep(_POLL)
    waiting(f"another process has held the same artifact for {PATIENCE:.0f} s: going on without waiting")
    return None


def _try_lock(tmp: int, name: str) -> int | None:
    handle, held = os.open(name, _LOCK, 0o600, dir_fd=tmp), False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last holder unlinks the file before it lets go: a lock on an unlinked file excludes nobody.
        held = os.fstat(handle).st_nlink > 0
    except BlockingIOError:
        held = False
    finally:
        if not held:
            os.close(handle)
    return handle if held else None


def _remove_orphan(tmp: int, name: str) -> None:
    facts = os.stat(name, dir_fd=tmp, follow_symlinks=False)
    # A clock that jumped may date a file in the future.
    if abs(time.time() - facts.st_mtime) < ORPHAN_AFTER:
        return
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=tmp)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=tmp)
    finally:
        os.close(handle)


def _check_ours(root: Path, layout: Collection[str]) -> None:
    with folder(root, "") as handle:
        # A disk that was mounted for the store has a lost+found.
        there = {name for name in os.listdir(handle) if not name.startswith(".")} - {"lost+found"}
    foreign = there - {*layout, TMP}
    if foreign and not there.issuperset(layout):
        raise StoreError(f"{root} holds {min(foreign)!r} and is no artifact store: choose a new or an empty folder")


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise StoreError(f"cannot write in {path}: {owner(path)}: have it opened to you, or use other --artifacts")
