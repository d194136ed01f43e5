"""Ranks in processes of their own on this host, watched over by the process that started them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO

from runner.distributed.env import PIPE
from runner.distributed.shares import Shares
from runner.distributed.watchdog import TIMEOUT, Watchdog
from runner.events import Emit, from_wire, silent
from runner.inputs import check_whole
from runner.placement_options import PROCESSES
from runner.text import clean
from stages.errors import RankLost, from_json
from stages.signatures import checked_class

WORKER = (sys.executable, "-P", "-m", "runner.distributed.worker")
GRACE = 30.0
_TAIL = 2000


@dataclass
class RankProcess:
    """One rank as the process that started it sees it."""

    rank: int
    """Its number."""
    process: "subprocess.Popen[bytes]"
    """The process that it is."""
    line: "Connection[Any, Any]"
    """What it is told and heard through."""
    errors: BinaryIO
    """What it wrote to its standard error."""
    messages: dict[str, Any] = field(default_factory=dict)
    """What it said last, by kind."""

    def send(self, kind: str, message: Mapping[str, Any]) -> None:
        """Say something without waiting until it is heard: a rank that is stopped does not listen."""
        data = json.dumps({"kind": kind, "message": message}).encode()
        threading.Thread(target=self._send, args=(data,), daemon=True).start()

    def _send(self, data: bytes) -> None:
        with suppress(OSError):
            self.line.send_bytes(data)

    def ending(self) -> str:
        """How the process ended, in words."""
        code = self.process.wait()
        if code >= 0:
            return f"left early with exit code {code}{self._last_words()}"
        name = signal.Signals(-code).name
        hint = " (by whoever sent it; the kernel does it where host memory runs out)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}{self._last_words()}"

    def _last_words(self) -> str:
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - _TAIL))
        words = self.errors.read().decode(errors="replace").strip()
        return f"; its last words: {clean(words)}" if words else ""


@checked_class
class RankProcesses:
    """`size` ranks on this host, for a `with` statement; leaving it ends every one of them.

    The ranks are new interpreters, not forks, so that it does not matter what this process did with its cards. What
    they write goes nowhere, or with `verbose` to this process's standard error.
    """

    def __init__(
        self, size: int, *, timeout: float = TIMEOUT, verbose: bool = False, command: Sequence[str] = WORKER
    ) -> None:
        """A rank is lost after `timeout` seconds in which it does nothing."""
        check_whole("size", size, 1, PROCESSES)
        self.size, self._timeout, self._verbose, self._command = size, timeout, verbose, tuple(command)
        self.members: list[RankProcess] = []
        self._shares = Shares(size, silent)

    def __enter__(self) -> "RankProcesses":
        try:
            for rank in range(self.size):
                self.members.append(self._started(rank))
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            for member in self.members:
                # A rank that waits for its next job goes home when nobody is there to give it one.
                member.line.close()
        self._end(None if error is None else signal.SIGINT if kind is KeyboardInterrupt else signal.SIGTERM)

    def run(self, job: Mapping[str, Any], emit: Emit) -> Any:
        """Have the ranks do a job that the first of them is told of; what comes of it, as JSON.

        `emit` hears what the ranks have to tell meanwhile. Raises RankLost naming the first rank that was killed,
        failed, left or hangs.
        """
        watchdog, self._shares = Watchdog(range(self.size), self._timeout), Shares(self.size, emit)
        for member in self.members:
            member.messages.clear()
        self.members[0].send("job", job)
        while "outcome" not in self.members[0].messages:
            self.listen(watchdog, emit)
            if (lost := watchdog.lost()) is not None:
                # One that hangs may be stopped, and would answer no other signal.
                self.members[lost[0]].process.kill()
                raise RankLost(lost[1])
        return self.members[0].messages["outcome"]

    def listen(self, watchdog: Watchdog, emit: Emit) -> None:
        """Take in what the ranks say, or wait for half a second."""
        ready = wait([member.line for member in self.members], timeout=0.5)
        for member in self.members:
            if member.line in ready:
                try:
                    received = json.loads(member.line.recv_bytes())
                except (EOFError, OSError):
                    raise RankLost(
                        f"rank {member.rank} {member.ending()}, last {watchdog.where(member.rank)}") from None
                self._take(member, received["kind"], received["message"], watchdog, emit)

    def _take(
        self, member: RankProcess, kind: str, message: Mapping[str, Any], watchdog: Watchdog, emit: Emit
    ) -> None:
        member.messages[kind] = message
        if kind == "beat":
            watchdog.see(member.rank, message)
            self._shares.see(member.rank, message)
        elif kind == "failed":
            raise from_json(message)
        elif kind == "published":
            for other in self.members[1:]:
                other.send("published", message)
        elif kind == "result":
            watchdog.end(member.rank)
            if all("result" in other.messages for other in self.members[1:]):
                self.members[0].send("results", {"results": [other.messages["result"] for other in self.members[1:]]})
        elif kind == "event":
            emit(*from_wire(message))

    def _end(self, number: signal.Signals | None) -> None:
        """Wait until every process is gone: first asked by a signal that it can answer, at last by one it cannot."""
        try:
            self._signal(number)
            deadline = time.monotonic() + GRACE
            for member in self.members:
                with suppress(subprocess.TimeoutExpired):
                    member.process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self._signal(signal.SIGKILL)
            for member in self.members:
                with suppress(subprocess.TimeoutExpired):
                    member.process.wait(GRACE)
                member.line.close()
                member.errors.close()

    def _signal(self, number: signal.Signals | None) -> None:
        for member in self.members:
            if number is not None and member.process.poll() is None:
                member.process.send_signal(number)

    def _started(self, rank: int) -> RankProcess:
        ours, theirs = socket.socketpair()
        errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by _end
        numbers = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.size,
                   PIPE: theirs.fileno()}
        # More threads than cores are at work where ranks compute on a CPU: they are not to spin while they wait.
        waiting = {"OMP_WAIT_POLICY": "PASSIVE"}
        torch = sys.modules.get("torch")
        threads = {} if torch is None else {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        paths = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))}
        with theirs:
            process = subprocess.Popen(
                self._command,
                env=waiting | os.environ | threads | paths | {name: str(value) for name, value in numbers.items()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if self._verbose else errors,
                pass_fds=[theirs.fileno()],
                # A terminal's Ctrl-C goes to the whole group; here it is this process that passes it on, once.
                start_new_session=True,
            )
        return RankProcess(rank, process, Connection(ours.detach()), errors)
