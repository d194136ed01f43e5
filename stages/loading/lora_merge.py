"""LoRA merged into weights, one by one where they are read: W + scale * alpha / rank * B A (Hu et al., 2021).

So nothing of it is left when a stage computes: every placement, the modulation table and every step are those of the
model alone, on cards that have no room for a second set of layers.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from torch import nn

from stages.errors import ModelError
from stages.models.checkpoint import Checkpoint, Component
from stages.models.lora import Lora, check_unchanged
from stages.models.skeleton import skeleton

# Elements of a weight that are added to at once: merging takes three times their bytes in float32 on its device.
ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class LowRankUpdate:
    """What a LoRA adds to the weight [out, in] of a linear layer."""

    down: torch.Tensor
    """The first matrix, [rank, in]."""
    up: torch.Tensor
    """The second matrix, [out, rank]."""
    scale: float
    """What their product is multiplied by."""

    def to(self, device: torch.device) -> "LowRankUpdate":
        """The same in float32 on a device."""
        return LowRankUpdate(self.down.to(device, torch.float32), self.up.to(device, torch.float32), self.scale)

    def rows(self, rows: slice) -> torch.Tensor:
        """What is added to these rows of the weight."""
        return self.up[rows] @ self.down * self.scale


class LoraMerger:
    """The updates of all LoRAs of a component, by weight."""

    def __init__(self, component: Component) -> None:
        self._updates: dict[str, list[LowRankUpdate]] = {}
        for lora in component.loras:
            for name, update in read_updates(lora, component).items():
                self._updates.setdefault(name, []).append(update)

    def __contains__(self, name: str) -> bool:
        return name in self._updates

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name with what is added to it: on a card in its place, on the host in a copy.

        A weight on the host may be a window on its file.
        """
        if name not in self:
            return weight
        weight = weight.clone() if weight.device.type == "cpu" else weight
        add_updates(weight, self._updates[name])
        return weight


@torch.no_grad()
def add_updates(weight: torch.Tensor, updates: Sequence[LowRankUpdate]) -> None:
    """Add all of them to a weight [out, in] in float32, some rows at a time, and round once."""
    here = [update.to(weight.device) for update in updates]
    count = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        total = weight[rows].float()
        for update in here:
            total = total + update.rows(rows)
        weight[rows] = total


@lru_cache(maxsize=32)
def check_loras(component: Component) -> None:
    """Raise ModelError for a LoRA that is not made for the component, or adds to more than its linear layers.

    What is well once is not looked at again: a LoRA is named by the hash of its file.
    """
    model = skeleton(component)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for lora in component.loras:
        for name, update in read_updates(lora, component).items():
            layer = layers.get(name.removesuffix(".weight"))
            if layer is None:
                raise ModelError(f"{lora.source} adds to {name}, which is no linear layer of this model's "
                                 f"{component.class_name} -> use a LoRA that was made for this model")
            shape = [update.up.shape[0], update.down.shape[1]]
            if shape != list(layer.weight.shape):
                raise ModelError(f"{lora.source} adds {shape} to {name}, which is {list(layer.weight.shape)} in this "
                                 f"model -> use a LoRA that was made for this model")
            if not all(bool(matrix.float().isfinite().all()) for matrix in (update.down, update.up)):
                raise ModelError(f"{lora.source} adds values to {name} that are not finite -> fetch it again, or use "
                                 f"another LoRA")


def components_reached(lora: Lora, checkpoint: Checkpoint) -> list[str]:
    """The components that a LoRA adds to; ModelError for one that is not in the checkpoint, or adds to nothing."""
    known = set(_pipeline(lora)._lora_loadable_modules) & checkpoint.components.keys()
    found = dict.fromkeys(name.partition(".")[0] for name in _converted(lora).tensors)
    if foreign := [name for name in found if name not in known]:
        raise ModelError(f"{lora.source} adds to {foreign[0]!r}, and diffusers {diffusers.__version__} knows LoRA for "
                         f"{' and '.join(sorted(known))} of this model -> use one for those alone")
    if not found:
        raise ModelError(f"{lora.source} holds nothing -> use another LoRA")
    return list(found)


