"""The stores that there are: in memory, in a folder, behind a URL, and one that hands everything on to another."""

import os
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
from runner.text import gib
from stages.errors import StoreError
from stages.signatures import checked_call
from stages.wording import kind_of

# What may be said in the place of a store.
Where = Store | str | os.PathLike[str]


class MemoryStore(Store):
    """A store in this process's memory, gone with it; the same bytes and the same checks as a folder."""

    def __init__(self, *, warn: Warn = warnings.warn, strict: bool = False) -> None:
        super().__init__(warn, strict)
        self._files: dict[str, tuple[bytes, float]] = {}
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __repr__(self) -> str:
        held = sum(entry.bytes for entry in self.entries("objects"))
        return f"MemoryStore({len(self.names('stages'))} artifacts in memory, {gib(held)})"
    @property
    def where(self) -> str:
        return "memory"

    def fetch(self, path: str, max_bytes: int, *, first: int | None = None) -> bytearray | None:
        """A copy of the bytes at `path`: who reads a state may change its tensors."""
        found = self._files.get(path)
        return None if found is None else bytearray(found[0][:first])

    def publish(self, files: Sequence[File]) -> None:
        for file in files:
            self._files[file.path()] = b"".join(file.chunks()), time.time()

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._files.pop(path, None)

    def names(self, folder: str) -> list[str]:
        return sorted({entry.path.split("/")[1] for entry in self.entries(folder)})

    def entries(self, folder: str) -> Iterator[Entry]:
        for path, (data, modified) in list(self._files.items()):
            if path.startswith(f"{folder}/"):
                yield Entry(path, len(data), modified)

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        with self._working[checked_key(key)]:
            yield


class FolderStore(Store):
    """A store in a folder, made where it is missing; safe under kills, damage and several processes at once.

    What is published or removed is on the disk, or gone from it, when the call returns. `readonly` opens what is there
    and never writes; otherwise StoreError at once where the folder is not ours to write in.
    """

    def __init__(
        self, path: str | Path, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False
    ) -> None:
        super().__init__(warn, strict)
        self.path = folder.open_root(Path(path), ("objects", "stages", "runs"), readonly=readonly)

    def __repr__(self) -> str:
        return f"FolderStore({str(self.path)!r})"
    @property
    def where(self) -> str:
        return str(self.path)

    def fetch(self, path: str, max_bytes: int, *, first: int | None = None) -> Buffer | None:
        return atomic_files.read(self.path, path, max_bytes=max_bytes, first=first)

    def publish(self, files: Sequence[File]) -> None:
        atomic_files.write(self.path, files)

    def remove(self, paths: Sequence[str]) -> None:
        atomic_files.remove(self.path, paths)

    def names(self, folder: str) -> list[str]:
        return atomic_files.names(self.path, folder)

    def entries(self, folder: str) -> Iterator[Entry]:
        return atomic_files.entries(self.path, folder)

    def working(self, key: str) -> AbstractContextManager[None]:
        return locks.exclusive(self.path, checked_key(key), "computing the same artifact", warn=self.warn)

    def housekeeping(self) -> AbstractContextManager[None]:
        return locks.exclusive(self.path, "runs", "at work on the list of runs", warn=self.warn)

    def running(self, run: str) -> AbstractContextManager[None]:
        return locks.shared(self.path, f"run.{checked_run(run)}")

    def is_running(self, run: str) -> bool | None:
        return locks.is_held(self.path, f"run.{checked_run(run)}")

    def sweep(self, *, min_age: float, dry_run: bool) -> list[Entry]:
        return folder.sweep(self.path, min_age=min_age, dry_run=dry_run)

    def drop_run(self, run: str) -> None:
        super().drop_run(run)
        atomic_files.remove_folder(self.path, f"runs/{run}")


class ForwardingStore(Store):
    """A store that reaches its bytes through another one, for subclasses that do some things in their own way."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.warn, store.strict)
        self._store = store

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._store!r})"
    @property
    def where(self) -> str:
        return self._store.where

    def fetch(self, path: str, max_bytes: int, *, first: int | None = None) -> Buffer | None:
        return self._store.fetch(path, max_bytes, first=first)

    def fetch_all(self, paths: Sequence[str], max_bytes: int, *, first: int | None = None) -> Iterator[Buffer | None]:
        return self._store.fetch_all(paths, max_bytes, first=first)

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

    def sweep(self, *, min_age: float, dry_run: bool) -> list[Entry]:
        return self._store.sweep(min_age=min_age, dry_run=dry_run)

    def drop_run(self, run: str) -> None:
        self._store.drop_run(run)


@checked_call
def open_store(where: Where, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False) -> Store:
    """The store at `where`: "memory", a folder whose parent exists, or a URL such as s3://bucket/folder; or a store.

    `strict` raises StoreError for a damaged artifact, which else counts as missing, with a warning.
    """
    if isinstance(where, Store):
        return where
    if not isinstance(where, str | os.PathLike):
        raise StoreError(f"`store` is {kind_of(where)} -> a folder, a URL, \"memory\", or what open_store "
                         f"gives")
    where = os.fspath(where)
    if not where:
        raise StoreError("`store` is empty -> a folder, a URL or \"memory\"")
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
