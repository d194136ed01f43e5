"""Records of runs that somebody changed: each command shows them, or refuses them in a line; nothing in them acts."""

import contextlib
import io
import json
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from runner import Job, Request
from runner.artifacts import FolderStore
from runner.commands.cli import answer
from runner.engine.session import recorded_job
from runner.reports.notebook import Charts, Memory
from stages.errors import StagerunError, StoreError
from tests.fuzz.mutations import change_document
from tests.records import record

JOB = Job("flux", [Request("x", 32, 32, 1, 3.5, 1, 32)], model="/nowhere", store="store", run="odd",
          loras=["style.safetensors"], place=["denoise=sharded"], max_memory="0=1GiB", labels=()).to_json()
RECORD = {**record("a fox"), "job": JOB, "begun": 1.0, "failures": [{"index": 0, "text": "why"}], "changes": ["x"]}
RECORD["plan"]["loras"] = [{"source": "style.safetensors", "scale": 1.0}]
RECORD["previews"] = {"0": 64 * "4"}


def changed(document: Any) -> st.SearchStrategy[Any]:
    """The document with a few changes."""

    def change(random: Random) -> Any:
        copy = json.loads(json.dumps(document))
        change_document(random, copy)
        return copy

    return st.randoms(use_true_random=False).map(change)


# python -m benchmarks.fuzz has thousands.
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=list(Phase)[:4])


@pytest.mark.parametrize("words", [["runs", "ls"], ["runs", "show", "odd"], ["report", "odd", "--out", "odd.html"],
                                   ["runs", "show", "odd", "--json"]], ids=" ".join)
@FEW
@given(found=changed(RECORD))
@example(found={})
@example(found={"requests": 1, "stages": 1, "plan": 1, "timeline": 1, "model": 1})
def test_a_record_is_shown_or_refused(words: list[str], found: Any) -> None:
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        FolderStore(Path("store"), warn=print).save_run("odd", found if isinstance(found, dict) else {})
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = answer([*words, "--artifacts", "store"])
        said = out.getvalue() + err.getvalue()
        assert code in (0, 5) and "unexpected" not in said and "\x1b" not in said and "\u202e" not in said, said
        assert code == 0 or (err.getvalue().count("\n") == 1 and not Path("odd.html").exists())
        if Path("odd.html").exists():
            text = Path("odd.html").read_text()
            assert "<script>" not in text and "\x1b" not in text and "\u202e" not in text


@FEW
@given(found=changed(RECORD))
def test_a_notebook_shows_it_or_says_why_not(found: Any) -> None:
    with TemporaryDirectory() as folder:
        store = FolderStore(Path(folder), warn=print)
        store.save_run("odd", found if isinstance(found, dict) else {})
        for show in (Memory, Charts):
            try:
                assert "<script>" not in show(store, "odd")._repr_html_()
            except StoreError as error:
                assert "the record of run odd cannot be read" in str(error)


@FEW
@given(job=changed(JOB))
def test_a_recorded_job_is_read_or_refused(job: Any) -> None:
    with TemporaryDirectory() as folder:
        store = FolderStore(Path(folder), warn=print)
        store.save_run("odd", {"requests": [], "stages": {}, "job": job})
        try:
            found = recorded_job(store, "odd", folder)
        except StagerunError as error:
            assert isinstance(error, StoreError) and "the record of run odd " in str(error)
        else:
            assert isinstance(found, Job) and found.run == "odd" and found.store == folder
