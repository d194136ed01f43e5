"""Variables and the file of settings: what they may say, which wins, and what they never change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.artifacts import FolderStore
from runner.commands.cli import answer, app
from runner.commands.options import FamilyOptions, RunOptions
from runner.commands.settings import ANYWHERE, OF_A_FAMILY, SETTINGS, config_path, settled, variable
from runner.distributed import api
from runner.job import Job
from stages.errors import InvalidInput
from tests.test_cli import base, elsewhere

__all__ = ["elsewhere"]

FILE = """
# What holds everywhere.
max-memory = "14GiB"
artifacts = "~/kept"
dtype = ["bf16", "vae=fp32"]

[flux]
steps = 20
size = 768
gpus = [1, 0]

[demo]
steps = 8
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of settings of the user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STAGERUN_CONFIG", raising=False)
    path = tmp_path / "config" / "stagerun" / "config.toml"
    path.parent.mkdir(parents=True)
    assert config_path() == path
    return path


def told(*words: str, launched: bool = False) -> tuple[RunOptions, dict[str, str]]:
    """The options of a command line with what is set, and where that is from."""
    options = app(list(words), standalone_mode=False)
    assert isinstance(options, RunOptions)
    return settled(options, getattr(options, "family", words[0] if isinstance(options, FamilyOptions) else ""),
                   launched=launched)


