"""`runner runs du` and `prune`: the bytes of a store by who holds them, and old runs that give theirs back."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.artifacts import FolderStore, Store, key_of, open_store
from runner.artifacts.atomic_files import File
from runner.artifacts.prune import Rule, choose, prune
from runner.artifacts.signed_json import write_document
from runner.artifacts.store import run_path
from runner.artifacts.usage import keys_in, usage_of
from runner.commands.cli import answer
from stages.errors import StoreError
from tests.test_artifacts import STATE

Say = Callable[..., tuple[int, str, str]]
SHARED, LOOSE = key_of({"prompt": "shared"}), key_of({"loose": 1})


def key(name: str, stage: str) -> str:
    return SHARED if stage == "encode" and name in ("old", "middle") else key_of({"of": name, "stage": stage})


def fill(store: Store, name: str, days: float, status: str = "done") -> None:
    """A run that began so many days ago, with embeddings that the old and the middle one share."""
    stages = {stage: [key(name, stage)] for stage in ("encode", "denoise", "decode")}
    store.save_run(name, {})
    record: Any = {"status": status, "stages": stages, "requests": [{"prompt": f"a {name} fox"}], "model": "demo"}
    body = {"sequence": store.stored_run(name).sequence, "begun": store.stored_run(name).begun - days * 86400,
            "record": record}
    store.publish([File.of(run_path(name), write_document(body))])
    for stage, (each,) in stages.items():
        store.put(each, stage, STATE, {})


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """Three runs of 60, 20 and 0 days, and an artifact that none of them names."""
    store = FolderStore(tmp_path / "store")
    for name, days in (("old", 60), ("middle", 20), ("new", 0)):
        fill(store, name, days)
    store.put(LOOSE, "encode", STATE, {})
    return store


@pytest.fixture
def say(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> Say:
    def said(*words: str) -> tuple[int, str, str]:
        code = answer(["runs", *words, "--artifacts", str(store.path)])
        return code, *capsys.readouterr()

    return said


def on_disk(store: FolderStore) -> int:
    return sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())


def whole(store: FolderStore, *names: str) -> bool:
    return all(store.get(key(name, stage)) is not None for name in names for stage in ("encode", "denoise", "decode"))


def test_every_byte_of_a_store_is_held_by_one_run_by_several_or_by_none(store: FolderStore, say: Say) -> None:
    midway = key_of({"midway": 1})
    store.drop(key("new", "denoise"))
    store.put(midway, "midway", STATE, {"of": key("new", "denoise")})
    told = json.loads(say("du", "--json")[1])
    held = {run["run"]: run for run in told["runs"]}
    counter = (store.path / "runs/.sequence").stat().st_size
    assert told["total"] == on_disk(store) == counter + told["shared"] + told["garbage"] + sum(
        run["alone"] for run in held.values())
    assert told["total"] == counter + told["records"] + sum(told["stages"].values())
    assert held["old"]["shared"] == held["middle"]["shared"] == told["shared"] > 0 == held["new"]["shared"]
    one = sum((store.path / path).stat().st_size for path in (
        f"stages/{LOOSE}.json", f"objects/{store.find(LOOSE).object[:2]}/{store.find(LOOSE).object}"))  # type: ignore[union-attr]
    assert told["garbage"] == one and told["stages"]["midway"] > 0
    # An unfinished denoise is its run's until what it was to become is there.
    store.put(key("new", "denoise"), "denoise", STATE, {})
    after = json.loads(say("du", "--json")[1])
    assert after["garbage"] == one + told["stages"]["midway"]


def test_du_says_it_to_people_and_names_the_cache_of_the_hub(
    store: FolderStore, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    for kind, name, size in (("models", "big--model", 3 * 2**20), ("datasets", "some--pictures", 2**20)):
        blobs, snapshot = hub / f"{kind}--{name}" / "blobs", hub / f"{kind}--{name}" / "snapshots" / ("a" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        (hub / f"{kind}--{name}" / "refs").mkdir()
        (hub / f"{kind}--{name}" / "refs" / "main").write_text("a" * 40)
        (blobs / "weights").write_bytes(bytes(size))
        (snapshot / "weights").symlink_to("../../blobs/weights")
    (hub / "models--big--model" / "blobs" / "more.incomplete").write_bytes(bytes(2**19))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    before = sorted(hub.rglob("*"))
    code, out, err = say("du")
    assert (code, err) == (0, "")
    for told in (f"{store.path}: ", f"{hub}: 4.5 MiB", "hf cache rm model/big/model", "hf cache prune",
                 "hf cache rm dataset/some/pictures", "garbage: ", "shared: ", "records of runs", "runner runs gc"):
        assert told in out, told
    rows = [line.split() for line in out.splitlines()]
    assert ["big/model", "3.0", "MiB", "hf", "cache", "rm", "model/big/model"] in rows
    found = json.loads(say("du", "--json")[1])["hub"]
    assert found["bytes"] == 9 * 2**19 and [repo["bytes"] for repo in found["repos"]] == [3 * 2**20, 2**20]
    assert sorted(hub.rglob("*")) == before


def test_du_tells_of_the_hub_before_there_is_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert answer(["runs", "du"]) == 0 and "models of the hub" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_holds_alone_is_what_rm_and_gc_free(store: FolderStore, say: Say) -> None:
    alone = {run["run"]: run["alone"] for run in json.loads(say("ls", "--json")[1])["runs"]}
    store.drop(LOOSE)
    before = on_disk(store)
    said = json.loads(say("rm", "middle", "--json")[1])
    assert said["removed"] == ["middle"] and said["records"] + said["left_for_gc"] == alone["middle"]
    assert f"freed 2 artifacts, 4 files: {said['left_for_gc'] / 1024:.1f} KiB" in say("gc", "--older-than", "0")[1]
    assert before - on_disk(store) == alone["middle"] and whole(store, "old", "new")
    # What was shared is the other run's alone now.
    assert json.loads(say("show", "old", "--json")[1])["alone"] > alone["old"]


def test_prune_shows_what_would_go_and_removes_it_when_told(store: FolderStore, say: Say) -> None:
    before = sorted(store.path.rglob("*"))
    code, out, err = say("prune", "--older-than", "30d")
    assert (code, err) == (0, "") and [line.split()[0] for line in out.splitlines()] == ["run", "old", "would"]
    assert "a old fox" in out and "the same command with --yes" in out
    assert sorted(store.path.rglob("*")) == before
    said = json.loads(say("prune", "--older-than", "30d", "--json")[1])
    size = on_disk(store)
    freed = say("prune", "--older-than", "30d", "--yes")
    assert freed[0] == 0 and freed[1].splitlines()[-1].startswith("freed ") and size - on_disk(store) == said["bytes"]
    assert store.runs() == ["middle", "new"] and whole(store, "middle", "new") and store.find(LOOSE) is not None
    assert not any(store.find(each) for each in (key("old", "denoise"), key("old", "decode")))
    assert say("prune", "--older-than", "30d", "--yes")[1] == "no run is such a one: nothing goes\n"


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (["--keep", "1"], ["old", "middle"]),
        (["--keep", "0"], ["old", "middle", "new"]),
        (["--keep", "5"], []),
        (["--keep", "1", "--older-than", "30d"], ["old"]),
        (["--keep", "2", "--older-than", "1h"], ["old"]),
        (["--older-than", "1d"], ["old", "middle"]),
        (["--older-than", "0"], ["old", "middle", "new"]),
        (["--free", "1B"], ["old"]),
        (["--free", "5KiB"], ["old", "middle"]),
    ],
    ids=" ".join,
)
def test_a_run_goes_where_all_that_is_said_holds(
    words: list[str], gone: list[str], store: FolderStore, say: Say
) -> None:
    said = json.loads(say("prune", *words, "--json")[1])
    size = on_disk(store)
    done = json.loads(say("prune", *words, "--yes", "--json")[1])
    assert said["runs"] == gone and done == {**said, "removed": True}
    assert size - on_disk(store) == said["bytes"]
    stay = [name for name in ("old", "middle", "new") if name not in gone]
    assert store.runs() == stay and whole(store, *stay)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "nothing says which runs may go -> --older-than 30d, --keep 20 or --free 10GiB"),
        (["--free", "much"], 2, "--free 'much' is no amount of bytes -> such as 500MiB"),
        (["--older-than", "1x"], 2, "write such as 90s"),
        (["--keep", "-1"], 2, "--keep"),
        (["--free", "1GiB", "--yes"], 5, "all that may go would free "),
        (["--free", "1GiB"], 5, "and 1.0 GiB are asked for -> ask for less, or let younger runs go"),
    ],
)
def test_what_cannot_be_pruned_is_one_line(
    words: list[str], code: int, says: str, store: FolderStore, say: Say
) -> None:
    before = sorted(store.path.rglob("*.json"))
    got, out, err = say("prune", *words)
    assert got == code and out == "" and says in err and err.count("\n") == 1
    assert sorted(store.path.rglob("*.json")) == before


def test_a_run_that_is_at_work_stays_and_what_it_needs(store: FolderStore, say: Say) -> None:
    with FolderStore(store.path).running("middle"):
        code, out, err = say("prune", "--keep", "0", "--yes")
        assert code == 0 and "run middle is going on, and stays" in err and "freed" in out
        assert store.runs() == ["middle"] and whole(store, "middle")
    assert say("prune", "--keep", "0", "--yes")[0] == 0 and store.runs() == [] and store.keys() == [LOOSE]


def test_prune_does_not_guess_what_a_damaged_record_holds(store: FolderStore, say: Say) -> None:
    (store.path / run_path("new")).write_text("{")
    code, out, err = say("prune", "--keep", "1", "--yes")
    assert (code, out) == (5, "") and "runner runs rm new, then prune" in err and whole(store, "old", "middle")
    assert re.search("the record of run new is damaged, so what it holds counts as garbage -> .* rm new", say("du")[1])


def test_where_there_are_no_locks_nothing_is_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    where = "memory://space-test"
    remote = open_store(where)
    fill(remote, "old", 60)
    assert answer(["runs", "prune", "--keep", "0", "--artifacts", where]) == 0
    assert "would free" in (said := capsys.readouterr().out) and "no locks" in said and "--yes" not in said
    assert answer(["runs", "prune", "--keep", "0", "--yes", "--artifacts", where]) == 5
    assert "this store has no locks" in capsys.readouterr().err and remote.runs() == ["old"]
    with pytest.raises(StoreError, match="no locks"):
        prune(remote, Rule(keep=0))
    assert choose(remote, Rule(keep=1)).runs == ()


def test_a_kill_between_two_removals_leaves_garbage_alone(
    store: FolderStore, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderStore, "drop_run", lambda self, run: os.unlink(self.path / run_path(run)))
        patch.setattr(FolderStore, "remove", lambda self, paths: fail(paths))
        prune(store, Rule(keep=1))
    assert store.runs() == ["new"] and whole(store, "new") and say("verify")[0] == 0
    assert "freed 6 artifacts" in say("gc", "--older-than", "0")[1] and whole(store, "new")


def test_keys_are_found_wherever_a_record_names_them() -> None:
    assert set(keys_in({"a": [{"b": SHARED}, 3, None], "c": {"d": LOOSE}, "e": "no key"})) == {SHARED, LOOSE}
    assert usage_of(open_store("memory"), {"r": [SHARED]}).alone("r") == 0
