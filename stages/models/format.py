"""Which type a component's weights have on a machine, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.machine import Device
from stages.models.checkpoint import Component

# Their blocks clip activations to what float16 holds; others overflow to infinity, and the picture turns black.
GUARDED = frozenset({"FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
                     "ChromaTransformer2DModel"})


@dataclass(frozen=True)
class Choice:
    """A type and the reason for it."""

    dtype: torch.dtype
    reason: str


def choose_dtype(component: Component, devices: Sequence[Device]) -> Choice:
    """bfloat16 where every device has it, float16 for denoisers that guard against overflow, float32 for the rest."""
    lacking = [device for device in devices if not device.bfloat16]
    if not lacking:
        return Choice(torch.bfloat16, "every card has bfloat16")
    first = lacking[0]
    if first.is_host:
        return Choice(torch.float32, "fastest on a CPU")
    if component.class_name in GUARDED:
        return Choice(torch.float16, f"{first.name} has no bfloat16, and the model guards against overflow")
    return Choice(torch.float32, f"{first.name} has no bfloat16, and float16 would overflow here")
