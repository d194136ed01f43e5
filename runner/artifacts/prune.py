"""Old runs forgotten together with what they alone hold: which ones, and what that frees."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from runner.artifacts.garbage import Garbage
from runner.artifacts.store import Store
from runner.artifacts.usage import Usage, keys_in, usage_of
from runner.text import gib
from stages.errors import StoreError


@dataclass(frozen=True)
class Rule:
    """Which runs may go; a run goes only where everything that is said of it holds."""

    older_than: float = 0.0
    """Those that began so many seconds ago."""
    keep: int = 0
    """Those that are not among so many newest."""
    free: int | None = None
    """No more of them than it takes, the oldest first, to free so many bytes; None: all."""


@dataclass(frozen=True)
class Pruning:
    """The runs that go by a rule."""

    runs: tuple[str, ...]
    """Their names, the oldest first."""
    usage: Usage
    """The bytes of the store and who holds them."""
    going_on: tuple[str, ...] = ()
    """Runs that would go, and are at work."""
    locks: bool = True
    """Whether the store can tell which runs go on."""

    @property
    def bytes(self) -> int:
        """The bytes that this frees."""
        return self.usage.freed(self.runs)


def choose(store: Store, rule: Rule) -> Pruning:
    """The runs of a store that go by the rule, as it stands now; StoreError for a damaged run's record, and where all
    that may go are fewer bytes than the rule wants free.
    """
    names = store.runs()
    begun: dict[str, float] = {}
    needed: dict[str, frozenset[str]] = {}
    for run in names:
        try:
            found = store.stored_run(run)
        except StoreError as error:
            text = f"{error.text}; what it needs is not known -> runner runs rm {run}, then prune"
            raise StoreError(text) from error
        begun[run], needed[run] = found.begun, frozenset(keys_in(found.record))
    usage = usage_of(store, needed)
    now = time.time()
    # Where a clock jumped, nothing says how old a run is.
    old = [run for run in names[: max(0, len(names) - rule.keep)]
           if not rule.older_than or (begun[run] and now - begun[run] >= rule.older_than)]
    states = {run: store.is_running(run) for run in old}
    may_go = [run for run in old if not states[run]]
    chosen = may_go if rule.free is None else _enough(usage, may_go, rule.free)
    return Pruning(tuple(chosen), usage, tuple(run for run in old if states[run]), None not in states.values())


def prune(store: Store, rule: Rule) -> tuple[Pruning, Garbage]:
    """Forget the runs that go by the rule, and remove what they alone hold; no run begins meanwhile.

    Raises what `choose` raises, and StoreError where there are no locks to tell which runs go on.
    """
    with store.housekeeping():
        chosen = choose(store, rule)
        if chosen.runs and not chosen.locks:
            raise StoreError("this store has no locks, so nothing tells which runs are at work on other machines -> "
                             "runner runs rm those that you know to be over, then runner runs gc")
        keys = sorted(chosen.usage.only(chosen.runs))
        files = [entry for key in keys for entry in chosen.usage.artifacts[key].files]
        # In this order a kill leaves garbage at most, and no run that lacks what it did.
        for run in chosen.runs:
            store.drop_run(run)
        for folder in ("stages/", "objects/"):
            store.remove([entry.path for entry in files if entry.path.startswith(folder)])
    return chosen, Garbage(tuple(keys), tuple(files))


def _enough(usage: Usage, runs: Sequence[str], wanted: int) -> list[str]:
    """The first of the runs that together free as many bytes as are wanted; StoreError where all of them do not."""
    left = dict(usage.holders)
    freed, chosen = 0, list[str]()
    for run in runs:
        if freed >= wanted:
            break
        chosen.append(run)
        freed += usage.records.get(run, 0)
        freed += sum(usage.artifacts[key].bytes for key in usage.held[run] if _last(left, key))
    if freed < wanted:
        raise StoreError(f"all that may go would free {gib(freed)} ({freed:,} bytes), and {gib(wanted)} are asked for "
                         f"-> ask for less, or let younger runs go")
    return chosen


def _last(left: dict[str, int], key: str) -> bool:
    """Whether nobody holds the artifact once this run is gone."""
    left[key] -= 1
    return not left[key]
