"""Files that are being written: named and locked so that those of a killed process are told from those of a live one.

Their name begins with the boot of the machine: whoever shares it sees the locks of the others, wherever there are any.
"""

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

Chunks = Sequence[bytes | memoryview]
PART = ".part"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_HEX = 16
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def part_name() -> str:
    """A name that no other file has."""
    return f"{_boot()}{secrets.token_hex(_HEX // 2)}{PART}"


def is_of_this_boot(name: str) -> bool:
    """Whether a part was written on this machine since it was started, so that its lock tells whether it still is."""
    return bool(_boot()) and re.fullmatch(f"{_boot()}[0-9a-f]{{{_HEX}}}{re.escape(PART)}", name) is not None


def write_part(name: str, chunks: Chunks, folder: int, *, mode: int = 0o600) -> int:
    """A descriptor of the new file `name`, which holds the chunks and is not on the disk yet; raises OSError.

    `folder` is a descriptor of its folder. The file is locked until the descriptor is closed.
    """
    while not lock_part(handle := os.open(name, _WRITE, mode, dir_fd=folder)):
        os.close(handle)
    try:
        for chunk in chunks:
            left = memoryview(chunk)
            while left:
                left = left[os.write(handle, left) :]
    except BaseException:
        os.close(handle)
        raise
    return handle


def lock_part(handle: int) -> bool:
    """Show that the writer of a file lives; False where a sweep has just taken the file for an orphan."""
    # A sweep holds it for an instant. Where there are no locks the age of the file tells.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return os.fstat(handle).st_nlink > 0


@contextmanager
def orphaned(name: str, folder: int) -> Iterator[bool | None]:
    """For the block, whether nobody holds the file `name` in a folder, and nobody takes it; None where there are no
    locks to tell. Raises OSError where it is no file.
    """
    with ExitStack() as stack:
        mine, other = (_opened(stack, name, folder) for _ in range(2))
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield False if isinstance(error, BlockingIOError) else None
            return
        yield True if _excludes(other) else None


def remove_orphans(folder: Path, prefix: str = "") -> None:
    """Remove the parts that killed processes left in a folder under this prefix, if their locks can tell."""
    with suppress(OSError), ExitStack() as stack:
        inside = _opened(stack, str(folder), None)
        for name in os.listdir(inside):
            if name.startswith(prefix) and is_of_this_boot(name.removeprefix(prefix)):
                with suppress(OSError), orphaned(name, inside) as free:
                    if free:
                        os.unlink(name, dir_fd=inside)


def _opened(stack: ExitStack, name: str, folder: int | None) -> int:
    handle = os.open(name, _READ, dir_fd=folder)
    stack.callback(os.close, handle)
    return handle


def _excludes(other: int) -> bool:
    """Whether a second descriptor of a file that is locked sees that it is; some file systems only say yes."""
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


@cache
def _boot() -> str:
    return hashlib.sha256(_BOOT.read_bytes()).hexdigest()[:8] + "-" if _BOOT.exists() else ""
