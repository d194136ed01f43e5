"""Ranks are planned, and cards that a plan leaves idle are named with what would use them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants as settings
import pytest

from runner.commands.cli import answer
from runner.distributed.idle import listed


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder for shapes: what was made of a folder is known for all plans of it."""
    return str(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def offline(assets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no network: plans are made of the shapes that ship with the package."""
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(settings, "HF_ASSETS_CACHE", assets)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert answer(["plan", "flux", *words]) == 0
    return capsys.readouterr().out


def flat(text: str) -> str:
    """A text whose lines were wrapped, as one line."""
    return " ".join(text.split())


def test_eight_ranks_show_what_the_cards_of_each_hold(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--machine", "8x80GB", "--ranks", "8", "--count", "8")
    lines = told(capsys, *words).splitlines()
    assert flat(" ".join(lines[:2])).startswith("fits: 8 ranks on 8 cards, weights 25.3 GiB, peak 16.5 of 73.5 GiB (")
    rows = [line.split()[:4] for line in lines[3:27]]
    assert rows == [[str(rank), "1", stage, f"cuda:{rank}"] for rank in range(8)
                    for stage in ("encode", "denoise", "decode")]
    assert not [line for line in lines if line.startswith("idle")]
    found = json.loads(told(capsys, *words, "--json"))
    assert [rank["devices"] for rank in found["ranks"]] == [[f"cuda:{number}"] for number in range(8)]
    assert found["verdict"].startswith("fits: 8 ranks on 8 cards, ")
    held = [[*rank["stages"]["denoise"].values()] for rank in found["ranks"]]
    assert held == held[:1] * 8 and held[0][0]["weights"] > 17 * 10**9 and found["idle"] == []


def test_ranks_whose_cards_differ_are_planned_apart(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told(capsys, "--machine", "24GB+40GB+80GB", "--ranks", "2", "--count", "3", "--json"))
    assert [(rank["devices"], rank["pictures"]) for rank in found["ranks"]] == [
        (["cuda:0", "cuda:1"], 2), (["cuda:2"], 1)]
    assert [*found["ranks"][0]["stages"]["denoise"]] == ["cuda:1"] and found["idle"] == ["cuda:0"]


def test_ranks_without_a_picture_and_too_many_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "--machine", "4x80GB", "--ranks", "4", "--count", "2")
    assert "without a picture: rank 2, 3 -> --ranks 2, or more pictures (--count)" in out and "idle" not in out
    assert answer(["plan", "flux", "--machine", "2x80GB", "--ranks", "3", "--count", "3"]) == 2
    assert "3 ranks" in capsys.readouterr().err


def test_ranks_that_do_not_fit_are_told_of_one_process_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["plan", "flux", "--machine", "2x16GB", "--ranks", "2", "--count", "2"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert "  -> it fits without --ranks: one process with all of the cards" in lines
    assert lines[-1] == "next: python -m runner plan flux --machine 2x16GB --count 2"


@pytest.mark.parametrize(("words", "line"), [
    ("--machine 8x80GB --count 8",
     "idle: cuda:1 to cuda:7 (7 of 8 cards) -> --ranks 8 uses all of them: a share of the pictures for each rank"),
    ("--machine 8x16GB --count 8", "idle: cuda:2 to cuda:7 (6 of 8 cards) -> --ranks 4 uses all of them"),
    ("--machine 2x80GB --count 2 --artifacts memory",
     "idle: cuda:1 (1 of 2 cards) -> --place denoise=tensor_parallel uses all of them"),
    ("--machine 4x16GB --count 4 --artifacts memory",
     "idle: cuda:2 and cuda:3 (2 of 4 cards) -> --lanes 4 uses all of them"),
    ("--machine 2x80GB", "idle: cuda:1 (1 of 2 cards) -> --place denoise=tensor_parallel uses all of them"),
    ("--machine 2x80GB+4GB", "-> --place denoise=tensor_parallel:2 uses 2 of them"),
])
def test_idle_cards_are_named_with_what_uses_them(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = flat(told(capsys, *words.split()))
    assert line in out and "fits here" not in out


@pytest.mark.parametrize(("words", "more"), [
    ("--machine 80GB+4GB", ""), ("--machine 2x80GB --lanes 2", "; --count 2 with --ranks 2 would use all of them"),
    ("--machine 80GB+4GB --count 2 --artifacts memory", ""),
    ("--machine 2x80GB --count 2 --lanes 2 --place denoise=cuda:0", ""),
])
def test_what_would_not_fit_as_it_is_pasted_is_not_suggested(
    words: str, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank with 4 GB, or without the card that is named, or processes that work together beside lanes."""
    out = flat(told(capsys, *words.split()))
    assert out.endswith(f"cards): nothing that would use them fits here{more}")
    assert not more or "idle" not in told(capsys, *words.split(), *re.findall(r"--\w+|\d", more))


@pytest.mark.parametrize("words", ["--machine 2x16GB", "--machine 1x80GB --count 8", "--machine 2xT4",
                                   "--machine 4x80GB --place denoise=tensor_parallel"])
def test_where_no_card_is_idle_nothing_is_said(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "idle" not in told(capsys, *words.split())


def test_cards_in_words() -> None:
    assert listed(["cuda:1"]) == "cuda:1" and listed(["cuda:1", "cuda:2"]) == "cuda:1 and cuda:2"
    assert listed(["cuda:1", "cuda:2", "cuda:3"]) == "cuda:1 to cuda:3"
    assert listed(["cuda:0", "cuda:2", "cuda:3"]) == "cuda:0, cuda:2 and cuda:3"


def test_a_run_says_it_too(
    flux: Path, cards: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = cards(2**30, 2**30)
    words = ["flux", "--model", str(flux), "--prompt", "a fox", "--seed", "1", "--size", "64x48", "--steps", "1",
             "--count", "2", "--device", first, "--device", second, "--artifacts", str(tmp_path / "store")]
    assert answer([*words, "--verbose", "--out", str(tmp_path / "out") + "/"]) == 0
    err = capsys.readouterr().err
    assert (f"idle: {second} (1 of 2 cards) -> --ranks 2 uses all of them: a share of the pictures for each rank"
            in flat(err))
