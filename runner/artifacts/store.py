"""The logic of every store, over a few ways to reach bytes by a path such as "stages/<key>.json".

    objects/ab/abcdef...    the bytes of a state; the name is their sha256
    stages/<key>.json       manifest: which object a key has, what is in it, how it came to be
    runs/<run>/run.json     what a run was asked, and its keys

Written in the order object, manifest, run and read in reverse, so that a kill at any moment leaves a stage that is
either done or not done. Locks save work; nothing depends on them for being right. torch is imported for states alone.
"""

import hashlib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from runner.artifacts import manifest
from runner.artifacts.atomic_files import Buffer, Entry, File
from runner.artifacts.background import Background
from runner.artifacts.manifest import MAX_OBJECT_BYTES, Artifact, checked_key, checked_run, is_key, is_run
from runner.artifacts.signed_json import JSON, MAX_DOCUMENT_BYTES, Damaged, read_document, write_document
from runner.artifacts.temp_files import Chunks
from stages.errors import StoreError

if TYPE_CHECKING:
    from stages.state import State

Warn = Callable[[str], None]
_HEAD = re.compile(rb'\{\s*"schema": \d+,\s*"sequence": (\d{1,18}),\s*"begun": (\d{1,12}\.\d+),')
_HEAD_BYTES = 128
# How many runs there were, also after they are forgotten.
COUNTER = "runs/.sequence"


@dataclass(frozen=True)
class StoredRun:
    """The record of a run, and when it began."""

    run: str
    """The name of the run."""
    sequence: int
    """Its place among the runs of the store."""
    begun: float
    """When it began by the clock of then, in seconds since 1970."""
    record: Mapping[str, JSON]
    """What it was asked and did."""