def read_updates(lora: Lora, component: Component) -> dict[str, LowRankUpdate]:
    """What a LoRA adds to the component, by the name of the weight; ModelError for more than pairs of matrices.

    diffusers knows the formats of the trainers, and what it would pass over is refused.
    """
    part = _converted(lora).of(component.name)
    tensors = _named_as_in(lora, component, part.tensors)
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors)
    odd = sorted(tensors.keys() ^ {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"})
    if odd or part.config.get("use_dora"):
        raise ModelError(f"{lora.source} is not made of pairs of matrices alone ({odd[0] if odd else 'DoRA'}) -> use "
                         f"a plain LoRA")
    found = {}
    for layer in layers:
        down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0:
            raise ModelError(f"{lora.source} has {list(up.shape)} by {list(down.shape)} for {layer} -> use a LoRA of "
                             f"linear layers")
        if not (down.is_floating_point() and up.is_floating_point()):
            raise ModelError(f"{lora.source} has {up.dtype} by {down.dtype} for {layer} -> use a LoRA in floating "
                             f"point")
        found[f"{layer}.weight"] = LowRankUpdate(down, up, _strength(lora, layer, down.shape[0], part) * lora.scale)
    return found


@dataclass(frozen=True)
class _Converted:
    """What a file holds, under diffusers' names."""

    tensors: Mapping[str, torch.Tensor]
    """The matrices."""
    alphas: Mapping[str, Any]
    """The alphas that stand beside them."""
    config: Mapping[str, Any]
    """The trainer's config."""

    def of(self, component: str) -> "_Converted":
        """What concerns a component, under its own names."""
        inside = f"{component}."
        return _Converted(*({name.removeprefix(inside): value for name, value in table.items()
                             if name.startswith(inside)} for table in (self.tensors, self.alphas, self.config)))


def _named_as_in(lora: Lora, component: Component, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the names that the component's class gives its layers, and PEFT the two matrices of each."""
    named = dict(tensors)
    if component.library == "diffusers":
        plain = all(".lora_A." in name or ".lora_B." in name for name in named)
        return named if plain else dict(convert_unet_state_dict_to_peft(named))
    try:
        named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(named))
    except (ValueError, LookupError) as error:
        raise ModelError(f"{lora.source} has names for the {component.class_name} that diffusers does not know "
                         f"({error}) -> use a LoRA that was made for this model") from error
    # transformers has done without this level since CLIP's encoder is a model of its own.
    level = "" if hasattr(skeleton(component), "text_model") else "text_model."
    return {name.removeprefix(level): tensor for name, tensor in named.items()}


def _strength(lora: Lora, layer: str, rank: int, part: _Converted) -> float:
    """Alpha over rank, from where the file says it; 1 where it says nothing, as its trainer then means."""
    if "lora_alpha" in part.config:
        patterns = part.config.get("alpha_pattern") or {}
        own = (alpha for pattern, alpha in patterns.items() if _names(lora, pattern, layer))
        root = math.sqrt(rank) if part.config.get("use_rslora") else rank
        return _number(lora, next(own, part.config["lora_alpha"])) / root
    if not part.alphas:
        return 1.0
    if f"{layer}.alpha" not in part.alphas:
        raise ModelError(f"{lora.source} has an alpha for other layers and none for {layer} -> use a whole LoRA")
    return _number(lora, part.alphas[f"{layer}.alpha"]) / rank


def _names(lora: Lora, pattern: str, layer: str) -> bool:
    """Whether a name of PEFT's `alpha_pattern` means the layer: the whole of it behind a `^`, or else its end.

    To PEFT it is a regular expression, and one from a file could run for ever.
    """
    if not re.fullmatch(r"\^?[\w.]+", pattern):
        raise ModelError(f"{lora.source} has an alpha for layers like {pattern[:60]!r}, and only names of layers are "
                         f"read -> use a LoRA that names them")
    return layer == pattern.removeprefix("^") or (pattern[0] != "^" and layer.endswith(f".{pattern}"))


def _number(lora: Lora, alpha: Any) -> float:
    with suppress(TypeError, ValueError, RuntimeError):
        if math.isfinite(value := float(alpha)):
            return value
    raise ModelError(f"{lora.source} has the alpha {str(alpha)[:60]!r} -> use another LoRA")


def _patterns(config: Mapping[str, Any]) -> list[str]:
    return [name for name in config if name.endswith("alpha_pattern")]


def _pipeline(lora: Lora) -> Any:
    """The pipeline class that reads a LoRA; ModelError for one that reads none."""
    found = getattr(diffusers, lora.pipeline)
    if not hasattr(found, "lora_state_dict"):
        raise ModelError(f"diffusers {diffusers.__version__} reads no LoRA for a {lora.pipeline} -> leave `loras` out")
    return found


def _converted(lora: Lora) -> _Converted:
    """The file as diffusers reads it; ModelError for one that it cannot read, or reads in part."""
    check_unchanged(lora)
    reader = _pipeline(lora).lora_state_dict
    wants = {"return_alphas": True} if "return_alphas" in inspect.signature(reader).parameters else {}
    try:
        with _strictly() as warned:
            tensors, *more = reader(str(lora.path.parent), weight_name=lora.path.name, use_safetensors=True,
                                    local_files_only=True, return_lora_metadata=True, **wants)
    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{lora.source} is no LoRA that diffusers {diffusers.__version__} can read for a "
                         f"{lora.pipeline} ({reason:.200}) -> use one that was made for this model") from error
    if warned:
        raise ModelError(f"{lora.source} holds what is not run ({warned[0]:.200}) -> use a plain LoRA")
    config = more.pop() or {}
    if not isinstance(config, dict) or not all(isinstance(config.get(name) or {}, dict) for name in _patterns(config)):
        raise ModelError(f"{lora.source} has a trainer's config that is no table -> use another LoRA")
    alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
    alphas |= more.pop() or {} if more else {}
    return _Converted({name: tensor for name, tensor in tensors.items() if name not in alphas}, alphas, config)


@contextmanager
def _strictly() -> Iterator[list[str]]:
    """What diffusers warns of while it converts: there it passes over what it does not know."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger("diffusers")
    level, handlers = root.level, root.handlers
    root.setLevel(logging.WARNING)
    root.handlers = [handler]
    try:
        yield warned
    finally:
        root.setLevel(level)
        root.handlers = handlers
