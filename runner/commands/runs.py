"""`runner runs`: the runs of a store listed, shown and forgotten, its garbage collected, its bytes verified."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace

from runner.artifacts import open_store
from runner.artifacts.audit import audit
from runner.artifacts.garbage import collect
from runner.artifacts.manifest import is_key
from runner.artifacts.signed_json import Damaged
from runner.artifacts.store import Store
from runner.commands.refusal import as_option
from runner.commands.settings import usual_store
from runner.reports.history import HEAD, describe_run, find_run, readable, stages_of, summarize
from runner.terminal import say, say_json, warn
from runner.text import gib, shown, table
from stages.errors import InvalidInput, StoreError, worded

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def ls(artifacts: str | None, *, as_json: bool, last: int | None) -> None:
    """Print the runs of a store, the first started first, or its `last` ones."""
    store = opened(artifacts, readonly=True)
    runs = store.runs()
    keys = frozenset(store.keys())
    rows = [summarize(store, run, keys) for run in (runs if last is None else runs[-last:])]
    if as_json:
        say_json(sys.stdout, {"runs": [each.document() for each in rows]})
    else:
        say(sys.stdout, table([HEAD, *(each.cells() for each in rows)]) if rows else ["no runs yet"])


def show(run: str, artifacts: str | None, *, as_json: bool) -> None:
    """Print what one run was asked and did."""
    store = opened(artifacts, readonly=True)
    found = store.stored_run(find_run(store, run))
    sizes = {key: _bytes(store, key) for keys in stages_of(found.record).values() for key in keys}
    with readable(found.run):
        facts = summarize(store, found.run, {key for key, size in sizes.items() if size is not None}, found)
        described = describe_run(facts, found, sizes)
    if as_json:
        say_json(sys.stdout, {**facts.document(), "sizes": sizes, "record": found.record})
    else:
        say(sys.stdout, described)


def rm(runs: Sequence[str], artifacts: str | None, *, as_json: bool) -> None:
    """Forget runs; their artifacts stay until garbage is collected."""
    store = opened(artifacts)
    found = list(dict.fromkeys(find_run(store, run) for run in runs))
    for run in found:
        if store.is_running(run):
            raise StoreError(f"run {run} is going on -> stop it first, with Ctrl-C or by its process")
    for run in found:
        store.drop_run(run)
    if as_json:
        say_json(sys.stdout, {"removed": found})
    else:
        say(sys.stdout, found)


def gc(artifacts: str | None, *, as_json: bool, older: str, dry: bool) -> None:
    """Remove what no run needs, and say how many bytes that freed."""
    garbage = collect(opened(artifacts), min_age=seconds(older), dry_run=dry)
    if as_json:
        document = {"artifacts": garbage.artifacts, "files": len(garbage.files), "bytes": garbage.bytes, "dry": dry}
        say_json(sys.stdout, document)
        return
    what = f"{len(garbage.artifacts)} artifacts, {len(garbage.files)} files: {gib(garbage.bytes)}"
    say(sys.stdout, [f"would free {what}" if dry else f"freed {what}"])


def verify(artifacts: str | None, *, as_json: bool) -> None:
    """Read all of a store; StoreError where something is damaged."""
    store = opened(artifacts, readonly=True)
    found = []
    for finding in audit(store):
        if finding.trouble is not None:
            finding = replace(finding, trouble=worded(finding.trouble, as_option))
        found.append(finding)
        if finding.trouble is not None and not as_json:
            say(sys.stdout, [f"{finding.kind} {finding.name}: {finding.trouble}"])
    bad = [finding for finding in found if finding.trouble is not None]
    counts = {kind: sum(finding.kind == kind for finding in found) for kind in ("run", "artifact", "object")}
    total = sum(finding.bytes for finding in found)
    if as_json:
        damaged = [vars(finding) for finding in bad]
        say_json(sys.stdout, {"looked_at": counts, "bytes": total, "damaged": damaged})
    if bad:
        raise StoreError(
            f"{len(bad)} of {len(found)} are damaged: a damaged artifact is computed again when a run needs it, a "
            f"damaged record goes with `runner runs rm`"
        )
    if not as_json:
        say(sys.stdout, [f"{counts['artifact']} artifacts and {counts['run']} runs are whole ({gib(total)} read)"])


def opened(artifacts: str | None, *, readonly: bool = False) -> Store:
    """The store that --artifacts names, or the user's own; StoreError where there is none."""
    if artifacts == "memory":
        raise StoreError("`store=memory` is gone with the process that had it -> name a folder or a URL")
    return open_store(artifacts or usual_store(), warn=warn, readonly=readonly)


def seconds(text: str) -> float:
    """The seconds in a text such as 90s, 30m, 1h, 7d or 0; InvalidInput for another."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if match is None or (not match[2] and int(match[1])):
        raise InvalidInput(f"--older-than {shown(text)}: write such as 90s, 30m, 1h, 7d or 0")
    return float(int(match[1]) * _UNITS[match[2] or "s"])


def _bytes(store: Store, key: str) -> int | None:
    """The bytes of an artifact; None where it is not there, or damaged; StoreError where it cannot be read."""
    try:
        # The record may be odd, and name what is no key.
        artifact = store.manifest(key) if is_key(key) else None
    except Damaged:
        return None
    return None if artifact is None else artifact.bytes
