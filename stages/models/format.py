"""The type that weights have when they are loaded, and the formats that are not."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import ModelError

if TYPE_CHECKING:
    import torch

    from stages.machine import Device

# Their blocks clip activations to what float16 holds; others overflow to infinity, and the picture turns black.
SAFE_IN_FLOAT16 = frozenset({"FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
                             "ChromaTransformer2DModel"})


_NOT_RUN = "which are not run; use a model in bfloat16 or float32, such as the one that it was made from"
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
# What is stored beside fp8, int8, 4 bit and packed weights: names of ComfyUI, compressed-tensors, bitsandbytes, GPTQ,
# AWQ, quanto, torchao, ModelOpt and nunchaku. No class of the libraries has a parameter of such a name.
_COMPANION = re.compile(
    r"(^|\.)(scaled_fp8|comfy_quant|SCB|CB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*"
    r"|(weight|input|output|k|v|q)_scale(_inv|_2)?|scale_(weight|input|output)|(weight|input)_zero_point"
    r"|weight_(packed|shape|g_idx|qdata)|(weight|input|output)_(quantizer\._)?amax|pre_quant_scale|g_idx|qweight|qzeros"
    r"|wscales|wzeros|wtscale|wcscales|smooth_factor(_orig)?|weight\._(data|scale|shift|packed))$"
    r"|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$"
)
_SCALE_LIKE = re.compile(r"scale|absmax|quant|zero_?point|zeros|amax", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """A type that was chosen for a component."""

    dtype: "torch.dtype"
    """The type of its weights, and of what it computes."""
    reason: str
    """Why so, as people read it."""


def choose_dtype(class_name: str, devices: Sequence["Device"]) -> Choice:
    """bfloat16 where every device has it, float16 for denoisers that guard against overflow, float32 for the rest."""
    import torch  # A model is found and checked before torch is imported, which takes a second.

    lacking = [device for device in devices if not device.bfloat16]
    if not lacking:
        return Choice(torch.bfloat16, "every card has bfloat16")
    first = lacking[0]
    if first.is_host:
        return Choice(torch.float32, "fastest on a CPU")
    if class_name in SAFE_IN_FLOAT16:
        return Choice(torch.float16, f"{first.name} has no bfloat16, and the model guards against overflow")
    return Choice(torch.float32, f"{first.name} has no bfloat16, and float16 would overflow here")


def refuse_quantized(config: Mapping[str, object], folder: Path) -> None:
    """Raise ModelError where the config of a component folder says that its weights are quantized."""
    parts = [part for part in config.values() if isinstance(part, dict)]
    if any(part.get(key) for part in (config, *parts) for key in _QUANTIZED):
        raise ModelError(f"{folder} holds quantized weights, {_NOT_RUN}")


def refuse_companions(tensors: Iterable[str], path: Path, *, unknown: bool = False) -> None:
    """Raise ModelError where weights have tensors beside them without which they mean something else, such as scales.

    The libraries read the weights all the same, and leave these out. Of `unknown` tensors, which stand beside weights
    and which no class asks for, all are meant that can be such.
    """
    pattern = _SCALE_LIKE if unknown else _COMPANION
    if found := [name for name in tensors if pattern.search(name)]:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ModelError(f"{path} holds quantized weights ({found[0]}{more} belongs to them), {_NOT_RUN}")


def refuse_whole_numbers(stored: Mapping[str, str], path: Path) -> None:
    """Raise ModelError for weights which are stored as whole numbers; `stored` has the types in the files by name."""
    found = [f"{name} ({dtype})" for name, dtype in stored.items() if dtype.startswith(("I", "U", "BOOL"))]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ModelError(f"{path} holds whole numbers in place of weights, {found[0]}{more}: quantized weights, "
                         f"{_NOT_RUN}")


def loaded_dtype(
    library: str, model: Any, dtype: "torch.dtype"
) -> "Callable[[str, torch.dtype], torch.dtype]":
    """The type that each stored tensor of a model has when its library loads it at `dtype`.

    It depends on the tensor's name and on the type that it has before: in the file for diffusers, which casts all
    that it reads, and in the model for transformers, which keeps what the class gives. Whole numbers stay as they are.
    """
    import torch

    keeps_float32 = _kept_in_float32(library, model, dtype)

    def loaded(name: str, before: "torch.dtype") -> "torch.dtype":
        if not before.is_floating_point:
            return before
        if keeps_float32(name):
            return torch.float32
        return dtype if library == "diffusers" else before

    return loaded


def _kept_in_float32(library: str, model: Any, dtype: "torch.dtype") -> Callable[[str], bool]:
    """Whether the library keeps a tensor in float32 when the rest is loaded at `dtype`."""
    import torch

    if library == "diffusers":
        kept = frozenset(model._keep_in_fp32_modules or ())
        return lambda name: not kept.isdisjoint(name.split("."))
    plain = model._keep_in_fp32_modules if dtype == torch.float16 else ()
    strict = model._keep_in_fp32_modules_strict if dtype in (torch.float16, torch.bfloat16) else ()
    return any_of([pattern.replace("*", ".*") for pattern in (*plain, *strict)])


def any_of(patterns: Collection[str] | None) -> Callable[[str], bool]:
    """Whether one of the patterns, as the libraries write them, is found in a name."""
    found = re.compile("|".join(f"({pattern})" for pattern in patterns or ()))
    return lambda name: bool(patterns) and found.search(name) is not None
