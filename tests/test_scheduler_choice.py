"""A scheduler in the place of the model's: the picture of diffusers with it, carried wherever a job goes."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

import stagerun
from runner import Job, Request, make_plan, run_all
from runner.artifacts import FolderStore, MemoryStore
from runner.commands.cli import answer
from runner.media.image import read_card
from stages.errors import InvalidInput, ModelError
from stages.models.scheduler import SchedulerRequest
from stages.pipeline.scheduler import exchanged

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
TEXT = "UniPCMultistepScheduler,use_flow_sigmas=true,prediction_type=flow_prediction"
UNIPC = SchedulerRequest("UniPCMultistepScheduler", FLOW)
RED: dict[str, Any] = {"num_inference_steps": 3, "height": 48, "width": 64, "max_sequence_length": 32, "seed": 7}


@pytest.fixture(scope="module")
def theirs(flux: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(flux, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("asked", [TEXT, "shift=2.5,use_dynamic_shifting=false", "FlowMatchLCMScheduler"])
def test_the_picture_is_that_of_diffusers_with_this_scheduler(
    asked: str, flux: Path, theirs: DiffusionPipeline
) -> None:
    request = SchedulerRequest.read(asked)
    own = FlowMatchEulerDiscreteScheduler.from_pretrained(flux, subfolder="scheduler")
    kind = {"": type(own), "UniPCMultistepScheduler": UniPCMultistepScheduler}.get(request.name)
    pipe = stagerun.Pipeline(flux, devices="cpu", dtype="float32", scheduler=asked)
    result, plain = pipe("a red circle", **RED), stagerun.Pipeline(flux, devices="cpu", dtype="float32")
    assert not np.array_equal(result.images[0], plain("a red circle", **RED).images[0])
    if kind is not None:  # LCM draws noise in its steps, which diffusers' pipeline takes from torch's own generator.
        theirs.scheduler = kind.from_config(own.config, **request.config)
        small = {name: value for name, value in RED.items() if name != "seed"}
        image, = theirs("a red circle", generator=torch.Generator().manual_seed(7), guidance_scale=3.5, **small).images
        assert np.array_equal(result.images[0], image)
    assert f"scheduler: {request} (asked for)" in " ".join(str(pipe.plan_for("a red circle")).split())


@pytest.mark.parametrize("kind", [LTXEulerAncestralRFScheduler, FlowMatchHeunDiscreteScheduler, EDMEulerScheduler])
def test_another_class_keeps_what_its_own_has_no_use_for_as_in_diffusers(kind: type[Any]) -> None:
    """One makes a second scheduler of its config, in which the model's shift is."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    ours, expected = exchanged(own, SchedulerRequest(kind.__name__)), kind.from_config(own.config)
    for scheduler in (ours, expected):
        scheduler.set_timesteps(4)
    assert torch.equal(ours.timesteps, expected.timesteps) and torch.equal(ours.sigmas, expected.sigmas)
    assert ours.config == expected.config


def test_a_scheduler_is_said_in_any_way_and_kept_in_one(flux: Path) -> None:
    own = UniPCMultistepScheduler.from_config(
        FlowMatchEulerDiscreteScheduler.from_pretrained(flux, subfolder="scheduler").config, **FLOW)
    for given in (TEXT, {"_class_name": "UniPCMultistepScheduler", **FLOW}, UNIPC, TEXT.replace("true", "True")):
        assert Job("flux", "a", scheduler=given).scheduler == UNIPC
    whole = Job("flux", "a", scheduler=own).scheduler
    assert whole is not None and whole.name == UNIPC.name and whole.config.items() >= FLOW.items()
    assert SchedulerRequest.read(UniPCMultistepScheduler) == SchedulerRequest("UniPCMultistepScheduler")
    job = Job("flux", Request("a", seed=1), scheduler=own)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    one, other = (run_all(make_plan(Job(
        "flux", Request("a red circle", 64, 48, 2, 3.5, 7, 32), model=flux, devices="cpu", scheduler=each)))
        for each in (own, TEXT))
    assert np.array_equal(one.pictures[0].pixels, other.pictures[0].pixels)


SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))


