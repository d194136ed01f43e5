"""Memory that runs out twice: exit code 4, the numbers, three commands that need less, and the one that goes on."""

import gc
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.artifacts import FolderStore
from runner.commands.cli import answer
from runner.commands.results import Results
from tests import tiny

Cards = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own for each test; what a run froze is thawed."""
    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose transformer has blocks enough to be dealt."""
    return tiny.flux(tmp_path_factory.mktemp("ways") / "flux", doubles=2, singles=4)


@pytest.fixture
def exhausted(monkeypatch: pytest.MonkeyPatch, sim: ModuleType) -> list[str]:
    """After every step the next allocation on each of these cards fails."""
    devices: list[str] = []
    hear = Results.__call__

    def heard(self: Results, kind: str, data: Mapping[str, Any]) -> None:
        hear(self, kind, data)
        if kind == "step":
            for device in devices:
                sim.fail_allocation(device, 1)

    monkeypatch.setattr(Results, "__call__", heard)
    return devices


def test_a_second_time_out_of_memory_ends_with_what_to_do(
    model: Path, cards: Cards, exhausted: list[str], sim: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = cards(40_000_000, 40_000_000)
    words = ["flux", "--model", str(model), "--dtype", "float32", "--prompt", "a red circle", "--seed", "1", "--steps",
             "4", "--size", "64x48", *(word for device in devices for word in ("--device", device)), "--count", "2",
             "--place", "denoise=sharded", "-q"]
    assert answer([*words, "--out", "whole/", "--artifacts", "memory"]) == 0
    exhausted += devices
    told: list[list[str]] = []
    for more, changes in (([], ["one request at a time instead of 2"]), (["--no-degrade"], [])):
        assert answer([*words, "--out", "out/", "--artifacts", f"store{len(more)}", *more]) == 4
        error, *ways = capsys.readouterr().err.splitlines()
        each = (r"sim:{} peaked at [0-9.]+ GiB, at most [0-9.]+ MiB planned, [0-9.]+ MiB "
                r"free now and 38.1 MiB when planned")
        both = f"{each.format(0)}; {each.format(1)}"
        # The other lane may have made an allocation fail that comes only when the stage is tried once more.
        assert re.match(rf"error: denoise ran out of memory \({both}\) while (computing|loading): ", error), error
        run = FolderStore(Path(f"store{len(more)}")).runs()[-1]
        record = FolderStore(Path(f"store{len(more)}")).load_run(run)
        assert record["changes"] == changes
        assert record["status"] == "failed" and "out of memory" in str(record["error"])
        assert error.endswith(f"; go on with: python -m runner resume {run} --artifacts store{len(more)}")
        assert len(ways) == 3 and all(way.startswith("next: python -m runner ") for way in ways), ways
        told.append(ways)

    # The first goes on with the run, after the step that was kept; the last is a smaller picture.
    exhausted.clear()
    sim.reset()
    first, last = shlex.split(told[1][0])[4:], shlex.split(told[0][2])[4:]
    assert first == ["resume", run, "--artifacts", "store1", "--lanes", "1"] and "--size" in last and last[0] == "flux"
    assert answer([*first, "--json", "-q"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [stage["made"] for stage in done["stages"]] == [0, 2, 2]
    for path in Path("whole").iterdir():
        assert np.array_equal(Image.open(path), Image.open(Path("out") / path.name))
