"""The commands that `runs show` and a report give: they ask for the very job of the run, and replace no file."""

import dataclasses
import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.commands.cli import answer, app
from runner.commands.options import FamilyOptions
from runner.commands.parse import job_of
from runner.job import Job, Label, Output, RunPolicy
from runner.job_defaults import default_store
from runner.reports.repeat import further_line, repeat_line, words_of
from runner.request import requests_for
from stages.families import FAMILIES

USUAL = str(default_store())
PROMPT = "a 'red' \"circle\" for $HOME, \\ and `date`; ! \u00e9 \u202e\n-- second line"
# What a command need not say: names of this one run, and what stands in the way of doing it anew.
UNSAID = {"whole", "run", "labels", "refused", "origin", "resumed", "output", "requests", "family"}


def job(**more: Any) -> Job:
    policy = RunPolicy(**more.pop("policy", {}))
    inputs = {"size": (64, 48), "steps": 3, "seed": 7, **more.pop("inputs", {})}
    family = more.pop("family", "flux")
    asked = requests_for(more.pop("prompt", PROMPT), FAMILIES[family], **inputs)
    return Job(family, asked, policy=policy, run="r1", **more)


JOBS = {
    "plain": job(),
    "leading dash": job(prompt="--help"),
    "several": job(inputs={"count": 3}),
    "sd3": job(family="sd3", inputs={"guidance": 4.25, "negative_prompt": "-1 blur"}),
    "no guidance": job(family="flux-schnell"),
    "model": job(model="some/model", revision="a" * 40, loras=["style.safetensors=0.8", "a=b.safetensors=-1.25"]),
    "types": job(dtype={"transformer": "bfloat16", "text_encoder": "bfloat16", "vae": "float32"}),
    "one type": job(dtype="float16"),
    "cards": job(devices="0,1", max_memory="0=14GiB,cpu=24GiB", place=["denoise=0:9,1:28,0:20", "decode=1"], lanes=2),
    "leave free": job(devices=["cuda:1", "cpu"], max_memory="-2GiB", allow_offload="disk"),
    "switches": job(modulation_table=False, peer_copies=False,
                    policy={"degrade": False, "preview": 4, "sample_memory": True, "strict": True, "step_every": 0.5}),
    "store": job(store="s3://bucket/a b"),
    "scheduler": job(scheduler="UniPCMultistepScheduler,use_flow_sigmas=true,solver_order=3"),
    "tiles": job(tile=256, inputs={"size": (512, 256)}),
    "whole": job(tile=0),
    "half": job(policy={"stop_after": "denoise"}),
}