class Store(ABC):
    """Artifacts and runs; a subclass reaches their bytes.

    `warn` hears of damage; with `strict`, damage is a StoreError instead.
    """

    def __init__(self, warn: Warn, strict: bool) -> None:
        self.warn = warn
        self.strict = strict

    @property
    @abstractmethod
    def where(self) -> str:
        """The place that it was opened at: "memory", a folder, or a URL."""

    @abstractmethod
    def fetch(self, path: str, max_bytes: int, *, first: int | None = None) -> Buffer | None:
        """The bytes at `path`, or `first` of them; None where nothing is; StoreError where they exceed `max_bytes`."""

    def fetch_all(self, paths: Sequence[str], max_bytes: int, *, first: int | None = None) -> Iterator[Buffer | None]:
        """What `fetch` gives for each path."""
        return (self.fetch(path, max_bytes, first=first) for path in paths)

    @abstractmethod
    def publish(self, files: Sequence[File]) -> None:
        """Put each file at its path, whole, in this order."""

    @abstractmethod
    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, passing over those that are missing."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none where it is missing."""

    @abstractmethod
    def entries(self, folder: str) -> Iterator[Entry]:
        """Every plain file below a folder."""

    @abstractmethod
    def working(self, key: str) -> AbstractContextManager[None]:
        """Only one process at a time is inside for `key`; ask `get` once more when inside."""

    def housekeeping(self) -> AbstractContextManager[None]:
        """Only one process at a time is inside, to begin a run or to collect garbage."""
        return nullcontext()

    def running(self, run: str) -> AbstractContextManager[None]:
        """Show others that the run is going on, for the block."""
        checked_run(run)
        return nullcontext()

    def is_running(self, run: str) -> bool | None:
        """Whether a process is inside of `running`; None where that cannot be known."""
        checked_run(run)
        return None

    def sweep(self, *, min_age: float, dry_run: bool) -> list[Entry]:
        """Remove (unless `dry_run`) what killed writers left `min_age` seconds ago; what it is."""
        return []

    def get(self, key: str) -> "State | None":
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

    def put(self, key: str, stage: str, state: "State", note: Mapping[str, object]) -> Artifact:
        """Store `state` under `key`; BadResult where it is not finite, StoreError where it cannot be stored."""
        from runner.artifacts.state_format import pack

        before: Artifact | None = None
        with suppress(Damaged):
            before = self.manifest(key)
        packed = pack(state, key=checked_key(key), stage=stage)
        # Taken while the bytes are written.
        digest = cache(Background(partial(_sha256, packed.chunks)).result)

        def artifact() -> Artifact:
            return Artifact(key, stage, digest(), packed.bytes, packed.tensors, dict(note))

        self.publish([
            File("objects", lambda: object_path(digest()), lambda: packed.chunks),
            File("stages", lambda: manifest_path(key), lambda: [manifest.write_manifest(artifact())]),
        ])
        # As in `drop`: no other manifest names the object that was replaced, unless somebody stored it once more.
        if before is not None and before.object != digest() and self.find(key) == artifact():
            self.remove([object_path(before.object)])
        return artifact()

    def find(self, key: str) -> Artifact | None:
        """The manifest of `key`, without a look at its object."""
        try:
            return self.manifest(key)
        except Damaged as error:
            self._not_done(f"the manifest of artifact {key[:12]}", error)
            return None

    def manifest(self, key: str) -> Artifact | None:
        """The manifest of `key`; Damaged where it is."""
        data = self.fetch(manifest_path(checked_key(key)), MAX_DOCUMENT_BYTES)
        return None if data is None else manifest.read_manifest(bytes(data), key)

    def read(self, artifact: Artifact, *, finite: bool = True) -> "State":
        """The state of `artifact`; StoreError where it is missing or damaged, BadResult unless `finite` is waived."""
        from runner.artifacts.state_format import unpack

        data = self.fetch(object_path(artifact.object), MAX_OBJECT_BYTES)
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
        artifact: Artifact | None = None
        with suppress(Damaged):
            artifact = self.manifest(key)
            if artifact is None:
                return
        # A key without a manifest is not there. The key is part of its object's bytes, so no other manifest names
        # them; but another process may have stored the same again.
        self.remove([manifest_path(key)])
        if artifact is not None and self.fetch(manifest_path(key), MAX_DOCUMENT_BYTES) is None:
            self.remove([object_path(artifact.object)])

    def keys(self) -> list[str]:
        """Every key that has a manifest, sorted."""
        return [key for key in (name.removesuffix(".json") for name in self.names("stages")) if is_key(key)]

    def objects(self) -> Iterator[tuple[str, Entry]]:
        """Every object by the sha256 that names it, whether a manifest names it or not."""
        for entry in self.entries("objects"):
            digest = entry.path.rpartition("/")[2]
            if is_key(digest) and entry.path == object_path(digest):
                yield digest, entry

    def save_run(self, run: str, record: Mapping[str, object]) -> None:
        """Store the record of a run in place of its last one."""
        head = self._head(checked_run(run))
        if head is not None:
            self._write_run(run, head, record)
            return
        with self.housekeeping():
            self._write_run(run, (self._next_sequence(), time.time()), record)

    def load_run(self, run: str) -> dict[str, JSON]:
        """The record of a run; StoreError where there is none or it is damaged."""
        return dict(self.stored_run(run).record)

    def stored_run(self, run: str) -> StoredRun:
        """The record of a run and when it began; StoreError where there is none or it is damaged."""
        data = self.fetch(run_path(checked_run(run)), MAX_DOCUMENT_BYTES)
        if data is None:
            raise StoreError(f"there is no run {run} here; the last are: {', '.join(self.runs()[-3:]) or 'none'}")
        try:
            record = read_document(bytes(data)).get("record")
            if not isinstance(record, dict):
                raise Damaged("it is signed, and holds none")
        except Damaged as error:
            raise StoreError(f"the record of run {run} is damaged: {error}; repeat it, its artifacts stay") from error
        return StoredRun(run, *_parse_head(bytes(data[:_HEAD_BYTES])), record)

    def drop_run(self, run: str) -> None:
        """Forget a run, if it is there; its artifacts stay."""
        self.remove([run_path(checked_run(run))])

    def runs(self) -> list[str]:
        """Every run, the first started first."""
        names = [run for run in self.names("runs") if is_run(run)]
        # A look at the first bytes: the record of a long run has millions.
        heads = self.fetch_all([run_path(run) for run in names], MAX_DOCUMENT_BYTES, first=_HEAD_BYTES)
        found = [(_parse_head(bytes(data)), run) for run, data in zip(names, heads, strict=True) if data is not None]
        return [run for _, run in sorted(found)]

    def _head(self, run: str) -> tuple[int, float] | None:
        data = self.fetch(run_path(run), MAX_DOCUMENT_BYTES, first=_HEAD_BYTES)
        return None if data is None else _parse_head(bytes(data))

    def _write_run(self, run: str, head: tuple[int, float], record: Mapping[str, object]) -> None:
        body = {"sequence": head[0], "begun": head[1], "record": dict(record)}
        self.publish([File.of(run_path(run), write_document(body))])

    def _next_sequence(self) -> int:
        # Counted, not timed: clocks jump. Where there are no locks, two runs that start at once may share a number;
        # their times and names then order them.
        data = self.fetch(COUNTER, 64)
        # A number that is longer than the head of a record may have was written by somebody else.
        if data is not None and re.fullmatch(rb"\d{1,17}", data):
            last = int(bytes(data))
        else:
            last = next((head[0] for run in reversed(self.runs()) if (head := self._head(run)) is not None), 0)
        self.publish([File.of(COUNTER, str(last + 1).encode())])
        return last + 1

    def _not_done(self, what: str, error: Damaged) -> None:
        if self.strict:
            raise StoreError(f"{what} is damaged: {error}; run without `strict` to compute it again") from error
        self.warn(f"{what} is damaged: {error}; it is computed again")


def object_path(digest: str) -> str:
    """Where the bytes with this sha256 are."""
    return f"objects/{digest[:2]}/{digest}"


def manifest_path(key: str) -> str:
    """Where the manifest of a key is."""
    return f"stages/{key}.json"


def run_path(run: str) -> str:
    """Where the record of a run is."""
    return f"runs/{run}/run.json"


def _sha256(chunks: Chunks) -> str:
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def _parse_head(data: bytes | bytearray) -> tuple[int, float]:
    head = _HEAD.match(data)
    return (0, 0.0) if head is None else (int(head[1]), float(head[2]))
