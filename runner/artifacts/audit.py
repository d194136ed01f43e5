"""A look at every byte of a store: what is damaged, by name."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runner.artifacts.manifest import MAX_OBJECT_BYTES
from runner.artifacts.signed_json import Damaged
from runner.artifacts.store import Store, object_path
from stages.errors import BadResult, StoreError


@dataclass(frozen=True)
class Finding:
    """Something that was looked at."""

    kind: str
    """A "run", an "artifact", or an "object" that no artifact has."""
    name: str
    """The run, the key, or the sha256 of the object."""
    bytes: int = 0
    """The bytes of its object."""
    trouble: str | None = None
    """What is wrong with it, if anything is, in the words of an error's `text`."""


def audit(store: Store) -> Iterator[Finding]:
    """Read every record, every artifact, and every object that no artifact has."""

    def record(run: str) -> int:
        store.load_run(run)
        return 0

    for run in store.runs():
        yield _looked("run", run, record)
    named: set[str] = set()

    def artifact(key: str) -> int:
        found = store.manifest(key)
        if found is None:
            return 0  # dropped since it was listed
        named.add(found.object)
        store.read(found)
        return found.bytes

    def orphan(digest: str) -> int:
        data = store.fetch(object_path(digest), MAX_OBJECT_BYTES) or b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged("it does not have the sha256 that names it, and no artifact has it")
        return len(data)

    keys = store.keys()
    for key in keys:
        yield _looked("artifact", key, artifact)
    for digest, _ in store.objects():
        if digest not in named:
            yield _looked("object", digest, orphan)


def _looked(kind: str, name: str, look: Callable[[str], int]) -> Finding:
    try:
        return Finding(kind, name, look(name))
    except (StoreError, BadResult) as error:
        return Finding(kind, name, trouble=error.text)