def asked_for(line: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The job that a line asks for when it is pasted."""
    monkeypatch.chdir(where)
    for name in ("style.safetensors", "a=b.safetensors"):
        (where / name).touch()
    words = shlex.split(line) if "$'" not in line else bash_words(line)
    assert words[:3] == ["python", "-m", "runner"]
    options = app(words[3:], standalone_mode=False)
    assert isinstance(options, FamilyOptions)
    return job_of(words[3], options)


def bash_words(line: str) -> list[str]:
    script = f"python() {{ printf '%s\\0' python \"$@\"; }}; {line}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True,
                          env={"LC_ALL": "C.UTF-8"})
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", JOBS)
def test_the_command_asks_for_the_same_job(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = JOBS[name]
    found = asked_for(repeat_line(done, USUAL), tmp_path, monkeypatch)
    assert found.family == done.family and found.requests == done.requests
    for field in dataclasses.fields(Job):
        if field.name not in UNSAID | {"store", "dtype"}:
            assert getattr(found, field.name) == getattr(done, field.name), field.name
    assert found.store == done.store or not done.store
    assert {part: found.dtype.get(part, found.dtype.get("")) for part in done.dtype} == done.dtype
    assert found.output.metadata and len(found.output.paths) == (0 if done.policy.stop_after else len(done.requests))


def test_the_command_replaces_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fox = tmp_path / "out" / "fox.png"
    one = job(output=Output((str(fox),), metadata=False))
    found = asked_for(repeat_line(one, USUAL), tmp_path, monkeypatch).output
    assert found == Output((str(fox),), False, False, str(fox.parent))
    fox.parent.mkdir()
    fox.write_bytes(b"")
    (beside,) = asked_for(repeat_line(one, USUAL), tmp_path, monkeypatch).output.paths
    assert Path(beside).parent == fox.parent and Path(beside).name.startswith("fox-2") and beside != str(fox)
    paths = (str(tmp_path / "out" / "a" / "1.png"), str(tmp_path / "out" / "b" / "2.png"))
    several = job(inputs={"count": 2}, output=Output(paths, folder=str(tmp_path / "out")))
    again = asked_for(repeat_line(several, USUAL), tmp_path, monkeypatch).output.paths
    assert {Path(path).parent for path in again} == {fox.parent} and len({*again}) == 2


@pytest.mark.parametrize(
    "odd",
    [
        job(prompt="-"),
        job(inputs={"text_tokens": 77}),
        replace(job(inputs={"count": 2}), labels=(Label(1), Label(2))),
        Job("flux", [requests_for(prompt, FAMILIES["flux"], seed=1)[0] for prompt in ("a", "b")], run="r1"),
        job(output=Output(("a{b}.png",))),
    ],
)
def test_what_no_options_can_say_is_repeated_by_its_record(odd: Job) -> None:
    odd = replace(odd, run="r1", store="/some where")
    assert words_of(odd, USUAL) is None
    assert repeat_line(odd, USUAL) == "python -m runner resume r1 --from encode --artifacts '/some where'"


def test_seeds_that_are_not_counted_up_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = job(inputs={"count": 3}).only([0, 2])
    found = asked_for(repeat_line(some, USUAL), tmp_path, monkeypatch)
    assert [request.seed for request in found.requests] == [7, 9]


def test_what_was_stopped_goes_on_behind_its_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = further_line(JOBS["half"], USUAL)
    assert line is not None and further_line(JOBS["plain"], USUAL) is None
    found = asked_for(line, tmp_path, monkeypatch)
    assert found.policy.stop_after is None and found.requests == JOBS["half"].requests


def test_every_field_of_a_job_is_said_or_known_not_to_be() -> None:
    """A new field of a job or of its policy must come into the command, or into `UNSAID`."""
    said = {field.name for name in JOBS for field in dataclasses.fields(Job)
            if getattr(JOBS[name], field.name) != getattr(Job("flux", JOBS["plain"].requests), field.name)}
    assert {field.name for field in dataclasses.fields(Job)} == said | UNSAID | {"policy"}
    changed = {field.name for name in JOBS for field in dataclasses.fields(RunPolicy)
               if getattr(JOBS[name].policy, field.name) != getattr(RunPolicy(), field.name)}
    assert changed == {field.name for field in dataclasses.fields(RunPolicy)} - {"from_stage"}


@pytest.mark.usefixtures("elsewhere")
def test_show_gives_commands_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a large red circle on the left on a blue background"
    words = ["demo", "--prompt", prompt, "--steps", "1", "--seed", "3", "--device", "cpu", "-q"]
    assert answer([*words, "--stop-after", "encode"]) == 0
    assert "picture 0" not in (shown := show(capsys)) and "go on: python -m runner demo --prompt" in shown
    assert answer(line_of(shown, "go on")) == 0
    made = Path(capsys.readouterr().out.strip())
    shown = show(capsys)
    assert f"picture 0: {made.absolute()}\n" in shown and "go on: " not in shown
    assert answer([*line_of(shown, "repeat it"), "-q"]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again.stem.startswith(made.stem) and again != made and again.parent == made.parent.absolute()
    found = json.loads(show(capsys, "--json"))
    assert found["files"] == [{"path": str(again), "there": True}] and found["go_on"] is None
    again.unlink()
    assert f"picture 0: {again} (not there)" in show(capsys)
    assert answer(["runs", "ls"]) == 0 and capsys.readouterr().out.count(prompt[:20]) == 3


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert answer(["runs", "show", "last", *words]) == 0
    return capsys.readouterr().out


def line_of(shown: str, what: str) -> list[str]:
    (line,) = (line for line in shown.splitlines() if line.startswith(f"{what}: "))
    return shlex.split(line.removeprefix(f"{what}: "))[3:]
