"""A run is told to people in few lines, to programs in JSON lines, and to nobody once nobody listens."""

import ast
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import Job, RunPolicy, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.engine.signals import Interrupted
from runner.events import EVENTS, from_wire, json_lines, silent, tee, to_wire
from runner.job import Output
from runner.reports.progress import Progress, Status, minutes
from runner.request import requests_for
from runner.terminal import TolerantStream
from runner.text import clean, gib
from stages.families import FAMILIES

ROOT = Path(__file__).parent.parent
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


# Fields that are there in some runs alone: of a prompt file, of a scheduler that draws noise, of Ray.
SOMETIMES = {"line", "id", "generator", "workers"}


def test_what_a_run_tells_is_what_the_table_of_events_says(tmp_path: Path) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []
    asked = requests_for("a red circle", FAMILIES["demo"], steps=2, seed=1)
    job = Job("demo", asked, devices=["cpu"], output=Output((str(tmp_path / "circle.png"),)),
              policy=RunPolicy(preview=1, step_every=0))
    store = MemoryStore()
    steps: list[str] = []

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        told.append((kind, data))
        steps.extend([kind] if kind == "step" else [])

    with pytest.raises(Interrupted):
        run_all(make_plan(job), store=store, emit=emit, stop=lambda: len(steps) == 1)
    run_all(make_plan(job), store=store, emit=emit)
    seen = {kind: {name for found, data in told if found == kind for name in data} for kind, _ in told}
    # The rest takes several processes, damage, or a picture that fails.
    assert EVENTS.keys() - seen.keys() == {"begin", "plan", "ranks", "warning", "failure"}
    for kind, data in [*RUN, *told]:
        assert data.keys() <= EVENTS[kind].keys(), kind
    for kind, names in seen.items():
        assert EVENTS[kind].keys() - names <= SOMETIMES, kind


def emitted() -> Iterator[tuple[str, set[str]]]:
    """Every kind of event that the sources tell, with the fields that stand there."""
    for path in (path for package in ("stages", "runner") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2].strip("_") == "emit"
                    and node.args and isinstance(kind := node.args[0], ast.Constant)):
                data = node.args[1]
                keys = data.keys if isinstance(data, ast.Dict) else []
                yield str(kind.value), {str(key.value) for key in keys if isinstance(key, ast.Constant)}


def test_every_event_of_the_sources_is_in_the_table_and_the_other_way_round() -> None:
    found = list(emitted())
    assert {kind for kind, _ in found} == EVENTS.keys()
    assert not [(kind, names) for kind, names in found if not names <= EVENTS[kind].keys()]


def test_the_page_on_events_is_the_table_of_events() -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    sections = re.split("^## (.*)$", page, flags=re.MULTILINE)[1:]
    said = {kind: dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
            for kind, text in zip(sections[::2], sections[1::2], strict=True)}
    assert said == EVENTS
    assert all(text.strip().splitlines()[0] for text in sections[1::2])


def test_the_code_of_the_page_on_events_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "events.md").read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == "".join(f"step {step} of 4\n" for step in range(1, 5))


def test_events_cross_to_another_process() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for kind, data in [*RUN, ("preview", {"stage": "denoise", "step": 1, "pixels": lambda: pixels})]:
        other, arrived = from_wire(json.loads(json.dumps(to_wire(kind, data))))
        assert other == kind and arrived.keys() == data.keys()
        if kind == "preview":
            assert np.array_equal(arrived["pixels"](), pixels)
        else:
            assert json.dumps(arrived) == json.dumps(data)


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
        "import sys, os; from runner.terminal import TolerantStream\n"
        "sys.stdin.readline()\n"
        "out = TolerantStream(sys.stdout)\n"
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
    out = TolerantStream(io.TextIOWrapper(raw, encoding="ascii"))
    out.write("caf\u00e9 \udcff\n")
    out.flush()
    assert raw.getvalue() == b"caf? ?\n"
