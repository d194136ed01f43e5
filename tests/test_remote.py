"""Stores behind URLs: the same promises over fsspec's memory, over a backend that fails, and over S3."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from runner.artifacts import FolderStore, MemoryStore, open_store, remote
from runner.artifacts.inspection import open_artifact
from runner.artifacts.remote import RemoteStore
from runner.commands.cli import answer
from stages.errors import StoreError
from tests.store_worker import KEY
from tests.test_artifacts import HOSTILE_NAMES, OTHER, STATE, same

ROOT = Path(__file__).parent.parent


class Failing(MemoryFileSystem):
    """fsspec's memory, whose call number `fail` fails; what it was writing then stays there in half."""

    protocol = "failing"
    calls = 0
    fail = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def _call(self) -> bool:
        Failing.calls += 1
        return Failing.calls == Failing.fail

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        if self._call():
            super().pipe_file(path, value[: len(value) // 2])
            raise TimeoutError("the connection is gone")
        super().pipe_file(path, value)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        if self._call():
            raise PermissionError("token expired")
        return super().cat_file(path, start, end)

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        if self._call():
            raise RuntimeError("503 slow down")
        return super().info(path)

    def mv(self, source: str, target: str, **more: Any) -> None:
        if self._call():
            raise ConnectionResetError
        self.store[self._strip_protocol(target)] = self.store.pop(self._strip_protocol(source))

    def rm_file(self, path: str) -> None:
        if self._call():
            raise ConnectionResetError
        super().rm_file(path)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """fsspec's memory, which all tests of a process share, empty."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Failing.calls = Failing.fail = 0
    yield
    MemoryFileSystem.store.clear()


def paths() -> set[str]:
    return set(MemoryFileSystem.store)


def test_a_remote_store_is_laid_out_and_works_like_a_folder() -> None:
    store = open_store("memory://bucket/inside/")
    assert isinstance(store, RemoteStore) and store.get(KEY) is None and store.keys() == [] and store.runs() == []
    artifact = store.put(KEY, "encode", STATE, {"seconds": 1})
    store.save_run("runs", {"status": "running"})
    store.save_run("a", {"status": "running"})
    store.save_run("runs", {"status": "done"})
    inside = {f"objects/{artifact.object[:2]}/{artifact.object}", f"stages/{KEY}.json", "runs/runs/run.json",
              "runs/a/run.json", "runs/.sequence", "store.json"}
    assert paths() == {f"/bucket/inside/{path}" for path in inside}
    again = open_store("memory://bucket/inside", readonly=True)
    found = again.get(KEY)
    assert found is not None and same(dict(found.values), dict(STATE.values)) and again.find(KEY) == artifact
    assert again.keys() == [KEY] and again.runs() == ["runs", "a"] and again.load_run("runs") == {"status": "done"}
    assert [entry.path for entry in again.entries("stages")] == [f"stages/{KEY}.json"]
    assert all(entry.age() < 60 and entry.bytes > 50 for entry in again.entries("runs") if "run.json" in entry.path)
    for what in (KEY[:8], f"memory://bucket/inside/stages/{KEY}.json",
                 f"memory://bucket/inside/objects/{artifact.object[:2]}/{artifact.object}"):
        assert open_artifact(what, again)[0].object == artifact.object
    store.drop(KEY)
    store.drop_run("a")
    assert again.keys() == [] and again.runs() == ["runs"] and again.get(KEY) is None
    with again.working(KEY), again.running("runs"):
        assert again.is_running("runs") is None


def test_damage_is_found_as_in_a_folder() -> None:
    told: list[str] = []
    store = RemoteStore("memory://bucket", warn=told.append)
    for data in (b"", b"torn", None):
        artifact = store.put(KEY, "encode", STATE, {})
        path = f"/bucket/objects/{artifact.object[:2]}/{artifact.object}"
        good = MemoryFileSystem.store[path].getvalue()
        if data is None:
            data = bytes([*good[:-1], good[-1] ^ 1])
        MemoryFileSystem().pipe_file(path, data)
        assert store.get(KEY) is None and "is damaged" in told[-1]
        with pytest.raises(StoreError, match="is damaged"):
            RemoteStore("memory://bucket", strict=True).get(KEY)
    store.put(KEY, "encode", STATE, {})
    MemoryFileSystem().pipe_file(f"/bucket/stages/{KEY}.json", b"{")
    assert store.get(KEY) is None and "manifest" in told[-1] and len(told) == 4
    MemoryFileSystem().pipe_file("/bucket/runs/.sequence", b"9" * 65)
    with pytest.raises(StoreError, match="has more than the 64 bytes"):
        store.save_run("r", {})
    MemoryFileSystem().pipe_file("/bucket/store.json", b"{}")
    with pytest.raises(StoreError, match=r"memory://bucket/store\.json: .*remove it"):
        RemoteStore("memory://bucket")


def test_hostile_names_never_reach_the_backend() -> None:
    store = RemoteStore("memory://bucket/inside")
    before = paths()
    for name in HOSTILE_NAMES:
        for call in (lambda n: store.put(n, "encode", STATE, {}), store.get, store.find, store.drop, store.working):
            with pytest.raises(ValueError, match="an artifact key is"):
                call(name)
        if name != "-":
            for call in (lambda n: store.save_run(n, {}), store.load_run, store.drop_run, store.running):
                with pytest.raises(ValueError, match="a run's name is"):
                    call(name)
    assert paths() == before


@pytest.mark.parametrize("whole", [False, True])
def test_no_failing_call_shows_a_torn_artifact(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose files appear whole leaves no half; `whole` lies about one, and the half is found out."""
    monkeypatch.setattr(remote, "WHOLE", remote.WHOLE | {"failing"} if whole else remote.WHOLE)
    points, seen = 0, []
    for fail in range(1, 100):
        MemoryFileSystem.store.clear()
        Failing.calls, Failing.fail = 0, fail
        failed = False
        try:
            store = RemoteStore("failing://bucket")
            store.save_run("r", {"status": "running"})
            store.put(KEY, "encode", STATE, {})
            store.save_run("r", {"status": "done"})
            store.get(KEY)
            store.drop(OTHER)
        except StoreError as error:
            failed = True
            assert str(error).startswith("cannot ") and "failing://bucket" in str(error) and "-> check" in str(error)
        Failing.fail = 0
        if not failed:
            break
        points += 1
        told: list[str] = []
        if whole:
            MemoryFileSystem.store.pop("/bucket/store.json", None)
        after = RemoteStore("memory://bucket", warn=told.append, strict=not whole)
        found = after.get(KEY)
        seen.append(found is not None)
        assert found is None or same(dict(found.values), dict(STATE.values))
        assert whole or after.runs() in ([], ["r"])
        assert not told or whole
        after.put(KEY, "encode", STATE, {})
        assert after.get(KEY) is not None
    print(f"failing calls: {points}")
    assert points > 12 and True in seen and False in seen


def test_what_a_failed_writer_left_aside_is_swept() -> None:
    store = RemoteStore("failing://bucket")
    with pytest.raises(StoreError, match=r"cannot write failing://bucket/objects/.*TimeoutError: the conn"):
        # The first call looks for what would be replaced.
        Failing.fail = Failing.calls + 2
        store.put(KEY, "encode", STATE, {})
    (part,) = (path for path in paths() if path.startswith("/bucket/tmp/"))
    assert store.sweep(min_age=3600, dry_run=False) == [] and part in paths()
    (entry,) = store.sweep(min_age=0, dry_run=True)
    assert f"/bucket/{entry.path}" == part and part in paths() and entry.bytes > 100
    assert store.sweep(min_age=0, dry_run=False) == [entry] and part not in paths()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "names no bucket"), ("nope://x/y", "Protocol not known: nope"), ("S3://b/x", "is no address"),
        ("s3://me:secret@host/x", "must not hold a user or a password"), ("simplecache::s3://b", "is no address"),
        ("s3://b/../c", "is no address"), ("s3://b/\x1b[2J", "is no address"), ("file://x", "a whole path"),
        ("gs://bucket/x", "gcsfs.* -> pip install gcsfs"), ("abfs://b/x", "adlfs.* -> pip install adlfs"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_one_clear_line(
    url: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=says):
        open_store(url)
    assert answer(["flux", "--model", "demo", "--prompt", "x", "--artifacts", url]) == 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "secret" not in err and "\x1b" not in err and not list(tmp_path.iterdir())


def test_open_store_knows_urls(tmp_path: Path) -> None:
    kinds = {"memory": MemoryStore, "memory://x": RemoteStore, f"file://{tmp_path}/s": FolderStore}
    for where, kind in kinds.items():
        assert type(open_store(where)) is kind
    assert (tmp_path / "s/objects").is_dir()
    with pytest.raises(StoreError, match="there is no artifact store memory://y"):
        open_store("memory://y", readonly=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server on this machine, with a bucket; the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
                   "AWS_SECRET_ACCESS_KEY": "sentinel-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ.update(environment)
    fsspec.filesystem("s3").mkdir("bucket")
    yield environment
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.mark.usefixtures("s3")
def test_s3_keeps_what_it_got_and_names_what_is_wrong() -> None:
    store = open_store("s3://bucket/a/b")
    assert store.get(KEY) is None and store.runs() == [] and store.keys() == []
    artifact = store.put(KEY, "encode", STATE, {})
    for run in ("zebra", "runs", "apple"):
        store.save_run(run, {"status": "running"})
    found = open_store("s3://bucket/a/b", readonly=True).get(KEY)
    assert found is not None and same(dict(found.values), dict(STATE.values))
    assert store.runs() == ["zebra", "runs", "apple"] and store.keys() == [KEY]
    (entry,) = store.entries("objects")
    assert entry.bytes == artifact.bytes and entry.age() < 60
    told: list[str] = []
    for bad in (b"", b"torn"):
        fsspec.filesystem("s3").pipe_file(f"bucket/a/b/{entry.path}", bad)
        assert open_store("s3://bucket/a/b", warn=told.append).get(KEY) is None
    assert [f"has {count} bytes" in text for count, text in zip((0, 4), told, strict=True)] == [True, True]
    store.drop(KEY)
    store.drop_run("runs")
    assert store.keys() == [] and list(store.entries("objects")) == [] and store.runs() == ["zebra", "apple"]
    with pytest.raises(StoreError, match=r"cannot write s3://gone/x/store\.json: FileNotFoundError: .*bucket does"):
        open_store("s3://gone/x")
    with pytest.raises(StoreError, match="there is no artifact store s3://gone/x"):
        open_store("s3://gone/x", readonly=True)


def runner(*words: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `python -m runner` says of its run, as one machine with nothing but the store in common."""
    folder.mkdir()
    command = [sys.executable, "-m", "runner", "flux", "--prompt", "a red circle", "--seed", "3", "--steps", "2",
               "--size", "64x48", "--device", "cpu", "--json", "-q", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={
        **os.environ, **environment, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")})
    assert done.returncode == 0, done.stderr
    assert "sentinel-secret" not in done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_each_stage_may_be_run_by_itself_on_a_shared_store(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same three commands on a store without locks; what is missing is refused, and nothing is made twice."""
    monkeypatch.chdir(tmp_path)
    where = "memory://shared/store"
    words = ["flux", "--model", str(flux), "--size", "32x32", "--steps", "1", "--seed", "1", "--prompt", "a fox",
             "--device", "cpu", "-q", "--json"]
    made = []
    assert answer([*words, "--artifacts", where, "--from-stage", "denoise"]) == 2
    assert "needs the artifacts of encode" in capsys.readouterr().err
    for more in (["--stop-after", "encode"], ["--from-stage", "denoise", "--stop-after", "denoise"],
                 ["--from-stage", "decode", "--out", "x.png"]):
        assert answer([*words, "--artifacts", where, *more]) == 0
        made.append([stage["made"] for stage in json.loads(capsys.readouterr().out)["stages"]])
    assert made == [[1], [0, 1], [0, 0, 1]]
    assert answer([*words, "--artifacts", "memory", "--out", "alone.png"]) == 0
    assert Path("x.png").read_bytes() == Path("alone.png").read_bytes()


def test_three_machines_share_a_bucket(s3: dict[str, str], flux: Path, tmp_path: Path) -> None:
    """Encode on one, denoise on another, decode on a third; each has its own copy of the model."""
    runs = []
    for number, words in enumerate((["--stop-after", "encode"], ["--stop-after", "denoise"], ["--out", "x.png"])):
        model = tmp_path / f"model{number}"
        shutil.copytree(flux, model)
        runs.append(runner("--model", str(model), "--artifacts", "s3://bucket/shared", *words,
                           folder=tmp_path / f"machine{number}", environment=s3))
    ran = [[stage["made"] for stage in run["stages"]] for run in runs]
    assert ran == [[1], [0, 1], [0, 0, 1]]
    assert (tmp_path / "machine2/x.png").exists() and not (tmp_path / "machine2/cache").exists()
    assert len(open_store("s3://bucket/shared").runs()) == 3
