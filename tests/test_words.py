"""What people type out of habit: prompts without quotes, other names, short options; each is taken or explained."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.commands import generate
from runner.commands.cli import answer, app
from runner.commands.family_names import named
from runner.commands.options import BatchOptions, FamilyOptions, PlanOptions
from runner.commands.parse import job_of
from runner.commands.words import again, line_words, read, spellings, with_prompt
from runner.job import Job
from runner.text import wrapped
from stages.families import FAMILIES
from tests.test_cli import base, elsewhere

__all__ = ["elsewhere"]


@pytest.mark.parametrize(("line", "parts"), [
    ("can be read: where there is a network, run: hf download a/b --include model_index.json --include '*/*'",
     ["can be read: where there is a", "  network, run:",
      "  hf download a/b --include model_index.json --include '*/*'"]),
    ("run: hf download a/b", ["run: hf download a/b"]),
    ("it fits again -> python -m runner flux --steps 4", ["it fits again ->", "  python -m runner flux --steps 4"]),
    ("-> what would help it is --allow-offload cpu: so much", ["-> what would help it is",
                                                              "  --allow-offload cpu: so much"]),
    ("with your account, then run `hf auth login` with it", ["with your account, then run",
                                                            "  `hf auth login` with it"]),
    ("", ["  "]),
])
def test_what_is_to_be_pasted_is_not_wrapped(line: str, parts: list[str]) -> None:
    assert wrapped(line, 30, "" if line else "  ") == parts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of the command lines that are answered; none is run."""
    jobs: list[Job] = []

    def make(family: str, options: FamilyOptions) -> int:
        jobs.append(job_of(family, options))
        return 0

    monkeypatch.setattr(generate, "make", make)
    return jobs


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line is refused with, in one line."""
    assert answer(words) == 2, words
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("words", [
    ["flux", "a fox"], ["flux", "--prompt", "a fox"], ["flux", "-p", "a fox"], ["flux", "-pa fox"], ["FLUX", "a fox"],
    ["Flux", "--", "a fox"], ["flux.1", "a fox"], ["black-forest-labs/FLUX.1-dev", "a fox"],
    ["BLACK-forest-labs/flux.1-DEV", "a fox"], ["batch", "flux", "a fox"], ["batch", "FLUX", "-p", "a fox"],
])
def test_a_prompt_and_a_family_are_said_in_any_of_these_ways(words: list[str], asked: list[Job]) -> None:
    assert answer([*words, "-s", "7"] if "--" not in words else ["flux", "-s", "7", *words[1:]]) == 0
    [job] = asked
    assert (job.family, job.requests[0].prompt, job.requests[0].seed) == ("flux", "a fox", 7)


@pytest.mark.parametrize(("word", "family"), [
    ("schnell", "flux-schnell"), ("FLUX.1-schnell", "flux-schnell"), ("flux.2", "flux2"),
    ("FLUX.2-klein", "flux2-klein"),
    ("qwen", "qwen-image"), ("Qwen/Qwen-Image", "qwen-image"), ("sd3.5", "sd3"), ("SD3", "sd3"),
    ("stabilityai/stable-diffusion-3.5-large", "sd3"), ("Z-Image-Turbo", "z-image"), ("demo", "demo"), ("sdxl", None),
])
def test_other_names_of_families(word: str, family: str | None) -> None:
    assert named(word) == family


def test_short_options_are_the_long_ones(asked: list[Job]) -> None:
    assert answer(["flux", "-p", "x", "-s", "3", "-n", "2", "-W", "512", "-H", "256", "-o", "out/"]) == 0
    assert answer(["flux", "--prompt", "x", "--seed", "3", "--count", "2", "--size", "512x256", "--out", "out/"]) == 0
    first, second = asked
    assert first.requests == second.requests and first.output == second.output


def test_one_side_leaves_the_other_as_it_is(asked: list[Job]) -> None:
    for words, size in ((["-W", "512"], (512, 1024)), (["--height", "768"], (1024, 768)),
                        (["--size", "512"], (512, 512)),
                        (["--model", "demo", "-H", "64"], (128, 64))):
        assert answer(["flux", "x", *words]) == 0
        request = asked[-1].requests[0]
        assert (request.width, request.height) == size
    Path("p.jsonl").write_text('{"prompt": "x", "width": 512}\n{"prompt": "x", "size": 256}\n{"prompt": "x"}\n')
    assert answer(["flux", "--prompt-file", "p.jsonl", "-H", "640"]) == 0
    assert [(each.width, each.height) for each in asked[-1].requests] == [(512, 640), (256, 256), (1024, 640)]


def test_types_have_short_names_too(asked: list[Job]) -> None:
    assert answer(["flux", "x", "--dtype", "bf16", "--dtype", "vae=fp32", "--dtype", "text_encoder=FP16"]) == 0
    assert asked[0].dtype == {"": "bfloat16", "vae": "float32", "text_encoder": "float16"}
    assert Job("flux", asked[0].requests, dtype="fp16").dtype == {"": "float16"}


@pytest.mark.parametrize(("words", "says"), [
    (["flux", "a", "red", "fox", "-s", "1"], "-> python -m runner flux 'a red fox' -s 1\n"),
    (["flux", "-s", "1", "it's", "a fox", "-q"], """-> python -m runner flux -s 1 'it'"'"'s a fox' -q\n"""),
    (["FLUX", "a", "fox"], "-> python -m runner flux 'a fox'\n"),
    (["plan", "flux", "a", "fox", "-q", "--machine", "1x8GB"], "plan flux 'a fox' -q --machine 1x8GB\n"),
    (["batch", "flux", "a", "fox"], "-> python -m runner batch flux 'a fox'\n"),
    (["a red fox", "-s", "1"], "-> python -m runner flux 'a red fox' -s 1\n"),
    (["flux", "plan"], "'plan' is a command, and stands in front -> python -m runner plan flux;"),
    (["flux", "resume", "last"], "-> python -m runner resume last;"), (["demo", "models"], "--prompt models\n"),
    (["flux", "x", "--prompt", "y"], "2 prompts are said"), (["flux", "-p", "x", "-p", "y"], "2 prompts are said"),
    (["plan", "flux", "x", "-p", "y"], "2 prompts are said"),
    (["flux", "x", "--prompt-file", "p.txt"], "both say what to draw"),
    (["flux", "p.txt"], "'p.txt' is a file -> --prompt-file p.txt draws its lines"),
    (["p.txt"], "and the file with --prompt-file p.txt"), (["plan"], "FAMILY"),
    (["sdxl", "x"], "'sdxl' is not supported -> supported are flux, flux-schnell, "),
    (["stabilityai/stable-diffusion-xl-base-1.0", "x"], "is not supported -> supported are flux"),
    (["plan", "SD1.5"], "is not supported"), (["Wan-AI/Wan2.1-T2V-14B-Diffusers"], "is not supported"),
    (["black-forest-labs/FLUX.1-Krea-dev", "a fox"],
     "-> python -m runner flux --model black-forest-labs/FLUX.1-Krea-dev 'a fox'\n"),
    (["plan", "stabilityai/stable-diffusion-3.5-medium"],
     "-> python -m runner plan sd3 --model stabilityai/stable-diffusion-3.5-medium\n"),
    (["nobody/nothing", "x"], "name the family that it is of, and the model with --model nobody/nothing"),
    (["fluxx", "x"], "Did you mean 'flux'?"), (["resme", "last"], "Did you mean 'resume'?"),
    (["zzz"], "python -m runner --help lists them"), (["plan", "flx"], "did you mean flux? choose from flux, "),
    (["flux", "x", "--size", "64x64", "-W", "32"], "both say the size"), (["flux", "x", "-W", "0"], "width must be"),
    (["flux", "x", "-H", "x"], "height must be"), (["flux", "x", "-W", "16384"], "the limit is 4,194,304"),
    (["flux", "x", "-o", "x.tiff"], "must end in .png, .webp, .jpg or .jpeg"),
    (["flux", "x", "--device", "gpu"], "is no device of torch -> cuda:0, or --gpus 0"),
    (["flux", "x", "--gpus", "1,1"], "the device 1 is named twice"),
    (["flux", "x", "--place", "denoize=0"], "there is no stage 'denoize'"),
    (["flux", "x", "--dtype", "int8"], "choose one of float32, bfloat16, float16"),
    (["flux", "x", "-x"], "No such option: -x"),
])
def test_what_cannot_be_is_said_with_what_can(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("a fox\n")
    assert says in refused(words, capsys)


def test_the_command_that_is_said_works_when_pasted(asked: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["flux", "-n", "2", "a", "fox", "-s", "1"], ["a fox", "-s", "1", "-n", "2"]):
        line = refused(words, capsys).split(" -> ")[1]
        assert answer(line_words(line)) == 0
        assert [each.prompt for each in asked[-1].requests] == ["a fox", "a fox"]
    assert len(asked) == 2


def test_what_is_on_this_machine_is_looked_for_before_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    (tmp_path / "style.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    cases = {
        "--lora gone.safetensors": 3, "--lora ./style.bin": 3, "--lora empty": 3, "--model ./gone": 3,
        "--model empty": 3,
        "--model qwen": 3, "--model qwen --revision main": 2, "--place denoise=0 --place decod=1": 2,
        "--device rocm:1": 2, "--out /proc/x.png": 2, "--like gone.webp": 2, "--max-memory 14GO": 2,
    }
    code = (
        "import json, sys\n"
        "from runner.commands.cli import answer\n"
        "codes = [answer([*front, 'x', *each]) for front, each in json.load(sys.stdin)]\n"
        "print(json.dumps([codes, sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))]))\n"
    )
    lines = [(front, shlex.split(words)) for words in cases for front in (["flux"], ["plan", "flux"])
             if front == ["flux"] or "--out" not in words]
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True,
                          cwd=tmp_path, check=True)
    codes, heavy = json.loads(done.stdout)
    assert codes == [cases[shlex.join(words)] for _, words in lines], done.stderr
    assert heavy == [] and done.stderr.count("error: ") == len(codes) == done.stderr.count("\n")


def test_words_know_their_options() -> None:
    words = ["plan", "flux", "-qs1", "-W", "64", "--out=x.png", "-ox.png", "-v", "a fox", "--", "-p"]
    known = spellings(app, words)
    assert [(said.option, said.value) for said in read(words, known)] == [
        ("", "plan"), ("", "flux"), ("--seed", "1"), ("--width", "64"), ("--out", "x.png"), ("--out", "x.png"),
        ("--verbose", None), ("", "a fox"), ("", None), ("", "-p")]
    assert again(words, {"--size": "32x32"}, known) == (
        "python -m runner plan flux -qs1 --out=x.png -ox.png -v 'a fox' --size 32x32 -- -p")
    for spelled in (["-"], ["-p", "-"], ["-p-"], ["--prompt", "-"], ["--prompt=-"]):
        assert with_prompt(["flux", *spelled, "-s", "1"], "-x y", known) == ["flux", "--prompt=-x y", "-s", "1"]


def test_a_family_is_the_first_of_two_arguments() -> None:
    plan = app(["plan", "flux", "a fox"], standalone_mode=False)
    assert isinstance(plan, PlanOptions) and (plan.family, plan.prompt) == ("flux", "a fox")
    batch = app(["batch"], standalone_mode=False)
    assert isinstance(batch, BatchOptions) and (batch.family, batch.prompt) == ("flux", None)


def test_a_positional_prompt_from_standard_input_is_repeated_in_what_would_fit(
    flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a fox\n")))
    words = base(flux, "-", "-s", "1", "--device", "cpu", "--max-memory", "100KB", "-q", "-o", "x.png")
    assert answer(words) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert "'--prompt=a fox' -s 1" in line and "--max-memory" not in line
    assert answer(line_words(line.removeprefix("next: "))) == 0 and Image.open("x.png").size == (64, 48)


def test_a_refused_plan_and_a_refused_run_are_json_too(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for front in (["plan"], []):
        words = [*front, *base(flux, "x", "--device", "cpu", "--max-memory", "100KB", "--json")]
        assert answer(words) == 4
        out, err = capsys.readouterr()
        told: dict[str, Any] = json.loads(out)
        assert told["exit_code"] == 4 and told["error"] == "NoStrategyFits" and told["kind"] == "error"
        assert told["reason"].startswith("does not fit: ") and f"error: {told['reason']}\n" in err
        assert any("100.0 KiB" in line or "97.7 KiB" in line for line in told["arithmetic"])
        assert told["fixes"] == [{"field": "max_memory", "value": None, "component": ""}]
        [command] = told["next"]
        assert f"next: {command}" in err and answer(line_words(command)) == 0
        capsys.readouterr()
    for words, code in ((["flux", "x", "--steps", "0"], 2), (["flux", "x", "--ste", "1"], 2),
                        (["flux", "x", "--model", "./gone"], 3), (["resume", "last", "--artifacts", "gone"], 5)):
        assert answer([*words, "--json"]) == code
        out, err = capsys.readouterr()
        told = json.loads(out)
        assert told["exit_code"] == code and f"error: {told['reason']}\n" == err and told["next"] == []


def test_a_run_begins_with_a_verdict_and_ends_with_its_picture(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(base(flux, "x", "-s", "3", "-o", "x.png")) == 0
    out, err = capsys.readouterr()
    # A slow machine says meanwhile what it does.
    first, *_, last = (line for line in err.splitlines() if not line.startswith("importing "))
    assert out == "x.png\n" and first.startswith("fits: the CPU, weights ") and " of " in first
    assert last.startswith("seed 3, ") and last.endswith(" s") and "re-used" not in err and "x.png" not in err
    assert all(len(line) <= 80 for line in err.splitlines() if "/" not in line)
    assert answer(base(flux, "x", "-s", "3", "-o", "y.png", "-v")) == 0
    err = capsys.readouterr().err
    assert "re-used" in err and "total " in err and "imports" in err and err.splitlines()[-1].startswith("seed 3, ")
    assert answer(base(flux, "x", "-s", "3", "--stop-after", "encode")) == 0
    assert "encode is done for 1 picture" in capsys.readouterr().err
    assert np.array_equal(Image.open("x.png"), Image.open("y.png"))


def test_every_family_and_its_license_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["models"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert answer(["models", "--json"]) == 0
    listed = {each["family"]: each for each in json.loads(capsys.readouterr().out)["families"]}
    assert listed.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        assert f"{name}: {family.repo}, " in out and listed[name]["license"] == family.license in out
        assert listed[name]["parameters"] == family.parameters > 0 and listed[name]["gated"] == family.gated
        assert (listed[name]["width"], listed[name]["steps"]) == (family.size[0], family.steps)
    assert {name for name, family in FAMILIES.items() if family.gated} == {"flux", "flux-schnell", "flux2", "sd3"}