def test_a_flag_beats_a_variable_and_that_the_file_and_that_the_family(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config.write_text(FILE)
    options, origins = told("flux", "x")
    assert isinstance(options, FamilyOptions)
    assert (options.max_memory, options.steps, options.size, options.gpus) == ("14GiB", "20", "768", "1,0")
    assert options.artifacts == str(tmp_path / "kept") and options.dtype == ["bf16", "vae=fp32"]
    assert origins["max-memory"] == f"{config}, line 3" and origins["steps"] == f"{config}, line 8"
    assert options.guidance is None and "guidance" not in origins
    monkeypatch.setenv("STAGERUN_MAX_MEMORY", "10GiB")
    options, origins = told("flux", "x", "--steps", "4")
    assert isinstance(options, FamilyOptions)
    assert (options.max_memory, options.steps) == ("10GiB", "4")
    assert origins["max-memory"] == "STAGERUN_MAX_MEMORY" and "steps" not in origins
    assert told("flux", "x", "--max-memory", "none")[0].max_memory == "none"


def test_the_table_is_that_of_the_family_and_the_demo_has_its_own(config: Path) -> None:
    config.write_text(FILE)
    for words, steps, size in ((["flux", "x"], "20", "768"), (["plan", "flux"], "20", "768"),
                               (["batch", "flux"], "20", "768"), (["flux-schnell", "x"], None, None),
                               (["demo", "x"], "8", None), (["flux", "x", "--model", "demo"], "8", None)):
        options, _ = told(*words)
        assert isinstance(options, FamilyOptions) and (options.steps, options.size) == (steps, size), words


@pytest.mark.parametrize(("text", "line", "says"), [
    ("max-memory = \"14 GO\"", 1, "max-memory: --max-memory: '14 GO' has the unit"),
    ("\n\nlanes = 0", 3, "lanes: lanes must be"), ("max_memory = \"0=\"", 1, "is no device=amount"),
    ("prompt = \"x\"", 1, "prompt: there is no such setting"), ("seed = 1", 1, "seed: there is no such setting"),
    ("max-memry = 1", 1, "did you mean max-memory?"), ("steps = 20", 1, "it is of one family -> write it below"),
    ("[flx]\nsteps = 1", 1, "there is no family 'flx' -> did you mean flux? choose from flux, "),
    ("[flux]\nsteps = 1\nsteps = 2", 3, "it is no TOML"), ("[flux]\nsize = \"axb\"", 2, "size: size must be WxH"),
    ("[flux-schnell]\nsteps = 2\nguidance = 3", 3, "flux-schnell takes no guidance"), ("steps", 1, "it is no TOML"),
    ("preview = true", 1, "is no text and no number"), ("model = [\"a\"]", 1, "it is a list"),
    ("device = []", 1, "is no text"), ("allow-offload = \"gpu\"", 1, "choose from cpu, disk, none"),
    ("place = [\"denoise=0\", \"encod=1\"]", 1, "there is no stage 'encod'"), ("out = \"x.gif\"", 1, "must end in"),
    ("gpus = \"a\"", 1, "write the numbers of cards"), ("engine = \"dask\"", 1, "choose from local, ray"),
    ("gpus = 0\ndevice = \"cpu\"", 2, "device and gpus contradict"), ("dtype = \"int8\"", 1, "choose one of"),
    ("ranks = 2\nengine = \"ray\"", 1, "ranks and engine contradict"), ("rank-timeout = 0", 1, "rank-timeout must be"),
    ("step-every = \"x\"", 1, "step-every must be"), ("artifacts = \"\"", 1, "is no name"),
    ("[flux.deep]\nx = 1", 1, "there is no such setting"), ("flux = {steps = 0}", 1, "steps must be"),
    ("x = \"\xe9\"", 1, "valid UTF-8"),
])
def test_a_mistake_in_the_file_is_one_line_with_its_place(
    config: Path, text: str, line: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_bytes(text.encode("latin-1"))
    for words in (["flux", "x"], ["plan", "flux"], ["demo", "--print-config"], ["runs", "ls"]):
        assert answer(words) == 2, words
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and f"{config}, line {line}: " in err and says in err
    assert answer(["models"]) == answer(["flux", "--help"]) == 0


@pytest.mark.parametrize(("name", "text", "says"), [
    ("STAGERUN_LANES", "x", "STAGERUN_LANES: lanes must be"),
    ("STAGERUN_PLACE", "denoise=0 encod=1", "STAGERUN_PLACE: --place 'encod=1'"),
    ("STAGERUN_CONFIG", "/gone.toml", "cannot read /gone.toml: No such file"),
    ("STAGERUN_MAX_MEM", "8GiB", "STAGERUN_MAX_MEM: there is no such setting -> did you mean STAGERUN_MAX_MEMORY?"),
    ("STAGERUN_max_memory", "8GiB", "did you mean STAGERUN_MAX_MEMORY?"),
    ("STAGERUN_CONFG", "x", "did you mean STAGERUN_CONFIG?"), ("STAGERUN_STEPS", "8", "below the line [flux]"),
    ("STAGERUN_PROMPT", "x", "there is no such setting -> unset it; there are STAGERUN_MODEL, "),
])
def test_a_mistake_in_a_variable_names_it(
    config: Path, name: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, text)
    for words in (["flux", "x"], ["runs", "ls"], ["plan", "flux"]):
        assert answer(words) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    monkeypatch.setenv(name, "")
    assert answer(["flux", "x", "--print-config"]) == 0


def test_a_pasted_command_finds_the_store_that_a_variable_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where another shell would look is found without what this one sets; where both agree nothing is said."""
    kept = tmp_path / "kept"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache/stagerun").mkdir(parents=True)
    usual = str(tmp_path / "cache/stagerun/store")
    words = ["demo", "a large red circle on a blue background", "--steps", "1", "--stop-after", "encode", "-q"]
    for variables, text, said in (
        ({"STAGERUN_ARTIFACTS": str(kept)}, "", f" --artifacts {kept}"), ({}, "", ""),
        ({"STAGERUN_ARTIFACTS": usual}, f"artifacts = \"{kept}\"\n", f" --artifacts {usual}"),
        ({}, f"artifacts = \"{kept}\"\n", ""),
        ({"STAGERUN_CONFIG": str(tmp_path / "other.toml")}, "", f" --artifacts {kept}"),
    ):
        config.write_text(text)
        (tmp_path / "other.toml").write_text(f"artifacts = \"{kept}\"\n")
        with monkeypatch.context() as set_here:
            for name, value in variables.items():
                set_here.setenv(name, value)
            assert answer(words) == 0
            capsys.readouterr()
            assert answer(["runs", "show", "last", "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert all((said in found[line]) if said else "--artifacts" not in found[line]
                       for line in ("go_on", "repeat")), (variables, found)
            assert answer(["runs", "rm", "last"]) == 0
            assert f"runs gc{said} (" in capsys.readouterr().err
            assert answer(["runs", "du"]) == 0
            assert f"runs gc{said}\n" in capsys.readouterr().out


def test_another_file_and_none(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("lanes = 2\n")
    (tmp_path / "other.toml").write_text("lanes = 3\n")
    assert told("flux", "x")[0].lanes == "2"
    monkeypatch.setenv("STAGERUN_CONFIG", str(tmp_path / "other.toml"))
    assert told("flux", "x")[0].lanes == "3"
    monkeypatch.setenv("STAGERUN_CONFIG", "")
    options, origins = told("flux", "x")
    assert options.lanes is None and origins == {} and config_path() is None


@pytest.mark.parametrize(("text", "words", "left"), [
    ("gpus = 0", ["flux", "x", "--device", "cpu"], "gpus"),
    ("device = \"cpu\"", ["flux", "x", "--gpus", "0"], "device"),
    ("ranks = 2", ["flux", "x", "--engine", "ray"], "ranks"),
    ("engine = \"ray\"", ["flux", "x", "--ranks", "2"], "engine"),
    ("engine = \"ray\"", ["flux", "x", "--place", "denoise=tensor_parallel"], "engine"),
    ("out = \"x/\"", ["flux", "x", "--stop-after", "encode"], "out"), ("model = \"a/b\"", ["demo", "x"], "model"),
])
def test_a_setting_gives_way_to_what_it_would_contradict(config: Path, text: str, words: list[str], left: str) -> None:
    config.write_text(text)
    options, origins = told(*words)
    assert left not in origins and getattr(options, left) is None
    assert left in told("flux", "x")[1]


def test_a_launcher_decides_about_processes(config: Path) -> None:
    config.write_text("ranks = 2\nlanes = 2\n")
    options, origins = told("flux", "x", launched=True)
    assert options.ranks is None and origins.keys() == {"lanes"}
    config.write_text("engine = \"ray\"\n")
    assert told("flux", "x", launched=True)[0].engine is None


def test_a_picture_that_is_repeated_and_a_run_that_is_resumed_stay_as_they_were(
    config: Path, flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings change model, steps, size, types and places; neither the picture nor the record does."""
    words = base(flux, "a fox", "-s", "3", "--artifacts", "store", "-q", "--dtype", "fp32")
    assert answer([*words, "-o", "first.png"]) == 0
    config.write_text(f"model = \"nobody/nothing\"\ndtype = \"fp16\"\nmax-memory = \"2GiB\"\nartifacts = "
                      f"\"{Path('store').absolute()}\"\nout = \"again-{{seed}}.png\"\n[flux]\nsteps = 5\nsize = 32\n"
                      f"guidance = 9\n")
    monkeypatch.setenv("STAGERUN_DTYPE", "bf16")
    assert answer(["flux", "--like", "first.png", "-q"]) == 0
    assert np.array_equal(Image.open("again-3.png"), Image.open("first.png"))
    capsys.readouterr()
    assert answer(["flux", "--like", "first.png", "--print-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["settings"]
    assert shown["steps"]["origin"] == shown["dtype"]["origin"] == shown["model"]["origin"] == "the picture"
    assert shown["max-memory"] == {"value": "2GiB", "origin": f"{config}, line 3"}
    store = FolderStore(Path("store"))
    run = store.runs()[0]
    before: Any = store.load_run(run)["job"]
    assert answer(["resume", run, "--overwrite", "-q"]) == 0
    assert capsys.readouterr().out == "first.png\n"
    after: Any = FolderStore(Path("store")).load_run(run)["job"]
    ours = ("dtype", "max_memory", "requests", "model", "place", "lanes")
    assert {name: before[name] for name in ours} == {name: after[name] for name in ours}
    assert answer(["runs", "ls"]) == 0 and run in capsys.readouterr().out


def test_workers_do_the_job_of_the_command_whatever_is_set_for_them(
    config: Path, flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ranks get is the job with the settings in it; they read none themselves."""
    config.write_text("ranks = 2\nmax-memory = \"1GiB\"\nrank-timeout = 77\n")
    seen: list[tuple[Job, int, float]] = []

    def spawn(job: Job, count: int, *, timeout: float, **more: Any) -> Any:
        seen.append((job, count, timeout))
        raise InvalidInput("seen")

    monkeypatch.setattr(api, "spawn", spawn)
    assert answer(base(flux, "x")) == 2
    [(job, count, timeout)] = seen
    assert count == 2 and timeout == 77.0 and str(job.max_memory) == "1GiB"
    assert Job.from_json(job.to_json()) == job
    assert answer(base(flux, "x", "--ranks", "none", "-q", "-o", "x.png")) == 0 and len(seen) == 1


def test_what_would_fit_lifts_what_a_setting_says(
    config: Path, flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("max-memory = \"100KB\"\n")
    words = base(flux, "x", "--device", "cpu", "-q", "-o", "x.png")
    assert answer(words) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("--max-memory none") and answer([*words, "--max-memory", "none"]) == 0


def test_print_config_shows_every_setting_with_its_origin(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(FILE)
    monkeypatch.setenv("STAGERUN_PREVIEW", "4")
    assert answer(["flux", "--print-config", "-s", "9", "--lanes", "3"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows.keys() >= SETTINGS.keys() and rows["file:"] == f"file: {config}"
    assert rows["preview"].split() == ["preview", "4", "STAGERUN_PREVIEW"]
    assert rows["lanes"].endswith("command line") and rows["seed"].split()[:2] == ["seed", "9"]
    assert rows["steps"].endswith(f"{config}, line 8") and rows["guidance"].split()[1:] == ["3.5", "family", "flux"]
    assert rows["ranks"].endswith("default")


def test_every_setting_is_an_option_that_is_silent_by_default() -> None:
    options = app(["flux"], standalone_mode=False)
    for name in SETTINGS:
        assert getattr(options, name.replace("-", "_")) is None
        assert variable(name) == f"STAGERUN_{name.upper().replace('-', '_')}" != "STAGERUN_CONFIG"
    assert not {"prompt", "seed", "count", "negative-prompt", "like", "lora"} & SETTINGS.keys()
    assert not ANYWHERE.keys() & OF_A_FAMILY.keys()
