"""What a hand-over costs, in bytes, and when it is on the disk: seconds are for `python -m benchmarks.store`."""

import errno
import hashlib
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from runner.artifacts import FolderStore, atomic_files
from runner.artifacts.background import THREADS, Background
from stages.errors import StoreError
from stages.state import State
from tests.test_artifacts import KEY, STATE, object_path, same

LARGE = State({"latents": torch.linspace(-1, 1, 2**21).bfloat16(), "sizes": [1, 2]})
BOTH = pytest.mark.parametrize("state", [STATE, LARGE], ids=["small", "large"])


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def counted(monkeypatch: pytest.MonkeyPatch, name: str, size: Callable[..., int]) -> list[int]:
    """The bytes of every call of a function of `os` from now on."""
    real, calls = getattr(os, name), list[int]()

    def counting(*args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        calls.append(size(found, *args))
        return found

    monkeypatch.setattr(os, name, counting)
    return calls


def watched(monkeypatch: pytest.MonkeyPatch, see: Callable[[int], None]) -> None:
    """Have `see` told how many bytes go into each sha256 from now on, before they do."""
    real = hashlib.sha256

    class Watched:
        def __init__(self, data: Any = b"") -> None:
            self._hash = real()
            self.update(data)

        def update(self, data: Any) -> None:
            see(memoryview(data).nbytes)
            self._hash.update(data)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Watched)


@BOTH
def test_a_hand_over_writes_hashes_and_reads_each_byte_once(
    state: State, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = counted(monkeypatch, "write", lambda found, handle, data: found)
    read = counted(monkeypatch, "readv", lambda found, handle, parts: found)
    hashed: list[int] = []
    watched(monkeypatch, hashed.append)
    artifact = store.put(KEY, "denoise", state, {})
    told = (store.path / f"stages/{KEY}.json").stat().st_size
    # A manifest is hashed without its own hash, and without indents.
    assert (sum(write), read) == (artifact.bytes + told, []) and 0 < sum(hashed) - artifact.bytes < told
    hashed.clear()
    assert store.get(KEY) is not None
    assert read == [told, artifact.bytes] and 0 < sum(hashed) - artifact.bytes < told
    assert sum(write) == artifact.bytes + told


@BOTH
def test_both_files_are_on_the_disk_before_they_are_shown_and_their_folders_at_the_end(
    state: State, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    shown: list[tuple[str, bool]] = []
    fsync, rename = os.fsync, os.rename

    def syncing(handle: int) -> None:
        fsync(handle)
        synced.append(os.fstat(handle).st_ino)

    def renaming(part: str, name: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        shown.append((name, os.stat(part, dir_fd=src_dir_fd).st_ino in synced))
        rename(part, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        # What was on the disk before may lack the new name.
        synced[:] = [inode for inode in synced if inode != os.fstat(dst_dir_fd).st_ino]

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    artifact = store.put(KEY, "denoise", state, {})
    assert shown == [(artifact.object, True), (f"{KEY}.json", True)]
    for folder in (store.path / "objects", object_path(store).parent, store.path / "stages"):
        assert folder.stat().st_ino in synced, folder


def test_the_object_goes_to_the_disk_while_its_hash_is_taken(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, begun, overlapped = os.fsync, Event(), list[bool]()

    def slow(size: int) -> None:
        # It ends after the first wait for the disk began: a hash taken first would wait in vain.
        if size > 2**20:
            overlapped.append(begun.wait(60))

    def syncing(handle: int) -> None:
        begun.set()
        fsync(handle)

    watched(monkeypatch, slow)
    monkeypatch.setattr(os, "fsync", syncing)
    store.put(KEY, "denoise", LARGE, {})
    assert overlapped == [True] and store.get(KEY) is not None


@pytest.mark.parametrize("failing", ["object", "manifest", "objects", "stages"])
def test_a_failed_wait_for_the_disk_is_told(
    failing: str, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is, and whichever thread waits."""
    folder = store.path / "objects" / store.put(KEY, "denoise", LARGE, {}).object[:2]
    store.drop(KEY)
    folders = {folder.stat().st_ino: "objects", (store.path / "stages").stat().st_ino: "stages"}
    fsync = os.fsync

    def failed(handle: int) -> None:
        facts = os.fstat(handle)
        file = "object" if stat.S_IMODE(facts.st_mode) == 0o444 else "manifest"
        if failing == (folders.get(facts.st_ino) if stat.S_ISDIR(facts.st_mode) else file):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failed)
        with pytest.raises(StoreError, match=r"cannot write .*\[EIO\]"):
            store.put(KEY, "denoise", LARGE, {})
    assert os.listdir(store.path / "tmp") == []
    found = store.get(KEY)
    # Nothing is shown before both files are on the disk.
    assert (found is None) == (failing in ("object", "manifest"))
    assert found is None or same(dict(found.values), dict(LARGE.values))


def test_a_call_that_no_thread_comes_to_is_made_here(store: FolderStore) -> None:
    """As when all cores are busy."""
    gate = Event()
    busy = [Background(gate.wait) for _ in range(THREADS)]
    try:
        assert Background(lambda: "made").result() == "made"
        made: list[int] = []
        Background(lambda: made.append(1)).end()
        assert not made
        assert store.put(KEY, "denoise", LARGE, {}).object == object_path(store).name
    finally:
        gate.set()
    assert all(call.result() for call in busy) and store.get(KEY) is not None


def test_a_child_of_a_process_that_stored_stores_too(store: FolderStore) -> None:
    expected = store.put(KEY, "denoise", LARGE, {})
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if store.put(KEY, "denoise", LARGE, {}) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_large_artifact_is_read_into_memory_of_its_own(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "HUGE_PAGES_FROM", 1)
    store.put(KEY, "encode", STATE, {})
    found = store.get(KEY)
    assert found is not None and same(dict(found.values), dict(STATE.values))
    found.tensors()["prompt_embeds"].zero_()
    again = store.get(KEY)
    assert again is not None and same(dict(again.values), dict(STATE.values))
    path = object_path(store)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"\xff")
    with pytest.warns(UserWarning, match="does not have the sha256 that names it"):
        assert store.get(KEY) is None
