"""`runner runs`: what it lists, shows, forgets, collects and verifies."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.artifacts import FolderStore, MemoryStore, Store, key_of, open_store
from runner.artifacts.garbage import collect
from runner.artifacts.signed_json import write_document
from runner.commands import runs
from runner.commands.cli import answer
from runner.reports.history import age, find_run
from stages.errors import StoreError
from tests.test_artifacts import HOSTILE_NAMES, STATE, object_path

Say = Callable[..., tuple[int, str, str]]
STAGES = ("encode", "denoise", "decode")


def keys(name: str) -> dict[str, list[str]]:
    return {stage: [key_of({"of": name, "stage": stage})] for stage in STAGES}


def record(name: str, status: str = "done", **more: Any) -> dict[str, Any]:
    request = {"prompt": f"a {name}\x1b[2J", "width": 64, "height": 48, "steps": 2, "guidance": None, "seed": 7}
    made = {"model": "sha256:abc", "requests": [request], "stages": keys(name), "status": status}
    return {**made, "warnings": [], **more}


def fill(store: Store, name: str, stages: int = 3, status: str = "done", **more: Any) -> None:
    """A run with as many finished stages."""
    store.save_run(name, record(name, status, **more))
    for stage in STAGES[:stages]:
        store.put(keys(name)[stage][0], stage, STATE, {"of": "nothing"})


def make_old(store: FolderStore) -> None:
    for path in store.path.rglob("*"):
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """Three runs: one done, one killed after its first stage, one failed before it finished any."""
    store = FolderStore(tmp_path / "store")
    fill(store, "zebra", plan={"model": "demo"})
    fill(store, "apple-1", 1, "running", warnings=["slow \u202e disk"])
    fill(store, "apple-2", 0, "failed", error="ModelError: gone\nfor good")
    return store


@pytest.fixture
def say(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> Say:
    """Answer `runner runs WORDS` on the store: exit code, standard output, standard error."""

    def said(*words: str) -> tuple[int, str, str]:
        code = answer(["runs", *words, "--artifacts", str(store.path)])
        return code, *capsys.readouterr()

    return said


def test_ls_tells_the_runs_the_newest_first(store: FolderStore, say: Say) -> None:
    code, out, err = say("ls")
    rows = [re.split("  +", line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert rows[0] == ["run", "age", "status", "pictures", "alone", "shared", "prompt"]
    assert [[row[0], row[2], row[3], row[5], row[6]] for row in rows[1:]] == [
        ["apple-2", "failed", "1", "0 B", "a apple-2[2J"],
        ["apple-1", "interrupted", "1", "0 B", "a apple-1[2J"],
        ["zebra", "done", "1", "0 B", "a zebra[2J"],
    ]
    assert all(re.fullmatch(r"\d+ (s|min)", row[1]) and re.fullmatch(r"[0-9.]+ (B|KiB)", row[4]) for row in rows[1:])
    with FolderStore(store.path).running("apple-1"):
        assert "running" in say("ls", "--last", "2")[1].splitlines()[2]
    found = json.loads(say("ls", "--json", "--last", "1")[1])["runs"]
    assert [run["run"] for run in found] == ["apple-2"] and found[0]["stages"]["encode"] == {"done": 0, "of": 1}
    assert found[0]["prompt"] == "a apple-2\x1b[2J" and found[0]["shared"] == 0 and found[0]["alone"] > 100


def test_ls_is_as_wide_as_the_terminal(store: FolderStore, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, "20261129-004934-0f3a2b", requests=[{"prompt": "a very " + 40 * "long " + "prompt"}])
    for columns, count in ((80, 9), (132, 5)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = say("ls")[1].splitlines()
        assert max(map(len, lines)) == columns and len(lines) == count
        assert sum(line.endswith("...") and "a very long" in line for line in lines) == 1
        assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
            "run", "20261129-004934-0f3a2b", "apple-2", "apple-1", "zebra"]


def test_ls_leaves_out_what_is_not_meant(store: FolderStore, say: Say) -> None:
    def names(*words: str) -> list[str]:
        return [line.split()[0] for line in say("ls", *words)[1].splitlines()[1:]]

    assert names("--status", "failed") == ["apple-2"] and names("--status", "interrupted") == ["apple-1"]
    assert names("--match", "ZEBRA") == ["zebra"] and names("--match", "apple") == ["apple-2", "apple-1"]
    assert names("--match", "apple", "--last", "1") == ["apple-2"]
    assert say("ls", "--match", "pear")[1] == "none of 3 runs is such a one\n"
    assert say("ls", "--status", "finished")[0] == 2


def test_show_tells_all_of_a_run(store: FolderStore, say: Say) -> None:
    code, out, _ = say("show", "zebra")
    assert code == 0 and "zebra: done, begun 2" in out and "model demo" in out
    for stage in STAGES:
        assert re.search(rf"{stage} 1 of 1, \d+ B|{stage} 1 of 1, [0-9.]+ KiB: {keys('zebra')[stage][0][:12]}", out)
    assert "request 0: 'a zebra\\x1b[2J', 64x48, steps 2, seed 7" in out and "\x1b" not in out
    assert say("show", "last")[1].endswith("error: ModelError: gone for good\n")
    assert "warning: slow disk" in say("show", "apple-1")[1].replace("  ", " ")
    found = json.loads(say("show", "z", "--json")[1])
    assert found["record"] == store.load_run("zebra") and found["sizes"][keys("zebra")["encode"][0]] > 100


def test_show_tells_a_disk_that_fails_from_an_artifact_that_is_not_there(
    store: FolderStore, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, torn, failing = (store.path / f"stages/{keys('zebra')[stage][0]}.json" for stage in STAGES)
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:-9])
    code, out, err = say("show", "zebra")
    assert (code, err) == (0, "") and "encode 0 of 1, 0 B" in out and "denoise 0 of 1, 0 B" in out
    readv = os.readv

    def read(handle: int, parts: Any) -> int:
        if os.fstat(handle).st_ino == failing.stat().st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return readv(handle, parts)

    monkeypatch.setattr(os, "readv", read)
    code, out, err = say("show", "zebra")
    assert (code, out) == (5, "") and f"cannot read {failing}" in err and "[EIO]" in err and "--artifacts" in err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["show", "apple"], 5, "the names of 2 runs start with apple: apple-1, apple-2 -> give more of it"),
        (["show", "pear"], 5, "no run's name starts with pear; the last are: zebra, apple-1, apple-2"),
        (["rm", "zebra", "pear"], 5, "no run's name starts with pear"),
        (["gc", "--older-than", "1"], 2, "write such as 90s, 30m, 1h, 7d, 2w or 0"),
        (["gc", "--older-than", "-1h"], 2, "write such as 90s"),
        (["ls", "--last", "0"], 2, "--last"),
        (["lss"], 2, "ls"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], code: int, says: str, store: FolderStore, say: Say) -> None:
    before = sorted(store.path.rglob("*"))
    got, out, err = say(*words)
    assert got == code and out == "" and says in err and err.count("\n") == 1
    assert sorted(store.path.rglob("*")) == before


def test_hostile_names_are_one_line_and_touch_nothing(store: FolderStore, say: Say) -> None:
    before = sorted(store.path.parent.rglob("*"))
    for name in HOSTILE_NAMES[::7]:
        for command in ("show", "rm"):
            code, out, err = say(command, "--", name)
            assert code in (2, 5) and out == "" and err.count("\n") == 1 and "\x1b" not in err, name
    assert sorted(store.path.parent.rglob("*")) == before


@pytest.mark.parametrize("command", [["resume"], ["report"], ["inspect"], ["runs", "show"], ["runs", "rm"]])
@pytest.mark.parametrize("name", ["..", "", "../zebra", "\0", "-", "\x1b[2J\n"])
def test_a_name_that_no_run_can_have_is_one_line_of_every_command(
    command: list[str], name: str, store: FolderStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(store.path.parent.rglob("*"))
    assert answer([*command, "--artifacts", str(store.path), "--", name]) in (2, 5)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "remove" not in err and "\x1b" not in err
    assert sorted(store.path.parent.rglob("*")) == before


def test_where_there_is_no_store_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["ls"], ["show", "last"], ["verify"]):
        assert answer(["runs", *command, "--artifacts", str(tmp_path / "none")]) == 5
        assert "there is no artifact store" in capsys.readouterr().err
    assert answer(["runs", "ls", "--artifacts", "memory"]) == 5
    assert list(tmp_path.iterdir()) == []


def test_rm_forgets_runs_and_gc_what_only_they_named(store: FolderStore, say: Say) -> None:
    make_old(store)
    code, out, err = say("rm", "apple-1", "zeb")
    assert (code, out) == (0, "apple-1\nzebra\n") and err.count("\n") == 1
    assert re.match(r"forgot 2 runs; [0-9.]+ KiB that no other run holds go with: python -m runner runs gc --art", err)
    assert store.runs() == ["apple-2"] and len(store.keys()) == 4 and not (store.path / "runs/zebra").exists()
    dry = say("gc", "--dry-run")[1]
    assert re.fullmatch(r"would free 4 artifacts, 8 files: [0-9.]+ KiB\n", dry) and len(store.keys()) == 4
    assert say("gc")[1] == dry.replace("would free", "freed")
    assert store.keys() == [] and list(store.entries("objects")) == []
    assert json.loads(say("gc", "--json")[1]) == {"artifacts": [], "files": 0, "bytes": 0, "dry": False}


def test_gc_keeps_what_a_run_names_and_what_is_young(store: FolderStore, say: Say) -> None:
    midway, loose = key_of({"midway": 1}), key_of({"loose": 1})
    store.put(midway, "midway", STATE, {"of": keys("apple-1")["denoise"][0]})
    make_old(store)
    store.put(loose, "encode", STATE, {})
    named = set(store.keys()) - {loose}
    assert "freed 0 artifacts" in say("gc")[1] and store.find(loose) is not None
    assert "freed 1 artifact, 2 files" in say("gc", "--older-than", "0")[1]
    assert set(store.keys()) == named and midway in named and all(store.get(key) is not None for key in named)


def test_gc_leaves_what_a_running_run_may_be_writing(store: FolderStore, say: Say) -> None:
    """An object whose manifest is not written yet, and a half of a file."""
    orphan = object_path(store, keys("zebra")["encode"][0])
    (store.path / f"stages/{keys('zebra')['encode'][0]}.json").unlink()
    (store.path / "tmp/0.part").write_bytes(b"half")
    with FolderStore(store.path).running("apple-1"):
        assert "0 files" in say("gc", "--older-than", "0")[1] and orphan.exists()
    assert "freed 0 artifacts, 2 files" in say("gc", "--older-than", "0")[1]
    assert not orphan.exists() and os.listdir(store.path / "tmp") == []


def test_gc_refuses_to_guess_what_a_damaged_record_named(store: FolderStore, say: Say) -> None:
    make_old(store)
    path = store.path / "runs/zebra/run.json"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = say("gc")
    assert code == 5 and "the record of run zebra is damaged" in err and "runner runs rm zebra" in err
    assert len(store.keys()) == 4
    assert [line.split()[2] for line in say("ls")[1].splitlines()[1:] if line.startswith("zebra")] == ["damaged"]
    assert say("show", "zebra")[0] == 5
    assert say("rm", "zebra")[0] == 0 and "freed 3 artifacts" in say("gc")[1]


def test_a_run_that_goes_on_is_not_removed_and_begins_after_gc(store: FolderStore, say: Say) -> None:
    with FolderStore(store.path).running("zebra"):
        code, _, err = say("rm", "zebra")
        assert code == 5 and "run zebra is going on" in err
    told: list[str] = []
    other = FolderStore(store.path, warn=told.append)
    with store.housekeeping():
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from runner.artifacts import open_store\n"
             "open_store(sys.argv[1]).save_run('new', {})", str(store.path)],
            cwd=Path(__file__).parent.parent,
        )
        time.sleep(1.0)
        assert "new" not in other.runs()
        other.save_run("apple-1", {"status": "done"})
    assert process.wait() == 0 and "new" in other.runs() and not told


def test_verify_names_everything_that_is_damaged(store: FolderStore, say: Say) -> None:
    code, out, err = say("verify")
    assert code == 0 and re.fullmatch(r"4 artifacts and 3 runs are whole \([0-9.]+ KiB read\)\n", out) and err == ""
    assert "torch" in sys.modules
    first, second, third = (keys("zebra")[stage][0] for stage in STAGES)
    flipped, manifest = object_path(store, first), store.path / f"stages/{second}.json"
    data = flipped.read_bytes()
    flipped.unlink()
    flipped.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
    orphan = object_path(store, second)
    manifest.write_text("{")
    orphan.chmod(0o600)
    orphan.write_bytes(b"x")
    object_path(store, third).unlink()
    (store.path / "runs/apple-2/run.json").write_text("")
    code, out, err = say("verify")
    told = [line.split(": ")[0] for line in out.splitlines()]
    assert code == 5 and set(told) == {f"artifact {first}", f"artifact {second}", f"artifact {third}", "run apple-2",
                                       f"object {orphan.name}"}
    assert "5 of 8 are damaged" in err and err.count("\n") == 1
    assert {each["name"] for each in json.loads(say("verify", "--json")[1])["damaged"]} == {
        line.split()[1] for line in told}


@pytest.mark.parametrize("where", ["memory", "memory://runs-test"])
def test_other_stores_collect_too(where: str) -> None:
    store = open_store(where)
    fill(store, "a")
    fill(store, "b", 2)
    store.drop_run("a")
    assert collect(store).files == () and len(store.keys()) == 5
    garbage = collect(store, min_age=0)
    assert set(garbage.artifacts) == {keys("a")[stage][0] for stage in STAGES} and garbage.bytes > 1000
    assert len(store.keys()) == 2 and len(list(store.entries("objects"))) == 2 and store.runs() == ["b"]


@pytest.mark.parametrize(
    "odd",
    [{}, {"status": 3, "stages": [], "requests": {}}, {"stages": {"encode": "x", "a\x1bb": [1, None]}, "plan": 7},
     {"requests": [1, {"prompt": None}], "warnings": "x", "failures": [{"index": 1}], "error": None}],
)  # fmt: skip
def test_odd_records_are_shown_as_far_as_they_go(odd: dict[str, Any], store: FolderStore, say: Say) -> None:
    store.save_run("odd", odd)
    for words in (["ls"], ["show", "odd"], ["gc"], ["verify"]):
        code, out, err = say(*words)
        assert code == 0 and err == "" and "\x1b" not in out


def test_ages_are_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    ages = {1e9: "0 s", 1e9 - 59: "59 s", 1e9 - 60: "1 min", 1e9 - 7200: "2 h", 1e9 - 864000: "10 d", 1e9 + 5: "-",
            0.0: "-"}
    assert {begun: age(begun) for begun in ages} == ages
    assert [runs.seconds(text) for text in ("0", "90s", "30m", "1h", "7d", "2w")] == [
        0, 90, 1800, 3600, 604800, 1209600]


def test_a_name_is_found_by_its_start(store: FolderStore) -> None:
    found = {text: find_run(store, text) for text in ("last", "z", "zebra", "apple-1")}
    assert found == {"last": "apple-2", "z": "zebra", "zebra": "zebra", "apple-1": "apple-1"}
    store.save_run("apple", {})
    assert find_run(store, "apple") == "apple"
    with pytest.raises(StoreError, match="there is no run in the store yet, so none is the last: memory"):
        find_run(MemoryStore(), "last")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderStore]:
    """A store of 10,000 runs, written without waiting for the disk."""
    store = FolderStore(tmp_path_factory.mktemp("many") / "store")
    for number in range(10_000):
        name = f"run-{number:05d}"
        folder = store.path / "runs" / name
        folder.mkdir()
        body = {"sequence": number + 1, "begun": 1e9 + number, "record": record(name)}
        (folder / "run.json").write_bytes(write_document(body))
    (store.path / "runs/.sequence").write_bytes(b"10000")
    yield store


def test_ten_thousand_runs_are_listed_without_torch_in_seconds(many: FolderStore) -> None:
    code = (
        "import sys; from runner.commands.cli import answer\n"
        "code = answer(['runs', *sys.argv[1:]])\n"
        "sys.exit(code or 100 * bool({'torch', 'diffusers', 'numpy', 'rich', 'fsspec'} & set(sys.modules)))"
    )
    for words, lines, limit in ((["ls"], 10_001, 8.0), (["ls", "--last", "1"], 2, 6.0), (["show", "last"], 7, 6.0)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *words, "--artifacts", str(many.path)], capture_output=True,
                              text=True, cwd=Path(__file__).parent.parent)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == lines
        # Seconds of the processor, as the machine may be busy with other work: it takes about 2.4, 2.2 and 1.6.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < limit
    many.save_run("new", {})
    assert many.runs()[-1] == "new"
