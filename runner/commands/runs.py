"""`runner runs`: the runs of a store listed, shown and forgotten, its garbage collected, its bytes verified."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from shutil import get_terminal_size

from runner.artifacts import open_store
from runner.artifacts.audit import audit
from runner.artifacts.garbage import collect
from runner.artifacts.manifest import is_key
from runner.artifacts.signed_json import Damaged
from runner.artifacts.store import Store, StoredRun
from runner.artifacts.usage import keys_in, usage_of
from runner.commands.refusal import as_option
from runner.commands.settings import unsaid_store, usual_store
from runner.job import Job
from runner.reports.history import (
    SHOWN,
    RunSummary,
    describe_run,
    find_run,
    list_runs,
    readable,
    stages_of,
    summarize,
)
from runner.reports.repeat import further_line, line, recorded, repeat_line, resume_line, store_words
from runner.terminal import say, say_json, warn
from runner.text import gib, shown
from stages.errors import InvalidInput, StoreError, worded
from stages.wording import counted

# Columns for a list that no terminal shows.
PIPE = 120
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def ls(
    artifacts: str | None, *, as_json: bool, last: int | None, status: str | None = None, match: str | None = None
) -> None:
    """Print the runs of a store, the newest first, or its `last` ones; of those that stand so and have this text."""
    store = opened(artifacts, readonly=True)
    keys = frozenset(store.keys())
    rows, needed = list[RunSummary](), dict[str, frozenset[str]]()
    for run in reversed(store.runs()):
        found = stored(store, run)
        rows.append(summarize(store, run, keys, found))
        if found is not None:
            needed[run] = frozenset(keys_in(dict(found.record)))
    chosen = [row for row in rows if status in (None, row.status) and (match is None or row.has(match))][:last]
    usage = usage_of(store, needed)
    chosen = [row.measured(usage) for row in chosen]
    if as_json:
        say_json(sys.stdout, {"runs": [row.document() for row in chosen]})
    elif chosen:
        say(sys.stdout, list_runs(chosen, get_terminal_size((PIPE, 24)).columns))
    else:
        say(sys.stdout, ["no runs yet" if not rows else f"none of {counted(len(rows), 'run')} is such a one"])


def show(run: str, artifacts: str | None, *, as_json: bool) -> None:
    """Print what one run was asked and did, its files, and the commands that repeat it and go on with it."""
    store = opened(artifacts, readonly=True)
    found = store.stored_run(find_run(store, run))
    sizes = {key: _bytes(store, key) for keys in stages_of(found.record).values() for key in keys}
    usage = usage_of(store, needs(store))
    with readable(found.run):
        facts = summarize(store, found.run, {key for key, size in sizes.items() if size is not None}, found)
        facts = facts.measured(usage)
        described = describe_run(facts, found, sizes)
    job = recorded(found.record, store.where if artifacts else usual_store())
    files = [] if job is None else [(path, os.path.isfile(path)) for path in job.output.paths]
    repeat = None if job is None else repeat_line(job, unsaid_store())
    further = None if job is None else go_on(job, facts.status, bool(found.record.get("failures")))
    if as_json:
        say_json(sys.stdout, {
            **facts.document(), "sizes": sizes, "files": [{"path": path, "there": there} for path, there in files],
            "repeat": repeat, "go_on": further, "record": found.record})
        return
    described += [f"picture {at}: {path}{'' if there else ' (not there)'}"
                  for at, (path, there) in enumerate(files[:SHOWN])]
    if len(files) > SHOWN:
        lost = sum(not there for _, there in files[SHOWN:])
        described.append(f"... and {len(files) - SHOWN:,} more pictures, {lost:,} of them not there")
    described += [f"{what}: {line}" for what, line in (("repeat it", repeat), ("go on", further)) if line is not None]
    say(sys.stdout, described)


def go_on(job: Job, status: str, failures: bool) -> str | None:
    """The command that goes on with a run, if there is anything left to do and nobody is at it."""
    if status in ("interrupted", "failed") or failures:
        return resume_line(job.run, job.store, unsaid_store())
    return further_line(job, unsaid_store()) if status == "done" else None


def stored(store: Store, run: str) -> StoredRun | None:
    """The record of a run; None where it is damaged or cannot be read."""
    try:
        return store.stored_run(run)
    except StoreError:
        return None


def needs(store: Store) -> dict[str, frozenset[str]]:
    """The keys that each run names whose record can be read."""
    found = ((run, stored(store, run)) for run in store.runs())
    return {run: frozenset(keys_in(dict(each.record))) for run, each in found if each is not None}


def rm(runs: Sequence[str], artifacts: str | None, *, as_json: bool) -> None:
    """Forget runs, and say what only they held; that stays until garbage is collected."""
    store = opened(artifacts)
    found = list(dict.fromkeys(find_run(store, run) for run in runs))
    for run in found:
        if store.is_running(run):
            raise StoreError(f"run {run} is going on -> stop it first, with Ctrl-C or by its process")
    usage = usage_of(store, needs(store))
    left = sum(usage.artifacts[key].bytes for key in usage.only(found))
    for run in found:
        store.drop_run(run)
    collector = line("runs", "gc", *store_words(artifacts or usual_store(), unsaid_store()))
    if as_json:
        say_json(sys.stdout, {"removed": found, "records": sum(usage.records.get(run, 0) for run in found),
                              "left_for_gc": left, "gc": collector})
        return
    say(sys.stdout, found)
    unknown = [run for run in found if run not in usage.held]
    more = f", and what {', '.join(unknown)} held, whose record was damaged" if unknown else ""
    say(sys.stderr, [f"forgot {counted(len(found), 'run')}; {gib(left)} that no other run "
                     f"holds{more} go with: {collector} (what is younger than an hour: with --older-than 0)"])


def gc(artifacts: str | None, *, as_json: bool, older: str, dry: bool) -> None:
    """Remove what no run needs, and say how many bytes that freed."""
    garbage = collect(opened(artifacts), min_age=seconds(older), dry_run=dry)
    if as_json:
        document = {"artifacts": garbage.artifacts, "files": len(garbage.files), "bytes": garbage.bytes, "dry": dry}
        say_json(sys.stdout, document)
        return
    found = f"{counted(len(garbage.artifacts), 'artifact')}, {counted(len(garbage.files), 'file')}"
    what = f"{found}: {gib(garbage.bytes)}"
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
            f"{len(bad)} of {len(found)} {'is' if len(bad) == 1 else 'are'} damaged: a damaged artifact is computed "
            f"again when a run needs it, a damaged record goes with `runner runs rm`"
        )
    if not as_json:
        whole = f"{counted(counts['artifact'], 'artifact')} and {counted(counts['run'], 'run')}"
        say(sys.stdout, [f"{whole} are whole ({gib(total)} read)"])


def opened(artifacts: str | None, *, readonly: bool = False) -> Store:
    """The store that --artifacts names, or the user's own; StoreError where there is none."""
    where = artifacts or usual_store()
    if where == "memory":
        raise StoreError("`store=memory` is gone with the process that had it -> name a folder or a URL")
    return open_store(where, warn=warn, readonly=readonly)


def seconds(text: str) -> float:
    """The seconds in a text such as 90s, 30m, 1h, 7d, 2w or 0; InvalidInput for another."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if match is None or (not match[2] and int(match[1])):
        raise InvalidInput(f"--older-than {shown(text)}: write such as 90s, 30m, 1h, 7d, 2w or 0")
    return float(int(match[1]) * _UNITS[match[2] or "s"])


def _bytes(store: Store, key: str) -> int | None:
    """The bytes of an artifact; None where it is not there, or damaged; StoreError where it cannot be read."""
    try:
        # The record may be odd, and name what is no key.
        artifact = store.manifest(key) if is_key(key) else None
    except Damaged:
        return None
    return None if artifact is None else artifact.bytes
