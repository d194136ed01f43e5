"""The edges of the command line: streams that are closed or full, and words that contradict; and Python's side."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner import Job, make_plan, run_all
from runner.commands.cli import answer
from runner.job import Output
from runner.request import requests_for
from stages.errors import InvalidInput
from stages.families import FAMILIES
from tests.test_cli import base, elsewhere, pixels

__all__ = ["elsewhere"]


@pytest.mark.parametrize("closed", [
    ">&- 2>&- <&-", pytest.param(">&-", marks=pytest.mark.slow), pytest.param("2>&-", marks=pytest.mark.slow),
])
def test_closed_streams_lose_no_picture(flux: Path, closed: str) -> None:
    words = [sys.executable, "-m", "runner", *base(flux, "--prompt", "x", "--seed", "3", "-q", "--out", "x.png")]
    assert subprocess.run(["sh", "-c", f"{shlex.join(words)} {closed}"], capture_output=True).returncode == 0
    assert Image.open("x.png").size == (64, 48)


def test_a_full_stream_is_an_error_and_loses_no_picture(flux: Path) -> None:
    words = [sys.executable, "-m", "runner", *base(flux, "--prompt", "x", "--seed", "3", "-q")]
    line = f"{shlex.join([*words, '--out', 'full.png'])} > /dev/full"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 5 and "cannot write standard output: No space left on device" in done.stderr
    assert Path("full.png").exists()


@pytest.mark.parametrize(("words", "code", "says"), [
    (["plan", "demo", "--machine", "2x16GB", "--gpus", "3"], 2, "the machine has no device '3' -> choose from cuda:0"),
    (["plan", "demo", "--ranks", "x"], 2, "ranks must be a whole number"),
    (["plan", "demo", "--engine", "ray", "--ranks", "2"], 2, "--ranks has no meaning with --engine ray"),
    (["plan", "demo", "--machine", "2xT44"], 2, "'T44' is no card that is known here -> did you mean T4?"),
    (["demo", "--prompt", "x", "--log", "/dev/full"], 5, "cannot write --log /dev/full: No space left on device"),
    (["demo", "--prompt", "x", "--out", "/proc/x.png"], 2, "cannot write in /proc"),
    (["demo", "--prompt", "x", "--rank-timeout", "0"], 2, "rank-timeout must be"),
    (["demo", "--prompt", "x", "--max-memory", "0"], 2, "--max-memory: '0' is no memory at all"),
    (["demo", "--prompt", "x", "--step-every", "-1"], 2, "step-every must be seconds"),
    (["report", "last", "--artifacts", "memory"], 5, "--artifacts memory is gone with the process"),
    (["demo", "--prompt", "x", "--device", "cpu", "--place", "denoise=sharded"], 4, "sharded: that takes two devices"),
])
def test_what_cannot_be_is_said_with_its_option(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--size", "32x32", "--steps", "1", "-q", "--artifacts", "store"] if words[0] == "demo" else []
    assert answer([*words, *more]) == code and says in capsys.readouterr().err


def test_a_run_s_words_make_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken.png").touch()
    for more in (["--out", "taken.png"], ["--from-stage", "decode"], ["--stop-after", "denoise"]):
        assert answer(["plan", "demo", "--prompt", "x", "--gpus", "0", "--machine", "2x16GB", *more]) == 0
        assert "cuda:1" not in capsys.readouterr().out


def test_what_a_job_names_is_written_from_python_too() -> None:
    asked = requests_for("a red circle", FAMILIES["demo"], size=(64, 64), steps=1, seed=1)
    plan = make_plan(Job("demo", asked, devices=["cpu"], output=Output(["x.png"])))  # type: ignore[arg-type]
    made = run_all(plan)
    assert np.array_equal(pixels("x.png"), made.pictures[0].pixels)
    before = os.stat("x.png")
    assert run_all(plan).failures == () and os.stat("x.png") == before
    Path("x.png").write_bytes(b"mine")
    with pytest.raises(InvalidInput, match=r"x\.png is there already"):
        run_all(plan)
    assert Path("x.png").read_bytes() == b"mine"
    with pytest.raises(InvalidInput, match=r"a Job is no plan -> make_plan\(job\) makes one"):
        run_all(plan.job)  # type: ignore[arg-type]
