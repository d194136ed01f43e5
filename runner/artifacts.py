"""Where the states between the stages are kept: content-addressed, checked on every read, in memory or in a folder.

    objects/ab/abcdef...    the bytes of a state; the name is their sha256
    stages/<key>.json       manifest: which object a key has, what is in it, how it came to be
    runs/<run>/run.json     what a run was asked, and its keys
    tmp/                    everything is written here, fsynced, renamed; locks

Written in the order object, manifest, run and read in reverse, so that a kill at any moment leaves a stage that is
either done or not done. Locks save work; nothing depends on them for being right.
"""

import hashlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from runner import durable, manifest, root
from runner.durable import Chunks
from runner.envelope import JSON, Damaged, pack, unpack
from runner.header import MOST_BYTES
from runner.manifest import Artifact, checked_key, checked_run, is_key, is_run, key_of
from stages.errors import StoreError
from stages.state import State

Warn = Callable[[str], None]
__all__ = ["Artifact", "ArtifactStore", "FolderStore", "MemoryStore", "key_of", "open_store"]


class ArtifactStore(Protocol):
    """What a run needs of a store."""

    def get(self, key: str) -> State | None:
        """The state of `key`; None where it is not there, or (with a warning) damaged."""

    def put(self, key: str, stage: str, state: State, note: Mapping[str, object]) -> Artifact:
        """Store `state` under `key`; BadResult where it is not finite, StoreError where it cannot be stored."""

    def find(self, key: str) -> Artifact | None:
        """The manifest of `key`, without a look at its object."""

    def read(self, artifact: Artifact, *, finite: bool = True) -> State:
        """The state of `artifact`; StoreError where it is missing or damaged, BadResult unless `finite` is waived."""

    def drop(self, key: str) -> None:
        """Forget `key` and its bytes, if it is there; who is reading it finds it whole or not at all."""

    def keys(self) -> list[str]:
        """Every key that has a manifest, sorted."""

    def working(self, key: str) -> AbstractContextManager[None]:
        """Only one process at a time is inside for `key`; ask `get` once more when inside."""

    def save_run(self, run: str, record: Mapping[str, object]) -> None:
        """Store the record of a run in place of its last one."""

    def load_run(self, run: str) -> dict[str, JSON]:
        """The record of a run; StoreError where there is none or it is damaged."""

    def runs(self) -> list[str]:
        """Every run, the first started first."""


class _Store(ABC):
    """The logic of every store, over five ways to reach bytes by a path such as "stages/<key>.json"."""

    def __init__(self, warn: Warn, strict: bool) -> None:
        self._warn = warn
        self._strict = strict

    @abstractmethod
    def _read(self, path: str, most: int) -> bytearray | None: ...

    @abstractmethod
    def _write(self, files: Mapping[str, Chunks]) -> None: ...

    @abstractmethod
    def _remove(self, paths: Sequence[str]) -> None: ...

    @abstractmethod
    def _names(self, folder: str) -> list[str]: ...

    @abstractmethod
    def working(self, key: str) -> AbstractContextManager[None]:
        """Only one process at a time is inside for `key`; ask `get` once more when inside."""

    def get(self, key: str) -> State | None:
        """The state of `key`; None where it is not there, or (with a warning) damaged."""
        artifact = self.find(key)
        if artifact is None:
            return None
        try:
            return self.read(artifact)
        except Damaged as error:
            if self.find(key) != artifact:
                return self.get(key)  # dropped or written anew since its manifest was read
            self._not_done(f"artifact {key[:12]} of stage {artifact.stage}", error)
            return None

    def put(self, key: str, stage: str, state: State, note: Mapping[str, object]) -> Artifact:
        """Store `state` under `key`; BadResult where it is not finite, StoreError where it cannot be stored."""
        packed = pack(state, key=checked_key(key), stage=stage)
        artifact = Artifact(key, stage, packed.digest(), packed.bytes, packed.tensors, dict(note))
        self._write({_object(artifact.object): packed.chunks, _manifest(key): [manifest.write_manifest(artifact)]})
        return artifact

    def find(self, key: str) -> Artifact | None:
        """The manifest of `key`, without a look at its object."""
        data = self._read(_manifest(checked_key(key)), manifest.LONGEST)
        if data is None:
            return None
        try:
            return manifest.read_manifest(data, key)
        except Damaged as error:
            self._not_done(f"the manifest of artifact {key[:12]}", error)
            return None

    def read(self, artifact: Artifact, *, finite: bool = True) -> State:
        """The state of `artifact`; StoreError where it is missing or damaged, BadResult unless `finite` is waived."""
        data = self._read(_object(artifact.object), MOST_BYTES)
        if data is None:
            raise Damaged("its object is missing")
        if len(data) != artifact.bytes:
            raise Damaged(f"its object has {len(data):,} bytes instead of {artifact.bytes:,}")
        if hashlib.sha256(data).hexdigest() != artifact.object:
            raise Damaged("its object does not have the sha256 that names it")
        found = unpack(data, finite=finite)
        if (found.key, found.stage) != (artifact.key, artifact.stage):
            raise Damaged(f"its object belongs to artifact {found.key[:12]} of stage {found.stage}")
        if found.tensors != artifact.tensors:
            raise Damaged("its object holds other tensors than its manifest declares")
        return found.state

    def drop(self, key: str) -> None:
        """Forget `key` and its bytes, if it is there; who is reading it finds it whole or not at all."""
        data = self._read(_manifest(checked_key(key)), manifest.LONGEST)
        if data is None:
            return
        artifact: Artifact | None = None
        with suppress(Damaged):
            artifact = manifest.read_manifest(data, key)
        # A key without a manifest is not there. The key is part of its object's bytes, so no other manifest names
        # them; but another process may have stored the same again.
        self._remove([_manifest(key)])
        if artifact is not None and self._read(_manifest(key), manifest.LONGEST) is None:
            self._remove([_object(artifact.object)])

    def keys(self) -> list[str]:
        """Every key that has a manifest, sorted."""
        return [key for key in (name.removesuffix(".json") for name in self._names("stages")) if is_key(key)]

    def save_run(self, run: str, record: Mapping[str, object]) -> None:
        """Store the record of a run in place of its last one."""
        data = self._read(_run(checked_run(run)), manifest.LONGEST)
        sequence = self._next_sequence() if data is None else _sequence(data)
        self._write({_run(run): [manifest.write_document({"sequence": sequence, "record": dict(record)})]})

    def load_run(self, run: str) -> dict[str, JSON]:
        """The record of a run; StoreError where there is none or it is damaged."""
        data = self._read(_run(checked_run(run)), manifest.LONGEST)
        if data is None:
            raise StoreError(f"there is no run {run} here; the last are: {', '.join(self.runs()[-3:]) or 'none'}")
        try:
            record = manifest.read_document(data).get("record")
        except Damaged as error:
            raise StoreError(f"the record of run {run} is damaged: {error}; repeat it, its artifacts stay") from error
        assert isinstance(record, dict), "save_run wrote it, and its sha256 is right"
        return record

    def runs(self) -> list[str]:
        """Every run, the first started first."""
        found = ((run, self._read(_run(run), manifest.LONGEST)) for run in self._names("runs") if is_run(run))
        return [run for _, run in sorted((_sequence(data), run) for run, data in found if data is not None)]

    def _not_done(self, what: str, error: Damaged) -> None:
        if self._strict:
            raise StoreError(f"{what} is damaged: {error}; run without --strict to compute it again") from error
        self._warn(f"{what} is damaged: {error}; it is computed again")

    def _next_sequence(self) -> int:
        # Counted, not timed: clocks jump. Two runs that start at once may share a number; the name then orders them.
        data = self._read("runs/.sequence", 64)
        if data is not None and data.isdigit():
            last = int(data)
        else:
            found = (self._read(_run(run), manifest.LONGEST) for run in self.runs())
            last = max((_sequence(data) for data in found if data is not None), default=0)
        self._write({"runs/.sequence": [str(last + 1).encode()]})
        return last + 1


