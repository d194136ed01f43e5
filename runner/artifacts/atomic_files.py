"""Files that are there whole or not at all: strict reads, and writes that survive a kill at any moment.

Inside of a store's folder every path is walked folder by folder without following symlinks, so nothing placed inside
can lead outside.
"""

import errno
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from runner.artifacts.background import Background
from runner.artifacts.temp_files import Chunks, part_name, write_part
from stages.errors import StoreError

Buffer = bytearray | mmap.mmap
TMP = "tmp"
SPARE = 1.2
_TRIES = 100
# From so many bytes on, a file is read into huge pages: to touch new memory page by page takes longer than to read it.
HUGE_PAGES_FROM = 2**24
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A FIFO would block the open without O_NONBLOCK.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Entry:
    """A stored file."""

    path: str
    """Where it is, from the folder of the store."""
    bytes: int
    """Its length."""
    modified: float
    """When it was written, in seconds since 1970."""

    def age(self) -> float:
        """Seconds since it was written, or until then: a clock that jumped may date a file in the future."""
        return abs(time.time() - self.modified)


@dataclass(frozen=True)
class File:
    """A file to write. It may be named by the hash of its bytes, and the file after it may tell of that."""

    inside: str
    """The folder that it lies below, such as "objects"."""
    path: Callable[[], str]
    """Gives its path from the folder of the store; called after `chunks`."""
    chunks: Callable[[], Chunks]
    """Gives its bytes."""

    @classmethod
    def of(cls, path: str, *chunks: bytes | memoryview) -> "File":
        """A file of which all is known."""
        return cls(path.partition("/")[0], lambda: path, lambda: chunks)


@contextmanager
def folder(root: Path, inside: str, *, made: Callable[[int], None] | None = None) -> Iterator[int]:
    """A descriptor of the folder `inside` (such as "objects/ab"); raises OSError.

    With `made` what is missing is made, and `made` gets the descriptor of each folder that something was made in:
    `os.fsync` puts it on the disk.
    """
    handle = os.open(root, _FOLDER)
    try:
        for part in filter(None, inside.split("/")):
            assert part not in (".", ".."), inside
            if made is not None and _make_folder(part, handle):
                made(handle)
            below = os.open(part, _FOLDER, dir_fd=handle)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def read(root: Path, path: str, *, max_bytes: int, first: int | None = None) -> Buffer | None:
    """The file at `path`, whole or its `first` bytes; None where there is none; StoreError where it is no plain file
    of at most `max_bytes` bytes.
    """
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
            size = facts.st_size
            if size > max_bytes:
                raise StoreError(f"{root / path} has {size:,} bytes, at most {max_bytes:,} are read: remove it")
            return _read_all(handle, size if first is None else min(first, size))
        finally:
            os.close(handle)


def write(root: Path, files: Sequence[File]) -> None:
    """Put each file at its path, whole and in this order, all on the disk when it returns; or StoreError.

    All are written in tmp/, fsynced and renamed, then their folders fsynced. Those under objects/ are read-only.
    """
    size = sum(memoryview(chunk).nbytes for chunk in files[0].chunks())
    parts = [part_name() for _ in files]
    with explained(root / files[0].inside, "write", size), ExitStack() as stack:
        changed: list[int] = []

        def sync_later(handle: int) -> None:
            changed.append(os.dup(handle))
            stack.callback(os.close, changed[-1])

        tmp = stack.enter_context(folder(root, TMP, made=sync_later))
        _check_room(tmp, size)
        try:
            _write_parts(tmp, parts, files)
            for file, part in zip(files, parts, strict=True):
                _moved(root, tmp, part, file.path(), sync_later)
            # Of several folders, the first takes the changes of all with it in most file systems.
            for handle in changed:
                os.fsync(handle)
        finally:
            for part in parts:
                with suppress(FileNotFoundError):
                    os.unlink(part, dir_fd=tmp)


