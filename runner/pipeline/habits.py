"""Methods that pipelines of diffusers have and need not be called here: each says what does it."""

from collections.abc import Callable
from typing import Any, NoReturn

from stages.errors import InvalidInput


def _instead(name: str, text: str) -> Callable[..., NoReturn]:
    def method(*args: Any, **kwargs: Any) -> NoReturn:
        raise InvalidInput(f"a pipeline has no {name}() -> {text}")

    method.__name__, method.__doc__ = name, f"Not here: {text}."
    return method


_OFFLOAD = 'leave it out: a stage loads its components alone; allow_offload="cpu" lets what fits no card wait'
_TILES = "leave it out: pictures that do not fit whole are decoded in tiles"


class Habits:
    """What users of diffusers may call first, refused in a line."""

    to = _instead("to", "leave it out: the plan places each stage; devices= of the pipeline says where it may")
    enable_model_cpu_offload = _instead("enable_model_cpu_offload", _OFFLOAD)
    enable_sequential_cpu_offload = _instead("enable_sequential_cpu_offload", _OFFLOAD)
    enable_group_offload = _instead("enable_group_offload", _OFFLOAD)
    enable_vae_tiling = _instead("enable_vae_tiling", _TILES)
    enable_vae_slicing = _instead("enable_vae_slicing", _TILES)
    enable_attention_slicing = _instead("enable_attention_slicing", "leave it out: attention is never held whole")
    load_lora_weights = _instead("load_lora_weights", 'loras=["style.safetensors=0.8"] of the pipeline')
    set_progress_bar_config = _instead("set_progress_bar_config", "progress=False of the pipeline")
    save_pretrained = _instead("save_pretrained", "the model's folder stays as it is: copy that")
