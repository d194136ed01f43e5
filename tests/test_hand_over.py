"""What a hand-over costs, in calls and bytes: seconds are for `python -m benchmarks.store`."""

import errno
import hashlib
import itertools
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from runner.artifacts import FolderStore, atomic_files, background, state_format
from runner.artifacts.background import ASIDE, Background
from runner.artifacts.state_format import pack
from stages.errors import StoreError
from stages.state import State
from tests.test_artifacts import KEY, STATE, object_path, same

LARGE = State({"latents": torch.linspace(-1, 1, ASIDE).bfloat16(), "sizes": [1, 2]})


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def counted(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, size: Callable[..., int]) -> list[int]:
    """The bytes of every call of a function from now on."""
    real, calls = getattr(target, name), list[int]()

    def counting(*args: Any, **more: Any) -> Any:
        found = real(*args, **more)
        calls.append(size(found, *args))
        return found

    monkeypatch.setattr(target, name, counting)
    return calls


def total(chunks: Any) -> int:
    return sum(memoryview(chunk).nbytes for chunk in chunks)


@pytest.mark.parametrize("state", [STATE, LARGE], ids=["small", "large"])
def test_a_hand_over_writes_hashes_and_reads_each_byte_once(
    state: State, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, "denoise", state, {})
    store.drop(KEY)
    fsync = counted(monkeypatch, os, "fsync", lambda found, handle: 0)
    rename = counted(monkeypatch, os, "rename", lambda found, *paths: 0)
    write = counted(monkeypatch, os, "write", lambda found, handle, data: found)
    read = counted(monkeypatch, os, "readv", lambda found, handle, parts: found)
    hashed = counted(monkeypatch, state_format, "_sha256", lambda found, chunks: total(chunks))
    artifact = store.put(KEY, "denoise", state, {})
    told = (store.path / f"stages/{KEY}.json").stat().st_size
    # An fsync for each of two files, and for each of their folders: one more where the object's folder is new.
    assert (len(fsync), len(rename)) == (4, 2)
    assert (sum(write), hashed, read) == (artifact.bytes + told, [artifact.bytes], [])
    checked = counted(monkeypatch, hashlib, "sha256", lambda found, data=b"": len(data))
    assert store.get(KEY) is not None
    assert read == [told, artifact.bytes] and checked.count(artifact.bytes) == 1
    assert sum(checked) < artifact.bytes + told and (len(fsync), len(hashed)) == (4, 1)


def test_the_object_goes_to_the_disk_while_its_hash_is_taken(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, took, begun = os.fsync, state_format._sha256, Event()

    def slow(chunks: Any) -> str:
        # It ends after the first wait for the disk began: a hash taken first would wait in vain.
        overlapped.append(begun.wait(60))
        return took(chunks)

    def syncing(handle: int) -> None:
        begun.set()
        fsync(handle)

    overlapped: list[bool] = []
    monkeypatch.setattr(state_format, "_sha256", slow)
    monkeypatch.setattr(os, "fsync", syncing)
    store.put(KEY, "denoise", LARGE, {})
    assert overlapped == [True] and store.get(KEY) is not None


@pytest.mark.parametrize("failing", range(4))
def test_a_failed_wait_for_the_disk_is_told(
    failing: int, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the four it is, and whichever thread waits."""
    store.put(KEY, "denoise", LARGE, {})
    store.drop(KEY)
    fsync, calls = os.fsync, itertools.count()

    def failed(handle: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failed)
        with pytest.raises(StoreError, match=r"cannot write .*\[EIO\]"):
            store.put(KEY, "denoise", LARGE, {})
    assert os.listdir(store.path / "tmp") == []
    found = store.get(KEY)
    # Nothing is shown before both files are on the disk.
    assert (found is None) == (failing < 2)
    assert found is None or same(dict(found.values), dict(LARGE.values))


def test_a_call_that_no_thread_comes_to_is_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when all cores are busy."""
    with ThreadPoolExecutor(1) as blocked:
        monkeypatch.setattr(background, "_pool", lambda: blocked)
        gate, entered = Event(), Event()
        blocked.submit(lambda: (entered.set(), gate.wait()))
        entered.wait()
        try:
            assert Background(lambda: "made").result() == "made"
            made: list[int] = []
            Background(lambda: made.append(1)).end()
            assert not made
            packed = pack(LARGE, key=KEY, stage="denoise")
            assert packed.digest == hashlib.sha256(b"".join(packed.chunks)).hexdigest()
        finally:
            gate.set()


def test_a_child_of_a_process_that_stored_stores_too(store: FolderStore) -> None:
    expected = store.put(KEY, "denoise", LARGE, {})
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if store.put(KEY, "denoise", LARGE, {}) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_large_artifact_is_read_into_memory_of_its_own(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "HUGE", 1)
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