def put(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Put a file at `path`, anywhere, on the disk when it returns; a symlink there is replaced, never followed.

    Raises FileExistsError where something is at `path` unless `overwrite`, and OSError where it cannot be written.
    """
    part = f".{part_name()}"
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        handle = write_part(part, [data], parent, mode=0o666)
        try:
            os.fsync(handle)
            _show(part, path.name, parent, overwrite)
        finally:
            os.close(handle)
        os.fsync(parent)
    finally:
        with suppress(OSError):
            os.unlink(part, dir_fd=parent)
        os.close(parent)


def remove(root: Path, paths: Sequence[str]) -> None:
    """Remove files, passing over those that are missing; all are gone from the disk when it returns."""
    for inside, group in groupby(sorted(paths), key=lambda path: path.rpartition("/")[0]):
        with explained(root / inside, "remove from"), suppress(FileNotFoundError), folder(root, inside) as parent:
            for path in group:
                with suppress(FileNotFoundError):
                    os.unlink(path.rpartition("/")[2], dir_fd=parent)
            os.fsync(parent)


def names(root: Path, inside: str) -> list[str]:
    """The names in a folder, sorted; none where the folder is missing."""
    with explained(root / inside, "read"):
        try:
            with folder(root, inside) as handle:
                return sorted(os.listdir(handle))
        except FileNotFoundError:
            return []


def entries(root: Path, inside: str) -> Iterator[Entry]:
    """Every plain file below a folder; none where the folder is missing."""
    with explained(root / inside, "read"), suppress(FileNotFoundError), folder(root, inside) as top:
        for path, folders, files, handle in os.fwalk(".", dir_fd=top, onerror=_unless_missing):
            folders.sort()
            for name in sorted(files):
                with suppress(FileNotFoundError):
                    facts = os.stat(name, dir_fd=handle, follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode):
                        yield Entry(f"{inside}{path[1:]}/{name}", facts.st_size, facts.st_mtime)


def remove_folder(root: Path, path: str) -> None:
    """Remove the folder at `path`, unless it is missing or something is left in it."""
    inside, _, name = path.rpartition("/")
    with explained(root / inside, "remove from"), folder(root, inside) as parent:
        try:
            os.rmdir(name, dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


@contextmanager
def explained(path: Path, verb: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError inside into a StoreError with path, cause and next step; the OSError stays its cause."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown")
        cause = _cause(error, path, needed)
        raise StoreError(f"cannot {verb} {path}: {error.strerror} [{code}]{cause}") from error


def owner(path: Path) -> str:
    """Who owns `path`, or the nearest folder above that is there."""
    there = _existing(path)
    facts = there.stat()
    return f"{there} belongs to user {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}, we are user {os.geteuid()}"


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _cause(error: OSError, path: Path, needed: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        facts = os.statvfs(_existing(path))
        room = facts.f_bavail * facts.f_frsize
        if error.errno == errno.EFBIG:
            return (f"; needs {int(needed * SPARE):,} bytes, {room:,} are free, but no file may be so large: see "
                    f"ulimit -f, or choose another `store`")
        if error.errno == errno.ENOSPC and facts.f_files and not facts.f_favail:
            return "; the disk has no room for another file, however small: remove files, or choose another `store`"
        return f"; needs {int(needed * SPARE):,} bytes, {room:,} are free: free some, or choose another `store`"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"; {owner(path)}: have it opened to you, or choose another `store`"
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
        return "; the store has plain files and folders alone, this is something else: remove it"
    if error.errno == errno.EIO:
        return "; the disk or its connection fails: see the system log, or choose another `store`"
    return ": choose another `store`"


def _existing(path: Path) -> Path:
    return next(there for there in (path, *path.parents) if os.path.exists(there))


def _read_all(handle: int, size: int) -> Buffer:
    data = _memory(size)
    done, view = 0, memoryview(data)
    while done < size and (count := os.readv(handle, [view[done:]])):
        done += count
    # Shorter than it was a moment ago: whoever asked finds that the hash is wrong.
    return data


def _memory(size: int) -> Buffer:
    if size < HUGE_PAGES_FROM:
        return bytearray(size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _make_folder(name: str, parent: int) -> bool:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def _check_room(tmp: int, size: int) -> None:
    facts = os.fstatvfs(tmp)
    # Some network file systems know no sizes and answer 0 for all of them.
    if facts.f_blocks and facts.f_bavail * facts.f_frsize < size * SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _moved(root: Path, tmp: int, part: str, path: str, sync_later: Callable[[int], None]) -> None:
    """Move a file from tmp/ to its path; who drops things meanwhile removes folders that are empty, also a new one."""
    inside, _, name = path.rpartition("/")
    for left in reversed(range(_TRIES)):
        with folder(root, inside, made=sync_later) as parent:
            try:
                os.rename(part, name, src_dir_fd=tmp, dst_dir_fd=parent)
            except FileNotFoundError:
                if not left or os.fstat(parent).st_nlink:
                    raise
                continue
            sync_later(parent)
            return


def _write_parts(tmp: int, parts: Sequence[str], files: Sequence[File]) -> None:
    """Write files in tmp/; all are on the disk when it returns. While one is on its way there the next is written."""
    with ExitStack() as stack:
        syncing = []
        for part, file in zip(parts, files, strict=True):
            handle = write_part(part, file.chunks(), tmp)
            stack.callback(os.close, handle)
            if file.inside == "objects":
                os.fchmod(handle, 0o444)
            syncing.append(Background(partial(os.fsync, handle)))
            # No descriptor is closed under a thread that waits for it.
            stack.callback(syncing[-1].end)
        for each in reversed(syncing):
            each.result()


def _show(part: str, name: str, parent: int, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, name, src_dir_fd=parent, dst_dir_fd=parent)
        return
    try:
        os.link(part, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        # exFAT and many network mounts have no hard links, the one rename that never replaces.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)
