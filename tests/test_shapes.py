"""The shapes that ship with the package: true totals, small, and enough to plan for the machines that people have."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants as settings
import pytest

import stagerun
from runner import Job, Request, make_plan, run_all
from runner.commands.cli import answer
from runner.planning.planner import fetched
from stages.errors import DoesNotFit, ModelError, from_json
from stages.families import FAMILIES
from stages.models.checkpoint import find, find_shapes
from stages.models.hub_answers import answers
from stages.models.shapes import Shapes, file_name, shipped
from stages.pipeline.denoise import Denoise
from stages.pipeline.split import split
from tests import sparse
from tools import shapes as tool

GB = 10**9
# By family and component, the billions of bytes of the files of the hub.
TOTALS = {
    "flux": {"transformer": 23.80, "text_encoder": 0.246, "text_encoder_2": 9.52, "vae": 0.168},
    "flux-schnell": {"transformer": 23.78, "text_encoder_2": 9.52},
    "flux2": {"transformer": 64.45, "text_encoder": 48.02},
    "flux2-klein": {"transformer": 7.75, "text_encoder": 8.04},
    "flux2-klein-base": {"transformer": 7.75, "text_encoder": 8.04},
    "qwen-image": {"transformer": 40.86, "text_encoder": 16.58, "vae": 0.254},
    "sd3": {"transformer": 16.29, "text_encoder": 0.247, "text_encoder_2": 1.39, "text_encoder_3": 9.52},
    "z-image": {"transformer": 24.62, "text_encoder": 8.04, "vae": 0.168},
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder for shapes: what was made of a folder is known for all plans of it."""
    return str(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def offline(assets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no network: plans are made of the shapes that ship with the package."""
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(settings, "HF_ASSETS_CACHE", assets)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert answer(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "demo"])
def test_every_family_has_shapes_of_the_known_sizes(family: str) -> None:
    found = find_shapes(FAMILIES[family].repo)
    assert found is not None and found.pipeline == FAMILIES[family].pipeline
    assert {name: found.components[name].bytes / GB for name in TOTALS[family]} == pytest.approx(
        TOTALS[family], rel=0.004)
    assert found.bytes_to_download == found.bytes_elsewhere > 0 and "made from its configs" in found.shapes
    asked = Request("a fox", seed=0).filled(FAMILIES[family], 0)
    denoise = split(found, asked.inputs)[1]
    assert isinstance(denoise, Denoise)
    assert denoise.scale_factor * FAMILIES[family].patch == FAMILIES[family].multiple


@pytest.mark.parametrize(("words", "says"), [
    (["--size", "1023x1024"], "--size 1023x1024: this model makes multiples of 16; nearest are 1024x1024 and"),
    (["--model", "some/finetune", "--size", "1000"], "this model makes multiples of 16"),
    (["--dtype", "unet=bf16"], "--dtype: the model has no component 'unet' -> choose from text_encoder, "),
    (["--place", "encode.vae=cuda:0"], "encode has no component vae: choose from text_encoder, text_encoder_2"),
])
def test_what_cannot_be_is_refused_before_a_download_is_asked_for(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["flux", "a fox", "--device", "cpu", "--artifacts", "memory", "-q"]
    assert answer([*asked, *words]) == 2
    assert says in capsys.readouterr().err


def test_a_line_of_a_size_that_is_not_made_is_refused_and_the_others_are_told_of_the_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a fox", "size": "1000"}\n{"prompt": "a fox"}\n')
    assert answer(["flux", "--prompt-file", str(file), "--device", "cpu", "--artifacts", "memory"]) == 3
    assert "is not in the cache and HF_HUB_OFFLINE is set" in capsys.readouterr().err
    file.write_text('{"prompt": "a fox", "size": "1000"}\n')
    assert answer(["flux", "--prompt-file", str(file), "--device", "cpu", "--artifacts", "memory"]) == 2
    assert "no line is left: --size 1000x1000: this model makes multiples of 16" in capsys.readouterr().err


def test_all_of_them_are_small_and_say_what_they_were_made_from() -> None:
    files = sorted(tool.SHIPPED.iterdir())
    assert [file.name for file in files] == sorted(file_name(FAMILIES[family].repo) for family in TOTALS)
    assert sum(file.stat().st_size for file in files) < 100_000
    for file in files:
        found = Shapes.unpacked(file.read_bytes())
        assert (found.commit is None) == (found.source == "its configs") and " with diffusers " in found.made


def test_they_are_what_the_tool_makes_of_the_configs() -> None:
    """Of the configs only which there are: another version of a library may write a field more."""
    made = Shapes.unpacked(tool.made("flux", "configs").packed())
    kept = shipped(FAMILIES["flux"].repo)
    assert kept is not None and (made.weights, made.model) == (kept.weights, kept.model)
    assert made.small.keys() == kept.small.keys() > {"model_index.json", "transformer/config.json"}


@pytest.mark.parametrize(("machine", "encode", "denoise", "dtype"), [
    ("2xT4", 2, 2, "float16"), ("2x4060Ti", 1, 2, "bfloat16"), ("1x3090+1x4060", 1, 1, "bfloat16"),
    ("1x4090", 1, 1, "bfloat16"), ("1x24GB", 1, 1, "bfloat16"), ("2x16GB,ram=30GB,no-bf16", 2, 2, "float16"),
])
def test_flux_dev_on_machines_that_people_have(
    machine: str, encode: int, denoise: int, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many cards each stage takes, and the type of the denoiser: a T4 has no bfloat16, and T5 19 GB in float32."""
    found = planned(capsys, "flux", "--machine", machine)
    assert [len(found["stages"][stage]) for stage in ("encode", "denoise", "decode")] == [encode, denoise, 1]
    assert found["components"]["transformer"]["dtype"] == dtype
    assert "made from its configs" in found["shapes"]
    assert (found["picture"] is None) == ("GB" in machine), "no rate is known of a card that has no name"


@pytest.mark.parametrize("machine", ["1xT4", "2x4060"])
def test_flux_dev_on_less_is_refused_with_a_command_that_fits(
    machine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(["plan", "flux", "--machine", machine]) == 4
    error, *_, last = capsys.readouterr().err.splitlines()
    assert "does not fit" in error
    assert last == f"next: python -m runner plan flux --machine {machine} --allow-offload cpu"


def test_what_a_refused_plan_rests_on_is_said_as_of_one_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    fitting = planned(capsys, "flux", "--machine", "2xT4")
    assert answer(["plan", "flux", "--machine", "2xT4", "--max-memory", "2GiB", "--json"]) == 4
    out, err = capsys.readouterr()
    refused = json.loads(out)
    assert refused["assumed"] == fitting["assumed"] and len(fitting["assumed"]) == 3
    assert refused["shapes"] == fitting["shapes"] != ""
    told = " ".join(err.split())
    assert all(f" assumed: {text}" in told for text in fitting["assumed"])
    assert " planned from shapes that ship with stagerun, made from its configs" in told
    assert not [line for line in refused["arithmetic"] if "assumed" in line]
    # What is to be pasted is whole.
    command = "hf download black-forest-labs/FLUX.1-dev --include model_index.json --include '*/*'"
    assert command in [line.strip() for line in err.splitlines()]
    with pytest.raises(DoesNotFit, match=r"assumed: T4-16GB: 14\.7 GiB as torch sees it") as error:
        make_plan("flux", "a fox", machine="2xT4", max_memory="2GiB")
    assert str(from_json(json.loads(json.dumps(error.value.to_json())))) == str(error.value)


def test_the_plan_says_that_it_is_made_of_shapes_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["plan", "flux", "--machine", "2xT4"]) == 0
    out, err = capsys.readouterr()
    out = " ".join(out.split())
    assert "planned from shapes that ship with stagerun, made from its configs (no commit) on " in out
    assert "its own files are planned from once they can be read: black-forest-labs/FLUX.1-dev is not in" in out
    assert "disk: 31.4 GiB to download" in out and err == ""


def test_a_model_that_can_be_read_is_planned_from_its_own_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev"
    sparse.flux_dev(at / "snapshots" / ("a" * 40), text_layers=2)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text("a" * 40)
    found = planned(capsys, "flux", "--machine", "2xT4")
    assert found["shapes"] is None and found["components"]["text_encoder_2"]["bytes"] < 4 * GB
    # A cache that has a part of it, and no network: shapes again.
    shutil.rmtree(at / "snapshots" / ("a" * 40) / "vae")
    assert planned(capsys, "flux", "--machine", "2xT4")["shapes"] is not None


def test_nothing_is_run_from_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("a fox", 64, 64, steps=1, guidance=3.5, seed=0, text_tokens=32)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        make_plan(Job("flux", [request], devices=["cpu"]), shapes=False)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        make_plan(Job("flux", [request], revision="main"), machine="2xT4")
    plan = make_plan(Job("flux", [request]), machine="2xT4")
    with pytest.raises(ModelError, match="made of shapes alone"):
        fetched(plan)
    words = ["flux", "--prompt", "a fox", "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert answer(words) == 3
    assert "is not in the cache and HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_python_plans_from_shapes_as_the_command_does_and_runs_nothing_of_them(
    capsys: pytest.CaptureFixture[str]
) -> None:
    # With an encoder and a transformer that are read from the disk block by block, so that it fits any machine.
    words: dict[str, Any] = {"devices": "cpu", "allow_offload": "disk", "dtype": "bfloat16"}
    pipe = stagerun.Pipeline("flux2-klein", **words)
    plan = pipe.plan
    found = planned(capsys, "flux2-klein", "--device", "cpu", "--allow-offload", "disk", "--dtype", "bfloat16")
    assert found["shapes"] == plan.checkpoint.shapes
    assert "planned from shapes that ship with stagerun, made from its configs" in " ".join(str(plan).split())
    made = make_plan("flux2-klein", "a fox", store="memory", **words)
    assert made.checkpoint.shapes == plan.checkpoint.shapes and made.needs.keys() == plan.needs.keys()
    unread = "black-forest-labs/FLUX[.]2-klein-4B is not in the cache and HF_HUB_OFFLINE is set"
    with pytest.raises(ModelError, match=f"nothing is run from them: {unread}"):
        run_all(made)
    for call in (pipe, pipe.encode):
        with pytest.raises(ModelError, match=f"^{unread}"):
            call("a fox")


def test_a_disk_that_is_said_must_hold_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("a fox", 64, 64, steps=1, guidance=3.5, seed=0, text_tokens=32)
    with pytest.raises(DoesNotFit, match=r"31\.4 GiB of weights to download.*disk=34GB"):
        make_plan(Job("flux", [request]), machine="1x24GB,disk=20GB")
    found = planned(capsys, "flux", "--machine", "1x24GB,ram=16GB,disk=100GB")
    assert found["disk"]["free"] == 100 * GB and found["host"]["total"] == 16 * GB and found["disk"]["rate"] is None


def test_host_memory_that_is_said_is_counted() -> None:
    request = Request("a fox", 1024, 1024, steps=28, guidance=3.5, seed=0, text_tokens=512)
    job = Job("flux", [request], allow_offload="cpu")
    assert make_plan(job, machine="1x8GB").needs["denoise"]["cpu"].weights > 8 * GB
    with pytest.raises(DoesNotFit, match="would wait in host memory, which has"):
        make_plan(job, machine="1x8GB,ram=4GB")


def test_a_cpu_is_told_of_what_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["plan", "flux", "--machine", "cpu,ram=16GB"]) == 4
    err = capsys.readouterr().err
    # Half of the bytes are enough for encode, and not for denoise.
    assert "--dtype bfloat16" not in err and "smaller models: flux2-klein, " in err
    assert "copied to the card" not in err
    assert answer(["plan", "flux", "--machine", "cpu,ram=24GB"]) == 4
    assert "-> or --dtype bfloat16: half of the bytes" in capsys.readouterr().err
    assert answer(["plan", "flux", "--machine", "cpu,ram=24GB", "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    assert answer(["plan", "flux", "--machine", "cpu,ram=64GB"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "less to compute: flux2-klein (4 steps), flux-schnell (4 steps), z-image (8 steps)" in out
    assert "a picture takes" not in out, "nobody knows how fast that processor is"


def test_an_unreachable_hub_is_asked_once_and_says_nothing_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(settings, "ENDPOINT", "http://127.0.0.1:9")
    assert not answers()
    with pytest.raises(ModelError, match=r"is not in the cache and http://127[.]0[.]0[.]1:9 cannot be reached"):
        find("org/open")
    assert not caplog.records
