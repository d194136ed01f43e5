"""Who holds the bytes of a store: one run alone, several together, or nobody. No torch."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from runner.artifacts.atomic_files import TMP, Entry
from runner.artifacts.manifest import Artifact, is_key, read_manifest
from runner.artifacts.signed_json import JSON, MAX_DOCUMENT_BYTES, Damaged
from runner.artifacts.store import COUNTER, Store

FOLDERS = ("objects", "stages", "runs", TMP)


@dataclass(frozen=True)
class Kept:
    """An artifact as it lies in a store."""

    stage: str
    """The stage that it is the result of; empty where its manifest is damaged."""
    files: tuple[Entry, ...]
    """Its manifest, and its object where that is there."""

    @property
    def bytes(self) -> int:
        """The bytes of its files."""
        return sum(entry.bytes for entry in self.files)


@dataclass(frozen=True)
class Usage:
    """The bytes of a store and who holds them."""

    artifacts: Mapping[str, Kept]
    """Every artifact, by key."""
    held: Mapping[str, frozenset[str]]
    """By run, the artifacts that it holds: those that its record names, and unfinished denoises of them."""
    records: Mapping[str, int]
    """The bytes of each run's record."""
    total: int
    """The bytes of all files of the store."""
    counter: int
    """The bytes of the file that counts its runs."""

    @cached_property
    def holders(self) -> Counter[str]:
        """How many runs hold each artifact."""
        return Counter(key for keys in self.held.values() for key in keys)

    def alone(self, run: str) -> int:
        """The bytes that no other run holds, its record among them: what goes with the run."""
        mine = (key for key in self.held.get(run, ()) if self.holders[key] == 1)
        return self.records.get(run, 0) + sum(self.artifacts[key].bytes for key in mine)

    def shared(self, run: str) -> int:
        """The bytes that other runs hold as well."""
        return sum(self.artifacts[key].bytes for key in self.held.get(run, ()) if self.holders[key] > 1)

    def only(self, runs: Collection[str]) -> frozenset[str]:
        """The artifacts that these runs hold, and no other does."""
        mine = Counter(key for run in dict.fromkeys(runs) for key in self.held.get(run, ()))
        return frozenset(key for key, count in mine.items() if self.holders[key] == count)

    def freed(self, runs: Collection[str]) -> int:
        """The bytes that go when these runs are forgotten, and what they alone hold is collected."""
        return (sum(self.records.get(run, 0) for run in dict.fromkeys(runs))
                + sum(self.artifacts[key].bytes for key in self.only(runs)))

    @property
    def stages(self) -> dict[str, int]:
        """The bytes of the artifacts of each stage."""
        found: Counter[str] = Counter()
        for kept in self.artifacts.values():
            found[kept.stage or "damaged"] += kept.bytes
        return dict(found)

    @property
    def together(self) -> int:
        """The bytes that several runs hold, each counted once."""
        return sum(self.artifacts[key].bytes for key, count in self.holders.items() if count > 1)

    @property
    def garbage(self) -> int:
        """The bytes that no run holds."""
        held = self.together + sum(map(self.alone, dict.fromkeys([*self.held, *self.records])))
        return self.total - self.counter - held


def usage_of(store: Store, needed: Mapping[str, Collection[str]]) -> Usage:
    """The usage of a store of which each run's record names the keys `needed`."""
    files = [entry for folder in FOLDERS for entry in store.entries(folder)]
    objects = {entry.path.rpartition("/")[2]: entry for entry in files if entry.path.startswith("objects/")}
    artifacts: dict[str, Kept] = {}
    midway: dict[str, list[str]] = {}
    for key, entry, artifact in manifests(store):
        of = None if artifact is None else artifact.note.get("of")
        there = None if artifact is None else objects.get(artifact.object)
        artifacts[key] = Kept("" if artifact is None else artifact.stage, (entry, *([there] if there else [])))
        if isinstance(of, str):
            midway.setdefault(of, []).append(key)
    # An unfinished denoise is held until what it is to become is there.
    unfinished = {of: keys for of, keys in midway.items() if of not in artifacts or not artifacts[of].stage}
    held = {run: frozenset(each for key in keys for each in (key, *unfinished.get(key, ())) if each in artifacts)
            for run, keys in needed.items()}
    records = {entry.path.split("/")[1]: entry.bytes for entry in files if entry.path.endswith("/run.json")}
    counter = sum(entry.bytes for entry in files if entry.path == COUNTER)
    return Usage(artifacts, held, records, sum(entry.bytes for entry in files), counter)


def keys_in(value: JSON | Iterable[JSON]) -> Iterator[str]:
    """Every key that a record names, wherever it does."""
    if isinstance(value, str):
        if is_key(value):
            yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from keys_in(inner)


def manifests(store: Store) -> Iterator[tuple[str, Entry, Artifact | None]]:
    """Every key that has a manifest, and what it says; None where it is damaged."""
    entries = [entry for entry in store.entries("stages") if is_key(_key(entry)) and entry.path.endswith(".json")]
    found = store.fetch_all([entry.path for entry in entries], MAX_DOCUMENT_BYTES)
    for entry, data in zip(entries, found, strict=True):
        try:
            artifact = None if data is None else read_manifest(bytes(data), _key(entry))
        except Damaged:
            artifact = None
        yield _key(entry), entry, artifact


def _key(entry: Entry) -> str:
    return entry.path.rpartition("/")[2].removesuffix(".json")
