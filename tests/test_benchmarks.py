"""Every benchmark runs, at a size that shows nothing but that it does."""

import importlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

HOST = {"start": "--repeats 1 --only 'runner --help'", "store": "--bytes 100000 --runs 20 --repeats 1",
        "many": "--prompts 3 --after 1 --size 32x32 --limit 64"}
CARDS = {"lanes": "--pictures 1 --repeats 1 --delay 0", "modulation": "--pictures 1 --repeats 1 --heads 5",
         "memory": "--heads 2 --only enable_model --only recipe --only 'ours on two,'", "plan": "--cases 1",
         "load": "--heads 4 --repeats 1 --patience 0", "overhead": "--prompts 1 --repeats 1 --steps 2 --heads 5"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a benchmark: it must print a table and write what it measured."""

    def check(name: str, options: str) -> None:
        monkeypatch.setattr("sys.argv", [name, *shlex.split(options), "--json", str(tmp_path / "raw.json")])
        importlib.import_module(f"benchmarks.{name}").main()
        lines = capsys.readouterr().out.splitlines()
        assert any(set(line) <= set("| -:") and line.count("|") > 2 for line in lines), "no table"
        raw = json.loads((tmp_path / "raw.json").read_text())
        assert raw["machine"]["cores"] and raw["raw"]

    return check


@pytest.mark.parametrize("name", HOST)
def test_on_the_host(name: str, run: Callable[[str, str], None]) -> None:
    run(name, HOST[name])


@pytest.mark.parametrize("name", CARDS)
def test_on_cards(name: str, run: Callable[[str, str], None], cards: Callable[..., list[str]]) -> None:
    cards(400_000_000, 400_000_000)
    run(name, CARDS[name])
