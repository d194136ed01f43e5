"""The command line: bad input is one line and an exit code, good input a path on standard output."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runner.commands import generate
from runner.commands.cli import answer
from runner.job_defaults import default_store
from runner.media.image import png, read_card
from stages.errors import BadResult, DoesNotFit, InvalidInput, ModelError, StageOutOfMemory, StoreError

BAD = [
    (["--prompt", ""], "empty prompt"),
    (["--prompt", "  "], "empty prompt"),
    ([], "there is no prompt"),
    (["--prompt"], "requires an argument"),
    (["--prompt", "x" * 16385], "16,385 bytes; the limit is 16,384"),
    (["--prompt", "a\0b"], "U+0000"),
    (["--prompt", "\x1b[2J"], "U+001B"),
    (["--prompt", "a\udcff"], "not valid UTF-8 at byte 1"),
    (["--prompt", "x", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
    (["--prompt", "x", "--steps", "-1"], "got -1"),
    (["--prompt", "x", "--steps", "2.5"], "got '2.5'"),
    (["--prompt", "x", "--steps", "100000"], "got 100000"),
    (["--prompt", "x", "--size", "0x64"], "width must be"),
    (["--prompt", "x", "--size=-16x64"], "width must be"),
    (["--prompt", "x", "--size", "64x"], "WxH"),
    (["--prompt", "x", "--size", "100000x64"], "got 100000"),
    (["--prompt", "x", "--size", "4096x2048"], "the limit is 4,194,304 -> --size 2880x1408"),
    (["--prompt", "x", "--guidance", "nan"], "guidance must be"),
    (["--prompt", "x", "--guidance", "inf"], "guidance must be"),
    (["--prompt", "x", "--guidance", "1e30"], "guidance must be"),
    (["--prompt", "x", "--guidance", "-1"], "guidance must be"),
    (["--prompt", "x", "--seed", "-5"], "seed must be"),
    (["--prompt", "x", "--seed", str(2**64)], "seed must be"),
    (["--prompt", "x", "--seed", "1.5"], "seed must be"),
    (["--prompt", "x", "--seed", "0x1F"], "seed must be"),
    (["--prompt", "x", "--seed", "9" * 5000], "seed must be"),
    (["--prompt", "x", "--seed", str(2**64 - 1), "--count", "2"], "pass the last seed"),
    (["--prompt", "x", "--count", "0"], "count must be a whole number from 1 to 64"),
    (["--prompt", "x", "--count", "-1"], "count must be"),
    (["--prompt", "x", "--count", "1000000000"], "count must be"),
    (["--promt", "x"], "Did you mean --prompt?"),
    (["--prompt", "x", "--ste", "5"], "Did you mean --steps?"),
    (["--prompt", "x", "--dtype", "fp8"], "choose one of float32, bfloat16, float16"),
    (["--prompt", "x", "--dtype", "vae=float32", "--dtype", "vae=float16"], "said twice for 'vae'"),
    (["--prompt", "x", "--device", "cuda:-1"], "is no device"),
    (["--prompt", "x", "--model", ""], "--model is empty"),
    (["--prompt", "x", "--out", "x.gif"], "must end in .png, .webp, .jpg or .jpeg"),
    (["--prompt", "x", "--out", "{sed}.png"], "did you mean {seed}?"),
    (["--prompt", "x", "--count", "2", "--out", "x.png"], "x-{index}.png"),
    (["--prompt", "x", "--stop-after", "decode"], "--stop-after"),
    (["--prompt", "x", "--stop-after", "encode", "--from-stage", "denoise"], "comes after"),
    (["--prompt", "x", "--stop-after", "encode", "--out", "x.png"], "makes no picture"),
    (["--prompt", "x", "--from-stage", "decode", "--artifacts", "memory"], "needs artifacts"),
    (["--prompt", "x", "-qv"], "contradict"),
    (["--like", "gone.png"], "cannot read gone.png"),
    (["--prompt", "x", "--negative-prompt", "y"], "reads no negative prompt"),
    (["--prompt", "x", "--lora", ""], "--lora names no file"),
    (["--prompt", "x", "--lora", "a.safetensors=0"], "must be from -10 to 10 and not 0"),
    (["--prompt", "x", "--lora", "none", "--lora", "a.safetensors"], "contradict"),
    (["--prompt", "x", "--log", "gone/log"], "--log 'gone/log': No such file"),
    (["x", "--prompt", "y"], "2 prompts are said"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a cache of its own for each test."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")


@pytest.mark.parametrize(("words", "says"), BAD, ids=[ascii(" ".join(words)[:40]) for words, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert answer(["flux", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err
    assert "\x1b" not in err and len(err) < 400
    assert not (tmp_path / "cache").exists() and not list(Path().iterdir())


def test_refusals_import_nothing_heavy_and_answer_in_half_a_second() -> None:
    code = (
        "import json, sys\n"
        "from runner.commands.cli import answer\n"
        "codes = [answer(['flux', *words]) for words in json.load(sys.stdin)]\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules)\n"
        "print(set(codes), sorted(heavy))\n"
    )
    lines = json.dumps([words for words, _ in BAD if "\udcff" not in "".join(words)])
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout == "{2} []\n"
    # Seconds of the processor, as the machine may be busy with other work.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    bad = subprocess.run([sys.executable, "-m", "runner", "flux", "--prompt", ""], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert bad.returncode == 2
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_store_is_in_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_store() == tmp_path / "cache" / "stagerun" / "store"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_store() == tmp_path / ".cache" / "stagerun" / "store"


def test_a_mistyped_family_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["fluks", "--prompt", "x"]) == 2
    assert "Did you mean 'flux'" in capsys.readouterr().err
    assert answer([]) == 0
    assert "flux-schnell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"x" * 10_000_000, "more than 16,384 bytes"), (b"caf\xc3\xa9 \xff", "not valid UTF-8 at byte 6"),
        (b"", "empty prompt"), (b"\n\n", "empty prompt"),
    ],
)
def test_a_bad_prompt_on_standard_input_is_refused(
    data: bytes, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert answer(["flux", "--prompt", "-"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("x"), 3), (DoesNotFit("x"), 4), (StageOutOfMemory("x"), 4), (MemoryError("x"), 4),
        (MemoryError(), 4),
        (StoreError("x"), 5), (BadResult("x"), 6), (InvalidInput("x"), 2), (ValueError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(family: str, said: Any) -> None:
        raise error

    monkeypatch.setattr(generate, "make", fail)
    assert answer(["flux", "--prompt", "x"]) == code
    quiet = capsys.readouterr().err
    assert quiet.startswith("error: ") and len(quiet) > 8 and quiet.count("\n") == 1
    assert ("run again with -v" in quiet) == (code == 1)
    assert answer(["flux", "--prompt", "x", "-v"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def base(flux: Path, *more: str) -> list[str]:
    return ["flux", "--model", str(flux), "--steps", "2", "--size", "64x48", *more]


def pixels(path: str | Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_prompt_becomes_a_picture_that_can_be_repeated(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = base(flux, "--prompt", "-a red circle", "--seed", "5", "--count", "2")
    assert answer([*words, "--out", "new/{index}.png"]) == 0
    out, err = capsys.readouterr()
    assert out == "new/0.png\nnew/1.png\n"
    assert "first seed 5\n" in err and "denoise: 2 pictures in" in err and "imports" not in err
    assert "fits: the CPU, weights " in err
    assert re.search(r"\n2 pictures in [0-9.]+ s, [0-9.]+ s per picture, seeds 5 to 6\n$", err) and ".png" not in err
    assert not np.array_equal(pixels("new/0.png"), pixels("new/1.png"))

    assert answer(["flux", "--like", "new/1.png", "--artifacts", "memory", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("new/1.png"))
    assert "seed 6" in capsys.readouterr().err
    assert answer(["flux", "--like", "new/1.png", "--seed", "5", "--out", "other.png"]) == 0
    assert np.array_equal(pixels("other.png"), pixels("new/0.png"))
    assert "decode: 1 picture taken from the store" in capsys.readouterr().err


def test_a_picture_is_never_overwritten_unasked(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.png").write_bytes(b"mine")
    words = base(flux, "--prompt", "x", "--seed", "1", "--out", "x.png", "-q")
    assert answer(words) == 2
    assert "x.png is there already -> --overwrite" in capsys.readouterr().err
    assert Path("x.png").read_bytes() == b"mine"
    assert answer([*words, "--overwrite"]) == 0
    assert (pixels("x.png").shape, capsys.readouterr()) == ((48, 64, 3), ("x.png\n", ""))


def test_stages_can_be_run_looked_at_and_run_again(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = base(flux, "--prompt", "x", "--seed", "1", "--artifacts", "store")
    assert answer([*words, "--from-stage", "decode"]) == 2
    assert "needs the artifacts of denoise" in capsys.readouterr().err
    assert answer([*words, "--stop-after", "denoise"]) == 0
    [path] = capsys.readouterr().out.splitlines()
    assert answer(["inspect", path]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("denoise ") and "latents  1x" in shown and "float32" in shown
    assert answer(["inspect", Path(path).stem[:10], "--artifacts", "store"]) == 0
    assert capsys.readouterr().out == shown
    stored = json.loads(Path(path).read_text())
    assert answer([*words, "--from-stage", "decode", "--json", "--no-metadata"]) == 0
    out, _ = capsys.readouterr()
    document = json.loads(out)
    assert [stage["made"] for stage in document["stages"]] == [0, 0, 1]
    assert document["artifacts"]["denoise"] == [Path(path).stem] and stored
    with Image.open(document["pictures"][0]["path"]) as image:
        assert not image.info and document["pictures"][0]["seed"] == 1


def test_inspect_refuses_what_is_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["inspect", "0123", "--artifacts", str(tmp_path / "none")]) == 5
    assert "no artifact store" in capsys.readouterr().err
    assert answer(["inspect"]) == 2


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--size", "33x48"], 2, "33x48"), (["--dtype", "unet=float32"], 2, "no component 'unet'"),
        (["--dtype", "ve=float32"], 2, "did you mean vae?"), (["--device", "cuda:99"], 2, "cuda:99"),
        (["--model", "./gone"], 3, "./gone"), (["--artifacts", "gone/deep/store"], 5, "gone/deep"),
    ],
)
def test_what_the_model_or_machine_cannot_do_is_refused_before_a_stage(
    flux: Path, more: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(base(flux, "--prompt", "x", "--out", "x.png", *more)) == code
    err = capsys.readouterr().err
    assert says in err and "encode:" not in err and not Path("x.png").exists()


def test_a_model_that_changed_does_not_pass_for_the_one_of_a_picture(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(base(flux, "--prompt", "x", "--seed", "1", "--out", "x.png", "-q")) == 0
    said = read_card("x.png")
    with Image.open("x.png") as image:
        card = json.loads(image.info["runner"])
    Path("y.png").write_bytes(png(pixels("x.png"), {**card, "identity": "sha256:" + "0" * 64}))
    assert answer(["flux", "--like", "y.png", "--out", "z.png"]) == 3
    assert said.identity in capsys.readouterr().err and not Path("z.png").exists()
    assert answer(["flux", "--like", "y.png", "--model", str(flux), "--out", "z.png", "-q"]) == 0
    assert np.array_equal(pixels("z.png"), pixels("x.png"))
    assert answer(["flux-schnell", "--like", "x.png"]) == 2
    assert "was made by flux" in capsys.readouterr().err


def test_the_token_is_written_nowhere(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_SENTINELsentinelSENTINELsentinel"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert answer(base(flux, "--prompt", "x", "--out", "x.png", "-v", "--log", "log", "--json")) == 0
    assert answer(["flux", "--model", "nobody/nothing", "--prompt", "x", "--out", "y.png", "-v", "--log", "log"]) == 3
    texts = "".join(capsys.readouterr()).encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and b"denoise" in texts
    for data in (texts, *(path.read_bytes() for path in files)):
        assert secret.encode() not in data and b"SENTINEL" not in data


@pytest.mark.parametrize(("words", "says"), [
    ([b"caf\xc3\xa9", "--steps", "0"], b"error: steps must be a whole number from 1 to 1000, got 0"),
    ([b"caf\xe9"], b"error: the prompt is not valid UTF-8 at byte 3 -> write it again in UTF-8"),
])
def test_letters_are_read_where_the_locale_knows_none(words: list[Any], says: bytes) -> None:
    """Only what is no UTF-8 is at fault."""
    words = [sys.executable, "-m", "runner", "flux", "--prompt", *words]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(words, env={**os.environ, **ascii_only}, capture_output=True, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (2, [says])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_exit_code_and_no_torn_file(flux: Path, number: int, code: int) -> None:
    words = base(flux, "--prompt", "x", "--out", "x.png", "--steps", "1000", "--artifacts", "store", "--log", "log")
    child = subprocess.Popen(
        [sys.executable, "-m", "runner", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with Ctrl-C ignored, and so are their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while '"step"' not in (Path("log").read_text() if Path("log").exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, number)
    start = time.monotonic()
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, b"")
    assert err.count(b"error: ") == 1 and b"Traceback" not in err
    assert time.monotonic() - start < 30
    assert not Path("x.png").exists()
    # The embeddings, and the latents as they are midway.
    assert len(list(Path("store/stages").iterdir())) == 2
    [run] = Path("store/runs").glob("*/run.json")
    command = f"python -m runner resume {run.parent.name} --artifacts store"
    assert err.decode().splitlines()[-1].endswith(f"; go on with: {command}")
    assert not [path for path in Path("store/tmp").iterdir() if path.suffix == ".part"]
    assert '"flush", "stage": "denoise"' in Path("log").read_text(), "the stage let go of its memory"
