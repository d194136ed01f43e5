"""The folder of a store: opened and checked once, and swept of what killed processes left."""

import os
from collections.abc import Collection
from pathlib import Path

from runner.artifacts.atomic_files import TMP, Entry, entries, explained, folder, owner
from runner.artifacts.locks import LOCK
from runner.artifacts.temp_files import PART, is_of_this_boot, orphaned
from stages.errors import StoreError

ORPHAN_AFTER = 3600.0


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
            with folder(root.parent, root.name, made=os.fsync):
                pass
        if not root.is_dir():
            raise StoreError(f"{root} is not a folder: choose another `store`")
        _check_ours(root, layout)
        for inside in () if readonly else (*layout, TMP):
            with folder(root, inside, made=os.fsync):
                _check_writable(root / inside)
    if not readonly:
        sweep(root)
    return root


def sweep(root: Path, *, min_age: float = ORPHAN_AFTER, dry_run: bool = False) -> list[Entry]:
    """Remove (unless `dry_run`) what killed processes left in tmp/ and nobody holds; what it is.

    Where a lock of another machine may not be seen, what was left `min_age` seconds ago.
    """
    found = [entry for entry in entries(root, TMP) if _is_orphan(entry, min_age)]
    with explained(root / TMP, "sweep"), folder(root, TMP) as tmp:
        return [entry for entry in found if _remove_orphan(tmp, entry, min_age, dry_run)]


def _is_orphan(entry: Entry, min_age: float) -> bool:
    name = entry.path.rpartition("/")[2]
    # A lock guards nothing, so one too few costs at most work.
    return name.endswith(LOCK) or is_of_this_boot(name) or (name.endswith(PART) and entry.age() >= min_age)


def _remove_orphan(tmp: int, entry: Entry, min_age: float, dry_run: bool) -> bool:
    name = entry.path.rpartition("/")[2]
    try:
        with orphaned(name, tmp) as free:
            gone = free or (free is None and entry.age() >= min_age)
            if gone and not dry_run:
                os.unlink(name, dir_fd=tmp)
            return gone
    except FileNotFoundError:
        return False


def _check_ours(root: Path, layout: Collection[str]) -> None:
    with folder(root, "") as handle:
        # A disk that was mounted for the store has a lost+found.
        there = {name for name in os.listdir(handle) if not name.startswith(".")} - {"lost+found"}
    foreign = there - {*layout, TMP}
    if foreign and not there.issuperset(layout):
        raise StoreError(f"{root} holds {min(foreign)!r} and is no artifact store: choose a new or an empty folder")


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise StoreError(f"cannot write in {path}: {owner(path)}: have it opened to you, or choose another `store`")
