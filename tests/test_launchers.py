"""Ranks that torchrun starts: a lost one ends the job with a reason, and what was finished is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed import TCPStore

from runner import Job, make_plan, run_all
from runner.commands.cli import answer
from runner.request import requests_for
from stages.families import FAMILIES

ROOT = Path(__file__).parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "runner", "flux")


@contextmanager
def launched(folder: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Two ranks under torchrun, gone at the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen([*TORCHRUN, *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def ranks(launcher: int) -> dict[int, int]:
    """The processes of a launcher by rank."""
    found = {}
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in map(int, children):
        rank = variables(pid).get("RANK")
        found |= {} if rank is None else {int(rank): pid}
    return found


def variables(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def caught(launcher: "subprocess.Popen[str]", rank: int) -> int:
    """The process of a rank, once it is in the steps of its denoise."""
    end = time.monotonic() + 120
    while len(pids := ranks(launcher.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    told = variables(pids[rank])
    store = TCPStore(told["MASTER_ADDR"], int(told["MASTER_PORT"]), None, False, timedelta(seconds=60))
    while launcher.poll() is None and time.monotonic() < end:
        key = f"beat/{rank}"
        beat: dict[str, Any] = json.loads(store.get(key)) if store.check([key]) else {}
        if "step" in beat.get("where", ""):
            break
        time.sleep(0.1)
    assert launcher.poll() is None, launcher.communicate()
    return pids[rank]


def lost(words: tuple[str, ...], folder: Path, rank: int, number: signal.Signals, says: str) -> None:
    """Send a rank a signal in its denoise, and see that the job ends with what `says`."""
    with launched(folder, *words) as launcher:
        os.kill(caught(launcher, rank), number)
        begin = time.monotonic()
        out, errors = launcher.communicate(timeout=60)
    print(f"over after {time.monotonic() - begin:.1f} s")
    # The first rank says which of its pictures are there already.
    assert launcher.returncode != 0 and all(Path(path).is_file() for path in out.splitlines())
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(says) and "what was finished is kept" in told[0], errors


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_with_its_name(flux: Path, tmp_path: Path) -> None:
    words = ("--model", str(flux), "--prompt", "a dog", "--count", "2", "--size", "64x48", "--device", "cpu",
             "--steps", "1000", "--rank-timeout", "6")
    lost(words, tmp_path, 0, signal.SIGSTOP, "error: rank 0 hangs: no sign of life for ")
    assert not list(tmp_path.glob("*.png"))


def test_a_killed_rank_ends_the_job_with_its_name_and_resume_makes_the_rest(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"prompt": "a dog"}, {"prompt": "a cat"}, {"prompt": "a fox", "steps": 1000}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--model", str(flux), "--prompt-file", "p.jsonl", "--seed", "3", "--size", "64x48", "--device", "cpu",
             "--steps", "2", "--out", "{index}.png")
    says = "error: rank 1 was killed or left early, last in denoise, picture 1 of 1, step "
    lost(words, tmp_path, 1, signal.SIGKILL, says)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert set(kept) <= {tmp_path / "0.png", tmp_path / "1.png"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert answer(["resume", "last", "-q"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"0.png", "1.png", "2.png"}
    assert all(path.read_bytes() == data for path, data in kept.items())
    asked = [replace(requests_for(prompt, FAMILIES["flux"], size=(64, 48), steps=2, seed=3 + at)[0], index=at)
             for at, prompt in enumerate(("a dog", "a cat"))]
    for picture in run_all(make_plan(Job("flux", asked, model=flux, devices=["cpu"]))).pictures:
        assert np.array_equal(Image.open(f"{picture.index}.png"), picture.pixels)
