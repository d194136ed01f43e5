"""What a folder store survives: kills at every system call, full and failing disks, other users, other processes."""

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runner.artifacts import FolderStore, locks
from runner.artifacts.temp_files import lock_part, part_name, remove_orphans
from stages.errors import StoreError
from tests.store_worker import KEY, Worker, state
from tests.test_artifacts import OTHER, STATE, object_path, same

WRITE_PATH = ("openat", "?mkdir", "mkdirat", "flock", "write", "fchmod", "fsync", "renameat", "unlinkat")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.close()


@pytest.fixture(scope="module")
def strace(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where a process cannot be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    order = {"do": "put", "folder": str(tmp_path_factory.mktemp("probe") / "store")}
    try:
        worker.start(order, trace=["-e", "inject=fsync:signal=SIGKILL:when=1"])
    except OSError as error:
        worker.end()
        pytest.skip(str(error))
    if worker.end().codes != [-9]:
        pytest.skip("strace cannot inject a signal here")


def assert_whole_or_nothing(folder: Path) -> bool:
    """Reopen a store after a fault: nothing torn, nothing warned of, and it works. Whether the state was there."""
    told: list[str] = []
    store = FolderStore(folder, warn=told.append, strict=True)
    found = store.get(KEY)
    assert found is None or same(dict(found.values), dict(state().values))
    for path in (store.path / "objects").rglob("*"):
        assert path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    store.put(KEY, "encode", state(), {})
    again = store.get(KEY)
    assert again is not None and same(dict(again.values), dict(state().values)) and not told
    for path in (store.path / "tmp").iterdir():
        os.utime(path, (1, 1))
    FolderStore(folder)
    assert list((store.path / "tmp").iterdir()) == []
    return found is not None


@pytest.mark.usefixtures("strace")
def test_a_kill_at_any_system_call_leaves_the_whole_artifact_or_none(worker: Worker, tmp_path: Path) -> None:
    points = {}
    for call in WRITE_PATH:
        seen = []
        for attempt in range(1, 100):
            folder = tmp_path / f"{call.strip('?')}-{attempt}"
            told = ["-e", f"inject={call}:signal=SIGKILL:when={attempt}"]
            end = worker.do({"do": "put", "folder": str(folder)}, trace=told)
            seen.append(assert_whole_or_nothing(folder))
            if end.codes == [0]:
                break
            assert end.codes == [-9]
        # Once it is there, a later kill does not take it away; and the last attempt was not killed.
        assert seen == sorted(seen) and seen[-1]
        points[call.strip("?")] = len(seen) - 1
    print(f"kill points: {sum(points.values())} {points}")
    assert sum(points.values()) > 25 and points["renameat"] == 2 and points["fsync"] >= 4


@pytest.mark.usefixtures("strace")
def test_a_kill_while_dropping_leaves_the_whole_artifact_or_none(worker: Worker, tmp_path: Path) -> None:
    points = 0
    for call in ("openat", "unlinkat", "fsync"):
        seen = []
        for attempt in range(1, 100):
            folder = tmp_path / f"{call}-{attempt}"
            FolderStore(folder).put(KEY, "encode", state(), {})
            told = ["-e", f"inject={call}:signal=SIGKILL:when={attempt}"]
            end = worker.do({"do": "drop", "folder": str(folder)}, trace=told)
            seen.append(assert_whole_or_nothing(folder))
            if end.codes == [0]:
                break
        assert seen == sorted(seen, reverse=True) and not seen[-1]
        points += len(seen) - 1
    print(f"kill points: {points}")
    assert points > 8


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_at_any_system_call_is_reported(worker: Worker, tmp_path: Path, code: str) -> None:
    for call in ("mkdirat", "write", "fchmod", "fsync", "renameat", "openat"):
        for attempt in range(1, 100):
            folder = tmp_path / f"{call}-{attempt}"
            told = ["-e", f"inject={call}:error={code}:when={attempt}"]
            end = worker.do({"do": "put", "folder": str(folder)}, trace=told)
            assert end.codes == [0]
            if "result" in end.told[0]:
                break
            assert end.told[0]["errno"] == getattr(errno, code), end.told
            assert f"{folder}" in end.told[0]["error"] and f"[{code}]" in end.told[0]["error"]
            assert not (folder / "tmp").exists() or list((folder / "tmp").iterdir()) == []
            assert_whole_or_nothing(folder)
        assert attempt > 1, call


@pytest.mark.usefixtures("strace")
def test_a_disk_that_fails_to_read_is_reported_not_recomputed(worker: Worker, tmp_path: Path) -> None:
    FolderStore(tmp_path / "store").put(KEY, "encode", state(), {})
    order = {"do": "get", "folder": str(tmp_path / "store")}
    for attempt in (1, 2):
        end = worker.do(order, trace=["-e", f"inject=readv:error=EIO:when={attempt}"])
        assert end.told[0]["errno"] == errno.EIO and "see the system log" in end.told[0]["error"]
    assert worker.do(order).told == [{"result": "state"}]


def test_a_file_size_limit_leaves_nothing_torn(worker: Worker, tmp_path: Path) -> None:
    order = {"do": "put", "folder": str(tmp_path / "store"), "size": 100_000, "limit": 2**16}
    told = worker.do(order).told[0]
    assert told["errno"] == errno.EFBIG and "needs 48" in told["error"] and "are free" in told["error"]
    assert "ulimit -f" in told["error"]
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert not assert_whole_or_nothing(tmp_path / "store")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Any]:
    """Mounts with these options; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def on(path: Path, *options: str) -> None:
        if subprocess.run(["mount", *options, str(path)], capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(path)

    yield on
    for path in reversed(mounted):
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_foreseen_and_works_again_when_freed(tmp_path: Path, mount: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    store = FolderStore(disk / "store")
    filler = disk / "filler"
    filler.write_bytes(bytes(1_800_000))
    with pytest.raises(StoreError, match=r"\[ENOSPC\]; needs 48\d,\d+ bytes, \d+,\d+ are free: free some") as refused:
        store.put(KEY, "encode", state(100_000), {})
    assert isinstance(refused.value.__cause__, OSError) and refused.value.__cause__.errno == errno.ENOSPC
    assert [path for path in store.path.rglob("*") if path.is_file()] == []
    filler.unlink()
    store.put(KEY, "encode", state(100_000), {})
    assert store.get(KEY) is not None


def test_a_read_only_disk_is_refused_at_once_and_still_read(tmp_path: Path, mount: Any) -> None:
    folder = tmp_path / "store"
    FolderStore(folder).put(KEY, "encode", STATE, {})
    mount(folder, "--bind", str(folder))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    with pytest.raises(StoreError, match=rf"cannot write in {folder}/objects: .* belongs to user"):
        FolderStore(folder)
    store = FolderStore(folder, readonly=True)
    with store.working(KEY):
        assert store.get(KEY) is not None
    with pytest.raises(StoreError, match=r"cannot write .*\[EROFS\]; .* choose another store"):
        store.put(OTHER, "encode", STATE, {})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_store_is_named_with_its_owner(worker: Worker) -> None:
    # Not in tmp_path, which is closed to other users at its top.
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        outer.chmod(0o755)
        FolderStore(outer / "store").put(KEY, "encode", STATE, {})
        told = worker.do({"do": "get", "folder": str(outer / "store"), "user": 65534}).told[0]
        assert told["errno"] == errno.EACCES
        assert f"{outer / 'store'} belongs to user 0, mode 700, we are user 65534" in told["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    FolderStore(tmp_path / "store")
    (tmp_path / "store/objects").chmod(0o500)
    with pytest.raises(StoreError, match=r"cannot write in .*/objects"):
        FolderStore(tmp_path / "store")


def test_folders_that_are_no_stores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "documents/tmp").mkdir(parents=True)
    (tmp_path / "documents/letter.txt").touch()
    for path, message in {
        "file": "is not a folder", "file/store": "does not exist, make it first|Not a directory",
        "no/such": r"cannot make .*/no/such: .*/no does not exist, make it first",
        "documents": "holds 'letter.txt' and is no artifact store", "n" * 300: "ENAMETOOLONG",
    }.items():  # fmt: skip
        with pytest.raises(StoreError, match=message):
            FolderStore(tmp_path / path)
    with pytest.raises(StoreError, match="there is no artifact store"):
        FolderStore(tmp_path / "absent", readonly=True)
    assert sorted(os.listdir(tmp_path)) == ["documents", "file"]


def test_a_store_may_be_reached_by_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    store = FolderStore(tmp_path / "link")
    (tmp_path / "link").unlink()
    store.put(KEY, "encode", STATE, {})
    assert store.path == tmp_path / "disk" and FolderStore(tmp_path / "disk").get(KEY) is not None


@pytest.mark.parametrize("what", ["objects", "objects/ab", "stages", "runs", "runs/r", "tmp"])
def test_a_symlinked_folder_inside_is_not_followed(tmp_path: Path, what: str) -> None:
    store = FolderStore(tmp_path / "store")
    artifact = store.put(KEY, "encode", STATE, {})
    store.save_run("r", {})
    inside = store.path / what.replace("/ab", f"/{artifact.object[:2]}")
    inside.rename(tmp_path / "outside")
    inside.symlink_to(tmp_path / "outside")
    before = sorted((tmp_path / "outside").rglob("*"))
    get, load, save = partial(store.get, KEY), partial(store.load_run, "r"), partial(store.save_run, "r", {})
    put = partial(store.put, KEY, "encode", STATE, {})
    for call in {"runs": (load, save), "runs/r": (load, save), "tmp": (put, save)}.get(what, (get, put)):
        with pytest.raises(StoreError, match=r"\[(ENOTDIR|ELOOP)\]; the store has plain files and folders alone"):
            call()
    assert sorted((tmp_path / "outside").rglob("*")) == before


@pytest.mark.parametrize("what", ["object", "manifest", "run"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "device"])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(tmp_path: Path, what: str, kind: str) -> None:
    store = FolderStore(tmp_path / "store")
    store.put(KEY, "encode", STATE, {})
    store.save_run("r", {})
    manifest, run = store.path / f"stages/{KEY}.json", store.path / "runs/r/run.json"
    path = {"object": object_path(store), "manifest": manifest, "run": run}[what]
    path.rename(tmp_path / "kept")
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    {
        "symlink": lambda: path.symlink_to(tmp_path / "kept"), "fifo": lambda: os.mkfifo(path), "folder": path.mkdir,
        "device": lambda: os.mknod(path, 0o020600, os.makedev(1, 5)),
    }[kind]()  # fmt: skip
    with pytest.raises(StoreError, match="remove it"):
        store.load_run("r") if what == "run" else store.get(KEY)


def test_several_processes_compute_a_shared_stage_once(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    order = {"do": "compute", "folder": str(tmp_path / "store"), "marks": str(tmp_path / "marks"), "count": 8}
    end = worker.do(order)
    assert end.codes == [0] * 8 and len(end.told) == 8
    assert len(os.listdir(tmp_path / "marks")) == 1
    assert {told["result"] for told in end.told} == {object_path(FolderStore(tmp_path / "store"), KEY).name}
    assert os.listdir(tmp_path / "store/tmp") == []


def test_several_processes_are_right_without_locks(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    order = {"do": "compute", "folder": str(tmp_path / "store"), "marks": str(tmp_path / "marks"), "count": 8}
    end = worker.do({**order, "locks": False})
    assert end.codes == [0] * 8 and len(os.listdir(tmp_path / "marks")) > 1
    assert {told["result"] for told in end.told} == {object_path(FolderStore(tmp_path / "store"), KEY).name}
    assert assert_whole_or_nothing(tmp_path / "store")


def test_dropping_storing_and_reading_at_once_shows_whole_artifacts_or_none(worker: Worker, tmp_path: Path) -> None:
    told: list[str] = []
    store = FolderStore(tmp_path / "store", warn=told.append)
    worker.start({"do": "drop", "folder": str(store.path), "count": 2, "times": 150})
    for _ in range(40):
        store.put(KEY, "encode", state(), {})
        found = store.get(KEY)
        assert found is None or same(dict(found.values), dict(state().values))
    assert worker.end().codes == [0, 0]
    # An object taken from under a manifest that was just written again is missing, never torn.
    assert all("its object is missing" in text for text in told)
    store.put(KEY, "encode", state(), {})
    assert store.get(KEY) is not None


def test_a_folder_that_is_dropped_before_something_is_in_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another process, between the making of the folder and the move of the file into it."""
    store, rename, gone = FolderStore(tmp_path / "store", warn=pytest.fail), os.rename, list[str]()

    def late(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        below = os.readlink(f"/proc/self/fd/{dst_dir_fd}")
        if below not in gone:
            gone.append(below)
            os.rmdir(below)
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", late)
    store.put(KEY, "encode", state(), {})
    assert len(gone) == 2 and store.get(KEY) is not None


def test_a_lock_is_waited_for_but_not_for_ever(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store = FolderStore(tmp_path / "store", warn=told.append)
    (pid,) = worker.start({"do": "hold", "folder": str(store.path), "marks": str(tmp_path)})
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    monkeypatch.setattr(locks, "PATIENCE", 1.2)
    with store.working(KEY):
        assert [text.split(": ")[-1] for text in told] == ["waiting for it", "going on without waiting"]
    with store.working(OTHER):
        assert len(told) == 2
    os.kill(pid, 9)
    assert worker.end().codes == [-9]
    monkeypatch.setattr(locks, "PATIENCE", 60.0)
    with store.working(KEY):
        assert len(told) == 2


def test_a_run_that_goes_on_is_seen_until_its_last_process_ends(worker: Worker, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    assert store.is_running("r") is False
    with store.running("r"):
        with FolderStore(store.path).running("r"):
            assert store.is_running("r") is True and store.is_running("s") is False
        assert store.is_running("r") is True
    assert store.is_running("r") is False and os.listdir(store.path / "tmp") == []
    (pid,) = worker.start({"do": "run", "folder": str(store.path), "marks": str(tmp_path)})
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert store.is_running("r") is True
    os.kill(pid, 9)
    assert worker.end().codes == [-9] and store.is_running("r") is False


def test_orphans_are_swept_and_nothing_else(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    tmp, now = store.path / "tmp", time.time()
    ages = {"old.part": 1, "old.lock": 1, "future.part": 2**32, "young.part": now - 60, "held.part": 1, "notes": 1}
    for name, age in ages.items():
        (tmp / name).touch()
        os.utime(tmp / name, (age, age))
    with open(tmp / "held.part") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        FolderStore(store.path)
    assert sorted(os.listdir(tmp)) == ["held.part", "notes", "young.part"]


@pytest.mark.parametrize("locks", ["real", "missing", "blind"])
def test_what_was_killed_on_this_machine_is_swept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    """Where no lock can tell that its writer is gone, it stays until it is old."""
    store = FolderStore(tmp_path / "store")
    left, live = part_name(), part_name()
    for name in (left, live, "some.lock"):
        (store.path / "tmp" / name).touch()
    with open(store.path / "tmp" / live) as held:
        assert lock_part(held.fileno())
        if locks == "missing":
            monkeypatch.setattr(fcntl, "flock", partial(_refuse, errno.ENOTSUP))
        elif locks == "blind":
            monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)
        FolderStore(store.path)
        remove_orphans(store.path / "tmp")
        there = {live} if locks == "real" else {left, live, "some.lock"}
        assert set(os.listdir(store.path / "tmp")) == there
    os.unlink(store.path / "tmp" / live)


def test_a_writer_whose_new_file_was_swept_takes_another(tmp_path: Path) -> None:
    with open(tmp_path / "gone", "wb") as file:
        os.unlink(tmp_path / "gone")
        assert not lock_part(file.fileno())


def _refuse(code: int, handle: int, how: int) -> None:
    raise OSError(code, os.strerror(code))
