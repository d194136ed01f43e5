"""`runner plan`: will it fit, and how, before anything is loaded."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from runner.commands.cli import answer
from runner.planning.verdict import rough_range
from tests import sparse

ROOT = Path(__file__).parents[1]
GB = 10**9
# As `python -m runner` does it, with the CPU seconds that the libraries take before it.
WHOLE = """
import sys, time
import torch, diffusers, transformers
print(time.process_time())
from runner.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> str:
    """FLUX.1-dev in its real shapes, without its bytes."""
    folder = tmp_path_factory.mktemp("sparse") / "flux-dev"
    sparse.flux_dev(folder)
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert answer(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flux_dev_on_two_16_gb_cards(flux_dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    """17.24 GB of transformer without its conditioning-only layers, 8.6 GB on each card."""
    found = planned(capsys, "flux", "--model", flux_dev, "--machine", "2x16GB")
    denoise = found["stages"]["denoise"]
    weights = [denoise[device]["weights"] for device in ("cuda:0", "cuda:1")]
    assert sum(weights) == found["modulation_table"]["transformer"]["left"] == pytest.approx(17.24 * GB, rel=0.002)
    assert max(weights) == pytest.approx(8.6 * GB, rel=0.03)
    assert all(need["weights"] + need["activations"] < 15 * GB for need in denoise.values())


def test_the_whole_command_takes_little_longer_than_its_imports(flux_dev: str) -> None:
    """A plan that is refused, and looks for a way out, takes longest: less than twice the imports of its libraries.

    That is CPU time of one process, so that other work harms both alike, with half as much again to spare;
    docs/benchmarks.md has the seconds.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["plan", "flux", "--model", flux_dev, "--machine", "2x8GB"]
    ended = subprocess.run([sys.executable, "-c", WHOLE, *words], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 4 and ended.stderr.splitlines()[-1].endswith("--machine 2x8GB --allow-offload cpu")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 3 * float(ended.stdout), (spent, ended.stdout)


def test_flux_dev_on_one_24_gb_card_is_resident(flux_dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "flux", "--model", flux_dev, "--machine", "1x24GB")
    assert found["components"]["transformer"]["placement"] == "cuda:0" and found["refused"]["denoise"] == {}


def test_without_the_table_a_24_gb_card_is_not_enough(flux_dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "flux", "--model", flux_dev, "--machine", "1x24GB", "--no-modulation-table"]
    assert answer(words) == 4
    assert "22.2 GiB" in capsys.readouterr().err


def test_a_plan_is_a_table_for_people(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["plan", "flux", "--model", str(flux), "--size", "64x64", "--machine", "2x16GB"]) == 0
    out = capsys.readouterr().out
    assert "weights" in out and "denoise  cuda:0" in out and "bfloat16" in out
    first, *rest = out.splitlines()
    assert re.fullmatch(r"fits: 1 card, weights \d+\.\d KiB, peak \d+\.\d [KM]iB of 13\.9 GiB \(cuda:0, \w+\)", first)
    assert all(len(line) <= 80 for line in rest) and "every card has" not in out


def test_a_plan_is_as_wide_as_the_terminal_and_has_its_arithmetic_behind_v(
    flux_dev: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", "flux", "--model", flux_dev, "--machine", "2x16GB", "--no-modulation-table"]
    wide: list[str] = []
    for columns in (200, 80, 56):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert answer(words) == 0
        short = capsys.readouterr().out
        assert answer([*words, "-v"]) == 0
        whole = capsys.readouterr().out
        wide += [*short.splitlines(), *whole.splitlines()]
        assert all(len(line) <= min(80, columns) for line in wide[-len(whole.splitlines()) :]), columns
        told = " ".join(whole.split())
        assert "denoise not resident: 22.2 GiB of weights on one device; cuda:0 has 13.4 GiB" in told
        assert "host memory while loading" in told and "every card has bfloat16" in told
        assert "not resident" not in short and "host memory while loading" not in short


@pytest.mark.parametrize(("seconds", "says"), [
    (0.3, "1 s"), (2.4, "1 to 10 s"), (30, "20 s to 2 min"), (400, "3 to 30 min"), (7200, "60 min to 8 h"),
])
def test_a_range_is_rough(seconds: float, says: str) -> None:
    assert rough_range(seconds) == says


def test_a_plan_tells_what_host_and_disk_must_give(flux_dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    """9.98 GB is the largest file of the transformer; T5's two files are mapped together."""
    words = ("flux", "--model", flux_dev, "--no-modulation-table", "--allow-offload", "disk")
    found = planned(capsys, *words, "--machine", "1x16GB", "--max-memory", "0=14GB,cpu=4GiB")
    host, disk = found["host"]["stages"], found["disk"]
    assert host["encode"] == {"held": 0, "loading": pytest.approx(9.52 * GB, rel=0.001)}
    assert 3.2 * 2**30 < host["denoise"]["held"] <= 4 * 2**30 == found["host"]["room"]
    assert host["denoise"]["loading"] == pytest.approx(host["denoise"]["held"] + 9.98 * GB, rel=0.01)
    assert found["limits"] == {"cpu": 4 * 2**30, "cuda:0": 14 * GB}
    assert disk["download"] == 0 and disk["free"] is disk["rate"] is None
    assert disk["stages"]["denoise"]["every_pass"] == found["stages"]["denoise"]["disk"]["weights"] > 5 * GB
    assert disk["stages"]["denoise"]["bytes"] == pytest.approx(23.80 * GB, rel=0.001)
    assert answer(["plan", *words, "--machine", "1x12GB", "--max-memory", "cpu=4GiB", "-v"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for told in ("limits: cpu 4.0 GiB (4294967296 bytes)", "denoise reads ", "of them read from the disk)",
                 "disk: nothing to download", "assumed: disk: not said", "GiB from the disk for every pass",
                 " in host memory, "):
        assert told in out


def test_what_cannot_be_planned_is_refused(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["plan", "flx"]) == 2 and "flux" in capsys.readouterr().err
    assert answer(["plan", "flux", "--model", str(flux), "--machine", "two"]) == 2
    assert answer(["plan", "flux", "--model", str(flux), "--gpus", "0,x"]) == 2
    assert answer(["plan", "flux", "--model", str(flux), "--max-memory", "0=16G", "--machine", "1x16GB"]) == 2


def test_on_this_machine_the_disk_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    disk = planned(capsys, "demo", "--device", "cpu")["disk"]
    assert disk["free"] > disk["download"] == 0
    assert disk["stages"]["denoise"]["seconds"] == pytest.approx(disk["stages"]["denoise"]["bytes"] / disk["rate"])
    assert answer(["plan", "demo", "--device", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    loading = re.search(r"loading: roughly (\d+ s|\S+( \S+)? to \S+ \S+) for [\d.]+ MiB from the disk", out)
    assert loading is not None and "." not in loading[1] and "assumed" not in out
    assert answer(["plan", "demo", "--device", "cpu", "-v"]) == 0 and "loading by stage: " in capsys.readouterr().out
