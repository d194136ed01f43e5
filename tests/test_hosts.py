"""The page on several hosts: its commands are ones that there are, and its script makes pictures on two "hosts"."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from runner import Job, make_plan, run_all
from runner.commands.cli import app
from runner.commands.options import FamilyOptions
from runner.commands.parse import job_of
from runner.distributed.ray.cluster import reached
from runner.distributed.watchdog import SILENCE, TIMEOUT
from runner.request import requests_for
from stages.errors import InvalidInput
from stages.families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hosts.md").read_text()
LINES = [line.partition("  #")[0] for block in re.findall("```sh\n(.*?)```", PAGE, re.DOTALL)
         for line in block.splitlines()]
(SCRIPT,) = re.findall("```slurm\n(.*?)```", PAGE, re.DOTALL)
# As many tasks as hosts, each with its number: what srun does, on this machine.
SRUN = '#!/bin/bash\nshift\nSLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" >/dev/null & wait -n && wait -n\n'


def words_of(line: str) -> list[str]:
    """The words behind `runner` of a line of the page."""
    words = shlex.split(line)
    return words[words.index("runner") + 1 :]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("torchrun")])
def test_torchrun_takes_its_lines(line: str) -> None:
    found = get_args_parser().parse_args(shlex.split(line)[1:])
    assert (found.nnodes, found.master_addr, found.master_port) == ("2", "host0", 29500)
    assert found.training_script == "runner" and found.training_script_args == words_of(line)


def test_an_option_that_torchrun_takes_for_its_own_is_behind_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["runner", "flux", "--log", "events.jsonl"]
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["-m", *more])
    assert "ambiguous option: --log" in capsys.readouterr().err and "`-m -- runner flux" in PAGE
    assert get_args_parser().parse_args(["-m", "--", *more]).training_script_args[-2:] == more[-2:]


@pytest.mark.parametrize("line", [line for line in [*LINES, SCRIPT.replace("\\\n", "").replace("'\n", "")]
                                  if "runner flux" in line])
def test_the_commands_of_the_page_ask_for_pictures(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a fox\na dog\n")
    words = shlex.split(line[line.index("runner flux") :].replace("/shared/pictures/", "pictures/"))[1:]
    options = app(words, standalone_mode=False)
    assert isinstance(options, FamilyOptions)
    assert len(job_of("flux", options).requests) == 2 and options.artifacts == "/shared/stagerun"


def test_what_the_page_says_of_seconds_is_so() -> None:
    assert f"after {SILENCE:.0f} seconds rank 0 says" in PAGE and f"`--rank-timeout` ({TIMEOUT:.0f})" in PAGE


def test_a_cluster_that_lets_nobody_in_is_one_line() -> None:
    said = "^no Ray lets this process in at RAY_ADDRESS=host0:6379: no answer -> ray start --head there, RAY_AUTH_MODE"
    for error in (ConnectionError("no answer\nand more"), RuntimeError("no answer")):
        with pytest.raises(InvalidInput, match=said), reached("host0:6379"):
            raise error
    with pytest.raises(RuntimeError, match="another"), reached(None):
        raise RuntimeError("another")


def test_the_script_for_slurm_makes_the_pictures_of_one_process_on_two_hosts(flux: Path, tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True).returncode == 0
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"),
                       ("torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "prompts.txt").write_text("a fox\na dog\n")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = SCRIPT.replace("/shared/", f"{tmp_path}/").replace(
        "flux --prompt-file", f"flux --model {flux} --size 64x48 --steps 2 --device cpu -q --prompt-file").replace(
        "$((20000 + SLURM_JOB_ID % 10000))", str(port))
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "two", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    paths = done.stdout.splitlines()
    assert len(paths) == 2 and {Path(path).parent for path in paths} == {tmp_path / "pictures"}
    for path, (prompt, seed) in zip(paths, (("a fox", 1), ("a dog", 2)), strict=True):
        asked = requests_for(prompt, FAMILIES["flux"], size=(64, 48), steps=2, seed=seed)
        (alone,) = run_all(make_plan(Job("flux", asked, model=flux, devices=["cpu"]))).pictures
        assert np.array_equal(Image.open(path), alone.pixels)
