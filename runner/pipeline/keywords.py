"""Keywords that diffusers has and a pipeline does not: each with what to write instead."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from runner.text import shown
from stages.errors import InvalidInput

_EMBEDS = "states = pipe.encode(...), change states[0], and pipe.decode(pipe.denoise(states))"
_NOISE = "seed= or generator= says the noise; latents are changed between pipe.denoise and pipe.decode"
_TEXT_ALONE = "leave it out: pictures are made of text alone"
_STEP = "on_step=, which is called with (index, step, timestep, values)"
_LORA = "loras=[\"style.safetensors=0.8\"] of the pipeline"
_SCHEDULE = "num_inference_steps= of the call, or scheduler= of the pipeline"

# Of a call.
CALL: Mapping[str, str] = {
    "latents": _NOISE,
    **dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "prompt_embeds_mask",
                     "negative_pooled_prompt_embeds", "negative_prompt_embeds_mask"), _EMBEDS),
    **dict.fromkeys(("prompt_2", "prompt_3"), "prompt=, which every text encoder reads"),
    **dict.fromkeys(("negative_prompt_2", "negative_prompt_3"), "negative_prompt=, which every text encoder reads"),
    **dict.fromkeys(("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps"),
                    _STEP),
    **dict.fromkeys(("image", "mask_image", "strength", "control_image", "ip_adapter_image", "padding_mask_crop",
                     "ip_adapter_image_embeds"), _TEXT_ALONE),
    "output_type": "leave it out: result.images are PIL's, result.report.pictures[0].pixels is an array, and "
                   "pipe.denoise gives latents",
    "return_dict": "leave it out: the pictures are result.images",
    **dict.fromkeys(("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"), _LORA),
    **dict.fromkeys(("sigmas", "timesteps", "mu"), _SCHEDULE),
    "steps": "num_inference_steps=", "guidance": "guidance_scale=", "cfg": "guidance_scale=",
    "size": "height= and width=", "count": "num_images_per_prompt=", "text_tokens": "max_sequence_length=",
    "callback_on_step": _STEP, "seeds": "seed=, which takes a list, too",
    **{name: f"{name}= of the pipeline: Pipeline(..., {name}=...)" for name in (
        "max_memory", "device_map", "place", "dtype", "torch_dtype", "store", "allow_offload", "lanes", "loras",
        "scheduler", "devices", "gpus")},
}

# Of a pipeline.
PIPELINE: Mapping[str, str] = {
    "cache_dir": "the variable HF_HOME, before Python starts",
    "local_files_only": "the variable HF_HUB_OFFLINE=1, before Python starts",
    **dict.fromkeys(("token", "use_auth_token"), "`hf auth login` in a shell, or the variable HF_TOKEN"),
    "use_safetensors": "leave it out: nothing but safetensors is read",
    "variant": "leave it out: the files without a variant are read, and dtype= says the type",
    "quantization_config": "leave it out: nothing is quantized; max_memory= and allow_offload= make it fit",
    **dict.fromkeys(("low_cpu_mem_usage", "force_download", "trust_remote_code"), "leave it out"),
    **dict.fromkeys(("offload_folder", "offload_state_dict"), "allow_offload=\"disk\""),
    "custom_pipeline": "leave it out: no code of a model is run",
    **dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "unet",
                     "tokenizer_2"), "save the whole with save_pretrained, and name its folder"),
    "ranks": "stagerun.spawn(pipe.job_for(...), ranks=2)", "engine": "stagerun.run_on_ray(pipe.job_for(...))",
    "out": "result.images[0].save(\"fox.png\")",
    "device": "devices=, such as \"cuda:0\"", "lora": "loras=", "artifacts": "store=", "step_callback": "on_step= of "
    "the call", "seed": "seed= of the call", "prompt": "the call: pipe(\"a red circle\")",
    "num_inference_steps": "num_inference_steps= of the call", "guidance_scale": "guidance_scale= of the call",
}


def refuse(unknown: Iterable[str], known: Iterable[str], instead: Mapping[str, str], what: str) -> None:
    """Raise InvalidInput for the first of `unknown` keywords, with what to write instead."""
    for name in unknown:
        if name in instead:
            raise InvalidInput(f"{what} takes no {name}= -> {instead[name]}")
        close = get_close_matches(name, [*known], 1)
        hint = f"did you mean {close[0]}=?" if close else f"it takes {', '.join(known)}"
        raise InvalidInput(f"{what} takes no {shown(name)} -> {hint}")
