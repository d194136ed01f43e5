"""Errors are data: they cross processes whole, and say in a shell and in Python what would help."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from runner import Job, Request, RunPolicy, make_plan, run_all
from runner.artifacts import open_store
from runner.commands.cli import answer
from runner.commands.refusal import as_option
from runner.distributed.ray.actor import Denoise
from runner.distributed.ray.cluster import group_rows
from runner.engine.report import StageReport
from stages.errors import (
    KINDS,
    DoesNotFit,
    Fix,
    InvalidInput,
    RankLost,
    StageOutOfMemory,
    StagerunError,
    as_keyword,
    from_json,
    worded,
)
from stages.machine import probe
from tests import tiny

Cards = Callable[..., list[str]]
FIXES = (Fix("lanes", 1), Fix("place", None, "denoise"))
ASKED = [Request("a red circle", 64, 48, 3, 3.5, 7 + index, 32, index) for index in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose transformer has blocks enough to be dealt."""
    return tiny.flux(tmp_path_factory.mktemp("errors") / "flux", doubles=2, singles=4)


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_error_crosses_processes_whole(kind: type[StagerunError]) -> None:
    more = {"stage": "denoise"} if kind is StageOutOfMemory else {}
    error = kind("no `size` of `lanes=2`", FIXES, ((Fix("size", "64x64"),),), **more)
    other = from_json(json.loads(json.dumps(error.to_json())))
    assert type(other) is kind and vars(other) == vars(error) and str(other) == str(error)
    assert (other.fixes, other.alternatives) == (FIXES, ((Fix("size", "64x64"),),))


def test_python_is_told_keywords_and_a_shell_options() -> None:
    text = '`max_memory` is too little -> `allow_offload=cpu`, `negative_prompt=""`, `degrade=False` or `loras`'
    assert str(InvalidInput(text)) == (
        "max_memory is too little -> allow_offload='cpu', negative_prompt=\"\", degrade=False or loras")
    assert worded(text, as_option) == (
        '--max-memory is too little -> --allow-offload cpu, --negative-prompt "", --no-degrade or --lora')
    assert as_keyword("devices", "0,1") == "devices='0,1'" and as_option("devices", "0,1") == "--gpus 0,1"
    assert as_option("devices", "cpu") == "--device cpu"


def test_names_in_backquotes_that_are_a_user_s_own_stay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for own in ("no model at /x/`size`/y", "'`size`'", "`size`.txt is empty", '"`lanes=2`"'):
        assert worded(own, as_option) == own and str(InvalidInput(own)) == own
    for words, quoted in ((["--like", "`size`"], "`size`"), (["--like=`size`"], "`size`"),
                          (["--prompt-file", "`lanes=2`"], "`lanes=2`"),
                          (["--prompt", "x", "--lanes", "`size`"], "`size`")):
        assert answer(["demo", *words, "--artifacts", "memory"]) == 2
        told = capsys.readouterr().err
        assert quoted in told and "--size" not in told and "--lanes 2" not in told and told.isascii()


def test_whoever_asks_for_value_errors_still_hears_of_bad_input() -> None:
    assert issubclass(InvalidInput, ValueError) and issubclass(RankLost, RuntimeError)
    assert all(issubclass(kind, StagerunError) for kind in KINDS.values())


@pytest.mark.parametrize("more", [(), ("--ranks", "2")], ids=["one process", "two ranks"])
def test_what_would_fit_is_proposed_by_ranks_too(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["flux", "--model", str(flux), "--prompt", "x", "--seed", "1", "--size", "64x48", "--device", "cpu",
             "--artifacts", "store", "--out", "x/", *more]
    assert answer([*words, "--max-memory", "100KB", "-q"]) == 4
    error, *lines = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "does not fit" in error
    assert lines[-1] == f"next: python -m runner {' '.join(words)} -q", lines


def test_a_full_card_of_a_ray_worker_is_told_with_what_would_need_less(
    model: Path, cards: Cards, sim: ModuleType, tmp_path: Path
) -> None:
    devices = cards(40_000_000, 40_000_000)
    job = Job("flux", ASKED, model=model, dtype="float32", devices=devices, place=["denoise=sharded"], lanes=2,
              store=tmp_path / "store", run="r", policy=RunPolicy(degrade=False))
    store = open_store(str(tmp_path / "store"))
    run_all(make_plan(job), RunPolicy(stop_after="encode"), store=store)
    document = json.dumps({"job": job.to_json(), "machine": probe(devices).to_json(), "threads": 1})
    (row,) = group_rows([range(2)], {"denoise": [0, 1]})
    actor = Denoise(document)
    sim.fail_allocation(devices[0], 1)
    error = from_json(json.loads(actor(row)["group"])["error"])
    assert isinstance(error, StageOutOfMemory) and error.stage == "denoise" and "sim:0 peaked at" in str(error)
    assert [torch.accelerator.memory_allocated(card) for card in devices] == [0, 0]
    assert error.alternatives[0] == (Fix("lanes", 1),) == error.fixes and len(error.alternatives) == 3


def test_a_ray_worker_goes_on_with_less_as_one_process_does(
    model: Path, cards: Cards, sim: ModuleType, tmp_path: Path
) -> None:
    devices = cards(40_000_000, 40_000_000)
    job = Job("flux", ASKED, model=model, dtype="float32", devices=devices, place=["denoise=sharded"], lanes=2,
              store=tmp_path / "store", run="r")
    store, stages = open_store(str(tmp_path / "store")), list[StageReport]()
    run_all(make_plan(job), RunPolicy(stop_after="encode"), store=store)
    document = json.dumps({"job": job.to_json(), "machine": probe(devices).to_json(), "threads": 1})
    (row,) = group_rows([range(2)], {"denoise": [0, 1]})
    actor = Denoise(document)
    sim.fail_allocation(devices[0], 1)
    group = json.loads(actor(row)["group"])
    assert not group["error"] and not group["failures"]
    assert group["did"]["denoise"]["changes"] == ["one request at a time instead of 2"]
    actor._held.close()
    assert [torch.accelerator.memory_allocated(card) for card in devices] == [0, 0]
    stages += run_all(make_plan(job), RunPolicy(stop_after="denoise"), store=store).stages
    assert [stage.ran for stage in stages] == [0, 0]


def test_a_plan_that_does_not_fit_says_so_in_python(flux: Path) -> None:
    with pytest.raises(DoesNotFit, match="it fits without max_memory") as refused:
        make_plan(Job("flux", ASKED, model=flux, devices=["cpu"], max_memory={"cpu": "100KB"}))
    assert refused.value.fixes == (Fix("max_memory"),)
