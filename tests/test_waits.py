"""Each wait of the packages is needed: with any one left out, a test of streams fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waits import FOLDERS, ROOT, Wait, waits

WAITS = list(waits())


def test_all_waits_are_found() -> None:
    assert {Path(wait.file).name for wait in WAITS} >= {"pinned_copy.py", "device_turns.py", "lanes.py"}
    assert all(wait.left_out().count("\n") <= (ROOT / wait.file).read_text().count("\n") for wait in WAITS)


def copied(folder: Path, wait: Wait | None) -> Path:
    """What the tests of streams need, in `folder`, with one wait left out."""
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if wait is not None:
        (folder / wait.file).write_text(wait.left_out())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("wait", [None, *WAITS], ids=str)
@pytest.mark.timeout(900)
def test_without_any_one_a_test_of_streams_fails(tmp_path: Path, wait: Wait | None) -> None:
    """And with all of them none does. `-rA -m slow` prints which test it is."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--timeout", "120",
         "tests/test_streams.py"],
        cwd=copied(tmp_path / "tree", wait), env={**os.environ, "PYTHONPATH": str(tmp_path / "tree")},
        capture_output=True, text=True)
    print(wait, *[line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))])
    assert done.returncode == (0 if wait is None else 1), done.stdout[-2000:]
