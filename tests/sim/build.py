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
    """Path of the built library, from torch's extension cache or compiled now (about ten seconds)."""
    texts = {path.name: path.read_text() for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])}
    digest = hashlib.sha256("".join([torch.__version__, *texts.values()]).encode())
    name = f"simulated_cards_{digest.hexdigest()[:12]}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    # One unit, as most of the time goes into torch's headers; of copies, so that another clone need not build again.
    unit = "".join(f'#include "{source}"\n' for source in texts if source.endswith(".cpp"))
    with _alone(folder), _ninja_on_path():
        for file, text in {**texts, "all.cc": unit}.items():
            _written(folder / file, text)
        cpp_extension.load(
            name,
            [str(folder / "all.cc")],
            build_directory=str(folder),
            extra_cflags=["-O1"],
            is_python_module=False,
            verbose=False,
        )
    return str(folder / f"{name}.so")


def _written(path: Path, text: str) -> None:
    """Write what is not there yet: ninja goes by the times of files."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


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
