"""A model that anybody may have damaged ends in a plan or in a line about it, in seconds and within a gigabyte.

A few dozen cases that are always the same; `python -m benchmarks.fuzz --cases 625` makes 5,000 others, as many of
each of eight kinds.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from benchmarks.fuzz import cases
from tests.fuzz.isolation import BYTES, Outcome, Server, is_fault, server
from tests.fuzz.mutations import nested
from tests.fuzz.targets import TARGETS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    TARGETS["flux"].make(folder)
    return folder


@pytest.fixture(scope="module")
def running(whole: Path) -> Iterator[Server]:
    with server(whole, "flux") as running:
        yield running


@given(random=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_every_damage_ends_in_a_plan_or_in_a_refusal(running: Server, whole: Path, random: Random) -> None:
    damaged = whole.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    note(TARGETS["flux"].damage(random, damaged))
    outcome = running.run("flux", damaged)
    note(str(outcome))
    assert not is_fault("flux", outcome)


@pytest.mark.parametrize("name", ["lora", "record", "store"])
def test_what_a_run_reads_besides_its_model_may_be_damaged_too(name: str) -> None:
    faults = [(seed, what, outcome) for seed, what, outcome in cases(name, range(8)) if is_fault(name, outcome)]
    assert not faults


def test_what_is_whole_is_planned(running: Server, whole: Path) -> None:
    assert running.run("flux", whole).kind == "ok"


@pytest.mark.parametrize(("outcome", "wrong"), [
    (Outcome("ok", "", 1.0, 0), False), (Outcome("ModelError", "is cut off", 1.0, 0), False),
    (Outcome("TypeError", "", 1.0, 0), True), (Outcome("timeout", "", 20.0, 0), True),
    (Outcome("ok", "", 11.0, 0), True), (Outcome("ok", "", 1.0, BYTES + 1), True),
    (Outcome("ModelError", "can't allocate memory", 1.0, 0), True),
])
def test_what_counts_as_a_fault(outcome: Outcome, wrong: bool) -> None:
    assert is_fault("flux", outcome) is wrong


@pytest.mark.parametrize("value", [10**4000, -1, 1e308, "", [], {}, None, nested(400)])
@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_every_value_in_every_field(running: Server, whole: Path, file: str, value: object) -> None:
    """One field after the other would take as long as thousands of cases, so all of them are this value."""
    damaged = whole.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    table = json.loads((damaged / file).read_text())
    (damaged / file).write_text(json.dumps(table | {name: value for name in table if not name.startswith("_")}))
    assert not is_fault("flux", running.run("flux", damaged))
