"""The next stage's files are in the page cache before the stage asks for them."""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from runner import Request, make_plan, readahead, run_all
from runner.readahead import read_ahead

MIB = 2**20


def cached(file: Path) -> int:
    """The bytes of a file that are in the page cache."""
    if shutil.which("fincore") is None:
        pytest.skip("no fincore (util-linux) to look at the page cache with")
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(file)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def dropped(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_files_are_read_without_waiting(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(os.urandom(8 * MIB))
    dropped(file)
    if cached(file) > 0:
        pytest.skip("this file system keeps its pages")
    assert read_ahead([file]) == 8 * MIB
    deadline = time.monotonic() + 20
    while cached(file) < 8 * MIB and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cached(file) == 8 * MIB


def test_nothing_is_read_where_host_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"x" * MIB)
    monkeypatch.setattr(readahead, "host_memory", lambda: (8 * 2**30, readahead.SPARE))
    assert read_ahead([file]) == 0


def test_a_stage_asks_for_the_files_of_the_next(flux: Path) -> None:
    asked: list[tuple[str, int]] = []

    def emit(kind: str, data: Any) -> None:
        if kind == "readahead":
            asked.append((data["stage"], data["bytes"]))

    request = Request("a red circle", 64, 48, 1, 3.5, 7, 32)
    run_all(make_plan("flux", [request], model=flux, devices=["cpu"]), emit=emit)
    transformer, vae = (next((flux / name).glob("*.safetensors")).stat().st_size for name in ("transformer", "vae"))
    assert asked == [("denoise", transformer), ("decode", vae)]
