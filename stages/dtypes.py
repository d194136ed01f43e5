"""Which type a component's weights have on a device."""

import torch

from stages.checkpoint import Component
from stages.machine import Device

# Their blocks clip activations to what float16 holds; others overflow to infinity, and the picture turns black.
GUARDED = frozenset({"FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
                     "ChromaTransformer2DModel"})


def choose(component: Component, device: Device) -> torch.dtype:
    """bfloat16 where the device has it, float16 for denoisers that guard against overflow, float32 for the rest."""
    if device.bfloat16:
        return torch.bfloat16
    if not device.is_host and component.class_name in GUARDED:
        return torch.float16
    return torch.float32
