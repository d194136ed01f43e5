"""`--version`: the versions that decide about pictures, and the cards."""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from runner.terminal import say

PACKAGES = ("torch", "diffusers", "transformers")
PATIENCE = 5.0


def show_version() -> None:
    """Print them, without importing torch where that can be helped."""
    found = {name: _version(name) for name in PACKAGES}
    say(sys.stdout, [f"stagerun {_version('stagerun')}", f"Python {platform.python_version()}",
                     *(f"{name} {text}" for name, text in found.items()), *cards(found["torch"])])


def cards(torch: str) -> list[str]:
    """A line for each card; one that says that there is none."""
    if torch.endswith("+cpu"):
        return ["no accelerator: this torch is built for CPUs alone"]
    listed = _by_driver()
    if listed is None:
        # Neither import is free, but only torch knows the cards of other makers.
        from stages.machine import probe

        listed = [card.label for card in probe().cards]
    return [f"card {index}: {name}" for index, name in enumerate(listed)] or ["no accelerator"]


def _by_driver() -> list[str] | None:
    """What the driver's tool calls the cards; None where there is no such tool, or it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.splitlines()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
