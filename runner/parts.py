"""Files that are being written: named and locked so that those of a killed process are told from those of a live one.

Their name begins with the boot of the machine: whoever shares it sees the locks of the others, wherever there are any.
"""

import fcntl
import hashlib
import os
import re
import secrets
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path

PART = ".part"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_HEX = 16


def part_name() -> str:
    """A name that no other file has."""
    return f"{_boot()}{secrets.token_hex(_HEX // 2)}{PART}"


def is_ours(name: str) -> bool:
    """Whether a part was written on this machine since it was started, so that its lock tells whether it still is."""
    return bool(_boot()) and re.fullmatch(f"{_boot()}[0-9a-f]{{{_HEX}}}{re.escape(PART)}", name) is not None


def hold(handle: int) -> bool:
    """Show that the writer of a file lives; False where a sweep has just taken the file for an orphan."""
    # A sweep holds it for an instant. Where there are no locks the age of the file tells.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return os.fstat(handle).st_nlink > 0


def sweep(folder: Path, prefix: str = "") -> None:
    """Remove the parts that killed processes left in a folder under this prefix, if their locks can tell."""
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if name.startswith(prefix) and is_ours(name.removeprefix(prefix))]
        for name in names:
            with suppress(OSError):
                _remove(folder / name)


def _remove(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.unlink(path)
    finally:
        os.close(handle)


@cache
def _boot() -> str:
    return hashlib.sha256(_BOOT.read_bytes()).hexdigest()[:8] + "-" if _BOOT.exists() else ""