class MemoryStore(_Store):
    """A store in this process's memory, gone with it; the same bytes and the same checks as a folder."""

    def __init__(self, *, warn: Warn = warnings.warn, strict: bool = False) -> None:
        super().__init__(warn, strict)
        self._files: dict[str, bytes] = {}
        self._working: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def _read(self, path: str, most: int) -> bytearray | None:
        data = self._files.get(path)
        # A copy: who reads a state may change its tensors.
        return None if data is None else bytearray(data)

    def _write(self, files: Mapping[str, Chunks]) -> None:
        for path, chunks in files.items():
            self._files[path] = b"".join(chunks)

    def _remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._files.pop(path, None)

    def _names(self, folder: str) -> list[str]:
        inside = (path.removeprefix(f"{folder}/") for path in list(self._files) if path.startswith(f"{folder}/"))
        return sorted({path.split("/")[0] for path in inside})

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        """Only one thread at a time is inside for `key`; ask `get` once more when inside."""
        with self._working[checked_key(key)]:
            yield


class FolderStore(_Store):
    """A store in a folder, made where it is missing; safe under kills, damage and several processes at once.

    `readonly` opens what is there and never writes; otherwise StoreError at once where the folder is not ours to
    write in.
    """

    def __init__(
        self, path: str | Path, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False
    ) -> None:
        super().__init__(warn, strict)
        self.path = root.open_root(Path(path), ("objects", "stages", "runs"), readonly=readonly)

    def _read(self, path: str, most: int) -> bytearray | None:
        return durable.read(self.path, path, most=most)

    def _write(self, files: Mapping[str, Chunks]) -> None:
        durable.write(self.path, files)

    def _remove(self, paths: Sequence[str]) -> None:
        durable.remove(self.path, paths)

    def _names(self, folder: str) -> list[str]:
        return durable.names(self.path, folder)

    def working(self, key: str) -> AbstractContextManager[None]:
        """Only one process at a time is inside for `key`; ask `get` once more when inside."""
        return root.alone(self.path, f"{checked_key(key)}{root.LOCK}", waiting=self._warn)


def open_store(
    where: str, *, warn: Warn = warnings.warn, strict: bool = False, readonly: bool = False
) -> ArtifactStore:
    """The store at `where`: "memory", or a folder whose parent exists; `strict` refuses what is damaged."""
    if where == "memory":
        return MemoryStore(warn=warn, strict=strict)
    return FolderStore(Path(where).expanduser(), warn=warn, strict=strict, readonly=readonly)


def _object(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def _manifest(key: str) -> str:
    return f"stages/{key}.json"


def _run(run: str) -> str:
    return f"runs/{run}/run.json"


def _sequence(data: bytes | bytearray) -> int:
    try:
        sequence = manifest.read_document(data).get("sequence")
    except Damaged:
        return 0
    return sequence if isinstance(sequence, int) else 0
