"""The rules of the house that a program can check."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_is_clean() -> None:
    check("ruff", "check", ".")


def test_types_are_complete() -> None:
    check("mypy")


def test_continuous_integration_runs_the_very_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert script[-1] in [line for block in blocks for line in block.splitlines()]
