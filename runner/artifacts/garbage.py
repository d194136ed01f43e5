"""What a store keeps for nobody: artifacts that no run names, objects that no manifest names, halves of files."""

from dataclasses import dataclass

from runner.artifacts.atomic_files import Entry
from runner.artifacts.folder import ORPHAN_AFTER
from runner.artifacts.manifest import Artifact
from runner.artifacts.store import Store
from runner.artifacts.usage import keys_in, manifests
from stages.errors import StoreError


@dataclass(frozen=True)
class Garbage:
    """What was collected."""

    artifacts: tuple[str, ...]
    """The keys of its artifacts."""
    files: tuple[Entry, ...]
    """Its files, those of the artifacts too."""

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(entry.bytes for entry in self.files)


def collect(store: Store, *, min_age: float = ORPHAN_AFTER, dry_run: bool = False) -> Garbage:
    """Remove (unless `dry_run`) what is `min_age` seconds old and nobody needs; StoreError for a damaged run's record.

    No run begins meanwhile, where there are locks. What a run names is kept until `runs rm`, and so is the unfinished
    denoise of an artifact that a run names and that is not there yet.
    """
    with store.housekeeping():
        needed, going_on = _needed(store)
        # A run that goes on has files that nothing names yet.
        orphaned = max(min_age, ORPHAN_AFTER) if going_on else min_age
        unneeded, kept = _sorted_out(store, needed, min_age)
        freed = {artifact.object for _, artifact in unneeded.values() if artifact is not None}
        manifests = [entry for entry, _ in unneeded.values()]
        objects = [entry for digest, entry in store.objects()
                   if digest not in kept and (digest in freed or entry.age() >= orphaned)]
        for files in () if dry_run else (manifests, objects):
            # Manifests first: a key without one is not there.
            store.remove([entry.path for entry in files])
        left = store.sweep(min_age=orphaned, dry_run=dry_run)
    return Garbage(tuple(unneeded), (*manifests, *objects, *left))


def tidy(store: Store, *, min_age: float) -> None:
    """Remove what a killed process left: unfinished denoises that were finished, objects that no manifest names.

    Of the objects only those that are `min_age` seconds old, and none while a run goes on, or may: it may be about to
    name them.
    """
    with store.housekeeping():
        try:
            _, going_on = _needed(store)
        except StoreError:
            return  # for `collect` to tell
        if going_on:
            return
        found = {key: artifact for key, _, artifact in manifests(store) if artifact is not None}
        for key in [key for key, artifact in found.items() if artifact.note.get("of") in found]:
            store.drop(key)
            del found[key]
        named = {artifact.object for artifact in found.values()}
        store.remove([entry.path for digest, entry in store.objects()
                      if digest not in named and entry.age() >= min_age])


def _sorted_out(
    store: Store, needed: set[str], min_age: float
) -> tuple[dict[str, tuple[Entry, Artifact | None]], set[str]]:
    """The manifests to remove, by key, and the objects of the others."""
    unneeded: dict[str, tuple[Entry, Artifact | None]] = {}
    kept: set[str] = set()
    found = list(manifests(store))
    unfinished = needed - {key for key, _, artifact in found if artifact is not None}
    for key, entry, artifact in found:
        of = None if artifact is None else artifact.note.get("of")
        if key not in needed and of not in unfinished and entry.age() >= min_age:
            unneeded[key] = entry, artifact
        elif artifact is not None:
            kept.add(artifact.object)
    return unneeded, kept


def _needed(store: Store) -> tuple[set[str], bool]:
    """Every key that a run names, and whether a run may be going on."""
    needed: set[str] = set()
    going_on = False
    for run in store.runs():
        try:
            record = store.load_run(run)
        except StoreError as error:
            text = f"{error.text}; what it needs is not known -> runner runs rm {run}, then collect"
            raise StoreError(text) from error
        needed.update(keys_in(record))
        going_on |= record.get("status") == "running" and store.is_running(run) is not False
    return needed, going_on
