"""A process that does store work in forked children, so that a test can kill one at a chosen system call.

Importing torch takes seconds and a fork milliseconds: `python -m tests.store_worker` imports once, then takes one JSON
order per line on stdin. A child waits for "go" before it works, which is when a tracer can be attached to it.
"""

import ctypes
import fcntl
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.artifacts import FolderStore, key_of
from stages.errors import StoreError
from stages.state import State

_PR_SET_PTRACER = 0x59616D61
KEY = key_of({"stage": "encode", "prompt": "a red circle"})


def state(size: int = 600) -> State:
    """A small state, the same in every process."""
    values = torch.arange(size, dtype=torch.float32)
    return State({"embeds": values, "pair": (values[:3].half(), 2.5), "text": "a red circle"}, {"inputs": ("embeds",)})


def put(store: FolderStore, order: dict[str, Any]) -> str:
    """Store the state; with a limit, no file may grow past it."""
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    return store.put(KEY, "encode", state(order.get("size", 600)), {"seconds": 0.5}).object


def get(store: FolderStore, order: dict[str, Any]) -> str:
    """Read the state."""
    return "nothing" if store.get(KEY) is None else "state"


def drop(store: FolderStore, order: dict[str, Any]) -> str:
    """Forget the state, many times over while others store and read it where `times` says so."""
    for _ in range(order.get("times", 1)):
        store.drop(KEY)
    return "dropped"


def compute(store: FolderStore, order: dict[str, Any]) -> str:
    """Compute the state as a run does, and leave a mark for having done so."""
    if not order.get("locks", True):
        fcntl.flock = lambda *_: None  # type: ignore[assignment]
    with store.working(KEY):
        if store.get(KEY) is None:
            Path(order["marks"], str(os.getpid())).touch()
            time.sleep(0.1)
            store.put(KEY, "encode", state(), {})
    found = store.find(KEY)
    assert found is not None
    return found.object


def hold(store: FolderStore, order: dict[str, Any]) -> str:
    """Hold the lock, or be at work on a run, until a file appears."""
    with store.working(KEY) if order["do"] == "hold" else store.running("r"):
        Path(order["marks"], "held").touch()
        while not Path(order["marks"], "enough").exists():
            time.sleep(0.01)
    return "held"


Work = Callable[[FolderStore, dict[str, Any]], str]
WORK: dict[str, Work] = {"put": put, "get": get, "drop": drop, "compute": compute, "hold": hold, "run": hold}


def child(order: dict[str, Any], gate: int, answer: int) -> None:
    """Wait for the gate, do the order, answer with its result or its StoreError, and leave."""
    if sys.platform == "linux":
        # Yama lets a process be traced by its parents alone, and the tracer is its aunt.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    os.read(gate, 1)
    try:
        if "user" in order:
            os.setuid(order["user"])
        told = {"result": WORK[order["do"]](FolderStore(order["folder"], warn=lambda text: None), order)}
    except StoreError as error:
        told = {"error": str(error), "errno": getattr(error.__cause__, "errno", None)}
    # Not write(), whose calls a test counts and makes fail.
    os.writev(answer, [json.dumps(told).encode()])
    os._exit(0)


def serve() -> None:
    """Fork `count` children per order, say their pids, open the gate on "go", say how they ended."""
    with tempfile.TemporaryDirectory() as scratch:
        put(FolderStore(scratch), {})
        get(FolderStore(scratch), {})
    for line in sys.stdin:
        order = json.loads(line)
        gate, answer = os.pipe(), os.pipe()
        pids = []
        for _ in range(order.get("count", 1)):
            pids.append(os.fork())
            if pids[-1] == 0:
                child(order, gate[0], answer[1])
        print(json.dumps(pids), flush=True)
        sys.stdin.readline()
        os.write(gate[1], b"!" * len(pids))
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.set_blocking(answer[0], False)
        try:
            told = os.read(answer[0], 65536).decode()
        except BlockingIOError:
            told = ""
        for handle in (*gate, *answer):
            os.close(handle)
        print(json.dumps({"ends": ends, "told": told}), flush=True)


@dataclass(frozen=True)
class End:
    """How the children of an order ended: their exit codes (negative: the signal), and what each told."""

    codes: list[int]
    told: list[dict[str, Any]]


class Worker:
    """The other end: gives orders to a serving process."""

    _tracer: "subprocess.Popen[bytes] | None" = None

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.store_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def do(self, order: dict[str, Any], *, trace: list[str] | None = None) -> End:
        """Do an order; with `trace`, its one child runs under strace with these options."""
        self.start(order, trace=trace)
        return self.end()

    def start(self, order: dict[str, Any], *, trace: list[str] | None = None) -> list[int]:
        """Start an order; the pids of its children."""
        self._tell(json.dumps(order))
        pids: list[int] = self._answer()
        try:
            self._tracer = None if trace is None else _attached(pids[0], trace)
        finally:
            self._tell("go")
        return pids

    def end(self) -> End:
        """Wait for the order that was started."""
        ended = self._answer()
        if self._tracer is not None:
            self._tracer.wait()
        decoder, told, rest = json.JSONDecoder(), [], ended["told"]
        while rest:
            one, used = decoder.raw_decode(rest)
            told.append(one)
            rest = rest[used:]
        return End(ended["ends"], told)

    def close(self) -> None:
        """End the serving process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def _attached(pid: int, options: list[str]) -> "subprocess.Popen[bytes]":
    tracer = subprocess.Popen(
        ["strace", "-qq", "-o", os.devnull, *options, "-p", str(pid)], stderr=subprocess.DEVNULL
    )
    while tracer.poll() is None:
        status = Path(f"/proc/{pid}/status").read_text()
        if f"TracerPid:\t{tracer.pid}\n" in status:
            return tracer
        time.sleep(0.002)
    raise OSError("strace cannot attach to a process here")


if __name__ == "__main__":
    serve()
