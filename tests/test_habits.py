"""What users of diffusers type first: it works where its meaning is plain, or a line says what does the same."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import stagerun
from runner.engine.keys import artifact_keys
from runner.pipeline.habits import Habits, Instead
from runner.placement_options import read_bytes
from stages.errors import InvalidInput, ModelError, StagerunError
from stages.families import FAMILIES, is_unsupported
from stages.models.config_check import explained
from stages.pipeline.suspects import suspected
from tests import tiny_families

RED = "a red circle"
SMALL: dict[str, Any] = {"num_inference_steps": 2, "height": 48, "width": 64, "max_sequence_length": 32, "seed": 7}
THEIRS = sorted({family.pipeline for family in FAMILIES.values()})
# Of diffusers' pipelines, what nobody calls but diffusers.
INTERNALS = {
    "config_name", "extract_init_dict", "fused_loras", "get_config_dict", "has_compatibles", "ignore_for_config",
    "load_config", "load_lora_into_text_encoder", "load_lora_into_transformer", "lora_state_dict",
    "maybe_convert_prompt", "model_cpu_offload_seq", "num_fused_loras", "pack_weights",
    "prepare_ip_adapter_image_embeds", "register_for_auto_class", "register_to_config", "save_config",
    "text_encoder_name", "to_json_file", "to_json_string", "transformer_name", "write_lora_layers",
}
DONE = {"enable_model_cpu_offload", "enable_vae_slicing", "from_pretrained", "set_progress_bar_config"}


@pytest.fixture(scope="module")
def pipe(flux: Path) -> stagerun.Pipeline:
    return stagerun.Pipeline(flux, devices="cpu", dtype="float32")


@pytest.fixture(scope="module")
def result(pipe: stagerun.Pipeline) -> stagerun.Result:
    return pipe([RED, "two small green squares"], **SMALL)


def refused(typed: Callable[[], Any], says: str = "->", kind: type[Exception] = StagerunError) -> str:
    with pytest.raises(kind, match=says) as caught:
        typed()
    text = str(caught.value)
    assert isinstance(caught.value, StagerunError) and "\n" not in text and " -> " in text and len(text) < 500
    return text


def test_every_attribute_of_diffusers_pipelines_is_done_or_says_what_does_it(pipe: stagerun.Pipeline) -> None:
    theirs = {name for kind in (*THEIRS, "StableDiffusionXLPipeline") for name in dir(getattr(diffusers, kind))
              if not name.startswith("_")}
    parts = {"transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler", "cuda"}
    asked = (theirs | parts) - INTERNALS - DONE
    here = {name for name in asked if isinstance(getattr(Habits, name, None), Instead)}
    # Those that another kind of model alone has are left to Python.
    assert here >= {name for name in asked if name in dir(diffusers.FluxPipeline)} | parts
    for name in here:
        refused(lambda name=name: getattr(pipe, name), f"a pipeline has no {name} -> ", AttributeError)
        assert not hasattr(pipe, name) and name not in dir(pipe)
    assert all(callable(getattr(pipe, name)) for name in DONE)


def test_what_is_set_on_a_pipeline_is_not_lost_in_silence(pipe: stagerun.Pipeline) -> None:
    for name in ("scheduler", "vae", "store", "num_inference_steps", "family"):
        refused(lambda name=name: setattr(pipe, name, 3), name)
    refused(lambda: stagerun.Pipeline.from_pipe(pipe), "has no from_pipe -> make another")
    refused(lambda: pipe.vae.enable_tiling(), "pipe.decode decodes latents")


def test_what_has_nothing_to_do_here_is_done(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = stagerun.Pipeline(flux, devices="cpu", dtype="float32", progress=True)
    pipe.enable_model_cpu_offload()
    pipe.enable_vae_slicing()
    pipe.set_progress_bar_config(disable=True, desc="x")
    pipe(RED, **SMALL)
    assert capsys.readouterr().err == ""
    refused(lambda: pipe.set_progress_bar_config(disable="yes"))


@pytest.mark.parametrize("kind", THEIRS)
def test_a_keyword_of_diffusers_that_asks_for_nothing_is_as_if_it_were_left_out(kind: str) -> None:
    family = next(family for family in FAMILIES.values() if family.pipeline == kind)
    pipe, seed = stagerun.Pipeline(family.name), 1
    plain = pipe.job_for(RED, seed=seed)
    takes = {name: each.default for name, each in
             inspect.signature(getattr(diffusers, kind).__call__).parameters.items()}
    own = {"self", "prompt", "guidance_scale", "true_cfg_scale", "height", "width", "num_inference_steps",
           "max_sequence_length", "num_images_per_prompt", "generator", "negative_prompt", "text_encoder_out_layers"}
    left_out = {name: default for name, default in takes.items() if name not in own}
    assert len(left_out) > 7 and pipe.job_for(RED, seed=seed, **left_out) == plain
    assert pipe.job_for(RED, seed=seed, **dict.fromkeys(takes.keys() - {"self", "prompt"})) == plain
    for name in left_out:
        other = {name: ["other"]}
        refused(lambda other=other: pipe.job_for(RED, seed=seed, **other), f"takes no {name}= -> ", TypeError)


def test_options_of_from_pretrained_that_ask_for_nothing_are_taken() -> None:
    pipe = stagerun.Pipeline.from_pretrained(
        "demo", variant=None, cache_dir=None, token=None, use_safetensors=True, low_cpu_mem_usage=True,
        local_files_only=False, device_map=None, loras=None, safety_checker=None, quantization_config=None)
    assert pipe.job_for(RED, seed=1) == stagerun.Pipeline("demo").job_for(RED, seed=1)


def test_a_result_is_what_it_holds(result: stagerun.Result) -> None:
    assert len(result) == 2 and list(result) == result.images == result["images"] and result["seeds"] == [7, 8]
    for wrong in (0, -1, slice(2), "image", None):
        refused(lambda wrong=wrong: result[wrong], "result.images, or result.images.0.", InvalidInput)
    for name in ("image", "pictures", "save", "nsfw_content_detected", "frames"):
        refused(lambda name=name: getattr(result, name), f"a result has no {name} -> ", AttributeError)


def test_one_generator_for_several_pictures_is_refused_with_the_list_to_write(pipe: stagerun.Pipeline) -> None:
    for call in ({"prompt": [RED, RED]}, {"prompt": RED, "num_images_per_prompt": 2}):
        refused(lambda call=call: pipe(generator=torch.Generator().manual_seed(7), **call),
                r"-> generator=\[torch.Generator\(\).manual_seed\(n\) for n in range\(7, 9\)\], or seed=7, which c")
    listed = [torch.Generator().manual_seed(n) for n in range(7, 9)]
    assert pipe.job_for([RED, RED], generator=listed) == pipe.job_for([RED, RED], seed=7)


@pytest.mark.parametrize("model", [
    "stabilityai/stable-diffusion-xl-base-1.0", "runwayml/stable-diffusion-v1-5", "PixArt-alpha/PixArt-XL-2-1024-MS",
    "black-forest-labs/FLUX.1-Kontext-dev", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Qwen/Qwen-Image-Edit",
    "openai/whisper-large-v3",
])
def test_a_model_that_is_not_supported_says_so_and_not_download(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for typed in (lambda: stagerun.Pipeline(model), lambda: stagerun.Pipeline.from_pretrained(model),
                  lambda: stagerun.Pipeline("flux", model=model).plan, lambda: stagerun.log_in(model)):
        text = refused(typed, "is not supported -> choose from flux, flux-schnell, ", ModelError)
        assert "download" not in text


def test_a_name_that_is_not_supported_says_so() -> None:
    for name in ("sdxl", "SD1.5", "stable diffusion", "pixart", "wan"):
        refused(lambda name=name: stagerun.Pipeline(name), "is not supported -> choose from flux, ", InvalidInput)
        refused(lambda name=name: stagerun.log_in(name), "is not supported -> choose from flux, ", InvalidInput)
    refused(lambda: stagerun.log_in("flx"), "did you mean flux", InvalidInput)
    refused(lambda: stagerun.log_in(3), "an int is no model", InvalidInput)  # type: ignore[arg-type]
    assert not any(is_unsupported(family.repo) for family in FAMILIES.values())


CHANGES: list[tuple[Callable[[torch.Tensor], Any], str]] = [
    (lambda tensor: None, "prompt_embeds is None, and was a tensor float32.1, 32, 32. -> a tensor of floats"),
    (lambda tensor: tensor.tolist(), "prompt_embeds is a list, and was"),
    (lambda tensor: tensor.numpy(), "prompt_embeds is a ndarray, and was"),
    (lambda tensor: tensor.long(), "prompt_embeds is a tensor int64.*, and was a tensor float32"),
    (lambda tensor: tensor.bool(), "prompt_embeds is a tensor bool"),
    (lambda tensor: tensor.to(torch.complex64), "prompt_embeds is a tensor complex64"),
    (lambda tensor: tensor.to("meta"), r"without numbers \(meta\)"), (lambda tensor: tensor.to_sparse(), "sparse"),
    (lambda tensor: tensor[0], "prompt_embeds is a tensor float32.32, 32., and was"),
    (lambda tensor: torch.cat([tensor, tensor]), "prompt_embeds is a tensor float32.2, 32, 32., and was"),
    (lambda tensor: tensor[:, :0], "prompt_embeds is a tensor float32.1, 0, 32., and was"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_a_value_that_cannot_stand_in_a_state_is_refused_where_it_is_set(
    change: Callable[[torch.Tensor], Any], says: str, pipe: stagerun.Pipeline
) -> None:
    states = pipe.encode(RED, **SMALL)
    value = change(states["prompt_embeds"])
    refused(lambda: states[0].changed(prompt_embeds=value), says, InvalidInput)
    refused(lambda: states.__setitem__("prompt_embeds", value), says, InvalidInput)
    # Whoever makes a state by hand hears of it before anything is loaded.
    states[0] = stagerun.State({**states[0].values, "prompt_embeds": value})
    heard: list[str] = []
    refused(lambda: pipe.denoise(states, emit=lambda kind, data: heard.append(kind)), says, InvalidInput)
    assert "load" not in heard


def test_a_state_whose_shapes_a_model_cannot_take_is_refused_before_it_is_loaded(pipe: stagerun.Pipeline) -> None:
    heard: list[str] = []

    def emit(kind: str, data: Any) -> None:
        heard.append(kind)

    states = pipe.encode(RED, **SMALL)
    states["prompt_embeds"] = states["prompt_embeds"][..., :5]
    refused(lambda: pipe.denoise(states, emit=emit), r"denoise cannot work on state 0: prompt_embeds is \[1, 32, 5\], "
            r"and was \[1, 32, 32\] \(.+\) -> other numbers in the same shapes")
    latents = pipe.denoise(pipe.encode(RED, **SMALL))
    latents["latents"] = latents["latents"][..., :4]
    refused(lambda: pipe.decode(latents, emit=emit), r"decode cannot work on state 0: latents is \[1, 4, 6, 4\]")
    latents["latents"] = torch.full_like(latents["latents"], torch.nan)
    refused(lambda: pipe.decode(latents, emit=emit), "latents holds NaN or infinity -> ")
    states = pipe.encode(RED, **SMALL)
    states[0] = stagerun.State({"pooled_prompt_embeds": states["pooled_prompt_embeds"]})
    refused(lambda: pipe.denoise(states, emit=emit), "it lacks prompt_embeds -> ")
    refused(lambda: stagerun.run_stage(latents.plan, "decode", states=[states[0]], emit=emit),
            "Required input 'latents' is missing")
    assert "load" not in heard


def test_embeddings_of_another_length_or_type_are_taken(pipe: stagerun.Pipeline) -> None:
    states = pipe.encode(RED, **SMALL)
    states["prompt_embeds"] = states["prompt_embeds"][:, :5].double().requires_grad_()
    by_hand = pipe.encode(RED, **SMALL)
    # Without tags, which say what the denoiser is given.
    by_hand[0] = stagerun.State({**states[0].values})
    made = pipe.denoise(states)
    assert torch.equal(made["latents"], pipe.denoise(by_hand)["latents"])
    assert not torch.equal(made["latents"], pipe.denoise(pipe.encode(RED, **SMALL))["latents"])


def test_states_of_another_pipeline_are_worked_on_as_this_one_says(pipe: stagerun.Pipeline, tmp_path: Path) -> None:
    states = pipe.encode(RED, **SMALL)
    other = stagerun.Pipeline(tiny_families.z_image(tmp_path / "z"), devices="cpu", dtype="float32")
    refused(lambda: other.denoise(states), "states of flux, and this pipeline is one of z-image -> give them to a pip")
    coarse = stagerun.Pipeline(pipe.job_for(RED).model or "", devices="cpu", dtype="bfloat16")
    made = coarse.denoise(states)
    assert {place.dtype for place in made.plan.places_of("denoise").values()} == {torch.bfloat16}
    again = stagerun.Pipeline(pipe.job_for(RED).model or "", devices="cpu", dtype="float32")
    assert again.denoise(states).plan is states.plan and artifact_keys(states.plan)


def test_errors_of_the_model_of_the_libraries_and_of_our_own_are_told_apart(pipe: stagerun.Pipeline) -> None:
    stage = pipe.plan.stage("denoise")
    says = "what its configs say does not go together: look at .*config.json"
    with pytest.raises(ModelError, match=says) as caught, suspected(stage):
        torch.nn.Linear(2, 3)(torch.zeros(1, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    says = f"where the model is untouched, it is diffusers {diffusers.__version__} or"
    with pytest.raises(ModelError, match=says), suspected(stage):
        diffusers.utils.load_image(3)

    class Lacking(torch.nn.Module):
        def forward(self) -> None:
            raise ModuleNotFoundError("no module named fast_attention")

    with pytest.raises(ModelError, match=r"named fast_attention.*install what they ask for"), suspected(stage):
        Lacking()()
    for ours in (suspected(stage), explained("the model", "another")):
        with pytest.raises(AttributeError), ours:
            read_bytes(json)  # type: ignore[arg-type]


def test_an_interruption_is_no_error_of_ours() -> None:
    """So that `except Exception` and `except StagerunError` let it through, as any Ctrl-C."""
    assert issubclass(stagerun.Interrupted, KeyboardInterrupt)
    assert not issubclass(stagerun.Interrupted, Exception | StagerunError)
