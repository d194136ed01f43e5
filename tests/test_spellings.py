"""What others call an option or a command is answered with what it is here, in one line, before torch is imported."""

import shlex
from pathlib import Path

import pytest

from runner.commands.cli import answer, app
from runner.commands.habits import _COMMANDS, _OF_RUNS, _OPTIONS
from runner.commands.words import spellings
from tests.test_cli import base, elsewhere

__all__ = ["elsewhere"]


@pytest.mark.parametrize(("words", "says"), [
    ("flux --num-inference-steps 4 x", "No such option: --num-inference-steps. Did you mean --steps?"),
    ("flux --num_inference_steps=4 x", "Did you mean --steps?"), ("flux x --cfg 3", "Did you mean --guidance?"),
    ("flux x --guidance_scale 3", "Did you mean --guidance?"), ("flux x --prompt_file a", "mean --prompt-file?"),
    ("flux x --true_cfg_scale 3", "Did you mean --guidance?"), ("flux x --torch_dtype bf16", "Did you mean --dtype?"),
    ("flux x --num_images_per_prompt 2", "Did you mean --count?"), ("flux x --fp16", "Did you mean --dtype fp16?"),
    ("flux x --enable_model_cpu_offload", "Did you mean --allow-offload cpu?"),
    ("plan flux --device_map balanced", "Did you mean --place?"), ("flux x --sampler a", "Did you mean --scheduler?"),
    ("flux x --num-gpus 2", "Did you mean --gpus 0,1?"), ("flux x --gpu 1", "Did you mean --gpus?"),
    ("runs prune --older 3", "Did you mean --older-than?"), ("flux x --cache-dir y", "the variable HF_HOME"),
    ("flux x --quite", "Did you mean --quiet?"), ("doctor --steps 3", "No such option: --steps"),
    ("flux x --stesp 3", "Did you mean --steps?"), ("--prompt x", "-> python -m runner flux --prompt x"),
    ("report last --json", "-> python -m runner runs show last --json"), ("ls", "-> python -m runner runs ls"),
    ("ls --json", "-> python -m runner runs ls --json"), ("help", "-> python -m runner --help"),
    ("help plan", "-> python -m runner plan --help"), ("version", "-> python -m runner --version"),
    ("config", "-> python -m runner flux --print-config"), ("generate 'a fox' -s 3", "runner flux 'a fox' -s 3"),
    ("runs ls --status bogus", "--status 'bogus' -> choose from done, interrupted, failed, running, damaged"),
    ("runs ls --status donne", "did you mean done?"), ("flux x --engine dask", "--engine 'dask' -> choose from local"),
    ("runs ls --last x", "--last must be a whole number"), ("runs ls --last 0", "--last must be 1 or more"),
    ("runs", "choose from ls, show, rm, gc, prune, du, verify: python -m runner runs ls"),
    ("runs list", "did you mean ls?"), ("runs delete x", "did you mean rm?"), ("runs rm", "python -m runner runs ls"),
    ("runs bogus", "runs has no command 'bogus' -> choose from ls, "), ("resume", "-> python -m runner resume last"),
    ("report", "-> python -m runner report last"), ("inspect", "-> python -m runner inspect last:denoise"),
    ("models bogus", "there is no family 'bogus' -> choose from flux"), ("doctor flux", "runner doctor --help"),
    ("plan --machine 2xT4", "Missing argument 'FAMILY' -> python -m runner plan flux --machine 2xT4"),
    ("plan 2xT4", "-> python -m runner plan flux --machine 2xT4"), ("2xT4", "runner plan flux --machine 2xT4"),
    ("plan 2xT4 sd3", "-> python -m runner plan sd3 --machine 2xT4"),
    ("plan flux 2xT4", "'2xT4' is a machine -> python -m runner plan flux --machine 2xT4; or to draw that word"),
    ("plan flux 'a fox' 2*T4 -n 2", "-> python -m runner plan flux 'a fox' --machine '2*T4' -n 2;"),
    ("plan flux 2xT44", "'T44' is no card that is known here -> did you mean T4?"),
    ("flux 2xT4", "-> python -m runner plan flux --machine 2xT4; or to draw that word, --prompt 2xT4"),
    ("flux 'a fox' 2x16GB", "-> python -m runner plan flux 'a fox' --machine 2x16GB;"),
    ("flux 'a fox' --machine 2xT4", "-> python -m runner plan flux 'a fox' --machine 2xT4"),
    ("batch flux --machine 2xT4", "-> python -m runner plan flux --machine 2xT4"),
    ("batch --machine 2xT4", "-> python -m runner plan flux --machine 2xT4"),
    ("resume last --machine T4", "are for plan, which loads nothing -> python -m runner plan flux --machine 2xT4"),
    ("flux x --gpus 2xT4", "those of this machine have numbers -> such as 0,1; for cards that are not here"),
    ("flux x --device T4", "such as cuda:0; for cards that are not here, the command plan with --machine T4"),
])
def test_a_habit_is_answered_with_what_is_meant(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("error: ") and err.count("\n") == 1
    assert not out or "--json" in words


def test_every_habit_leads_to_what_there_is() -> None:
    known = {*spellings(app, ["flux"]), *spellings(app, ["plan"])}
    assert {option.partition(" ")[0] for option in _OPTIONS} <= known
    commands = {each.name for each in app.registered_commands} | {"models", "doctor", "runs", "--version"}
    assert {words[0] for words in _COMMANDS} <= commands
    of_runs = {name for words in _COMMANDS for name in words[1:] if words[0] == "runs"} | {*_OF_RUNS.values()}
    assert of_runs <= {"ls", "show", "rm", "gc", "prune", "du", "verify"}
    for habits, taken in ((_OPTIONS, known), (_COMMANDS, commands)):
        named = [name for names in habits.values() for name in names]
        assert len(named) == len({*named}) and not {f"--{name}" if taken is known else name for name in named} & taken


def test_keys_of_a_prompt_file_are_habits_too(capsys: pytest.CaptureFixture[str]) -> None:
    with open("p.jsonl", "w") as file:
        file.write('{"prompt": "a fox", "num_inference_steps": 4}')
    assert answer(["flux", "--prompt-file", "p.jsonl"]) == 2
    assert "it has the unknown key 'num_inference_steps' -> did you mean steps?" in capsys.readouterr().err


def test_one_family_alone_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["models", "FLUX.1-schnell"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("flux-schnell: ") and "FLUX.1-dev" not in out and "runner plan flux-schnell" in out


def test_a_run_is_no_artifact(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = base(flux, "x", "--artifacts", "s", "-q", "--stop-after", "encode", "--device", "cpu")
    assert answer(words) == 0
    capsys.readouterr()
    assert answer(["inspect", "last", "--artifacts", "s"]) == 2
    assert "each stage -> python -m runner inspect last:denoise --artifacts s, or of" in capsys.readouterr().err
