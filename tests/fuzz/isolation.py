"""A case in a process of its own, which is ended when it takes too long and cannot take more memory than it may.

The processes are forked from one that has imported everything, which takes as long as many cases:
`python -m tests.fuzz.isolation FOLDER` reads a line of JSON for each case and answers with one.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from tests.fuzz.targets import TARGETS, Target

# Of computing; a machine may be busy, so that a process that waits for its turn has no limit.
SECONDS = 10
# Of waiting for something else than its turn.
ASLEEP = 60
TICK = 0.5
BYTES = 2**30
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    kind: str
    """`ok`, the name of the error, `timeout` or `died`."""
    text: str
    """What the error says, or of one that is no answer where it was raised."""
    seconds: float
    """How long it computed."""
    bytes: int
    """The most memory that it took besides what it was given."""


@dataclass(frozen=True)
class Server:
    """The process from which those of the cases are forked, seen from outside."""

    process: "subprocess.Popen[str]"
    """The process, which answers a line with a line."""

    def run(self, target: str, folder: Path) -> Outcome:
        """What comes of using the target's files in a folder."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([target, str(folder)]) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))


@contextmanager
def server(whole: Path, target: str) -> Iterator[Server]:
    """A server that has seen the target's folder `whole` before it was damaged."""
    words = [sys.executable, "-m", "tests.fuzz.isolation", target, str(whole)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def is_fault(target: str, outcome: Outcome) -> bool:
    """Whether a case ended in another way than it may."""
    known = outcome.kind == "ok" or outcome.kind in TARGETS[target].refusals
    # What torch says where its memory ends may come as the reason of a refusal.
    return not known or outcome.seconds > SECONDS or outcome.bytes > BYTES or "allocate" in outcome.text


def _serve(lines: Iterator[str], answers: IO[str]) -> None:
    for line in lines:
        name, folder = json.loads(line)
        answers.write(json.dumps(asdict(_forked(TARGETS[name], Path(folder)))) + "\n")
        answers.flush()


def _forked(target: Target, folder: Path) -> Outcome:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _used(target, folder, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        ready = _answers(child, pipe)
        if not ready:
            os.kill(child, signal.SIGKILL)
        text = pipe.read()
    _, _, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if not text:
        return Outcome("died" if ready else "timeout", "", seconds, usage.ru_maxrss * 1024)
    kind, words, took = json.loads(text)
    return Outcome(kind, words, seconds, took)


def _answers(child: int, pipe: IO[bytes]) -> bool:
    """Whether a process writes to its pipe, or ends, before it has computed or slept for too long."""
    process, asleep = psutil.Process(child), 0.0
    while asleep < ASLEEP:
        if select.select([pipe], [], [], TICK)[0]:
            return True
        spent = process.cpu_times()
        if spent.user + spent.system > 2 * SECONDS:
            return False
        asleep += TICK * (process.status() == psutil.STATUS_SLEEPING)
    return False


def _used(target: Target, folder: Path, writer: int) -> None:
    """Use the folder, tell the pipe how it ended, and end this process."""
    before = _resident()
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kind, text = "ok", ""
    try:
        target.use(folder)
    except BaseException as error:
        kind = type(error).__name__
        text = str(error) if kind in target.refusals else "".join(traceback.format_exception(error)[-14:])
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    os.write(writer, json.dumps([kind, text[-6000:], took]).encode("utf-8", "replace"))
    os._exit(0)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Import everything by using a folder that is whole, and then serve."""
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)
    TARGETS[sys.argv[1]].use(Path(sys.argv[2]))
    _serve(iter(sys.stdin), answers)


if __name__ == "__main__":
    main()
