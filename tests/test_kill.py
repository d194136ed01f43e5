"""A run that is killed goes on to the same pictures; `python -m tests.kill` tries every point, this a few of each."""

import re
import subprocess
import sys
from pathlib import Path


def test_a_run_killed_at_any_point_goes_on_with_nothing_lost_or_left() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.kill", "--each", "2"], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"(\d+) of (\d+) kill points tried \((.*)\): 0 wrong", done.stdout)
    assert told is not None and int(told[1]) >= 20 and int(told[2]) >= 200
    assert {kind.partition(" ")[2] for kind in told[3].split(", ")} >= {
        "open", "write", "torn write", "fsync", "rename", "link", "unlink", "flock", "step"}
