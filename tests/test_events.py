"""A run is told to people in few lines, to programs in JSON lines, and to nobody once nobody listens."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from runner.events import Tolerant, json_lines, silent, tee
from runner.reports.progress import Progress, Status, minutes
from runner.text import clean, gib

GIB = 2**30
RUN: list[tuple[str, Mapping[str, Any]]] = [
    ("begin", {"what": "importing torch and diffusers"}),
    ("run", {"run": "r1", "requests": 2, "model": "some/model", "seed": 7}),
    ("stage", {"stage": "encode", "requests": 2, "reused": 2}),
    ("flush", {"stage": "encode", "freed": 0, "left": 0, "leftovers": []}),
    ("end", {"stage": "encode", "seconds": {"load": 0.0, "compute": 0.0}, "peak": {"cpu": GIB}}),
    ("stage", {"stage": "denoise", "requests": 2, "reused": 0}),
    ("load", {"stage": "denoise", "component": "transformer", "bytes": 22 * GIB, "device": "cuda:0"}),
    ("loaded", {"stage": "denoise", "seconds": 4.2}),
    ("item", {"stage": "denoise", "index": 0, "of": 2}),
    ("step", {"stage": "denoise", "step": 1, "steps": 4}),
    ("flush", {"stage": "denoise", "freed": 22 * GIB, "left": 3 * 2**20,
               "leftovers": [{"kind": "Tensor", "shape": (3, 4), "bytes": 3 * 2**20}]}),
    ("end", {"stage": "denoise", "seconds": {"load": 4.2, "compute": 5.8}, "peak": {"cuda:0": 23 * GIB}}),
    ("warning", {"text": "artifact abc is \x1b[2Jdamaged"}),
]
PLAIN = [
    "run r1: 2 pictures, some/model, first seed 7",
    "encode: 2 pictures taken from the store",
    "denoise: 2 pictures in 10.0 s, peak cuda:0 23.0 GiB, freed 22.0 GiB",
    "warning: denoise left 3.0 MiB behind: Tensor (3, 4) 3.0 MiB",
    "warning: artifact abc is [2Jdamaged",
]


def told(verbosity: int) -> list[str]:
    stream = io.StringIO()
    with Progress(stream, verbosity=verbosity) as progress:
        for kind, data in RUN:
            progress(kind, data)
    return stream.getvalue().splitlines()


def test_a_pipe_gets_one_line_per_stage() -> None:
    assert told(0) == PLAIN


def test_quiet_is_silent() -> None:
    assert told(-1) == []


def test_verbose_tells_everything_else_too() -> None:
    lines = told(1)
    assert [line for line in lines if line in PLAIN] == PLAIN
    assert "denoise: loading transformer (22.0 GiB) on cuda:0, 0 s" in lines
    assert "denoise: loaded in 4.2 s" in lines
    assert any(line.startswith("denoise: picture 1/2, step 1/4, ") for line in lines)


def test_the_live_line_says_step_pace_and_time_left_over_all_pictures() -> None:
    now = iter([0.0, 0.0, 10.0, 12.0, 14.0, 100.0, 102.0])
    status = Status(clock=lambda: next(now))
    status.see("stage", {"stage": "denoise", "requests": 3, "reused": 1})
    status.see("item", {"stage": "denoise", "index": 0, "of": 2})
    status.see("step", {"stage": "denoise", "step": 1, "steps": 28})
    assert status.line() == "denoise: picture 1/2, step 1/28, 2.00 s/step, 1:50 left"
    status.see("step", {"stage": "denoise", "step": 2, "steps": 28})
    assert status.line() == "denoise: picture 1/2, step 2/28, 2.00 s/step, 1:48 left"
    status.see("item", {"stage": "denoise", "index": 1, "of": 2})
    assert status.line() == "denoise: picture 2/2, 2.00 s/step, 1:48 left"


def test_a_long_stage_has_a_heartbeat_in_a_log() -> None:
    stream = io.StringIO()
    with Progress(stream, heartbeat=0.1) as progress:
        progress("load", {"component": "vae", "bytes": 2**20, "device": "cpu"})
        deadline = time.monotonic() + 10
        while "loading vae" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "loading vae (1.0 MiB) on cpu, 0 s\n" in stream.getvalue()
    count = stream.getvalue().count("\n")
    time.sleep(0.3)
    assert stream.getvalue().count("\n") == count


@pytest.fixture
def terminal() -> Iterator[tuple[Any, list[bytes]]]:
    """A terminal to write to, and what it shows."""
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                seen.append(data)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(theirs, "w")
    yield stream, seen
    stream.close()
    reader.join()
    os.close(ours)


def test_a_terminal_gets_a_live_line_and_the_same_lines(terminal: tuple[Any, list[bytes]]) -> None:
    stream, seen = terminal
    with Progress(stream) as progress:
        for kind, data in RUN:
            progress(kind, data)
        progress("stage", {"stage": "decode", "requests": 1, "reused": 0})
        progress("load", {"component": "[red]vae[/red]", "bytes": 2**20, "device": "cpu"})
        deadline = time.monotonic() + 10
        while b"[red]vae[/red]" not in b"".join(seen) and time.monotonic() < deadline:
            time.sleep(0.05)
    stream.flush()
    time.sleep(0.1)
    shown = b"".join(seen).decode()
    assert all(line in shown for line in PLAIN)
    assert "decode: loading [red]vae[/red] (1.0 MiB) on cpu" in shown
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :], "the cursor comes back"


def test_json_lines_hold_every_event() -> None:
    stream = io.StringIO()
    emit = tee(silent, json_lines(stream))
    for kind, data in RUN:
        emit(kind, data)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["kind"] for line in lines] == [kind for kind, _ in RUN]
    assert lines[1]["seed"] == 7 and abs(lines[1]["time"] - time.time()) < 60


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**19, "1.5 MiB"), (3 * 2**29, "1.5 GiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert gib(count) == text


def test_time_for_people() -> None:
    assert (minutes(0.4), minutes(53), minutes(3723)) == ("0:00", "0:53", "1:02:03")


def test_clean_text_moves_no_cursor_and_turns_no_direction() -> None:
    assert clean("a\x1b[2J\nb\u202ec\x9bd\ud800\t e\x7f") == "a[2J bcd e"
    assert clean("caf\u00e9 \u05d0\u05d1 \U0001f600\u200d") == "caf\u00e9 \u05d0\u05d1 \U0001f600\u200d"


def test_a_stream_whose_reader_is_gone_goes_quiet() -> None:
    code = (
        "import sys, os; from runner.events import Tolerant\n"
        "sys.stdin.readline()\n"
        "out = Tolerant(sys.stdout)\n"
        "for _ in range(3): out.write('x' * 100_000); out.flush()\n"
        "print('on', file=sys.stderr)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate(b"\n", timeout=60)
    assert (child.returncode, errors) == (0, b"on\n")


def test_a_stream_says_what_its_encoding_can() -> None:
    raw = io.BytesIO()
    out = Tolerant(io.TextIOWrapper(raw, encoding="ascii"))
    out.write("caf\u00e9 \udcff\n")
    out.flush()
    assert raw.getvalue() == b"caf? ?\n"
