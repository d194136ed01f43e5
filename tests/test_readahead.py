"""The next stage's files are in the page cache before the stage asks for them."""

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runner import Job, Request, make_plan, run_all
from stages.loading import readahead
from stages.loading.readahead import reading_ahead

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
    """All of them, which are more than the system reads at one call."""
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        file.write_bytes(os.urandom(24 * MIB))
        dropped(file)
    if any(map(cached, files)):
        pytest.skip("this file system keeps its pages")
    with reading_ahead(files) as size:
        assert size == 48 * MIB
        deadline = time.monotonic() + 60
        while sum(map(cached, files)) < 48 * MIB and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(map(cached, files)) == [24 * MIB] * 2
    assert not any(thread.name == "readahead" for thread in threading.enumerate())


def test_it_stops_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of holes that nobody could read to its end."""
    monkeypatch.setattr(readahead, "host_memory", lambda: (2**50, 2**50))
    with (tmp_path / "holes").open("wb") as opened:
        opened.truncate(2**43)
    with reading_ahead([tmp_path / "holes"]) as size:
        assert size == 2**43 and any(thread.name == "readahead" for thread in threading.enumerate())
    assert not any(thread.name == "readahead" for thread in threading.enumerate())


def test_a_file_that_is_gone_is_left_to_who_loads_it(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    (tmp_path / "lost").write_bytes(b"x")
    with reading_ahead(file for file in (tmp_path / "there", tmp_path / "lost")) as size:
        (tmp_path / "lost").unlink(missing_ok=True)
    assert size == 2


def test_nothing_is_read_where_host_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"x" * MIB)
    monkeypatch.setattr(readahead, "host_memory", lambda: (8 * 2**30, readahead.SPARE))
    with reading_ahead([file]) as size:
        assert size == 0 and not any(thread.name == "readahead" for thread in threading.enumerate())


def test_a_stage_asks_for_the_files_of_the_next(flux: Path) -> None:
    asked: list[tuple[str, int]] = []

    def emit(kind: str, data: Any) -> None:
        if kind == "readahead":
            asked.append((data["stage"], data["bytes"]))

    request = Request("a red circle", 64, 48, 1, 3.5, 7, 32)
    run_all(make_plan(Job("flux", [request], model=flux, devices=["cpu"])), emit=emit)
    transformer, vae = (next((flux / name).glob("*.safetensors")).stat().st_size for name in ("transformer", "vae"))
    assert asked == [("denoise", transformer), ("decode", vae)]
