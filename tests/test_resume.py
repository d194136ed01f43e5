"""`runner resume`: on with a run from its record alone, to the same pictures, with nothing done twice."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.artifacts import FolderStore
from runner.artifacts.store import run_path
from runner.commands.cli import answer
from runner.commands.results import Results
from runner.inputs import EXAMPLE
from runner.job import Job
from runner.request import Request

pytestmark = pytest.mark.usefixtures("elsewhere")
SMALL = ("--size", "32x32", "--steps", "3", "--device", "cpu", "--artifacts", "store", "-q")


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run gets the signal `number` once, after that many steps of all; `steps` are those told of since."""
    said: dict[str, Any] = {"after": 0, "number": signal.SIGINT, "steps": []}
    hear = Results.__call__

    def heard(self: Results, kind: str, data: Mapping[str, Any]) -> None:
        hear(self, kind, data)
        if kind == "step":
            said["steps"].append((data["request"], data["step"]))
            if len(said["steps"]) == said["after"]:
                os.kill(os.getpid(), said["number"])

    monkeypatch.setattr(Results, "__call__", heard)
    return said


def pixels(path: str | Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    with Image.open(path) as image:
        return np.asarray(image)


def run_of(store: FolderStore) -> tuple[str, dict[str, Any]]:
    name = store.runs()[-1]
    return name, store.load_run(name)


def test_a_batch_that_was_stopped_goes_on_after_its_last_step(
    flux: Path, stopping: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt": "a red circle", "id": "one"}', '{"prompt": ""}', '{"prompt": "two squares", "seed": [4, 5]}',
             '{"prompt": "a heart", "steps": 2}']
    Path("p.jsonl").write_text("\n".join(lines))
    words = ["flux", "--model", str(flux), *SMALL, "--seed", "7", "--prompt-file", "p.jsonl"]
    assert answer([*words, "--out", "whole/", "--artifacts", "memory"]) == 1
    whole = capsys.readouterr().out.splitlines()
    stopping |= {"after": len(stopping["steps"]) + 5}
    assert answer([*words, "--out", "out/"]) == 130
    out, err = capsys.readouterr()
    name, record = run_of(FolderStore(Path("store")))
    command = f"python -m runner resume {name} --artifacts store"
    assert out == "" and err.splitlines()[-1].endswith(f"stopped by SIGINT; what was finished is kept; go on with: "
                                                       f"{command}")
    assert record["status"] == "interrupted" and not Path("out").exists()

    # The prompt file may change or go: the record has it all.
    Path("p.jsonl").unlink()
    stopping |= {"after": 0, "steps": []}
    assert answer(["resume", "last", "--artifacts", "store", "-q"]) == 1
    out, err = capsys.readouterr()
    assert stopping["steps"] == [(1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]
    assert err == f'error: line 2: empty prompt -> say what to draw, such as --prompt "{EXAMPLE}"\n'
    assert [path.replace("out/", "whole/") for path in out.splitlines()] == whole
    for path in whole:
        assert np.array_equal(pixels(path), pixels(path.replace("whole/", "out/")))
    assert run_of(FolderStore(Path("store"))) == (name, {**run_of(FolderStore(Path("store")))[1], "status": "done"})

    # A run that is done makes what is gone, leaves what is there, and computes nothing.
    stopping["steps"].clear()
    Path(whole[0].replace("whole/", "out/")).unlink()
    assert answer(["resume", name[:-2], "--artifacts", "store", "--json", "-q"]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert stopping["steps"] == [] and [stage["made"] for stage in told[-1]["stages"]] == [0, 0, 0]
    assert np.array_equal(pixels(whole[0]), pixels(whole[0].replace("whole/", "out/")))
    stopping["steps"].clear()
    assert answer(["resume", name, "--from", "denoise", "--artifacts", "store", "-q"]) == 1
    assert len(stopping["steps"]) == 11 and FolderStore(Path("store")).runs() == [name]


def test_another_file_at_a_pictures_place_is_not_replaced_unasked(
    flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(["flux", "--model", str(flux), *SMALL, "--prompt", "x", "--seed", "1", "--out", "x.png"]) == 0
    mine = pixels("x.png").copy()
    Path("x.png").write_bytes(b"another")
    assert answer(["resume", "last", "--artifacts", "store", "-q"]) == 2
    assert "x.png is there already" in capsys.readouterr().err and Path("x.png").read_bytes() == b"another"
    assert answer(["resume", "last", "--artifacts", "store", "-q", "--overwrite"]) == 0
    assert np.array_equal(pixels("x.png"), mine)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["last"], 5, "no run in the store yet"), (["gone"], 5, "no run's name starts with gone"),
        (["../x"], 5, "run"), (["last", "--artifacts", "memory"], 5, "a run in memory ends with its process"),
        (["last", "--from", "all"], 2, "--from 'all' -> choose from encode, denoise, decode"),
        (["last", "-qv"], 2, "contradict"),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_line(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FolderStore(Path("store"))
    assert answer(["resume", "--artifacts", "store", *words]) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


JOB = Job("flux", (Request("x", 32, 32, 1, 3.5, 1, 32),), store="store", run="odd").to_json()


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "of an older version, which kept no job"), ({"job": []}, "of an older version"),
        ({"order": {"version": 1}}, "of an older version"), ({"job": {}}, "version None, where this program reads 2"),
        ({"job": {**JOB, "version": 3}}, "version 3, where this program reads 2"),
        ({"job": {**JOB, "family": "os"}}, "there is no family 'os'"),
        ({"job": {**JOB, "family": 1}}, "family: Input should be a valid string"),
        ({"job": {**JOB, "output": {**JOB["output"], "paths": [1]}}}, "output.paths.0: "),
        ({"job": {**JOB, "output": {**JOB["output"], "paths": ["x", "y"]}}}, "(1 request and 2 --out paths -> "),
        ({"job": {**JOB, "dtype": {"vae": "complex64"}}}, "complex64"),
        ({"job": {**JOB, "out": "/"}}, "out: no field of a job"),
        ({"job": {**JOB, "policy": {**JOB["policy"], "stop_after": "lunch"}}}, "policy.stop_after: "),
        ({"job": {**JOB, "place": [{"stage": "denoise", "where": 1}]}}, "place.0."),
        ({"job": {**JOB, "requests": [{**JOB["requests"][0], "steps": 0}]}}, "steps must be a whole number"),
        ({"job": {**JOB, "requests": []}}, "requests"), ({"job": {**JOB, "requests": 1}}, "requests: "),
    ],
)
def test_an_odd_record_is_refused_by_name(
    record: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FolderStore(Path("store")).save_run("odd", {"requests": [], **record, "status": "interrupted"})
    assert answer(["resume", "odd", "--artifacts", "store"]) == 5
    err = capsys.readouterr().err
    assert "the record of run odd " in err and says in err and err.count("\n") == 1 and "its artifacts are kept" in err


@pytest.mark.parametrize(
    ("path", "folder", "says"),
    [
        ("/etc/cron.d/x", "/etc", "must end in .png"), ("../../x.png", "", "is no path of a picture"),
        ("away/x.png", "home", "leads out of"), ("home/../away/x.png", "home", "is no path of a picture"),
        (".bashrc", "", "must end in .png"), ("x\x1b[2J.png", "", "no name for a file"), ("", "", "is empty"),
        ("home/link/x.png", "home", "by a symlink"), ("file/x.png", "", "is not a folder"),
        ("/proc/x.png", "", "cannot write in /proc"), ("x\0.png", "", "no name for a file"), ("home", "", "no path"),
    ],
)
def test_a_record_leads_nowhere_where_out_could_not(
    path: str, folder: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("home", "away"):
        Path(name).mkdir()
    Path("home/link").symlink_to(tmp_path / "away")
    Path("file").touch()
    output = {"paths": [path and os.path.join(os.getcwd(), path)], "folder": folder and str(Path(folder).absolute()),
              "overwrite": True}
    FolderStore(Path("store")).save_run("odd", {"requests": [], "status": "interrupted",
                                                "job": {**JOB, "output": {**JOB["output"], **output}}})
    before = sorted(Path().rglob("*"))
    assert answer(["resume", "odd", "--artifacts", "store"]) == 5
    err = capsys.readouterr().err
    assert "the record of run odd names a picture that cannot be written: " in err and says in err
    assert err.count("\n") == 1 and "\x1b" not in err and sorted(Path().rglob("*")) == before


def test_a_damaged_record_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    FolderStore(Path("store")).save_run("odd", {"job": JOB, "requests": []})
    path = Path("store") / run_path("odd")
    path.write_bytes(path.read_bytes().replace(b'"x"', b'"y"'))
    assert answer(["resume", "odd", "--artifacts", "store"]) == 5
    assert "the record of run odd is damaged" in capsys.readouterr().err
