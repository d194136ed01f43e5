"""How ranks talk: through a pipe to the process that spawned them, or through the key-value store of a launcher.

Everything said is JSON, and there is little of it: the job once, a beat a second, and the result of each rank in the
end.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import psutil

from runner.distributed.env import PIPE, Rank
from runner.distributed.shares import Shares
from runner.distributed.watchdog import TIMEOUT, Watchdog
from runner.events import Emit, silent
from stages.errors import RankLost

LOST = 7
_POLL = 0.2
Message = Mapping[str, Any]


class Channel(Protocol):
    """What a rank needs of the others."""

    def publish(self, job: Message) -> None:
        """Give every other rank its job; the first rank's to do."""

    def receive_job(self) -> dict[str, Any]:
        """The job that the first rank published; waits for it."""

    def hand_in(self, result: Message) -> None:
        """Give the first rank what this one did."""

    def results(self) -> list[dict[str, Any]]:
        """What every other rank did, by rank; waits for all of it."""

    def beat(self, beat: Message) -> None:
        """Tell whoever watches that this rank lives."""

    def fail(self, error: RankLost) -> NoReturn:
        """End this rank, and have whoever is to say so say why."""


class Pipe:
    """The channel of a rank that `spawn` started: every message goes to that process, which passes it on."""

    def __init__(self, connection: "Connection[Any, Any]", others: int = 1) -> None:
        """`others` is how many ranks there are besides this one."""
        self._connection, self._others = connection, others
        self._lock = threading.Lock()

    @classmethod
    def inherited(cls, rank: Rank) -> "Pipe":
        """The pipe of this rank, which the environment names."""
        return cls(Connection(int(os.environ.pop(PIPE))), rank.size - 1)

    def send(self, kind: str, message: Message) -> None:
        """Say something; the process ends where nobody is left to hear it."""
        try:
            with self._lock:
                self._connection.send_bytes(json.dumps({"kind": kind, "message": message}, default=str).encode())
        except OSError:
            os._exit(LOST)

    def receive(self, kind: str) -> Any:
        """What the other end says next; None once it is closed."""
        try:
            received = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None
        assert received["kind"] == kind, f"expected {kind}, got {received['kind']}"
        return received["message"]

    def publish(self, job: Message) -> None:
        self.send("published", job)

    def receive_job(self) -> dict[str, Any]:
        return self._expected("published")

    def hand_in(self, result: Message) -> None:
        self.send("result", result)

    def results(self) -> list[dict[str, Any]]:
        # Sent when the last of the others has handed in: never, where there are none.
        return list(self._expected("results")["results"]) if self._others else []

    def beat(self, beat: Message) -> None:
        self.send("beat", beat)

    def fail(self, error: RankLost) -> NoReturn:
        self.send("failed", error.to_json())
        raise SystemExit(LOST)

    def _expected(self, kind: str) -> dict[str, Any]:
        message = self.receive(kind)
        if message is None:
            os._exit(LOST)
        return dict(message)


class Launcher:
    """The channel of a rank that a launcher started: the key-value store that it keeps at MASTER_ADDR:MASTER_PORT.

    The first rank watches over all others, and they over the first; who finds one lost says so to `tell` and ends its
    own process, upon which the launcher ends the rest.
    """

    def __init__(self, rank: Rank, tell: Callable[[RankLost], None], timeout: float = TIMEOUT) -> None:
        from torch.distributed.rendezvous import rendezvous

        self._rank, self._tell = rank, tell
        self._shares = Shares(rank.size, silent)
        try:
            self._store = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
        except (ValueError, RuntimeError) as error:
            text = str(error).splitlines()[0]
            raise RankLost(f"rank {rank.rank} cannot reach the others: {text}") from None
        self._others = range(1, rank.size) if rank.first else range(1)
        self._watchdog = Watchdog(self._others, timeout)

    def follow(self, emit: Emit) -> None:
        """From now on tell `emit` how far all ranks are; for the first rank, which hears of all."""
        self._shares = Shares(self._rank.size, emit)

    def publish(self, job: Message) -> None:
        self._set("job", job)

    def receive_job(self) -> dict[str, Any]:
        return self._wait("job")

    def hand_in(self, result: Message) -> None:
        self._set(f"result/{self._rank.rank}", result)
        self._set(f"end/{self._rank.rank}", {})

    def results(self) -> list[dict[str, Any]]:
        found = [self._wait(f"result/{rank}") for rank in self._others]
        self._set("end/0", {})
        return found

    def beat(self, beat: Message) -> None:
        self._set(f"beat/{self._rank.rank}", {**beat, "pid": os.getpid()})
        self._shares.see(self._rank.rank, beat)
        self._look()
        lost = self._watchdog.lost()
        if lost is None:
            return
        if self._speaks():
            self._tell(RankLost(lost[1]))
        self._kill(lost[0])
        os._exit(LOST)

    def fail(self, error: RankLost) -> NoReturn:
        self.leave()
        raise error

    def leave(self) -> None:
        """Tell the others that this rank ends by itself, and has said why."""
        self._set(f"end/{self._rank.rank}", {})

    def culprit(self) -> str | None:
        """Which of those that this rank watches was gone before the launcher asked this one to stop, if one was."""
        self.leave()
        deadline = time.monotonic() + 4.0
        while time.monotonic() < deadline:
            self._look()
            if dead := self._watchdog.silent(3.0):
                text = f"rank {dead[0]} was killed or left early, last {self._watchdog.where(dead[0])}"
                return text if self._speaks() else None
            if not self._watchdog.silent(-1.0):
                break
            time.sleep(_POLL)
        return None

    def _kill(self, rank: int) -> None:
        """End a rank of this host that hangs: a launcher would only ask it to, and wait for half a minute."""
        pid = int((self._get(f"beat/{rank}") or {}).get("pid", 0))
        # The number may be that of a process on another host: only a child of our own parent is meant.
        with suppress(psutil.Error, ProcessLookupError):
            if pid and psutil.Process(pid).ppid() == os.getppid():
                os.kill(pid, signal.SIGKILL)

    def _look(self) -> None:
        for rank in self._others:
            if (beat := self._get(f"beat/{rank}")) is not None:
                self._watchdog.see(rank, beat)
                self._shares.see(rank, beat)
            if self._get(f"end/{rank}") is not None:
                self._watchdog.end(rank)

    def _speaks(self) -> bool:
        """Whether it is on this rank to say what is wrong: several may find the first rank lost."""
        me = str(self._rank.rank)
        with _served():
            return bool(self._store.compare_set("speaks", "", me) == me.encode())

    def _set(self, key: str, message: Message) -> None:
        with _served():
            self._store.set(key, json.dumps(message, default=str))

    def _get(self, key: str) -> dict[str, Any] | None:
        with _served():
            # `get` alone would wait for the key, and hold off the other threads meanwhile.
            return dict(json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _wait(self, key: str) -> dict[str, Any]:
        while (found := self._get(key)) is None:
            time.sleep(_POLL)
        return found


@contextmanager
def _served() -> Iterator[None]:
    """Use the launcher's store; the process ends where the launcher is gone, as nobody else would end it."""
    try:
        yield
    except RuntimeError:
        os._exit(LOST)
