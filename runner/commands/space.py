"""`runner runs du` and `prune`: where the bytes of a store are, and how old runs give theirs back."""

import os
import sys
from typing import Any

from runner.artifacts import MemoryStore
from runner.artifacts.prune import Pruning, Rule, choose, prune
from runner.artifacts.store import Store
from runner.artifacts.usage import Usage, usage_of
from runner.commands.runs import needs, opened, seconds, stored
from runner.commands.settings import unsaid_store, usual_store
from runner.placement_options import read_bytes
from runner.reports.history import summarize
from runner.reports.repeat import line, store_words
from runner.terminal import say, say_json
from runner.text import clean, cut, gib, shown, table
from stages.errors import InvalidInput
from stages.models.hub_cache import HubCache, hub_cache
from stages.wording import counted

NAMES = {"midway": "unfinished denoises", "preview": "previews", "damaged": "damaged artifacts"}
PROMPT = 40


def du(artifacts: str | None, *, as_json: bool) -> None:
    """Print who holds the bytes of a store, and those of the hub's cache."""
    # There are models before there is a first run.
    store = opened(artifacts, readonly=True) if artifacts or os.path.exists(usual_store()) else MemoryStore()
    usage, hub = usage_of(store, needs(store)), hub_cache()
    rows = sorted(((run, usage.alone(run), usage.shared(run)) for run in usage.held), key=lambda row: -row[1])
    damaged = [run for run in usage.records if run not in usage.held]
    if as_json:
        say_json(sys.stdout, {
            "store": artifacts or usual_store(), "total": usage.total,
            "runs": [{"run": run, "alone": alone, "shared": shared} for run, alone, shared in rows],
            "damaged_runs": damaged, "stages": usage.stages, "records": sum(usage.records.values()),
            "shared": usage.together, "garbage": usage.garbage, "hub": _hub_document(hub)})
        return
    where = store_words(artifacts or usual_store(), unsaid_store())
    told = [f"{artifacts or usual_store()}: {gib(usage.total)}", ""]
    if rows:
        told += [*table([("run", "alone", "shared"), *((run, gib(alone), gib(both)) for run, alone, both in rows)]),
                 ""]
    told += [*table([(name, gib(size)) for name, size in _parts(usage)]), ""]
    told.append(f"shared: {gib(usage.together)} that several runs hold, counted once")
    told.append(f"garbage: {gib(usage.garbage)} that no run holds -> {line('runs', 'gc', *where)}")
    told += [f"the record of run {run} is damaged, so what it holds counts as garbage -> "
             f"{line('runs', 'rm', run, *where)}" for run in damaged]
    say(sys.stdout, [*told, "", *_hub_lines(hub)])


def prune_runs(
    artifacts: str | None, *, as_json: bool, older: str | None, keep: int | None, free: str | None, yes: bool
) -> None:
    """Print which runs go and what that frees; with `yes` have them gone."""
    if older is None and keep is None and free is None:
        raise InvalidInput("nothing says which runs may go -> --older-than 30d, --keep 20 or --free 10GiB, or several")
    rule = Rule(0.0 if older is None else seconds(older), keep or 0, None if free is None else _amount(free))
    store = opened(artifacts, readonly=not yes)
    if yes:
        # What is told of runs is read before they are gone.
        before = {run: _cells(store, run) for run in store.runs()}
        chosen, _ = prune(store, rule)
        rows = [before[run] for run in chosen.runs]
    else:
        chosen = choose(store, rule)
        rows = [_cells(store, run) for run in chosen.runs]
    if as_json:
        say_json(sys.stdout, {"runs": list(chosen.runs), "bytes": chosen.bytes,
                              "artifacts": sorted(chosen.usage.only(chosen.runs)), "going_on": list(chosen.going_on),
                              "removed": yes})
        return
    say(sys.stdout, _told(chosen, rows, yes=yes))
    say(sys.stderr, [f"run {run} is going on, and stays" for run in chosen.going_on])


def _told(chosen: Pruning, rows: list[tuple[str, ...]], *, yes: bool) -> list[str]:
    if not rows:
        return ["no run is such a one: nothing goes"]
    held = [(*row, gib(chosen.usage.alone(run))) for run, row in zip(chosen.runs, rows, strict=True)]
    count = f"{counted(len(rows), 'run')}, {counted(len(chosen.usage.only(chosen.runs)), 'artifact')}"
    if yes:
        last = f"freed {gib(chosen.bytes)}: {count}"
    elif chosen.locks:
        last = f"would free {gib(chosen.bytes)}: {count} -> the same command with --yes"
    else:
        last = (f"would free {gib(chosen.bytes)}: {count}; this store has no locks, so nothing tells which runs are "
                f"at work -> runner runs rm those that you know to be over, then runner runs gc")
    return [*table([("run", "age", "status", "prompt", "alone"), *held]), last]


def _cells(store: Store, run: str) -> tuple[str, ...]:
    facts = summarize(store, run, (), stored(store, run))
    name, age, status, *_ = facts.cells()
    return name, age, status, cut(clean(facts.prompt), PROMPT)


def _amount(text: str) -> int:
    """The bytes that --free asks for; InvalidInput for another text."""
    try:
        return read_bytes(text)
    except InvalidInput:
        raise InvalidInput(f"--free {shown(text)} is no amount of bytes -> such as 500MiB, 10GiB or 20GB") from None


def _parts(usage: Usage) -> list[tuple[str, int]]:
    """The bytes of a store by what they are; all of them together are its total."""
    stages = [(NAMES.get(stage, stage), size) for stage, size in usage.stages.items()]
    records = sum(usage.records.values()) + usage.counter
    rest = usage.total - records - sum(size for _, size in stages)
    return [*stages, ("records of runs", records), *([("named by no artifact", rest)] if rest else [])]


def _hub_document(hub: HubCache) -> dict[str, Any]:
    return {"path": hub.path, "bytes": hub.bytes, "unfinished": hub.unfinished,
            "repos": [vars(repo) for repo in hub.repos]}


def _hub_lines(hub: HubCache) -> list[str]:
    """The hub's cache, which this program never removes anything of."""
    told = [f"models of the hub are not in the store: {hub.path}: {gib(hub.bytes)}"]
    rows = [(repo.name, gib(repo.bytes), repo.remove) for repo in hub.repos]
    if hub.unfinished:
        rows.append(("unfinished downloads", gib(hub.unfinished), "hf cache prune"))
    return [*told, *(table(rows) if rows else [])]
