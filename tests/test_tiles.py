"""Pictures decoded in tiles: those alone that do not fit whole, and the same ones when they are made again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runner import Job, Plan, Report, Request, RunPolicy, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.commands.cli import answer
from runner.engine.session import recorded_job
from runner.media.image import card_of, read_card
from runner.planning import describe
from runner.planning.tiles import heaviest, tilings
from stages.errors import DoesNotFit, Fix, InvalidInput
from stages.placement.tiling import Tiling
from tests import tiny, tiny_families
from tests.conftest import Cards

MIB = 2**20
SIZES = ((64, 64), (384, 384), (512, 512), (512, 384))


def asked(size: tuple[int, int], seed: int = 7) -> Request:
    return Request("a red circle", *size, steps=1, guidance=None, seed=seed, text_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.flux(tmp_path_factory.mktemp("models") / "schnell", guidance=False)


def job_of(model: Path, sizes: tuple[tuple[int, int], ...], **more: Any) -> Job:
    return Job("flux-schnell", [asked(size) for size in sizes], model=model, dtype="float32", **more)


def limit_for(model: Path, size: tuple[int, int]) -> int:
    """The bytes with which pictures of this size are decoded whole, and none of more pixels."""
    return make_plan(job_of(model, (size,))).needs["decode"]["sim:0"].total


def made(plan: Plan, **more: Any) -> Report:
    """A run, whose cards took no more than planned."""
    report = run_all(plan, **more)
    for stage in report.stages:
        for device, peak in stage.peak.items():
            assert peak <= plan.needs[stage.stage][device].total <= (plan.machine.room(device) or 2**62)
    return report


def cards_of(report: Report) -> list[Mapping[str, Any]]:
    return [card_of(picture.request, picture.facts) for picture in report.pictures]


def test_only_the_pictures_that_do_not_fit_whole_are_tiled(model: Path, cards: Cards, sim: ModuleType) -> None:
    cards(64 * MIB)
    limits = {"max_memory": f"{limit_for(model, (384, 384))}B"}
    plan = make_plan(job_of(model, SIZES, **limits))
    assert plan.tiles == {"64x64": None, "384x384": None, "512x384": 256, "512x512": 256}
    assert plan.tiling == Tiling(256, 384 * 384) and plan.tile == 256
    text = " ".join(" ".join(describe.lines(plan)).split())
    assert ("decoded in tiles of 256 pixels, because the whole picture does not fit: 512x384, 512x512; "
            "whole: 64x64, 384x384") in text
    assert describe.document(plan)["tiles"] == plan.tiles
    together = made(plan)
    assert [card.get("tile") for card in cards_of(together)] == [None, None, 256, 256]
    for at, size in enumerate(SIZES):
        alone = made(make_plan(job_of(model, (size,), **limits)))
        assert {stage: keys[at] for stage, keys in together.keys.items()} == {
            stage: keys[0] for stage, keys in alone.keys.items()}
        assert np.array_equal(together.pictures[at].pixels, alone.pictures[0].pixels)
        assert cards_of(alone)[0].get("tile") == cards_of(together)[at].get("tile")
    # What fits is what a card without limits makes.
    ample = made(make_plan(job_of(model, SIZES[:2])))
    assert ample.keys["decode"] == together.keys["decode"][:2]


def test_a_repeated_picture_is_decoded_as_it_was(
    model: Path, cards: Cards, sim: ModuleType, elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cards(64 * MIB)
    limit = f"--max-memory={limit_for(model, (384, 384))}B"
    words = ["flux-schnell", "--artifacts", "memory", "-q", "--overwrite"]
    new = [*words, "--model", str(model), "--dtype", "float32", "--prompt", "a red circle", "--seed", "7", "--steps",
           "1", "--size", "512x512"]

    def run(*more: str) -> np.ndarray:
        assert answer([*more, "--out", "out.png"]) == 0, capsys.readouterr().err
        return np.asarray(Image.open("out.png"))

    assert answer([*new, limit, "--out", "tiled.png"]) == 0
    assert answer([*new, "--out", "whole.png"]) == 0
    tiled, whole = (np.asarray(Image.open(name)) for name in ("tiled.png", "whole.png"))
    assert [read_card(name).tile for name in ("tiled.png", "whole.png")] == [256, 0]
    assert not np.array_equal(tiled, whole)
    # On any card: with room for the whole picture, and without.
    assert np.array_equal(run(*words, "--like", "tiled.png"), tiled) and read_card("out.png").tile == 256
    assert np.array_equal(run(*words, "--like", "tiled.png", limit), tiled)
    assert np.array_equal(run(*words, "--like", "tiled.png", "--device", "cpu"), tiled)
    assert np.array_equal(run(*words, "--like", "tiled.png", "--tile", "auto"), whole)
    assert np.array_equal(run(*new, "--tile", "256"), tiled) and np.array_equal(run(*new, "--tile", "0", ), whole)
    # One that was whole is whole again, or is not made.
    assert np.array_equal(run(*words, "--like", "whole.png"), whole)
    capsys.readouterr()
    for more in (["--like", "whole.png"], ["--like", "tiled.png", "--tile", "0"]):
        assert answer([*words, *more, limit, "--out", "out.png"]) == 4
        told = capsys.readouterr().err
        assert "does not fit: decode" in told
        line = next(line for line in told.splitlines() if line.startswith("next: "))
        assert line.endswith("--out out.png") and "--max-memory" not in line
        assert np.array_equal(run(*shlex.split(line)[4:]), whole)
    # What has another size is another picture, and goes by the card.
    capsys.readouterr()
    assert answer(["plan", *words, "--like", "whole.png", "--size", "512x528", limit, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == {"512x528": 256}


def test_a_card_that_is_too_small_says_the_tiles_that_fit(model: Path, cards: Cards, sim: ModuleType) -> None:
    cards(64 * MIB)
    cards(limit_for(model, (512, 384)))
    for tile in (0, 512):
        with pytest.raises(DoesNotFit, match=r"`?tile=256`?: what is decoded in tiles needs less") as refused:
            make_plan(job_of(model, ((64, 64), (640, 512)), tile=tile))
        assert refused.value.fixes == (Fix("tile", 256),)
    plan = make_plan(job_of(model, ((64, 64), (640, 512)), tile=256))
    assert plan.tiles == {"64x64": None, "640x512": 256}
    assert "as was asked: 640x512; whole: 64x64" in "\n".join(describe.lines(plan))
    made(plan)


def test_a_run_goes_on_as_it_was_planned(model: Path, cards: Cards, sim: ModuleType) -> None:
    """The record says which pictures are tiled: on a card with room for all of them they still are."""
    devices = cards(64 * MIB)
    store = MemoryStore(warn=print)
    limits = {"max_memory": f"{limit_for(model, (384, 384))}B"}
    plan = make_plan(job_of(model, SIZES, **limits, run="mine"))
    run_all(plan, RunPolicy(stop_after="denoise"), store=store)
    job = recorded_job(store, "mine", "memory")
    assert (job.tile, job.whole) == (256, 384 * 384) and Job.from_json(job.to_json()) == job
    again = make_plan(replace(job, max_memory="", devices=devices))
    assert again.tiles == plan.tiles
    report = run_all(again, RunPolicy(), store=store)
    assert report.keys == made(plan).keys
    # With less room than the whole ones need it is refused, and said what would do.
    smaller = limit_for(model, (352, 352))
    with pytest.raises(DoesNotFit) as refused:
        make_plan(replace(job, max_memory=f"{smaller}B"))
    assert refused.value.fixes == (Fix("tile", 256),)


def test_a_picture_that_is_there_stays_whole_when_others_must_be_tiled(
    model: Path, cards: Cards, sim: ModuleType
) -> None:
    """Others fill the card while the second of two is decoded."""
    devices = cards(64 * MIB)
    plan = make_plan(job_of(model, ((384, 384), (512, 512), (384, 384))))
    plan = replace(plan, job=replace(plan.job, requests=tuple(
        replace(request, seed=seed) for seed, request in enumerate(plan.requests))))
    alone = run_all(plan)
    held: list[torch.Tensor] = []

    def fill(kind: str, data: Any) -> None:
        if kind == "item" and data["stage"] == "decode" and data["index"] == 1 and not held:
            size = 64 * MIB - torch.accelerator.memory_allocated(0) - MIB - limit_for_tile
            held.append(torch.empty(size, dtype=torch.uint8, device=devices[0]))

    limit_for_tile = make_plan(job_of(model, ((512, 512),), tile=256)).needs["decode"]["sim:0"].total
    told: list[str] = []
    report = run_all(plan, emit=lambda kind, data: (fill(kind, data), told.append(kind))[0],
                     done=lambda picture: told.append(str(picture.index)))
    assert report.changes and "in tiles of 256 pixels" in report.changes[0]
    tiles = [card.get("tile") for card in cards_of(report)]
    assert tiles[:2] == [None, 256]
    assert report.keys["decode"][0] == alone.keys["decode"][0] and report.keys["decode"][1] != alone.keys["decode"][1]
    assert np.array_equal(report.pictures[0].pixels, alone.pictures[0].pixels)
    assert [text for text in told if text.isdigit()] == ["0", "1", "2"]
    held.clear()
    # Nothing is tiled where the job says how to decode.
    assert made(make_plan(replace(plan.job, tile=0))).keys == alone.keys


@pytest.mark.parametrize(("family", "build"), [
    ("qwen-image", tiny_families.qwen_image), ("flux2-klein", tiny_families.klein), ("sd3", tiny_families.sd3),
    ("z-image", tiny_families.z_image)])
def test_every_family_tiles_some_pictures_of_a_run(
    tmp_path: Path, cards: Cards, sim: ModuleType, family: str, build: Any
) -> None:
    cards(256 * MIB)
    requests = [Request("a fox", side, side, steps=2, guidance=None, seed=1, text_tokens=16) for side in (64, 192)]
    job = Job(family, requests, model=build(tmp_path / "model"), dtype="float32")
    whole, tiled = made(make_plan(job)), made(make_plan(replace(job, tile=128)))
    assert whole.keys["decode"][0] == tiled.keys["decode"][0] and whole.keys["decode"][1] != tiled.keys["decode"][1]
    first, second = (np.abs(one.pixels.astype(int) - other.pixels)
                     for one, other in zip(whole.pictures, tiled.pictures, strict=True))
    assert first.max() == 0 and 0 < second.mean() < 40


def test_the_sizes_that_take_most() -> None:
    sizes = ((4096, 128), (512, 512), (1024, 448), (256, 256))
    assert heaviest(sizes, None) <= {(4096, 128)}
    # Of tiles the largest is 512x448, of what is whole the most is 512x512, and 4096x128 has most pixels.
    assert heaviest(sizes, Tiling(512)) == {(512, 512), (1024, 448), (4096, 128)}
    assert heaviest((), None) == set()
    assert list(tilings(None, 0, sizes)) == [None, Tiling(1024), Tiling(512), Tiling(256)]
    assert list(tilings(None, 0, ((512, 512),))) == [None, Tiling(256)]
    assert list(tilings(0, 0, sizes)) == [None] and list(tilings(512, 9, sizes)) == [Tiling(512, 9)]


@pytest.mark.parametrize(("tile", "says"), [
    (100, "tile must be a multiple of 64 pixels, 0 for whole pictures or auto, got 100 -> tile=64"),
    (1, "-> tile=64"), (-64, "tile must be a whole number from 0 to"), ("many", "tile must be a whole number"),
    (True, "tile must be a whole number"), (10**6, "tile must be a whole number"), (2.0, "tile must be a whole"),
])
def test_what_is_no_side_of_a_tile(model: Path, tile: Any, says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        job_of(model, SIZES, tile=tile)
    assert says in str(refused.value)
    assert [job_of(model, SIZES, tile=each).tile for each in (None, "auto", "0", 0, "512", 512)] == [
        None, None, 0, 0, 512, 512]
