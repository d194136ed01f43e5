"""Files that are there whole or not at all: strict reads, and writes that survive a kill at any moment.

Every path is walked folder by folder without following symlinks, so nothing placed inside can lead outside.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.errors import StoreError

PART = ".part"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def folder(root: Path, inside: str, *, make: bool = False) -> Iterator[int]:
    """A descriptor of the folder `inside` (such as "objects/ab"), made durably when `make`."""
    handle = os.open(root, _FOLDER)
    try:
        for part in filter(None, inside.split("/")):
            assert part not in (".", ".."), inside
            if make:
                _make_folder(part, handle)
            below = os.open(part, _FOLDER, dir_fd=handle)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def read(root: Path, path: str, *, most: int) -> bytes | None:
    """The whole file at `path`, or None where there is none; StoreError where it is no plain file of `most` bytes."""
    inside, _, name = path.rpartition("/")
    with explained(root / path, "read"):
        try:
            with folder(root, inside) as parent:
                handle = os.open(name, _READ, dir_fd=parent)
        except FileNotFoundError:
            return None
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise StoreError(f"{root / path} is not a plain file: remove it")
            if facts.st_size > most:
                raise StoreError(f"{root / path} has {facts.st_size:,} bytes, at most {most:,} are read: remove it")
            with open(handle, "rb", buffering=0, closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)


def write(root: Path, path: str, chunks: Iterable[bytes | memoryview], *, mode: int) -> None:
    """Put a file at `path` whole: written in tmp/, fsynced, renamed, its folder fsynced; StoreError when it cannot."""
    inside, _, name = path.rpartition("/")
    held = [memoryview(chunk).cast("B") for chunk in chunks]
    with explained(root / path, "write", sum(chunk.nbytes for chunk in held)), folder(root, "tmp", make=True) as tmp:
        part = f"{secrets.token_hex(8)}{PART}"
        try:
            _write_part(tmp, part, held, mode)
            with folder(root, inside, make=True) as parent:
                os.rename(part, name, src_dir_fd=tmp, dst_dir_fd=parent)
                os.fsync(parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part, dir_fd=tmp)


def names(root: Path, inside: str) -> list[str]:
    """The names in a folder, sorted; none where the folder is missing."""
    with explained(root / inside, "read"):
        try:
            with folder(root, inside) as handle:
                return sorted(os.listdir(handle))
        except FileNotFoundError:
            return []


@contextmanager
def explained(path: Path, verb: str, needed: int = 0) -> Iterator[None]:
    """Turns an OSError inside into a StoreError with path, cause and next step; the OSError stays its cause."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {verb} {path}: {_cause(error, path, needed)}") from error


def _cause(error: OSError, path: Path, needed: int) -> str:
    text = f"{error.strerror} [{errno.errorcode.get(error.errno or 0, error.errno)}]"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{text}; needs {needed:,} bytes, {free(path):,} are free: free some or choose another --artifacts"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}; {_owner(path)}: choose another --artifacts, or have it made writable"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return f"{text}; a symlink or a file stands where a folder of the store should be: remove it"
    if error.errno == errno.EIO:
        return f"{text}; the disk or its connection fails: look at the system log, or choose another --artifacts"
    return f"{text}: choose another --artifacts"


def free(path: Path) -> int:
    """The bytes that this process may still write where `path` is or would be."""
    facts = os.statvfs(_existing(path))
    return facts.f_bavail * facts.f_frsize


def _owner(path: Path) -> str:
    there = _existing(path)
    facts = there.lstat()
    return f"{there} belongs to user {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}, we are {os.geteuid()}"


def _existing(path: Path) -> Path:
    return next(there for there in (path, *path.parents) if os.path.lexists(there) and not there.is_symlink())


def _make_folder(name: str, parent: int) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return
    os.fsync(parent)


def _write_part(tmp: int, part: str, chunks: list[memoryview], mode: int) -> None:
    handle = os.open(part, _WRITE, 0o600, dir_fd=tmp)
    try:
        for chunk in chunks:
            while chunk:
                chunk = chunk[os.write(handle, chunk) :]
        os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def open_root(path: Path) -> Path:
    """The folder `path` with its symlinks resolved, made where only its last part is missing."""
    root = path.resolve()
    with explained(root, "open"):
        if not root.exists():
            if not root.parent.is_dir():
                raise StoreError(f"{root} cannot be made: {root.parent} does not exist, make it first")
            root.mkdir(mode=0o700, exist_ok=True)
        with folder(root, ""):
            return root
