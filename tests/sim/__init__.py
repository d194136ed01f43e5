"""Simulated cards: devices `sim:0`, `sim:1`, ... in host memory, each with its own limit in bytes.

Importing this builds the backend once and makes it this process's `torch.accelerator`, with no card until
`configure` is called. Memory is asked for as on any accelerator, through `torch.accelerator`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch

from tests.sim.build import build

__all__ = [
    "bfloat16", "configure", "copied", "corrupt", "delay", "fail_allocation", "reset", "reset_copied", "withdraw",
]

torch.ops.load_library(build())
_backend = torch.ops.sim
_CORRUPTIONS = ("none", "zeros", "noise")


def configure(limits: Sequence[int]) -> None:
    """Have `len(limits)` cards of so many bytes each; ValueError if a card would vanish that still holds bytes."""
    _backend.configure(list(limits))


def withdraw() -> None:
    """Have no cards, so that CPU work finds no accelerator. What is still allocated counts on no later card."""
    _backend.withdraw()


def copied() -> dict[tuple[str, str], int]:
    """Bytes copied so far per (source, destination), such as ("cpu", "sim:0"); pairs without copies are absent."""
    flat = _backend.copied()
    return {(_name(flat[i]), _name(flat[i + 1])): flat[i + 2] for i in range(0, len(flat), 3)}


def reset_copied() -> None:
    """Count copies from zero again."""
    _backend.clear_copied()


def fail_allocation(device: str | int, nth: int) -> None:
    """Make the nth next allocation on a card (1 is the very next) raise `torch.OutOfMemoryError`, once."""
    _backend.fail_allocation(_index(device), nth)


def corrupt(source: str, destination: str, how: Literal["none", "zeros", "noise"] = "zeros") -> None:
    """Make copies from one device to another succeed with wrong contents, until reset."""
    _backend.corrupt(_index(source), _index(destination), _CORRUPTIONS.index(how))


def delay(per_kernel_seconds: float = 0.0, per_copied_byte_seconds: float = 0.0) -> None:
    """Make kernels and copies take at least so long and hold their cards meanwhile, as one queue per card would."""
    _backend.delay(per_kernel_seconds, per_copied_byte_seconds)


def bfloat16(supported: bool) -> None:
    """Say whether the cards have bfloat16, as `torch.sim.is_bf16_supported()` then reports."""
    _backend.set_bfloat16(supported)
    torch.accelerator.get_device_capability.cache_clear()


def reset() -> None:
    """Take back every fault and delay and count copies from zero; memory and limits stay."""
    _backend.clear_faults()
    _backend.clear_copied()
    torch.accelerator.get_device_capability.cache_clear()


def _name(index: int) -> str:
    return "cpu" if index < 0 else f"sim:{index}"


def _index(device: str | int) -> int:
    if isinstance(device, int):
        return device
    if device == "cpu":
        return -1
    named = torch.device(device)
    if named.type != "sim" or named.index is None:
        raise ValueError(f"expected 'cpu' or a card such as 'sim:0', got {device!r}")
    return named.index


def _card(device: str | int | torch.device) -> int:
    index = device if isinstance(device, int) else torch.device(device).index
    return torch.accelerator.current_device_index() if index is None else index


def _device_module() -> ModuleType:
    """What torch and the libraries on it look for under `torch.sim`."""
    module = ModuleType("torch.sim")
    vars(module).update(
        is_available=lambda: bool(_backend.device_count()),
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=_backend.device_count,
        current_device=torch.accelerator.current_device_index,
        set_device=torch.accelerator.set_device_index,
        get_device_name=lambda device="sim": "simulated card",
        is_bf16_supported=_backend.bfloat16,
        get_amp_supported_dtype=lambda: [torch.float16] + [torch.bfloat16] * _backend.bfloat16(),
        manual_seed=_backend.seed,
        manual_seed_all=_backend.seed,
        get_rng_state=lambda device="sim": _backend.get_rng_state(_card(device)),
        set_rng_state=lambda state, device="sim": _backend.set_rng_state(state, _card(device)),
    )
    return module


torch.utils.rename_privateuse1_backend("sim")
torch._register_device_module("sim", _device_module())
torch.utils.generate_methods_for_privateuse1_backend()
