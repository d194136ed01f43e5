"""A run that is harmed goes on to the same pictures; `python -m tests.kill` tries every point, this a few of each."""

import re
import subprocess
import sys
from pathlib import Path

KINDS = {"open", "write", "torn write", "fsync", "rename", "link"}


def test_a_run_that_is_killed_or_fails_goes_on_with_nothing_lost_or_left() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.kill", "--each", "1"], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for what, kinds in (("kill", {*KINDS, "unlink", "flock", "step"}), ("full disk", KINDS)):
        told = re.search(rf"(\d+) of (\d+) {what} points tried \((.*)\): 0 wrong", done.stdout)
        assert told is not None and int(told[1]) >= len(kinds) and int(told[2]) >= 200
        assert {kind.partition(" ")[2] for kind in told[3].split(", ")} >= kinds
    assert "two runs at once with locks: right" in done.stdout and "without locks: right" in done.stdout
