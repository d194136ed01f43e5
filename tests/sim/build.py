"""Building the backend, once per version of its sources and of torch."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent


def build() -> str:
    """Path of the built library, from torch's extension cache or compiled now (about half a minute)."""
    sources = sorted(HERE.glob("*.cpp"))
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sorted([*sources, *HERE.glob("*.h")]):
        digest.update(source.read_bytes())
    name = f"simulated_cards_{digest.hexdigest()[:12]}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with _alone(folder), _ninja_on_path():
        cpp_extension.load(
            name,
            [str(source) for source in sources],
            build_directory=str(folder),
            extra_cflags=["-O1"],
            is_python_module=False,
            verbose=False,
        )
    return str(folder / f"{name}.so")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time. Torch's own lock outlives a killed process and would be waited for forever."""
    with open(folder / "alone", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Ninja comes as a Python package, whose scripts are on the path only in an activated environment."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
