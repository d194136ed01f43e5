"""Where the states between the stages are kept: content-addressed and checked on every read.

In memory, in a folder, or behind a URL.
"""

import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from runner.artifacts import atomic_files, folder, locks
from runner.artifacts.atomic_files import Buffer, Entry, File
from runner.artifacts.manifest import checked_key, checked_run
from runner.artifacts.store import Store, Warn
from stages.errors import StoreError


class MemoryStore(Store):
    """A store in this process's memory, gone with it; the same bytes and the same checks as a folder."""

    def __init__(self, *, warn: Warn = warnings.warn, strict: bool = False) -> None:
        super().__init__(warn, strict)
        self._files: dict[str, tuple[bytes, float]] = {}
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def fetch(self, path: str, most: int, *, first: int | None = None) -> bytearray | None:
        """A copy of the bytes at `path`: who reads a state may change its tensors."""
        found = self._files.get(path)
        return None if found is None else bytearray(found[0][:first])

    def publish(self, files: Sequence[File]) -> None:
        """Put each file at its path, in this order."""
        for file in files:
            self._files[file.path()] = b"".join(file.chunks()), time.time()

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, passing over those that are missing."""
        for path in paths:
            self._files.pop(path, None)

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted."""
        return sorted({entry.path.split("/")[1] for entry in self.entries(folder)})

    def entries(self, folder: str) -> Iterator[Entry]:
        """Every file below a folder."""
        for path, (data, modified) in list(self._files.items()):
            if path.startswith(f"{folder}/"):
                yield Entry(path, len(data), modified)

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        """Only one thread at a time is inside for `key`; ask `get` once more when inside."""
        with self._working[checked_key(key)]:
            yield


class FolderStore(Store):
    """A store in a folder, made where it is missing; safe under kills, damage and several processes at once.

    `readonly` opens what is there and never writes; otherwise StoreError at once where the folder is not ours to
    write in.
    """

    def __init__(
        self, path: str | Path, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False
    ) -> None:
        super().__init__(warn, strict)
        self.path = folder.open_root(Path(path), ("objects", "stages", "runs"), readonly=readonly)

    def fetch(self, path: str, most: int, *, first: int | None = None) -> Buffer | None:
        """The bytes at `path`, or `first` of them; None where nothing is; StoreError where it is no plain file."""
        return atomic_files.read(self.path, path, most=most, first=first)

    def publish(self, files: Sequence[File]) -> None:
        """Put each file at its path, whole, in this order; all are on the disk when it returns."""
        atomic_files.write(self.path, files)

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, passing over those that are missing; all are gone from the disk when it returns."""
        atomic_files.remove(self.path, paths)

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none where it is missing."""
        return atomic_files.names(self.path, folder)

    def entries(self, folder: str) -> Iterator[Entry]:
        """Every plain file below a folder."""
        return atomic_files.entries(self.path, folder)

    def working(self, key: str) -> AbstractContextManager[None]:
        """Only one process at a time is inside for `key`; ask `get` once more when inside."""
        return locks.exclusive(self.path, checked_key(key), "computing the same artifact", waiting=self.warn)

    def housekeeping(self) -> AbstractContextManager[None]:
        """Only one process at a time is inside, to begin a run or to collect garbage."""
        return locks.exclusive(self.path, "runs", "at work on the list of runs", waiting=self.warn)

    def running(self, run: str) -> AbstractContextManager[None]:
        """Show others that the run is going on, for the block."""
        return locks.shared(self.path, f"run.{checked_run(run)}")

    def is_running(self, run: str) -> bool | None:
        """Whether a process is inside of `running`; None where there can be no lock."""
        return locks.is_held(self.path, f"run.{checked_run(run)}")

    def sweep(self, *, older: float, dry: bool) -> list[Entry]:
        """Remove (unless `dry`) what killed writers left `older` seconds ago; what it is."""
        return folder.sweep(self.path, older=older, dry=dry)

    def drop_run(self, run: str) -> None:
        """Forget a run, if it is there; its artifacts stay."""
        super().drop_run(run)
        atomic_files.remove_folder(self.path, f"runs/{run}")


class ForwardingStore(Store):
    """A store that reaches its bytes through another one, for subclasses that do some things in their own way."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.warn, store.strict)
        self._store = store

    def fetch(self, path: str, most: int, *, first: int | None = None) -> Buffer | None:
        return self._store.fetch(path, most, first=first)

    def fetch_all(self, paths: Sequence[str], most: int, *, first: int | None = None) -> Iterator[Buffer | None]:
        return self._store.fetch_all(paths, most, first=first)

    def publish(self, files: Sequence[File]) -> None:
        self._store.publish(files)

    def remove(self, paths: Sequence[str]) -> None:
        self._store.remove(paths)

    def names(self, folder: str) -> list[str]:
        return self._store.names(folder)

    def entries(self, folder: str) -> Iterator[Entry]:
        return self._store.entries(folder)

    def working(self, key: str) -> AbstractContextManager[None]:
        return self._store.working(key)

    def housekeeping(self) -> AbstractContextManager[None]:
        return self._store.housekeeping()

    def running(self, run: str) -> AbstractContextManager[None]:
        return self._store.running(run)

    def is_running(self, run: str) -> bool | None:
        return self._store.is_running(run)

    def sweep(self, *, older: float, dry: bool) -> list[Entry]:
        return self._store.sweep(older=older, dry=dry)

    def drop_run(self, run: str) -> None:
        self._store.drop_run(run)


def open_store(where: str, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False) -> Store:
    """The store at `where`: "memory", a folder whose parent exists, or a URL such as s3://bucket/folder; `strict`
    refuses what is damaged.
    """
    if where == "memory":
        return MemoryStore(warn=warn, strict=strict)
    folder = folder_of(where)
    if folder is not None:
        return FolderStore(folder, warn=warn, strict=strict, readonly=readonly)
    from runner.artifacts.remote import RemoteStore

    return RemoteStore(where, warn=warn, strict=strict, readonly=readonly)


def folder_of(where: str) -> Path | None:
    """The folder that a place for artifacts names; None for "memory" and for URLs but file://."""
    if where.startswith("file://"):
        path = where.removeprefix("file://")
        if not path.startswith("/"):
            raise StoreError("`store` file:// takes a whole path -> such as file:///data/store")
        return Path(path)
    return None if where == "memory" or "://" in where else Path(where).expanduser()
