"""Cards that are in the machine and that torch does not see: it would run on the CPU, a hundred times slower."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

# What their drivers make.
_NVIDIA_NODES = ("/dev/nvidiactl", "/dev/nvidia0")
_AMD_NODE = "/dev/kfd"
_DRIVER = Path("/proc/driver/nvidia/version")
# Variables by which somebody hides all cards, and what they then say.
_HIDING = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_NONE = ("", "-1", "void", "none", "NoDevFiles")
# The oldest driver for torch's builds of a CUDA release (docs.nvidia.com/deploy/cuda-compatibility), newest first.
_BUILDS = ((580, "13.0", "cu130"), (525, "12.6", "cu126"))
_INDEX = "https://download.pytorch.org/whl"


def unseen_cards() -> str:
    """What cards there are that this torch does not see, why, and what to do; empty where there are none.

    To be asked where torch sees no accelerator.
    """
    if any(os.environ.get(name, "all").strip() in _NONE for name in _HIDING):
        return ""
    # The graphics of many processors have that node, too: only who has installed a build for ROCm means a card.
    if torch.version.hip and os.path.exists(_AMD_NODE):
        return (f"there is an AMD card that this torch, {torch.__version__}, built for ROCm {torch.version.hip}, does "
                f"not see -> rocminfo says what the driver knows of it")
    driver = _driver()
    if not driver and not any(map(os.path.exists, _NVIDIA_NODES)):
        return ""
    return f"there is an NVIDIA card that torch does not see: {_why(driver)}"


def _why(driver: str) -> str:
    built, own = torch.version.cuda, f"this torch, {torch.__version__},"
    needed = next((least for least, release, _ in _BUILDS if built and _numbers(built) >= _numbers(release)), 0)
    major = _numbers(driver)[0] if driver else 0
    fitting = next(((release, name) for least, release, name in _BUILDS if major >= least), None)
    install = "" if fitting is None else (
        f"pip install --force-reinstall torch --index-url {_INDEX}/{fitting[1]} (built for CUDA {fitting[0]})")
    if not built:
        return f"{own} was built without CUDA -> {install or 'install one that was'}"
    if driver and fitting is None:
        return f"its driver, {driver}, is too old for {own} built for CUDA {built} -> install driver 525 or newer"
    own += f" was built for CUDA {built}"
    if driver and major < needed:
        return f"{own}, and its driver is {driver} (at least {needed} is needed) -> {install}"
    said = f"driver {driver}" if driver else "its driver does not answer"
    return (f"{own}, {said} -> nvidia-smi says what the driver knows of it; after an update of the driver, restart "
            f"the machine")


def _driver() -> str:
    """The version of NVIDIA's driver, such as `535.104.05`; empty where nobody says it."""
    if _DRIVER.exists():
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", _DRIVER.read_text())
        return found[1] if found else ""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        told = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=20)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return told.stdout.split()[0] if re.match(r"\d+\.\d+", told.stdout) else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
