"""Keywords that diffusers has and a pipeline does not: each with what to write instead."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stages.errors import StagerunError, worded
from stages.signatures import WrongCall, unknown_name

_EMBEDS = "states = pipe.encode(...), change states[0], and pipe.decode(pipe.denoise(states))"
_NOISE = "seed= or generator= says the noise; latents are changed between pipe.denoise and pipe.decode"
_TEXT_ALONE = "leave it out: pictures are made of text alone"
_STEP = "on_step=, which is called with (index, step, timestep, values)"
_LORA = "loras=[\"style.safetensors=0.8\"] of the pipeline"
_SCHEDULE = "num_inference_steps= of the call, or scheduler= of the pipeline"
_GUIDANCE = "leave it out: guidance_scale= says all of the guidance"
_FOLDER = "save the whole with save_pretrained, and name its folder"
_LEFT_OUT = "leave it out"

# Of a call.
CALL: Mapping[str, str] = {
    "latents": _NOISE,
    **dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "prompt_embeds_mask",
                     "negative_pooled_prompt_embeds", "negative_prompt_embeds_mask"), _EMBEDS),
    **dict.fromkeys(("prompt_2", "prompt_3"), "prompt=, which every text encoder reads"),
    **dict.fromkeys(("negative_prompt_2", "negative_prompt_3"), "negative_prompt=, which every text encoder reads"),
    **dict.fromkeys(("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps",
                     "callback_on_step"), _STEP),
    **dict.fromkeys(("image", "mask_image", "strength", "control_image", "ip_adapter_image", "padding_mask_crop",
                     "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds"),
                    _TEXT_ALONE),
    "output_type": "leave it out: result.images are PIL's, numpy.asarray(result.images[0]) is an array (uint8, height "
                   "x width x 3), and pipe.denoise(pipe.encode(...)) gives latents",
    "return_dict": "leave it out: the pictures are result.images",
    **dict.fromkeys(("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"), _LORA),
    **dict.fromkeys(("sigmas", "timesteps", "mu"), _SCHEDULE),
    **dict.fromkeys(("eta", "guidance_rescale", "cfg_normalization", "cfg_truncation", "skip_guidance_layers",
                     "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"), _GUIDANCE),
    **dict.fromkeys(("clip_skip", "text_encoder_out_layers"), "leave it out: the encoders' layers are those that the "
                                                              "family reads"),
    **dict.fromkeys(("caption_upsample_temperature", "original_size", "target_size", "crops_coords_top_left"),
                    _LEFT_OUT),
    "steps": "num_inference_steps=", "guidance": "guidance_scale=", "cfg": "guidance_scale=",
    "size": "height= and width=", "count": "num_images_per_prompt=", "text_tokens": "max_sequence_length=",
    "seeds": "seed=, which takes a list, too",
    **dict.fromkeys(("on_step", "emit"), "pipe(...) and pipe.denoise(...) take it"),
    "machine": "pipe.plan_for(...) takes it",
    **{name: f"{name}= of the pipeline: Pipeline(..., {name}=...)" for name in (
        "max_memory", "device_map", "place", "dtype", "torch_dtype", "store", "allow_offload", "lanes", "tile",
        "loras", "scheduler", "devices", "gpus", "progress", "policy")},
}

# Of a pipeline.
PIPELINE: Mapping[str, str] = {
    "cache_dir": "the variable HF_HOME, before Python starts",
    "local_files_only": "the variable HF_HUB_OFFLINE=1, before Python starts",
    **dict.fromkeys(("token", "use_auth_token"), "`hf auth login` in a shell, or the variable HF_TOKEN"),
    "use_safetensors": "leave it out: nothing but safetensors is read",
    "variant": "leave it out: the files without a variant are read, and dtype= says the type",
    "quantization_config": "leave it out: nothing is quantized; max_memory= and allow_offload= make it fit",
    **dict.fromkeys(("low_cpu_mem_usage", "force_download", "trust_remote_code", "proxies", "load_connected_pipeline",
                     "use_onnx", "use_flashpack", "disable_mmap", "mirror"), _LEFT_OUT),
    **dict.fromkeys(("offload_folder", "offload_state_dict"), "allow_offload=\"disk\""),
    **dict.fromkeys(("custom_pipeline", "custom_revision"), "leave it out: no code of a model is run"),
    **dict.fromkeys(("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder"),
                    "leave it out: no picture is checked, and none is read"),
    "ranks": "stagerun.spawn(pipe.job_for(...), ranks=2)", "engine": "stagerun.run_on_ray(pipe.job_for(...))",
    "out": "result.images[0].save(\"fox.png\")",
    "device": "devices=, such as \"cuda:0\"", "lora": "loras=", "artifacts": "store=", "step_callback": "on_step= of "
    "the call", "prompt": "the call: pipe(\"a red circle\")", "steps": "num_inference_steps= of the call",
    **{name: f"{name}= of the call" for name in (
        "negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width",
        "num_images_per_prompt", "generator", "seed", "max_sequence_length")},
    **dict.fromkeys(("on_step", "emit"), "pipe(...) takes it"),
}
# A None for one of these asks for a model without it, which is something else than not to ask.
COMPONENTS: Mapping[str, str] = dict.fromkeys(
    ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
     "tokenizer_3", "unet"), _FOLDER)

# What asks for nothing besides None: what diffusers does, or does not, when a keyword is left out.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "output_type": ("pil",), "return_dict": (True,), "callback_on_step_end_tensor_inputs": (["latents"],),
    **dict.fromkeys(("eta", "guidance_rescale"), (0.0, 0)), "cfg_normalization": (False,), "cfg_truncation": (1.0, 1),
    "skip_layer_guidance_scale": (2.8,), "skip_layer_guidance_start": (0.01,), "skip_layer_guidance_stop": (0.2,),
    "use_safetensors": (True,), "low_cpu_mem_usage": (True, False),
    **dict.fromkeys(("local_files_only", "force_download", "trust_remote_code", "load_connected_pipeline", "use_onnx",
                     "use_flashpack", "disable_mmap", "offload_state_dict", "requires_safety_checker"), (False,)),
}


# What a job calls otherwise than a call does.
_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "text_tokens": "max_sequence_length",
          "count": "num_images_per_prompt"}


@contextmanager
def in_words_of_a_call() -> Iterator[None]:
    """While entered, errors name what a call takes in its own words."""

    def word(name: str, value: str | None) -> str | None:
        return f"`{_NAMES[name]}`" if value is None else f"`{_NAMES[name]}={value}`"

    try:
        yield
    except StagerunError as error:
        error.text = worded(error.text, lambda name, value: word(name, value) if name in _NAMES else None)
        raise


def asked_for(given: Mapping[str, Any], elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """What is asked for by keywords, without those of `elsewhere` that ask for nothing, such as `image=None`."""
    def is_nothing(name: str, value: Any) -> bool:
        return value is None or any(type(value) is type(nothing) and value == nothing
                                    for nothing in _NOTHING.get(name, ()))

    return {name: value for name, value in given.items() if name not in elsewhere or not is_nothing(name, value)}


def refuse(unknown: Iterable[str], known: Iterable[str], instead: Mapping[str, str], what: str) -> None:
    """Raise WrongCall for the first of `unknown` keywords, with what to write instead."""
    for name in unknown:
        if name in instead:
            raise WrongCall(f"{what} takes no {name}= -> {instead[name]}")
        raise WrongCall(unknown_name(what, name, known))