def config_of(scheduler: Any) -> Any:
    return {name: value for name, value in json.loads(scheduler.to_json_string()).items() if not name.startswith("_")}


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_of_diffusers_is_taken_as_it_is() -> None:
    """Made bare, of the model's config or of another's; with what a third class would read, nothing of the model's."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.6)
    tried = 0
    for name in SCHEDULERS:
        kind = getattr(diffusers, name)
        try:
            given = [kind(), kind.from_config(own.config)]
        except (ImportError, TypeError):  # It needs a package, or has no defaults.
            continue
        third = EDMEulerScheduler.from_config(given[1].config)
        for scheduler in (*given, third, FlowMatchEulerDiscreteScheduler.from_config(third.config)):
            asked = SchedulerRequest.read(scheduler)
            again = SchedulerRequest(**json.loads(json.dumps(asked.to_json(), allow_nan=False)))
            assert asked == SchedulerRequest.read(str(asked)) == again and asked.whole
            assert config_of(exchanged(own, asked)) == config_of(scheduler)
            tried += 1
    assert tried > 150
    assert SchedulerRequest.read(third.config) == SchedulerRequest.read(third)


def test_a_scheduler_with_values_of_its_own_beside_its_config_is_refused() -> None:
    own = FlowMatchEulerDiscreteScheduler()
    own.set_shift(3.0)
    with pytest.raises(InvalidInput, match=r"a shift of 3 by set_shift, and its config says 1 -> make it with shift"):
        SchedulerRequest.read(own)
    with pytest.raises(InvalidInput, match="a whole config and no class"):
        SchedulerRequest("", {"shift": 3.0}, True)


@pytest.mark.parametrize("config", [
    {"trained_betas": [0.1, 0.2]}, {"lists": [[1, 2], [3, 4]], "word": "x,y", "table": {"k": [1, 2]}, "last": 1},
    {"word": '"', "other": "[", "least": "-inf"},
])
def test_a_text_says_any_config(config: dict[str, Any]) -> None:
    for whole in (False, True):
        request = SchedulerRequest("UniPCMultistepScheduler", config, whole)
        assert SchedulerRequest.read(str(request)) == request
    assert SchedulerRequest.read("A1,a=-Infinity").config == {"a": "-inf"}


def test_the_picture_with_a_scheduler_of_diffusers_is_theirs(flux: Path, theirs: DiffusionPipeline) -> None:
    """Of a bare one nothing of the model's config, of one with infinities, and repeated from the picture."""
    theirs.scheduler = DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True)
    result = stagerun.Pipeline(flux, devices="cpu", dtype="float32", scheduler=theirs.scheduler)("a red circle", **RED)
    small = {name: value for name, value in RED.items() if name != "seed"}
    image, = theirs("a red circle", generator=torch.Generator().manual_seed(7), guidance_scale=3.5, **small).images
    assert np.array_equal(result.images[0], image)


def test_another_scheduler_encodes_nothing_anew_and_is_in_every_key_behind(flux: Path) -> None:
    store, asked = MemoryStore(), Request("a red circle", 64, 48, 2, 3.5, 7, 32)
    runs = [run_all(make_plan("flux", asked, model=flux, devices="cpu", scheduler=each), store=store)
            for each in (None, "shift=2.5", {"shift": 2.5})]
    assert [[stage.ran for stage in run.stages] for run in runs] == [[1, 1, 1], [0, 1, 1], [0, 0, 0]]
    assert runs[1].pictures[0].facts["scheduler"] == {"name": "", "config": {"shift": 2.5}}
    assert Job.from_json(store.load_run(runs[1].run)["job"]).scheduler == SchedulerRequest("", {"shift": 2.5})


def test_a_picture_and_its_run_are_repeated_with_their_scheduler(
    flux: Path, elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--device", "cpu", "--artifacts", "store"]
    words = ["flux", "--model", str(flux), "--prompt", "a red circle", "--steps", "1", "--size", "64x48", "--seed=7"]
    assert answer([*words, *store, "--scheduler", TEXT, "--out", "one.png"]) == 0
    assert read_card("one.png").scheduler == UNIPC
    assert Image.open("one.png").info["parameters"].count("Sampler: UniPCMultistepScheduler") == 1
    memory = ["--device", "cpu", "--artifacts", "memory"]
    assert answer(["flux", "--like", "one.png", *memory, "--out", "like.png"]) == 0
    assert answer(["flux", "--like", "one.png", "--scheduler", "none", *memory, "--out", "own.png"]) == 0
    assert Path("like.png").read_bytes() == Path("one.png").read_bytes()
    assert not np.array_equal(Image.open("own.png"), Image.open("one.png")) and read_card("own.png").scheduler is None
    Path("one.png").unlink()
    assert answer(["resume", FolderStore("store").runs()[-1], *store]) == 0
    assert Path("like.png").read_bytes() == Path("one.png").read_bytes()
    capsys.readouterr()
    assert answer([*words, *store, "--scheduler", "UniPCMultistepSchedular", "--out", "no.png"]) == 2
    assert "--scheduler: diffusers has no UniPCMultistepSchedular -> did you mean UniPCMultistepScheduler?" in (
        capsys.readouterr().err)


@pytest.mark.parametrize(("given", "says"), [
    ("euler a", "is no name of a class -> NAME"), ("", "is empty -> NAME"), ({}, "is empty"), (3, "is an int"),
    ("UniPCMultistepScheduler,flow", "has 'flow' -> NAME"), ({"shift": float("nan")}, "no JSON"),
    ({"shift": torch.zeros(1)}, "no JSON"), ({"num_train_timesteps": 10**9}, "num_train_timesteps is .* more than"),
    (Path, "scheduler is a type"), ({"Sh ift": 1}, "has the key"),
])
def test_what_is_no_scheduler_is_refused_when_the_job_is_made(given: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        Job("flux", "a", scheduler=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "says"), [
    ("EulerScheduler", "diffusers has no EulerScheduler -> did you mean"),
    ("SchedulerMixin", "diffusers has no SchedulerMixin"),
    ("shfit=3", "FlowMatchEulerDiscreteScheduler has no shfit -> did you mean shift"),
    ("time_shift_type=cubic", "FlowMatchEulerDiscreteScheduler cannot be made of"),
    ("DDIMScheduler", "DDIMScheduler .*cannot run the denoise of FluxPipeline: .* -> another scheduler"),
])
def test_what_a_family_cannot_use_is_refused_in_the_plan(given: str, says: str, flux: Path) -> None:
    with pytest.raises((InvalidInput, ModelError), match=says) as caught:
        make_plan("flux", Request("a", 64, 48, 2), model=flux, devices="cpu", scheduler=given)
    assert "\n" not in str(caught.value)
