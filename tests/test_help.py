"""The help pages and docs/command-line.md: both say what the options are, and are held against them."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from runner.commands import option_values, refusal
from runner.commands.cli import answer, app
from runner.commands.help import NOT_READ_BY_A_PLAN
from runner.commands.options import RunOptions
from runner.commands.settings import ANYWHERE, OF_A_FAMILY, variable
from runner.commands.version import cards
from stages.families import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()
GROUPS = ["Picture", "Where it goes", "Model", "The run", "Several processes", "What is said", "Placement"]
GROUP = get_command(app)
assert isinstance(GROUP, TyperGroup)
RUNS = GROUP.commands["runs"]
assert isinstance(RUNS, TyperGroup)
COMMANDS = [[], *([name] for name in GROUP.commands), *(["runs", name] for name in RUNS.commands)]


def page(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int = 80
) -> str:
    """The help of a command as it is on a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert answer([*words, "--help"]) == 0
    return capsys.readouterr().out


def options_of(name: str) -> list[TyperOption]:
    assert isinstance(GROUP, TyperGroup)
    return [param for param in GROUP.commands[name].params if isinstance(param, TyperOption)]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "all")
def test_a_help_page_fits_80_columns_and_cuts_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = page(words, monkeypatch, capsys)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "..." not in shown and "\u2026" not in shown and "--help" in shown
    narrow = page(words, monkeypatch, capsys, 60)
    assert all(len(line) <= 60 for line in narrow.splitlines())
    assert all(option in shown for param in (options_of(words[0]) if len(words) == 1 and words != ["runs"] else ())
               if not param.hidden for option in param.opts)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_the_help_of_a_family_has_its_groups_defaults_and_examples(
    family: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = page([family.name], monkeypatch, capsys)
    heads = re.findall(r"^\u256d\u2500 (.*?) \u2500+\u256e$", shown, re.MULTILINE)
    assert heads == GROUPS
    flat = re.sub(r"[\s\u2502]+", " ", shown)
    for default in (family.repo, "{}x{}".format(*family.size), family.steps):
        assert f"[default: {default}]" in flat
    assert ("--guidance" in shown) == (family.guidance is not None)
    assert ("--negative-prompt" in shown) == family.negative
    assert family.guidance is None or f"[default: {family.guidance:g}]" in flat
    lines = shown[shown.index("Examples") :].splitlines()
    examples = [" ".join(line.split()) for line in lines if "python -m runner" in line]
    assert len(examples) == 4
    for line in examples:
        assert isinstance(app(shlex.split(line)[3:], standalone_mode=False), RunOptions), line


@pytest.mark.parametrize("words", [[], ["plan"], ["batch"], ["resume"]], ids=lambda words: " ".join(words) or "all")
def test_other_pages_have_four_examples_that_are_commands(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = page(words, monkeypatch, capsys)
    examples = [line.strip() for line in shown.splitlines() if line.strip().startswith("python -m runner ")]
    assert len(examples) == 4
    for line in examples:
        assert not isinstance(app(shlex.split(line)[3:], standalone_mode=False), int)


def test_plan_shows_what_it_reads_and_takes_all(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    shown = page(["plan"], monkeypatch, capsys)
    plan, run = ({param.name for param in options_of(name)} for name in ("plan", "flux"))
    assert plan == run | {"machine"} and plan > NOT_READ_BY_A_PLAN
    for param in options_of("plan"):
        shows = re.search(rf"{param.opts[0]}\b(?!-)", shown) is not None
        assert shows == (param.name not in NOT_READ_BY_A_PLAN), param.name


def test_the_page_has_every_option_with_its_group_and_names_no_other() -> None:
    parts = {part.split("\n", 1)[0]: part for part in PAGE.split("### ")[1:]}
    assert list(parts) == GROUPS
    known: dict[str, str | None] = {}
    for name in ("flux", "sd3", "plan", "resume"):
        for param in options_of(name):
            known |= dict.fromkeys(param.opts, param.rich_help_panel)
    for spelling, group in known.items():
        assert group is not None and f"`{spelling}`" in parts[group].split("\n## ")[0], spelling
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PAGE))
    assert said - known.keys() <= {"--help", "--version", "--install-completion", "--show-completion"}


def test_the_page_has_every_setting_and_exit_code() -> None:
    rows = set(re.findall(r"^\| `([a-z-]+)` \| (?:`([A-Z_]+)`|-) \| (anywhere|in a family's table) \|$", PAGE,
                          re.MULTILINE))
    assert rows == {*((name, variable(name), "anywhere") for name in ANYWHERE),
                    *((name, "", "in a family's table") for name in OF_A_FAMILY)}
    codes = {int(code) for code in re.findall(r"^\| ([0-9]+) \|", PAGE, re.MULTILINE)}
    assert codes == {0, 1, 130, 143, *(code for _, code in refusal.CODES)}
    commands = re.findall(r"^\| `(\S+)[^`]*` \| [a-z]", PAGE.split("## Options")[0], re.MULTILINE)
    assert isinstance(GROUP, TyperGroup) and set(commands) == GROUP.commands.keys() - FAMILIES.keys() | {"FAMILY"}
    assert all(f"`{family}`" in PAGE for family in FAMILIES)


def test_versions_and_cards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert answer(["--version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:5] == ["stagerun", "Python", "torch", "diffusers", "transformers"] and len(names) > 5
    assert cards("2.13.0+cpu") == ["no accelerator: this torch is built for CPUs alone"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Tesla T4, 15360 MiB'\necho 'Tesla T4, 15360 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cards("2.13.0") == ["card 0: Tesla T4, 15360 MiB", "card 1: Tesla T4, 15360 MiB"]


def test_a_shell_completes_the_words_of_the_installed_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, at, expected in (("stagerun fl", "1", "flux-schnell"), ("stagerun plan z", "2", "z-image"),
                               ("stagerun flux --allow-offload d", "3", "disk"), ("stagerun mo", "1", "models"),
                               ("stagerun flux --max", "2", "--max-memory")):
        monkeypatch.setenv("_STAGERUN_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", text)
        monkeypatch.setenv("COMP_CWORD", at)
        with pytest.raises(SystemExit) as ended:
            app([], prog_name="stagerun")
        assert ended.value.code in (0, None) and expected in capsys.readouterr().out.split()
    monkeypatch.delenv("_STAGERUN_COMPLETE")
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    with pytest.raises(SystemExit):
        answer(["--show-completion"])
    assert "complete -o default -F _stagerun_completion stagerun" in capsys.readouterr().out


def test_what_undoes_a_setting_is_an_option_too() -> None:
    assert (option_values.lanes("none"), option_values.ranks("none"), option_values.preview("none")) == (None, None, 0)
    assert option_values.devices((), "all") == ()
