"""Where the states between the stages are kept: content-addressed, checked on every read, in memory or in a folder.

    objects/ab/abcdef...    the bytes of a state; the name is their sha256
    stages/<key>.json       manifest: which object a key has, what is in it, how it came to be
    runs/<run>/run.json     what a run was asked, and its keys
    tmp/                    everything is written here, fsynced, renamed; locks

Written in the order object, manifest, run and read in reverse, so that a kill at any moment leaves a stage that is
either done or not done. Locks save work; nothing depends on them for being right.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from runner.envelope import JSON, LARGEST, Damaged, Packed, pack, unpack
from runner.header import Spec, strict_json
from stages.errors import StoreError
from stages.state import State

SCHEMA = 1
LONGEST_RECORD = 64 * 2**20
_KEY = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Artifact:
    """A stored state, as its manifest tells it; `bytes` is the size of the object."""

    key: str
    stage: str
    object: str
    bytes: int
    tensors: Mapping[str, Spec]
    note: Mapping[str, JSON] = field(default_factory=dict)


class ArtifactStore(Protocol):
    """What a run needs of a store."""

    def get(self, key: str) -> State | None:
        """The state of `key`; None where it is not there, or (with a warning) damaged."""

    def put(self, key: str, stage: str, state: State, note: Mapping[str, JSON]) -> Artifact:
        """Store `state` under `key`; BadResult where it is not finite, StoreError where it cannot be stored."""

    def find(self, key: str) -> Artifact | None:
        """The manifest of `key`, without a look at its object."""

    def keys(self) -> list[str]:
        """Every key that has a manifest, sorted."""

    def working(self, key: str) -> AbstractContextManager[None]:
        """While one process is inside for `key`, others wait: ask `get` again once inside."""

    def save_run(self, run: str, record: Mapping[str, JSON]) -> None:
        """Store the record of a run in place of its last one."""

    def load_run(self, run: str) -> dict[str, JSON]:
        """The record of a run; StoreError where there is none."""

    def runs(self) -> list[str]:
        """Every run, the first started first."""


def key_of(parts: Mapping[str, JSON]) -> str:
    """The sha256 of `parts` as canonical JSON; ValueError for NaN and infinity. 1 and 1.0 are different."""
    return hashlib.sha256(_canonical(parts)).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class _Store(ABC):
    """The logic of every store, over four ways to reach bytes by a path such as "stages/<key>.json"."""

    def __init__(self, warn: Callable[[str], None], strict: bool) -> None:
        self._warn = warn
        self._strict = strict

    @abstractmethod
    def _read(self, path: str, most: int) -> bytes | None: ...

    @abstractmethod
    def _write(self, path: str, chunks: Sequence[bytes | memoryview]) -> None: ...

    @abstractmethod
    def _names(self, folder: str) -> list[str]: ...

    @abstractmethod
    def working(self, key: str) -> AbstractContextManager[None]: ...

    def get(self, key: str) -> State | None:
        artifact = self.find(key)
        if artifact is None:
            return None
        try:
            return self._open(artifact)
        except Damaged as error:
            self._not_done(f"artifact {key[:12]} of stage {artifact.stage}", error)
            return None

    def put(self, key: str, stage: str, state: State, note: Mapping[str, JSON]) -> Artifact:
        packed = pack(state, key=_checked_key(key), stage=stage)
        artifact = Artifact(key, stage, self._write_object(packed), packed.bytes, packed.tensors, dict(note))
        manifest = {name: getattr(artifact, name) for name in Artifact.__dataclass_fields__}
        self._write(f"stages/{key}.json", [_document(manifest)])
        return artifact

    def find(self, key: str) -> Artifact | None:
        data = self._read(f"stages/{_checked_key(key)}.json", LONGEST_RECORD)
        if data is None:
            return None
        try:
            return _artifact(_contents(data), key)
        except Damaged as error:
            self._not_done(f"the manifest of artifact {key[:12]}", error)
            return None

    def keys(self) -> list[str]:
        found = (name.removesuffix(".json") for name in self._names("stages"))
        return [key for key in found if _KEY.fullmatch(key)]

    def save_run(self, run: str, record: Mapping[str, JSON]) -> None:
        path = f"runs/{_checked_run(run)}/run.json"
        data = self._read(path, LONGEST_RECORD)
        sequence = self._next_sequence() if data is None else _sequence(data)
        self._write(path, [_document({"sequence": sequence, "record": dict(record)})])

    def load_run(self, run: str) -> dict[str, JSON]:
        data = self._read(f"runs/{_checked_run(run)}/run.json", LONGEST_RECORD)
        if data is None:
            last = ", ".join(self.runs()[-3:]) or "none"
            raise StoreError(f"there is no run {run} in this store (the last are: {last})")
        return _record(data, run)

    def runs(self) -> list[str]:
        found = []
        for run in self._names("runs"):
            data = self._read(f"runs/{run}/run.json", LONGEST_RECORD) if _RUN.fullmatch(run) else None
            if data is not None:
                found.append((_sequence(data), run))
        return [run for _, run in sorted(found)]

    def _write_object(self, packed: Packed) -> str:
        digest = packed.digest()
        self._write(_object(digest), packed.chunks)
        return digest

    def _open(self, artifact: Artifact) -> State:
        data = self._read(_object(artifact.object), LARGEST)
        if data is None:
            raise Damaged("its object is missing")
        if len(data) != artifact.bytes:
            raise Damaged(f"its object has {len(data):,} bytes instead of {artifact.bytes:,}")
        if hashlib.sha256(data).hexdigest() != artifact.object:
            raise Damaged("its object does not have the sha256 that names it")
        found = unpack(data)
        if (found.key, found.stage) != (artifact.key, artifact.stage):
            raise Damaged(f"its object belongs to artifact {found.key[:12]} of stage {found.stage}")
        if found.tensors != artifact.tensors:
            raise Damaged("its object holds other tensors than its manifest declares")
        return found.state

    def _not_done(self, what: str, error: Damaged) -> None:
        if self._strict:
            raise StoreError(f"{what} is damaged: {error}; run again without strict to compute it anew") from error
        self._warn(f"{what} is damaged: {error}; the stage is computed again")

    def _next_sequence(self) -> int:
        # Counted, not timed: clocks jump. Two runs that start at once may share a number; the name then orders them.
        data = self._read("runs/.sequence", 64)
        last = int(data) if data is not None and data.isdigit() else self._last_sequence()
        self._write("runs/.sequence", [str(last + 1).encode()])
        return last + 1

    def _last_sequence(self) -> int:
        every = (self._read(f"runs/{run}/run.json", LONGEST_RECORD) for run in self.runs())
        return max((_sequence(data) for data in every if data is not None), default=0)


class MemoryStore(_Store):
    """A store in this process's memory, gone with it; the same bytes and the same checks as a folder."""

    def __init__(self, *, warn: Callable[[str], None], strict: bool = False) -> None:
        super().__init__(warn, strict)
        self._files: dict[str, bytes] = {}

    def _read(self, path: str, most: int) -> bytes | None:
        return self._files.get(path)

    def _write(self, path: str, chunks: Sequence[bytes | memoryview]) -> None:
        self._files[path] = b"".join(chunks)

    def _names(self, folder: str) -> list[str]:
        inside = (path.removeprefix(f"{folder}/") for path in self._files if path.startswith(f"{folder}/"))
        return sorted({path.split("/")[0] for path in inside})

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        yield


