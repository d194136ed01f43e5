"""Runs of the command line that are killed at a chosen point, in forked children: imports take seconds, forks none.

    python -m tests.kill [--demo] [--each N]

kills a run at every call of its write path, in the middle of every write and after every step, goes on with each, and
prints how many kills there were: all of them, or N of each kind. Then each call that needs room fails, as on a full
disk; and two runs work on one store at once, with locks and without. With `--demo` it is the demo checkpoint instead
of a random tiny one.
"""

import argparse
import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from runner.commands.cli import answer
from runner.commands.results import Results
from tests.tiny import flux

CALLS = ("mkdir", "write", "fsync", "fchmod", "rename", "replace", "link", "unlink", "rmdir")
CHANGING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
TORN = "torn write"
FILLING = ("open", "mkdir", "write", TORN, "fsync", "rename", "link")
STEP = "step"


@dataclass(frozen=True)
class Case:
    """A run: its command line, how many pictures and steps it has, and the pixels that it makes."""

    words: tuple[str, ...]
    pictures: int
    steps: int
    expected: Mapping[str, bytes]

    @property
    def units(self) -> int:
        """What is computed: one encode, and for each picture its steps and a decode."""
        return 1 + self.pictures * (self.steps + 1)


class Failpoint:
    """Counts the calls of the write path, and the steps; at number `at` the process is killed, or the call fails with
    the number `error`.
    """

    def __init__(self, at: int | None, error: int = 0) -> None:
        self.at, self.error, self.seen = at, error, list[str]()
        self._lock = threading.Lock()

    def passed(self, name: str) -> bool:
        """Take in one more point, if it is to be; whether it is the one."""
        with self._lock:
            self.seen.append(name)
            return len(self.seen) - 1 == self.at

    def die(self) -> None:
        """Be killed as by the system: no handler, no cleanup; or fail."""
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Have every call of the write path pass here first."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        fcntl.flock = self._watched("flock", fcntl.flock)
        os.open = self._opening(os.open)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **more: Any) -> Any:
            if name == "write" and self.passed(TORN):
                call(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
                self.die()
            if self.passed(name):
                self.die()
            return call(*args, **more)

        return watched

    def _opening(self, call: Callable[..., int]) -> Callable[..., int]:
        def opening(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & CHANGING and self.passed("open"):
                self.die()
            return call(path, flags, *args, **more)

        return opening


@dataclass(frozen=True)
class Ended:
    """A child that ended: its exit code (negative: the signal), the units that it computed, the points it passed."""

    code: int
    units: int
    seen: tuple[str, ...]


def child(folder: Path, words: tuple[str, ...], point: Failpoint | None = None) -> Ended:
    """Answer a command line in a forked child, in `folder`."""
    return ended(*start(folder, words, point))


def start(folder: Path, words: tuple[str, ...], point: Failpoint | None = None) -> tuple[int, int]:
    """A forked child that answers a command line: its number, and the pipe that it tells what it did."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _answer(folder, words, point or Failpoint(None), writing)
    os.close(writing)
    return pid, reading


def ended(pid: int, reading: int) -> Ended:
    """How a child ended, when it has."""
    with open(reading, "rb") as pipe:
        told = pipe.read().decode().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = json.loads(told.pop()) if code != -signal.SIGKILL else []
    return Ended(code, told.count("unit"), tuple(seen))


def _answer(folder: Path, words: tuple[str, ...], point: Failpoint, pipe: int) -> None:
    os.chdir(folder)
    hear, write = Results.__call__, os.write

    def heard(self: Results, kind: str, data: Mapping[str, Any]) -> None:
        computed = kind == "part" and data["part"] == "compute" and data["stage"] != "denoise"
        if kind == "step" or computed:
            write(pipe, b"unit\n")
        hear(self, kind, data)
        if kind == "step" and point.passed(STEP):
            point.die()

    Results.__call__ = heard  # type: ignore[method-assign]
    point.install()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = answer(words)
    write(pipe, json.dumps(point.seen).encode())
    if code not in (0, 5):
        write(2, stderr.getvalue().encode())
    os._exit(code)


def harm(case: Case, point: Failpoint) -> str:
    """Kill a run at a point, or let it fail there, and go on with it; what is wrong then, or ""."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = child(folder, case.words, point)
        # What only saves work may fail unseen.
        if first.code not in ((0, 5) if point.error else (-signal.SIGKILL,)):
            return f"it ended with {first.code}"
        recorded = any(folder.glob("store/runs/*/run.json"))
        # A run that is killed before it has a name can only be asked for again.
        words = ("resume", "last", "--artifacts", "store", "-q") if recorded else case.words
        rest = child(folder, words)
        return "; ".join(_wrong(case, folder, first, rest, recorded))


def _wrong(case: Case, folder: Path, first: Ended, rest: Ended, recorded: bool) -> Iterator[str]:
    if rest.code:
        yield f"going on ended with {rest.code}"
        return
    again = first.units + rest.units - case.units
    if again > 1:
        yield f"{again} units were computed twice"
    if pixels(folder) != case.expected:
        yield "the pictures differ"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    kept = {*case.expected, "store/runs/.sequence", *map(str, _store(folder))}
    if there != kept:
        yield f"left over: {sorted(there - kept)}, missing: {sorted(kept - there)}, recorded: {recorded}"


def _store(folder: Path) -> Iterator[Path]:
    """Every file that the store of a finished run has: its record, and the manifests and objects that it names."""
    for record in folder.glob("store/runs/*/run.json"):
        yield record.relative_to(folder)
        stages = json.loads(record.read_text())["record"]["stages"]
        for key in {key for keys in stages.values() for key in keys}:
            yield Path(f"store/stages/{key}.json")
            digest = json.loads((folder / f"store/stages/{key}.json").read_text())["object"]
            yield Path(f"store/objects/{digest[:2]}/{digest}")


def together(case: Case, *, locks: bool) -> str:
    """Two runs of the same pictures at once on one store; what is wrong then, or ""."""
    with tempfile.TemporaryDirectory() as name:
        flock = fcntl.flock
        if not locks:
            fcntl.flock = lambda handle, how: None
        store = ("--artifacts", f"{name}/store")
        folders = [Path(name) / "one", Path(name) / "two"]
        for folder in folders:
            folder.mkdir()
        children = [start(folder, (*case.words, *store)) for folder in folders]
        fcntl.flock = flock
        ends = [ended(*each) for each in children]
        units = sum(end.units for end in ends)
        if any(end.code for end in ends) or any(pixels(folder) != case.expected for folder in folders):
            return f"they ended with {[end.code for end in ends]}, or their pictures differ"
        if locks and units != case.units:
            return f"{units} units were computed instead of {case.units}"
        left = list((Path(name) / "store/tmp").iterdir())
        return f"left over: {left}" if left else ""


def pixels(folder: Path) -> dict[str, bytes]:
    """The pixels of the pictures in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = image.tobytes()
    return found


def case_of(model: Path | str, folder: Path, *, size: str, steps: int, pictures: int) -> tuple[Case, tuple[str, ...]]:
    """A run of the model, made unharmed in `folder`; and the points that it passed.

    It is made in this process first, so that no child has to import anything.
    """
    # The table writes nothing, and planning it takes half of the time.
    words = ("flux", "--no-modulation-table", "--model", str(model), "--prompt", "a red circle", "--seed", "1",
             "--count", str(pictures), "--size", size, "--steps", str(steps), "--device", "cpu", "--artifacts",
             "store", "--out", "{index}.png", "--step-every", "0", "-q")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert answer([*words, "--artifacts", "memory", "--out", "warm/"]) == 0
    shutil.rmtree(folder / "warm")
    whole = child(folder, words)
    assert whole.code == 0, whole
    case = Case(words, pictures, steps, pixels(folder))
    assert whole.units == case.units
    return case, whole.seen


def spread(seen: tuple[str, ...], each: int) -> list[int]:
    """At most `each` points of every kind, from the first to the last."""
    chosen: list[int] = []
    for kind in sorted(set(seen)):
        found = [at for at, name in enumerate(seen) if name == kind]
        count = min(each, len(found))
        chosen += [found[(2 * index + 1) * len(found) // (2 * count)] for index in range(count)]
    return sorted(chosen)


def main() -> None:
    """Try every point, and say how many there were and what went wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--demo", action="store_true", help="the demo checkpoint, at 64x64")
    parser.add_argument("--each", type=int, default=sys.maxsize, metavar="N", help="at most N points of each kind")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model: Path | str = "demo"
        if not said.demo:
            model = flux(Path(name) / "flux")
        folder = Path(name) / "whole"
        folder.mkdir()
        case, seen = case_of(model, folder, size="64x64" if said.demo else "32x32", steps=2, pictures=2)
        shutil.rmtree(folder)
        bad = tried(case, seen, said.each, "kill", 0)
        bad += tried(case, seen, said.each, "full disk", errno.ENOSPC)
        for locks in (True, False):
            wrong = together(case, locks=locks)
            bad += bool(wrong)
            print(f"two runs at once {'with' if locks else 'without'} locks: {wrong or 'right'}", flush=True)
    sys.exit(bool(bad))


def tried(case: Case, seen: tuple[str, ...], each: int, what: str, error: int) -> int:
    """Harm a run at every point, or at `each` of a kind, and say what came of it; how many came out wrong."""
    chosen, bad = [at for at in spread(seen, each) if not error or seen[at] in FILLING], 0
    for at in chosen:
        wrong = harm(case, Failpoint(at, error))
        bad += bool(wrong)
        if wrong:
            print(f"{what} at point {at} ({seen[at]}): {wrong}", flush=True)
    kinds = [seen[at] for at in chosen]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(f"{len(chosen)} of {len(seen)} {what} points tried ({counts}): {bad} wrong", flush=True)
    return bad


if __name__ == "__main__":
    main()
