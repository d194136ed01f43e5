"""A plan that does not fit ends with exit code 4 and a command: pasted, it plans, or runs."""

import io
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from runner import Job, Request
from runner.artifacts import FolderStore
from runner.commands.cli import answer, app
from runner.commands.refusal import better
from runner.commands.words import again, reads_input, spellings
from runner.placement_options import MemoryLimits
from runner.planning.planner import smaller_sizes
from runner.planning.suggestions import _amount
from runner.text import quoted
from stages.errors import DoesNotFit, Fix
from tests import sparse, tiny

Cards = Callable[..., list[str]]


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory: pytest.TempPathFactory) -> str:
    """FLUX.1-dev in its real shapes, without its bytes."""
    return str(sparse.flux_dev(tmp_path_factory.mktemp("sparse") / "flux dev"))


def pasted(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[list[str], str]:
    """The words of the command that a refused one ends with, and the error before it."""
    assert answer(words) == 4
    told = capsys.readouterr().err
    *error, command = told[told.index("error: "):].splitlines()
    assert all(line.startswith("  ") for line in error[1:]) and command.startswith("next: python -m runner ")
    return shlex.split(command)[4:], " ".join(" ".join(error).split())


@pytest.mark.parametrize(
    ("options", "expected", "why"),
    [
        ("--machine 2x16GB --max-memory=3GiB", "--machine 2x16GB", "it fits without --max-memory"),
        ("--no-modulation-table --machine 2x8GB", "--no-modulation-table --machine 2x8GB --allow-offload cpu",
         "11.6 GiB would wait in host memory"),
        ("--machine 2x16GB --no-modulation-table --place denoise=0 --place decode=1",
         "--machine 2x16GB --no-modulation-table --place decode=1", "it fits without --place denoise"),
        pytest.param("--size 2048x2048 --machine 1x3GB", "--machine 1x3GB --allow-offload cpu --size 1536x1536",
                     "would wait", marks=pytest.mark.slow),
    ],
)
def test_the_next_command_plans(
    flux_dev: str, capsys: pytest.CaptureFixture[str], options: str, expected: str, why: str
) -> None:
    words, error = pasted(capsys, ["plan", "flux", "--model", flux_dev, *options.split()])
    assert words == ["plan", "flux", "--model", flux_dev, *expected.split()] and why in error
    assert answer(words) == 0 and "denoise" in capsys.readouterr().out


def test_where_nothing_helps_the_last_reason_is_told(flux_dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["plan", "flux", "--model", flux_dev, "--machine", "1x2GB"]) == 4
    error = " ".join(capsys.readouterr().err.split())
    assert "next: " not in error and "That is not enough, with --allow-offload cpu: encode does not fit" in error
    assert "it would fit with" in error


def test_options_that_help_together_alone_are_suggested_together(
    flux_dev: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder is larger than 8 GB, and no block of it fits into 300 MB."""
    # What waits on the host needs more room than a busy machine may have.
    monkeypatch.setattr("stages.machine.host_memory", lambda: (64 * 2**30, 60 * 2**30))
    words, error = pasted(capsys, ["plan", "flux", "--model", flux_dev, "--machine", "1x8GB", "--max-memory", "300MB"])
    assert "-> it fits with --allow-offload cpu, without --max-memory" in error
    assert words[-2:] == ["--allow-offload", "cpu"] and "--max-memory" not in words and answer(words) == 0


def test_a_run_ends_with_a_command_that_makes_the_picture(
    tmp_path: Path, cards: Cards, sim: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """33 MB of transformer, on a card of 25 MB."""
    model = tiny.flux(tmp_path / "flux", doubles=8, singles=16, heads=8)
    (device,) = cards(25 * 10**6)
    out = tmp_path / "a picture's.png"
    words, error = pasted(capsys, [
        "flux", "--model", str(model), "--prompt", "a red circle", "--size", "64x48", "--steps", "1", "--seed", "1",
        "--dtype", "float32", "--device", device, "--artifacts", "memory", "--out", str(out), "--no-modulation-table",
    ])
    assert words[-2:] == ["--allow-offload", "cpu"] and "does not fit: denoise" in error
    assert answer(words) == 0 and out.is_file()


def test_a_prompt_from_standard_input_is_written_out(
    flux_dev: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for spelled in (["--prompt", "-"], ["--prompt=-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a fox's \xf0\x9f\xa6\x8a\n")))
        words, _ = pasted(capsys, ["plan", "flux", "--model", flux_dev, *spelled, "--machine", "2x16GB",
                                   "--max-memory", "3GiB"])
        assert "a fox's \U0001f98a" in words or "--prompt=a fox's \U0001f98a" in words
        assert answer(words) == 0


def test_no_command_is_suggested_that_would_be_refused_again(
    flux_dev: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line with a size of its own does not hear of --size; nor can standard input be read twice."""
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a fox", "size": "2048x2048"}\n')
    plan = ["plan", "flux", "--model", flux_dev, "--machine", "1x3GB", "--allow-offload", "cpu", "--prompt-file"]
    assert answer([*plan, str(lines)]) == 4
    told = capsys.readouterr().err
    assert "next: " not in told and "--size" in told
    assert all(
        reads_input(words, spellings(app, words)) == read for words, read in (
            ([*plan, "-"], True), (["flux", "--prompt-file=-"], True), ([*plan, "x"], False)))


def test_lanes_beyond_the_pictures_take_nothing_and_fewer_are_suggested(
    flux_dev: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", "flux", "--model", flux_dev, "--machine", "2x16GB", "--json"]
    assert answer(plan) == 0
    alone = json.loads(capsys.readouterr().out)
    assert answer([*plan, "--lanes", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == alone["stages"]
    many = [*plan, "--prompt", "a fox", "--count", "16", "--lanes", "16", "--size", "2048x2048"]
    words, error = pasted(capsys, many)
    assert words[-2:] == ["--lanes", "1"] and "one picture at a time needs less" in error and answer(words) == 0


@pytest.mark.parametrize(("size", "says"), [((2048, 16), "1792x16"), ((16, 2048), "16x1792"), ((64, 32), "48x16")])
def test_a_side_at_its_least_stays_and_the_other_one_shrinks(size: tuple[int, int], says: str) -> None:
    request = Request("x", *size, 1, None, 1, 8)
    sizes = smaller_sizes(request, 16)
    assert next(iter(sizes)) == says and all(0 < part < 1 for part in sizes.values())
    assert smaller_sizes(Request("x", 16, 16, 1, None, 1, 8), 16) == {}


@pytest.mark.parametrize(("size", "text"), [(14 * 2**30, "14336MiB"), (2**20, "1MiB"), (2**20 - 1, "1023KiB"),
                                            (1000, "1000B"), (1, "1B"), (0, "1B")])
def test_an_amount_is_written_as_it_is_read(size: int, text: str) -> None:
    assert _amount(size) == text and MemoryLimits.read(text).by_device[""].amount == max(1, size) // {
        "M": 2**20, "K": 2**10}.get(text[-3:-2], 1) * {"M": 2**20, "K": 2**10}.get(text[-3:-2], 1)


def test_the_next_command_of_a_resume_lifts_what_the_run_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit is in its record, and leaving --max-memory out would leave it there."""
    monkeypatch.chdir(tmp_path)
    demo = Request("a red circle", 64, 64, 1, None, 1, 20)
    for name, more in (("limited", {"max_memory": "4MB"}), ("placed", {"place": ["denoise=sharded", "decode=cpu"]})):
        job = Job("demo", [demo], store="store", run=name, **more).absolute()
        FolderStore(Path("store"), warn=print).save_run(name, {"requests": [], "stages": {}, "job": job.to_json()})
        words, _ = pasted(capsys, ["resume", name, "--artifacts", "store", "--no-modulation-table", "--quiet"])
        lifted = ["--max-memory", "none"] if name == "limited" else ["--place", "denoise=auto"]
        assert words[-2:] == lifted and answer(words) == 0
        assert (name == "placed") == bool(Job.from_json(FolderStore(Path("store")).load_run(name)["job"]).place)


def test_options_are_replaced_and_others_kept() -> None:
    words = ["plan", "flux", "--prompt", "--size", "--size=64x64", "-q", "--json", "--place", "denoise.transformer=0",
             "--place=decode=1", "--max-memory", "3GiB", "--", "--size", "1x1"]
    line = again(words, {"--size": "32x32", "--max-memory": "", "--place denoise": ""}, spellings(app, words))
    assert line == ("python -m runner plan flux --prompt --size -q --json --place=decode=1 --size 32x32 -- --size 1x1")
    both = again(words, {"--place decode": "", "--place denoise": ""}, spellings(app, words))
    assert "--place" not in both and "3GiB" in both


@pytest.mark.parametrize("word", ["plain", "two  words", "it's $HOME `x` \\n !", "caf\u00e9", "a\nb\tc", "\u202e'\\"])
def test_every_word_is_quoted_for_the_shell(word: str) -> None:
    line = quoted(word)
    assert line.isprintable()
    shown = subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, check=True,
                           env={"LC_ALL": "C.UTF-8"})
    assert shown.stdout.decode() == word


def test_a_command_without_the_option_is_not_proposed() -> None:
    assert better(app, DoesNotFit("x", (Fix("size", "64x64"),)), ["doctor"]) == []
    assert better(app, DoesNotFit("x"), ["flux"]) == []
    assert better(app, DoesNotFit("x", (Fix("size", "64x64"),)), ["flux", "--json", "a"]) == [
        "python -m runner flux --json a --size 64x64"]
