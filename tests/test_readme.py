"""Every command of the README and of its pages runs; large models stand in as tiny ones of the same classes."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner import Job, make_plan, run_all
from runner.commands.cli import answer
from runner.request import requests_for
from stages.families import FAMILIES
from stages.library_remarks import REMARKS
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]
# A page may show what another shows; it is tried once.
LINES = list(dict.fromkeys(line for block in BLOCKS for line in block.splitlines()))
RUNS = [line[line.index("python -m runner") :] for line in LINES
        if "python -m runner" in line and not any(word in line for word in ("--ranks", "tensor_parallel", "ray"))]
RANKS = [line for line in LINES if line.startswith(("torchrun", "accelerate")) or "--ranks" in line]
BY_RAY = [line for line in LINES if "--engine ray" in line]
TOGETHER = [line for line in LINES if "tensor_parallel" in line]
STARTS = {"python": ["-m"], "torchrun": ["-m", "torch.distributed.run"],
          "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -q "


def run(line: str, folder: Path, *more: str) -> list[str]:
    """The lines that a command prints when it is run in `folder` with more options."""
    first, *rest = shlex.split(line)
    words = [sys.executable, *STARTS[first], *rest[first == "python" :], *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert not [remark for remark in REMARKS.values() if remark in done.stderr]
    return done.stdout.splitlines()


def answered(line: str, folder: Path, *more: str) -> list[str]:
    """The same in this process, as a new one takes seconds to import torch."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        assert answer([*shlex.split(line)[3:], *more]) == 0, line
    return out.getvalue().splitlines()


def test_there_are_two_commands_that_install() -> None:
    """The second is what continuous integration runs (test_lint.py), the first differs in what follows the install."""
    installing = [line for line in LINES if "pip install" in line]
    assert [line.startswith(INSTALL) for line in installing] == [True, True]
    assert all(line.startswith(INSTALL) or line in RUNS + RANKS + TOGETHER + BY_RAY for line in LINES)


def test_the_first_command_ends_with_a_picture(tmp_path: Path) -> None:
    (first,) = (line for line in RUNS if "--model demo" in line)
    assert run(first, tmp_path, "--device", "cpu") == ["demo.png"]
    assert Image.open(tmp_path / "demo.png").size == (128, 128)


def test_every_other_command_runs(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a fox\n# nobody\na lighthouse\n")
    tiny.lora(tmp_path / "style.safetensors", flux)
    small = ("--model", str(flux), "--size", "64x48", "--device", "cpu")
    for line in RUNS:
        if "--model demo" in line:
            continue
        if "runner runs" in line:
            assert answered(line, tmp_path)
            continue
        if "runner resume" in line:
            assert [(tmp_path / path).exists() for path in answered(line, tmp_path)] == [True, True]
            continue
        more = small if "--like" not in line else ("--model", str(flux), "--device", "cpu")
        steps = ("--steps", "2") if "--steps" not in line and "--like" not in line else ()
        if "runner report" in line:
            assert answered(line, tmp_path) == ["report.html"] and "Memory over time" in (
                tmp_path / "report.html").read_text()
            continue
        if "runner plan" in line:
            assert any("denoise" in printed for printed in answered(line, tmp_path, "--model", str(flux)))
            continue
        printed = answered(line, tmp_path, *more, *steps)
        assert printed and all((tmp_path / path).exists() for path in printed)
    shots = [np.asarray(Image.open(tmp_path / name)) for name in ("more-steps.png", "decoded-again.png",
                                                                  "the-same-pixels.png")]
    assert all(np.array_equal(shots[0], shot) for shot in shots)


@pytest.mark.parametrize("line", RANKS, ids=lambda line: line.split()[0])
def test_two_ranks_make_the_pictures_of_one_process(line: str, flux: Path, tmp_path: Path) -> None:
    printed = run(line, tmp_path, "--model", str(flux), "--size", "64x48", "--device", "cpu", "--steps", "2")
    asked = requests_for("a fox", FAMILIES["flux"], size=(64, 48), steps=2, seed=1, count=4)
    alone = run_all(make_plan(Job("flux", asked, model=flux, devices=["cpu"]))).pictures
    assert len(printed) == len(alone) == 4
    for path, picture in zip(printed, alone, strict=True):
        assert np.array_equal(Image.open(tmp_path / path), picture.pixels)


def test_two_processes_make_one_picture_together(flux: Path, tmp_path: Path) -> None:
    (line,) = TOGETHER
    small = ("--model", str(flux), "--size", "64x48", "--device", "cpu", "--steps", "2", "--ranks", "2")
    (printed,) = run(line, tmp_path, *small)
    asked = requests_for("a fox", FAMILIES["flux"], size=(64, 48), steps=2, seed=1)
    alone = run_all(make_plan(Job("flux", asked, model=flux, devices=["cpu"]))).pictures[0].pixels
    assert np.abs(np.asarray(Image.open(tmp_path / printed)).astype(int) - alone).max() <= 1


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = "\nassert picture.size == (128, 128) and picture.tobytes() == result.images[0].tobytes()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"demo"}))
def test_every_family_is_listed_with_its_defaults(family: str) -> None:
    listed = FAMILIES[family]
    size, guidance = "x".join(map(str, listed.size)), "-" if listed.guidance is None else listed.guidance
    assert f"| `{family}` | {listed.repo} | {size} | {listed.steps} | {guidance} |" in README


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_what_a_page_links_to_is_there(page: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text())
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing and (links or page != "README.md")


def test_the_table_of_cards_is_what_plans_say(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines()
            if re.match(r"\| `\dx", line)]
    assert len(rows) == 4
    for cards, *cells in rows:
        for machine, (family, cell) in itertools.product(
                re.findall("`(.*?)`", cards), zip(("flux", "z-image", "flux2-klein"), cells, strict=True)):
            allowed = ["--allow-offload", "cpu"]
            words = ["plan", family, "--machine", machine, "--json", *(allowed if allowed[0] in cell else ())]
            assert answer(words) == 0, (machine, family)
            plan = json.loads(capsys.readouterr().out)
            used = {device for stage in plan["stages"].values() for device in stage if device.startswith("cuda")}
            assert len(used) == (2 if "both" in cell else 1), (machine, family, used)
            if allowed[0] in cell:
                assert answer(words[:-2]) == 4 and "allow_offload" in capsys.readouterr().out
