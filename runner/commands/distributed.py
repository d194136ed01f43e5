"""A command line that several ranks answer: one of them speaks, the others are heard when something is wrong."""

import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runner.commands.order import Order, order
from runner.commands.results import Results
from runner.distributed.channel import Channel, Launcher
from runner.distributed.env import Rank, launched
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.process_group import RankProcesses
from runner.distributed.rank import RankWorker
from runner.distributed.task import Task
from runner.distributed.watchdog import TIMEOUT
from runner.events import Emit, Tolerant, tee
from runner.planning.parallel import RANKS, team, wished
from runner.reports.progress import Progress
from runner.request import read_whole
from runner.text import clean, shown
from stages.errors import RankLost

LONGEST = 24 * 3600


def make(family: str, said: Any) -> int:
    """Make the pictures that the options ask for, with ranks that a launcher started, or with --ranks of our own."""
    rank, told = launched(), said.rank_timeout
    timeout = TIMEOUT if told is None else float(read_whole("rank-timeout", told, 1, LONGEST))
    if said.artifacts == "memory":
        raise ValueError("ranks share a store, and each has a memory of its own -> --artifacts DIR, or leave it out")
    if rank is None:
        alone = wished(said.place) is None
        return supervise(family, said, read_whole("ranks", said.ranks, 1, RANKS) if alone else team(said), timeout)
    if said.ranks is not None:
        raise ValueError(f"--ranks {shown(said.ranks)}: a launcher started {rank.size} ranks already -> leave it out")
    return join(family, said, rank, timeout)


def supervise(family: str, said: Any, ranks: int, timeout: float) -> int:
    """Start ranks of our own, and see to it that all of them end with this process."""
    options = {name: value for name, value in vars(replace(said, ranks=None)).items() if name != "ctx"}
    with RankProcesses(ranks, timeout=timeout, speaking=True) as crew:
        return int(crew.work({"family": family, "said": options}, aloud)["code"])


def join(family: str, said: Any, rank: Rank, timeout: float) -> int:
    """Be one of the ranks that a launcher started."""
    # Refused by the first rank before anything heavy is imported; the others take what it publishes.
    asked = order(family, said) if rank.first else None
    link = Launcher(rank, timeout)
    pulse = Heartbeat(link.beat)
    try:
        with pulse:
            if asked is not None:
                return speak(asked, said, rank, link, pulse)
            with pulse.waiting():
                task = link.task()
            share = RankWorker(rank, link, pulse, tee(pulse, warnings(rank))).follow(task)
        # After the last beat: the first rank may leave as soon as it has all shares, and the store with it.
        link.hand_in(share)
        return 0
    except KeyboardInterrupt as stopped:
        # A launcher stops all ranks when it lost one.
        culprit = link.culprit()
        if culprit is not None:
            raise RankLost(culprit) from None
        if rank.first:
            raise
        number = getattr(stopped, "signal", signal.SIGINT)
        raise SystemExit(128 + number) from None


def speak(asked: Order, said: Any, rank: Rank, link: Channel, pulse: Heartbeat) -> int:
    """Do the first rank's part, and say how all of it goes."""
    from runner.commands.make import complain, hush, logged, opened, tell, timed, untracked

    begin = time.perf_counter()
    hush(said.verbose)
    progress = Progress(sys.stderr, verbosity=-1 if said.quiet else int(said.verbose))
    seconds: dict[str, float] = {}
    with logged(said.log, progress) as told, progress:
        emit = tee(pulse, told)
        with timed(seconds, "imports"), untracked():
            emit("begin", {"what": "importing torch and diffusers"})
            from runner.distributed.results import cards_of, differing, joined
        store = opened(asked, said, emit)
        asked, shares = RankWorker(rank, link, pulse, emit).lead(Task(asked, said), store)
        if (warning := differing(shares)) is not None:
            emit("warning", {"text": warning})
    report = joined(asked.run, asked.requests, shares, store)
    seconds["total"] = time.perf_counter() - begin
    complain(f"{line}" for line in asked.refused)
    results = Results(asked, said, sys.stdout)
    for position, card in cards_of(shares):
        results.tell(position, card)
    return tell(report, report.failures, results, seconds, said)


def warnings(rank: Rank) -> Emit:
    """An emit that says warnings, and nothing else, with the number of the rank."""

    def emit(kind: str, data: Mapping[str, object]) -> None:
        if kind == "warning":
            aloud(kind, {"text": f"rank {rank.rank}: {data['text']}"})

    return emit


def aloud(kind: str, data: Mapping[str, Any]) -> None:
    """Say on standard error what a rank has to tell."""
    stderr = Tolerant(sys.stderr)
    stderr.write(f"{kind}: {clean(str(data['text']))}\n")
    stderr.flush()