class FolderStore(_Store):
    """A store in a folder, made where it is missing; safe under kills, damage and several processes at once."""

    def __init__(self, path: str | Path, *, warn: Callable[[str], None], strict: bool = False) -> None:
        from runner import durable

        super().__init__(warn, strict)
        self._durable = durable
        self.path = durable.open_root(Path(path))

    def _read(self, path: str, most: int) -> bytes | None:
        return self._durable.read(self.path, path, most=most)

    def _write(self, path: str, chunks: Sequence[bytes | memoryview]) -> None:
        mode = 0o444 if path.startswith("objects/") else 0o600
        self._durable.write(self.path, path, chunks, mode=mode)

    def _names(self, folder: str) -> list[str]:
        return self._durable.names(self.path, folder)

    @contextmanager
    def working(self, key: str) -> Iterator[None]:
        yield


def open_store(where: str, *, warn: Callable[[str], None], strict: bool = False) -> ArtifactStore:
    """The store at `where`: "memory", or a folder whose parent exists; `strict` refuses what is damaged."""
    if where == "memory":
        return MemoryStore(warn=warn, strict=strict)
    return FolderStore(Path(where).expanduser(), warn=warn, strict=strict)


def _object(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def _document(body: Mapping[str, object]) -> bytes:
    document = {"schema": SCHEMA, **body}
    signed = {**document, "sha256": hashlib.sha256(_canonical(document)).hexdigest()}
    return json.dumps(signed, indent=1, allow_nan=False).encode() + b"\n"


def _contents(data: bytes) -> dict[str, JSON]:
    try:
        document = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is torn ({error})") from error
    if not isinstance(document, dict):
        raise Damaged("it is no mapping")
    declared = document.pop("sha256", None)
    if declared != hashlib.sha256(_canonical(document)).hexdigest():
        raise Damaged("it does not have the sha256 that it names")
    schema = document.get("schema")
    if schema != SCHEMA:
        raise StoreError(f"this store was made by a newer version (schema {schema}, here {SCHEMA}): upgrade stagerun")
    return document


def _artifact(found: Mapping[str, JSON], key: str) -> Artifact:
    fields = {name: found.get(name) for name in Artifact.__dataclass_fields__}
    types = {"key": str, "stage": str, "object": str, "bytes": int, "tensors": dict, "note": dict}
    wrong = [name for name, kind in types.items() if type(fields[name]) is not kind]
    if wrong or not _KEY.fullmatch(str(fields["object"])):
        raise Damaged(f"it lacks {', '.join(wrong) or 'an object'}")
    if fields["key"] != key:
        raise Damaged(f"it is the manifest of artifact {str(fields['key'])[:12]}")
    return Artifact(**cast("dict[str, object]", fields))  # type: ignore[arg-type]


def _record(data: bytes, run: str) -> dict[str, JSON]:
    try:
        record = _contents(data).get("record")
    except Damaged as error:
        raise StoreError(f"the record of run {run} is damaged: {error}; its artifacts are still used") from error
    if not isinstance(record, dict):
        raise StoreError(f"the record of run {run} is damaged: it is no mapping; its artifacts are still used")
    return record


def _sequence(data: bytes) -> int:
    try:
        sequence = _contents(data).get("sequence")
    except Damaged:
        return 0
    return sequence if isinstance(sequence, int) else 0


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"an artifact key is 64 digits 0-9a-f, got {key[:80]!r}")
    return key


def _checked_run(run: str) -> str:
    if not _RUN.fullmatch(run):
        raise ValueError(f"a run's name is 1 to 64 of A-Z a-z 0-9 . _ - with no dot in front, got {run[:80]!r}")
    return run
