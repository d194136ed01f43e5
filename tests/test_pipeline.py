"""A pipeline called as diffusers' own: the same pictures, bit for bit, and every mistake a line with what to do."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import stagerun
from runner.artifacts import MemoryStore
from runner.commands.cli import answer
from runner.media.image import read_card
from runner.reports.notebook import HTML
from stages.errors import InvalidInput, ModelError
from tests import tiny_families
from tests.test_display import checked

RED, STAR = "a red circle", "two small green squares"
SMALL: dict[str, Any] = {"num_inference_steps": 2, "height": 48, "width": 64, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe(flux: Path) -> stagerun.Pipeline:
    return stagerun.Pipeline(flux, devices="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(flux: Path) -> DiffusionPipeline:
    """diffusers' own pipeline of the same model."""
    pipe = DiffusionPipeline.from_pretrained(flux, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal(ours: list[Image.Image], others: list[Image.Image]) -> bool:
    return len(ours) == len(others) and all(np.array_equal(a, b) for a, b in zip(ours, others, strict=True))


def test_the_pictures_are_those_of_diffusers(pipe: stagerun.Pipeline, theirs: DiffusionPipeline) -> None:
    """One prompt, several, several pictures of each: with generators, and with seeds that count up."""
    one = pipe(RED, generator=seeded(7), guidance_scale=2.5, **SMALL)
    assert equal(one.images, theirs(RED, generator=seeded(7), guidance_scale=2.5, **SMALL).images)
    whole = {"num_images_per_prompt": 2, "guidance_scale": 3.5, **SMALL}
    many = pipe([RED, STAR], generator=[seeded(at) for at in (3, 4, 5, 6)], **whole)
    expected = theirs([RED, STAR], generator=[seeded(at) for at in (3, 4, 5, 6)], **whole).images
    alone = [theirs(prompt, generator=seeded(at), guidance_scale=3.5, **SMALL).images[0]
             for at, prompt in zip((3, 4, 5, 6), (RED, RED, STAR, STAR), strict=True)]
    assert equal(many.images, alone) and many.seeds == [3, 4, 5, 6]
    # In one batch of four diffusers rounds its own pictures otherwise.
    assert all(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
               for a, b in zip(alone, expected, strict=True))
    again = pipe([RED, STAR], seed=3, **whole)
    assert equal(again.images, alone) and [stage.ran for stage in again.report.stages] == [0, 0, 0]


def test_qwen_image_takes_the_name_that_its_own_pipeline_has(tmp_path: Path) -> None:
    model = tiny_families.qwen_image(tmp_path / "qwen")
    pipe = stagerun.Pipeline.from_pretrained(model, devices="cpu", torch_dtype=torch.float32)
    small = {**SMALL, "max_sequence_length": 64}
    asked = pipe.job_for(RED, true_cfg_scale=3, negative_prompt=STAR, seed=1, **small)
    assert pipe.family.name == "qwen-image" and asked.requests[0].guidance == 3.0
    assert asked == pipe.job_for(RED, guidance_scale=3.0, negative_prompt=STAR, seed=1, **small)
    theirs = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(RED, negative_prompt=STAR, true_cfg_scale=3.0, generator=seeded(1), **small).images
    assert equal(pipe(RED, negative_prompt=STAR, true_cfg_scale=3.0, seed=1, **small).images, expected)
    with pytest.raises(InvalidInput, match="are one thing here -> leave guidance_scale out"):
        pipe(RED, true_cfg_scale=3, guidance_scale=3)


def test_a_saved_picture_is_the_file_of_the_command_line(
    pipe: stagerun.Pipeline, flux: Path, elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (image,) = pipe(RED, seed=7, **SMALL).images
    image.save("image.png")
    words = ["flux", "--model", str(flux), "--prompt", RED, "--seed", "7", "--device", "cpu", "--dtype", "float32",
             "--artifacts", "memory"]
    assert answer([*words, "--steps", "2", "--size", "64x48", "--out", "theirs.png"]) == 0
    again = ["flux", "--like", "image.png", "--device", "cpu", "--artifacts", "memory", "--out", "like.png"]
    assert answer(again) == 0
    assert capsys.readouterr().out.split() == ["theirs.png", "like.png"]
    assert Path("image.png").read_bytes() == Path("like.png").read_bytes()
    assert read_card("image.png").request.steps == 2 and equal([image], [Image.open("like.png")])
    with open("stream.png", "wb") as stream:
        image.save(stream, format="png")
    assert Path("stream.png").read_bytes() == Path("image.png").read_bytes()
    # What was made of it could not be made again.
    image.resize((8, 8)).save("small.png")
    image.putpixel((0, 0), (1, 2, 3))
    image.save("drawn.png")
    for changed in ("small.png", "drawn.png"):
        with pytest.raises(InvalidInput, match="no runner metadata"):
            read_card(changed)


def test_a_picture_of_a_report_saves_itself_and_nothing_of_others(
    pipe: stagerun.Pipeline, tmp_path: Path
) -> None:
    (picture,) = pipe(RED, seed=7, **SMALL).report.pictures
    path = picture.save(tmp_path / "new" / "fox.png")
    assert path == tmp_path / "new" / "fox.png" and read_card(path).request == picture.request
    written = path.read_bytes()
    with pytest.raises(InvalidInput, match="is there already -> overwrite=True, or another path"):
        picture.save(path)
    path.write_bytes(b"mine")
    with pytest.raises(InvalidInput, match="is there already"):
        picture.save(str(path))
    picture.save(path, overwrite=True)
    assert path.read_bytes() == written and equal([picture.image], [Image.open(path)])
    with pytest.raises(InvalidInput, match=r"'fox.gif' must end in .png, .webp"):
        picture.save(tmp_path / "fox.gif")


def test_a_result_says_what_it_is(pipe: stagerun.Pipeline) -> None:
    result = pipe([RED, STAR], seed=[9, 4], **SMALL)
    assert repr(result).startswith("Result(2 pictures, seeds 9, 4, encode ") and result.seeds == [9, 4]
    tags = checked(HTML["runner.pipeline.result", "Result"](result))
    assert [tag for tag, _ in tags.seen].count("img") == 2 and "seed 4" in tags.text
    assert pipe(RED, **SMALL).seeds != pipe(RED, **SMALL).seeds


def test_a_generator_that_was_drawn_from_is_refused(pipe: stagerun.Pipeline) -> None:
    generator = seeded(7)
    first = pipe(RED, generator=generator, **SMALL)
    # As with diffusers, it has been drawn from now, and would give another picture.
    with pytest.raises(InvalidInput, match=r"has been drawn from.*-> generator.manual_seed\(7\), or a new one"):
        pipe(RED, generator=generator, **SMALL)
    assert equal(pipe(RED, generator=generator.manual_seed(7), **SMALL).images, first.images)
    untouched = seeded(1)
    with pytest.raises(InvalidInput):
        pipe(RED, generator=untouched, num_inference_steps=0)
    pipe.plan_for(RED, generator=untouched, **SMALL)
    assert torch.equal(untouched.get_state(), seeded(1).get_state())


@pytest.mark.parametrize(("call", "says"), [
    ({}, "there is no prompt -> pipe"), ({"prompt": []}, "list of prompts is empty"),
    ({"prompt": 3}, "prompt is an int -> a text, or a list of texts"), ({"prompt": ""}, "empty prompt"),
    ({"prompt": [RED, 3]}, "the prompt must be text"),
    ({"generator": 7}, r"generator is an int -> torch.Generator\(\).manual_seed"),
    ({"generator": [seeded(1), seeded(2)]}, "2 generators for 1 picture, each"),
    ({"prompt": [RED, STAR], "generator": seeded(1)}, r"one generator for 2 pictures: .* range\(1, 3\)\], or seed=1"),
    ({"num_images_per_prompt": 2, "generator": [seeded(1)] * 2}, None),
    ({"generator": seeded(1), "seed": 1}, "seed and generator both say the noise"),
    ({"seed": [1, 2]}, "2 seeds for 1 picture -> one for each"), ({"seed": -2}, "seed must be a whole number"),
    ({"seed": "7"}, "seed must be a whole number"), ({"seed": [-1]}, "seed must be a whole number from 0"),
    ({"seed": True}, "seed must be"), ({"num_images_per_prompt": 0}, "num_images_per_prompt must be .* from 1 to 64"),
    ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, got 0"),
    ({"max_sequence_length": 513}, "takes at most 512"), ({"guidance_scale": 31}, "guidance_scale must be a number"),
    ({"guidance_scale": "3"}, "guidance_scale must be a number"), ({"guidance_scale": [3]}, "guidance_scale must be"),
    ({"height": 1.5}, "height must be a whole number"), ({"width": 99999}, "width must be"),
    ({"height": 50}, "multiples of 16"), ({"negative_prompt": "blurry"}, "flux reads no negative prompt"),
    ({"negative_prompt": ["a", "b"]}, "1 prompt and 2 negative prompts"),
    ({"true_cfg_scale": 4.0}, "flux has no true_cfg_scale -> guidance_scale="),
    ({"on_step": 3}, r"on_step is an int -> a function of \(index, step, timestep, values\)"),
    ({"on_step": lambda: None}, r"on_step cannot be called with \(index, step, timestep, values\) -> def on_step"),
    ({"on_step": lambda a, b, c, d, e: None}, "on_step cannot be called with"), ({"emit": 3}, "emit is an int -> a f"),
    ({"emit": lambda: None}, r"emit cannot be called with \(kind, data\)"),
    ({"num_inference_step": 3}, "a call takes no 'num_inference_step' -> did you mean num_inference_steps=?"),
    ({"xyz": 3}, "a call takes no 'xyz' -> it takes negative_prompt"),
    ({"latents": torch.zeros(1)}, "takes no latents= -> seed= or generator="),
    ({"prompt_embeds": torch.zeros(1)}, "takes no prompt_embeds= -> states = pipe.encode"),
    ({"callback_on_step_end": print}, "takes no callback_on_step_end= -> on_step="),
    ({"image": 1}, "takes no image= -> leave it out: pictures are made of text alone"),
    ({"output_type": "np"}, r"takes no output_type= -> leave it out: result.images are PIL's, numpy.asarray\("),
    ({"steps": 3}, "takes no steps= -> num_inference_steps="), ({"size": "64x48"}, "-> height= and width="),
    ({"max_memory": "1GiB"}, "max_memory= of the pipeline"), ({"return_dict": False}, "result.images"),
    ({"prompt_2": "x"}, "every text encoder reads"), ({"joint_attention_kwargs": {}}, "loras="),
])
def test_a_call_that_cannot_be_is_refused_in_a_line(
    pipe: stagerun.Pipeline, call: dict[str, Any], says: str | None
) -> None:
    given = {**({} if "prompt" in call or not call else {"prompt": RED}), **call}
    with pytest.raises(InvalidInput, match=says) as caught:
        pipe(**given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(("options", "says"), [
    ({"max_memry": "1GiB"}, "a pipeline takes no 'max_memry' -> did you mean max_memory=?"),
    ({"cache_dir": "x"}, "takes no cache_dir= -> the variable HF_HOME"), ({"variant": "fp16"}, "dtype= says the type"),
    ({"local_files_only": True}, "HF_HUB_OFFLINE=1"), ({"quantization_config": {}}, "nothing is quantized"),
    ({"policy": 3}, "policy must be RunPolicy, got '3'"), ({"policy": {"strict": True}}, "policy must be RunPolicy"),
    ({"progress": "x"}, "progress must be bool"), ({"progress": 1}, "progress must be bool"),
    ({"devices": 1.5}, "devices is '1.5' -> give a list"), ({"gpus": [None]}, "devices has 'None' -> such as"),
    ({"device_map": {"vae": None}}, "device_map has 'None' for vae -> a device"),
    ({"max_memory": {"cpu": None}}, "max_memory of cpu is None -> leave cpu out"),
    ({"max_memory": ["1GiB"]}, "max_memory is .* -> bytes as a whole number"),
    ({"text_encoder_3": None}, "takes no text_encoder_3= -> save the whole"),
    ({"dtype": "fp8"}, "dtype 'fp8': choose one of"), ({"dtype": "bf16", "torch_dtype": "fp16"}, "one thing"),
    ({"allow_offload": "gpu"}, "allow_offload is 'gpu' -> choose from"), ({"place": "denoise"}, "write STAGE=WHERE"),
    ({"place": "paint=0"}, "there is no stage 'paint'"), ({"max_memory": "lots"}, "is no amount of memory"),
    ({"lanes": 99}, "lanes must be"), ({"store": 3}, "store is an int -> a folder"), ({"store": ""}, "store is empty"),
    ({"gpus": 0, "devices": "cpu"}, "devices and gpus both choose"), ({"stop_after": "encode"}, "leave stop_af"),
    ({"strict": True, "policy": stagerun.RunPolicy()}, "policy and strict"), ({"strict": "yes"}, "must be bool"),
    ({"device_map": {"fox": 0}}, "device_map names 'fox'"), ({"device_map": 1.5}, "device_map is a float"),
    ({"device_map": {"vae": 0}, "place": "decode=0"}, "both say where things go"), ({"vae": 1}, "save the whole with"),
    ({"num_inference_steps": 3}, "num_inference_steps= of the call"), ({"loras": ["a=99"]}, "from -10 to 10"),
])
def test_a_pipeline_that_cannot_be_is_refused_in_a_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises((InvalidInput, stagerun.StoreError), match=says) as caught:
        stagerun.Pipeline("demo", **options)
    assert "\n" not in str(caught.value)


def test_a_pipeline_takes_what_the_command_line_takes(flux: Path, tmp_path: Path) -> None:
    pipe = stagerun.Pipeline(
        "flux", model=flux, gpus="0,1", max_memory={0: "10GiB", "cpu": 2**30}, place={"denoise": "sharded"},
        allow_offload="disk", lanes=2, dtype={"": "bf16", "vae": torch.float32}, store=tmp_path / "store",
        step_every=60, preview=2, modulation_table=False)
    job = pipe.job_for(RED, seed=1)
    assert job == stagerun.Job(
        "flux", [stagerun.Request(RED, seed=1)], model=flux, devices="0,1", max_memory="0=10GiB,cpu=1073741824B",
        place="denoise=sharded", allow_offload="disk", lanes=2, dtype=["bfloat16", "vae=float32"],
        store=tmp_path / "store", policy=stagerun.RunPolicy(step_every=60, preview=2), modulation_table=False)
    assert job.requests[0].height == 1024 and repr(pipe.store) == f"FolderStore('{tmp_path}/store')"
    mapped = stagerun.Pipeline("demo", device_map={"text_encoder_2": 1, "denoise": "cuda:0"}).job_for(RED)
    assert [str(place) for place in mapped.place] == ["encode.text_encoder_2=1", "denoise=cuda:0"]
    for device_map, devices in (("balanced", ()), ("cuda", ("cuda:0",)), (torch.device("cpu"), ("cpu",)), (1, ("1",))):
        assert stagerun.Pipeline("demo", device_map=device_map).job_for(RED).devices == devices
    with pytest.raises(InvalidInput, match=r"there is no device .* choose from"):
        stagerun.Pipeline("demo", devices="cuda:97").plan_for(RED)


def test_the_family_is_that_of_the_model(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stagerun.Pipeline("FLUX").family.name == "flux"
    assert stagerun.Pipeline("black-forest-labs/flux.1-schnell").job_for(RED).model is None
    assert stagerun.Pipeline.from_pretrained("Qwen/Qwen-Image").family.name == "qwen-image"
    assert stagerun.Pipeline(flux).job_for(RED).family == "flux"
    distilled = tiny_families.tiny.flux(tmp_path / "distilled", guidance=False)
    assert stagerun.Pipeline(distilled).family.name == "flux-schnell"
    for distilled_klein, name in ((True, "flux2-klein"), (False, "flux2-klein-base")):
        klein = tiny_families.klein(tmp_path / name, distilled=distilled_klein)
        assert stagerun.Pipeline.from_pretrained(str(klein)).family.name == name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux").symlink_to(flux)
    assert stagerun.Pipeline("flux").job_for(RED).model is None
    assert stagerun.Pipeline.from_pretrained("flux").job_for(RED).model == "./flux"
    for name, says in (("flx", "did you mean flux"), ("qwen", "did you mean qwen-image"), ("FLUX.1-dev", "FLUX.1-dev"),
                       ("no/such/folder", "no family and no model folder"), ("", "no family")):
        with pytest.raises(InvalidInput, match=says):
            stagerun.Pipeline(name)
    with pytest.raises(InvalidInput, match="an int is no model"):
        stagerun.Pipeline(3)  # type: ignore[arg-type]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ModelError, match=r"is not supported: it is a PixArtAlphaPipeline, .* choose from flux"):
        stagerun.Pipeline(tmp_path / "other")


def test_guidance_of_1_or_less_is_none_for_a_family_that_takes_none() -> None:
    """As in the examples of diffusers for FLUX.1-schnell and Z-Image-Turbo."""
    pipe = stagerun.Pipeline("flux-schnell")
    assert pipe.job_for(RED, guidance_scale=0.0).requests[0].guidance is None
    with pytest.raises(InvalidInput, match="flux-schnell takes no guidance -> leave guidance_scale out"):
        pipe.job_for(RED, guidance_scale=3.5)


def test_on_step_hears_of_every_step_and_may_stop(flux: Path, theirs: DiffusionPipeline) -> None:
    pipe, heard = stagerun.Pipeline(flux, devices="cpu", dtype="float32"), []

    def told(index: int, step: int, timestep: float | None, values: dict[str, Any]) -> bool | None:
        heard.append((index, step, timestep, values["latents"]))
        return False if (index, step) == (1, 0) and len(heard) == 3 else None

    with pytest.raises(stagerun.Interrupted, match="stopped by on_step"):
        pipe([RED, STAR], seed=7, on_step=told, **SMALL)
    assert [entry[:2] for entry in heard] == [(0, 0), (0, 1), (1, 0)]
    latents: list[tuple[float, torch.Tensor]] = []

    def theirs_told(pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        latents.append((timestep.item(), values["latents"].clone()))
        return values

    theirs(RED, generator=seeded(7), callback_on_step_end=theirs_told, guidance_scale=3.5, **SMALL)
    for ours, (timestep, expected) in zip(heard, latents, strict=False):
        assert ours[2] == timestep and torch.equal(ours[3], expected)
    # The same call goes on behind the step after which it was left.
    result = pipe([RED, STAR], seed=7, on_step=told, **SMALL)
    assert [entry[:2] for entry in heard[3:]] == [(1, 1)]
    assert equal(result.images, stagerun.Pipeline(flux, devices="cpu", dtype="float32")([RED, STAR], seed=7,
                                                                                        **SMALL).images)


def test_what_on_step_raises_or_cannot_change_is_told(flux: Path) -> None:
    pipe = stagerun.Pipeline(flux, devices="cpu")

    def fails(*step: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe(RED, seed=7, on_step=fails, **SMALL)
    with pytest.raises(InvalidInput, match="on_step gave other latents"):
        pipe(RED, seed=7, on_step=lambda *step: {"latents": step[3]["latents"] * 2}, **SMALL)
    assert pipe(RED, seed=7, on_step=lambda *step: step[3], **SMALL).seeds == [7]


def test_stage_by_stage_is_the_whole(pipe: stagerun.Pipeline, tmp_path: Path) -> None:
    embeddings = pipe.encode([RED, STAR], seed=7, **SMALL)
    assert len(embeddings) == 2 and "prompt_embeds" in embeddings
    assert {*embeddings.keys()} == {*embeddings[0].keys()} == {*embeddings[0]} >= {"prompt_embeds"}
    assert embeddings[1]["prompt_embeds"].shape == (1, 32, 32)
    assert "1: State(prompt_embeds float32[1, 32, 32]" in repr(embeddings)
    latents = pipe.denoise(embeddings)
    result = pipe.decode(latents)
    assert equal(result.images, pipe([RED, STAR], seed=7, **SMALL).images) and result.seeds == [7, 8]
    result.images[1].save(tmp_path / "star.png")
    assert read_card(tmp_path / "star.png").request.seed == 8


def test_what_is_changed_between_stages_reaches_the_picture_and_not_its_metadata(
    pipe: stagerun.Pipeline, tmp_path: Path
) -> None:
    whole = pipe([RED, STAR], seed=7, **SMALL).images
    embeddings = pipe.encode([RED, STAR], seed=7, **SMALL)
    embeddings[0] = embeddings[1]
    words = pipe.decode(pipe.denoise(embeddings)).images
    other = pipe([STAR, STAR], seed=7, **SMALL).images
    assert equal(words, other) and not equal(words[:1], whole[:1])
    words[0].save(tmp_path / "changed.png")
    with pytest.raises(InvalidInput, match="no runner metadata"):
        read_card(tmp_path / "changed.png")
    words[1].save(tmp_path / "kept.png")
    assert read_card(tmp_path / "kept.png").request.prompt == STAR
    latents = pipe.denoise(pipe.encode(RED, seed=7, **SMALL))
    latents["latents"] = latents["latents"] * 0.5
    replaced = pipe.decode(latents).images
    fresh = pipe.denoise(pipe.encode(RED, seed=7, **SMALL))
    fresh["latents"].mul_(0.5)
    assert equal(pipe.decode(fresh).images, replaced) and not equal(replaced, whole[:1])
    assert equal(pipe(RED, seed=7, **SMALL).images, whole[:1])


def test_states_that_cannot_be_used_are_refused_in_a_line(pipe: stagerun.Pipeline) -> None:
    embeddings = pipe.encode([RED, STAR], seed=7, **SMALL)

    def changed() -> None:
        embeddings[0] = 3  # type: ignore[assignment]

    for wrong, says in (
        (lambda: pipe.decode(embeddings), "decode works on what pipe.denoise gives, not on states after encode"),
        (lambda: pipe.denoise([1]), "denoise works on what pipe.encode gives, not on a list"),
        (lambda: embeddings["prompt_embeds"], "there are 2 states -> states.0..'prompt_embeds'"),
        (lambda: embeddings[0]["prompt_embed"], "has no 'prompt_embed' -> did you mean prompt_embeds"),
        (lambda: embeddings[2], "there is no state 2 -> 0 to 1"), (changed, "an int is no state"),
        (lambda: embeddings[0].changed(foo=1), "has no 'foo'"),
    ):
        with pytest.raises(InvalidInput, match=says):
            wrong()


def test_a_plan_prints_what_the_command_prints(
    pipe: stagerun.Pipeline, flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = stagerun.Pipeline(flux, dtype="float32").plan_for(
        RED, machine="2x16GB", num_inference_steps=2, height=48, width=64)
    words = ["plan", "flux", "--model", str(flux), "--prompt", RED, "--steps", "2", "--size", "64x48", "--machine",
             "2x16GB", "--dtype", "float32"]
    assert answer(words) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "cuda:0" in line and "GiB" in line]
    assert table and set(table) <= set(str(plan).splitlines())
    assert "\n" not in repr(plan) and str(pipe.plan).count("\n") > 4
    assert pipe.plan.requests[0].steps == 28


def test_a_warning_of_a_run_is_one_of_python(pipe: stagerun.Pipeline) -> None:
    with pytest.warns(UserWarning, match="the prompt is too long for the model"):
        pipe("a red circle on a blue background " * 9, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(RED, seed=7, **SMALL)


def test_a_pipeline_keeps_its_work_where_it_is_told(flux: Path, tmp_path: Path) -> None:
    kept = MemoryStore()
    for store in (kept, str(tmp_path / "store")):
        for made in (1, 0):
            report = stagerun.Pipeline(flux, devices="cpu", store=store)(RED, seed=7, **SMALL).report
            assert [stage.ran for stage in report.stages] == [made] * 3
    assert len(kept.keys()) == 3 and repr(kept).startswith("MemoryStore(3 artifacts in memory, ")
    with contextlib.chdir(tmp_path):
        assert stagerun.Memory("store", stagerun.open_store("store").runs()[-1]).rows
