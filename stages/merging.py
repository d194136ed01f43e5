"""LoRA merged into weights, one by one where they are read: W + scale * alpha / rank * B A (Hu et al., 2021).

So nothing of it is left when a stage computes: every placement, the modulation table and every step are those of the
model alone, on cards that have no room for a second set of layers.
"""

import inspect
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from torch import nn

from stages.checkpoint import Component
from stages.errors import LoadError
from stages.lora import Lora
from stages.weights import outline

# Elements of a weight that are added to at once: merging takes three times their bytes in float32 on its device.
PART = 2**20


@dataclass(frozen=True)
class Addition:
    """What a LoRA adds to the weight [out, in] of a linear layer: `up` [out, rank] times `down` [rank, in]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def on(self, device: torch.device) -> "Addition":
        """The same in float32 on a device."""
        return Addition(self.down.to(device, torch.float32), self.up.to(device, torch.float32), self.scale)

    def of(self, rows: slice) -> torch.Tensor:
        """What is added to these rows."""
        return self.up[rows] @ self.down * self.scale


class Merger:
    """The additions of all LoRAs of a component."""

    def __init__(self, component: Component) -> None:
        self._additions: dict[str, list[Addition]] = {}
        for lora in component.loras:
            for name, addition in read(lora, component.name).items():
                self._additions.setdefault(name, []).append(addition)

    def __contains__(self, name: str) -> bool:
        return name in self._additions

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name with what is added to it: on a card in its place, on the host in a copy.

        A weight on the host may be a window on its file.
        """
        if name not in self:
            return weight
        weight = weight.clone() if weight.device.type == "cpu" else weight
        add(weight, self._additions[name])
        return weight


@torch.no_grad()
def add(weight: torch.Tensor, additions: Sequence[Addition]) -> None:
    """Add all of them to a weight [out, in] in float32, some rows at a time, and round once."""
    here = [addition.on(weight.device) for addition in additions]
    count = max(1, PART // weight.shape[1])
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        total = weight[rows].float()
        for addition in here:
            total = total + addition.of(rows)
        weight[rows] = total


def check(component: Component) -> None:
    """Raise LoadError for a LoRA that is not made for the component, or adds to more than its linear layers."""
    model = outline(component)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for lora in component.loras:
        for name, addition in read(lora, component.name).items():
            layer = layers.get(name.removesuffix(".weight"))
            if layer is None:
                raise LoadError(f"{lora.source} adds to {name}, which is no linear layer of this model's "
                                f"{component.class_name} -> use a LoRA that was made for this model")
            shape = [addition.up.shape[0], addition.down.shape[1]]
            if shape != list(layer.weight.shape):
                raise LoadError(f"{lora.source} adds {shape} to {name}, which is {list(layer.weight.shape)} in this "
                                f"model -> use a LoRA that was made for this model")


def read(lora: Lora, component: str) -> dict[str, Addition]:
    """What a LoRA adds, by the name of the weight; LoadError for a file that is none of its pipeline.

    diffusers knows the formats of the trainers, and what it would pass over is refused.
    """
    tensors, alphas, metadata = _converted(lora)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    foreign = [name for name in tensors if not name.startswith(f"{component}.")]
    if foreign:
        raise LoadError(f"{lora.source} adds to {foreign[0]} too, and LoRA is merged into the {component} alone -> "
                        f"use one that was trained on the {component} alone")
    mine = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
    if mine and not any(".lora_A." in name for name in mine):
        mine = convert_unet_state_dict_to_peft(mine)
    config = {name.removeprefix(f"{component}."): value for name, value in (metadata or {}).items()}
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in mine)
    names = {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    odd = sorted(mine.keys() ^ names)
    if odd or config.get("use_dora"):
        raise LoadError(f"{lora.source} is not made of pairs of matrices alone ({odd[0] if odd else 'DoRA'}) -> use a "
                        f"plain LoRA")
    if not layers:
        raise LoadError(f"{lora.source} holds nothing -> use another LoRA")
    found = {}
    for layer in layers:
        down, up = mine[f"{layer}.lora_A.weight"], mine[f"{layer}.lora_B.weight"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise LoadError(f"{lora.source} has {list(up.shape)} by {list(down.shape)} for {layer} -> use a LoRA of "
                            f"linear layers")
        strength = _strength(lora, f"{component}.{layer}", layer, down.shape[0], alphas, config)
        found[f"{layer}.weight"] = Addition(down, up, strength * lora.scale)
    return found


def _strength(
    lora: Lora, full: str, layer: str, rank: int, alphas: Mapping[str, Any], config: Mapping[str, Any]
) -> float:
    """Alpha over rank, from where the file says it; 1 where it says nothing, as its trainer then means."""
    if "lora_alpha" in config:
        patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
        own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern.lstrip('^')})", layer))
        return float(next(own, config["lora_alpha"])) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not alphas:
        return 1.0
    if f"{full}.alpha" not in alphas:
        raise LoadError(f"{lora.source} has an alpha for other layers and none for {layer} -> use a whole LoRA")
    return float(alphas[f"{full}.alpha"]) / rank


def _converted(lora: Lora) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any] | None]:
    """The tensors under diffusers' names, the alphas that stand beside them, and the trainer's config."""
    reader = getattr(getattr(diffusers, lora.pipeline), "lora_state_dict", None)
    if reader is None:
        raise LoadError(f"diffusers {diffusers.__version__} reads no LoRA for a {lora.pipeline} -> leave --lora out")
    alphas: dict[str, Any] = {}
    wants = {"return_alphas": True} if "return_alphas" in inspect.signature(reader).parameters else {}
    try:
        with _strictly() as warned:
            tensors, *more = reader(str(lora.path.parent), weight_name=lora.path.name, use_safetensors=True,
                                    local_files_only=True, return_lora_metadata=True, **wants)
    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise LoadError(f"{lora.source} is no LoRA that diffusers {diffusers.__version__} can read for a "
                        f"{lora.pipeline} ({reason:.200}) -> use one that was made for this model") from error
    if warned:
        raise LoadError(f"{lora.source} holds what is not run ({warned[0]:.200}) -> use a plain LoRA")
    metadata = more.pop()
    if more:
        alphas = more.pop() or {}
    alphas |= {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
    return tensors, alphas, metadata


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
