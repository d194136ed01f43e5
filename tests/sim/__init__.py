"""Simulated cards: devices `sim:0`, `sim:1`, ... in host memory, each with its own limit in bytes.

Importing this builds the backend once and makes it this process's `torch.accelerator`, with no card until
`configure` is called. Memory is asked for as on any accelerator, through `torch.accelerator`.

At first everything runs when it is called. After `schedule` what is called is ordered, as on a real card: streams and
events mean something, memory that is given back is spoiled in the order of its stream, and every engine has a virtual
clock.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import torch

from tests.sim.build import build

__all__ = [
    "Busy", "at_once", "bfloat16", "busy", "caching", "clear_workspaces", "configure", "contexts", "copied", "corrupt",
    "delay", "fail_allocation", "fail_kernel", "host_seconds", "host_waits", "limit_pinned",
    "pinned_bytes", "reset", "reset_copied",
    "schedule", "watched_waits", "withdraw", "workspaces",
]

torch.ops.load_library(build())
_backend = torch.ops.sim
_CORRUPTIONS = ("none", "zeros", "noise")
_SCHEDULES = {"synchronous": -1, "late": 0, "early": 1}
_FIRST_SEED = 2
_ENGINES = ("compute", "in", "out")
_PICOSECOND = 1e-12
# When each engine of a card, such as ("sim:0", "in"), is busy: begins and ends in seconds, in order.
Busy = dict[tuple[str, str], list[tuple[float, float]]]


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
    """Make kernels and copies take so long and hold their cards meanwhile, as one queue per card would.

    Where what is called is ordered, that is the virtual clock's time, and each card has an engine for kernels and one
    for copies in each direction; else they sleep.
    """
    _backend.delay(per_kernel_seconds, per_copied_byte_seconds)


def schedule(when: Literal["synchronous", "late", "early"] | int) -> None:
    """Say when what is called runs, from now on.

    "synchronous" is at once; "late" is when somebody waits for it; "early" is at once on side streams, and late on
    default ones; a number from 0 on draws it. Whoever does not wait reads wrong numbers under one of them.
    """
    _backend.set_schedule(_FIRST_SEED + when if isinstance(when, int) else _SCHEDULES[when])


def host_waits() -> int:
    """How often the host has waited for something that was not done, since the last reset."""
    return int(_backend.host_waits())


@contextmanager
def watched_waits() -> Iterator[list[str]]:
    """Where in Python's code the host waits meanwhile, filled in at the end: frames, innermost first."""
    found: list[str] = []
    begin = len(_backend.places_of_waits())
    _backend.tell_places_of_waits(True)
    try:
        yield found
    finally:
        _backend.tell_places_of_waits(False)
        found += _backend.places_of_waits()[begin:]


def at_once() -> list[str]:
    """Names of the operators that were not ordered under a schedule, but run at once, since this was last asked."""
    return list(_backend.run_at_once())


def busy() -> Busy:
    """When the engines were busy on the virtual clock, which begins at the last reset."""
    flat, found = _backend.booked(), Busy()
    for i in range(0, len(flat), 4):
        engine = _name(flat[i]), _ENGINES[flat[i + 1]]
        found.setdefault(engine, []).append((flat[i + 2] * _PICOSECOND, flat[i + 3] * _PICOSECOND))
    return found


def host_seconds() -> float:
    """The time on the virtual clock at which the calling thread's last wait ended."""
    return float(_backend.host_time()) * _PICOSECOND


def fail_kernel(device: str | int, nth: int) -> None:
    """Make the nth next kernel on a card fail: whoever waits for the card then raises RuntimeError, until reset."""
    _backend.fail_kernel(_index(device), nth)


def caching(wanted: bool, context_bytes: int = 0) -> None:
    """Count the bytes that CUDA's caching allocator would reserve and what a context takes, not those asked for.

    To be said before the first allocation.
    """
    _backend.set_caching(wanted)
    _backend.set_context_bytes(context_bytes)


def contexts() -> list[str]:
    """The cards on which this process has a context."""
    return [_name(index) for index in _backend.contexts()]


def workspaces(size: int) -> None:
    """Have matrix products take a workspace of so many bytes for each thread's handle and stream, and keep it."""
    _backend.set_workspace_bytes(size)


def clear_workspaces() -> None:
    """Give the workspaces back, as `torch._C._cuda_clearCublasWorkspaces()` does on CUDA."""
    _backend.clear_workspaces()


def pinned_bytes() -> int:
    """Bytes of host memory that are locked, with what is kept for later."""
    return int(_backend.pinned_bytes())


def limit_pinned(size: int | None) -> None:
    """Have the system lock no more than so many bytes."""
    _backend.limit_pinned(-1 if size is None else size)


def bfloat16(supported: bool) -> None:
    """Say whether the cards have bfloat16, as `torch.sim.is_bf16_supported()` then reports."""
    _backend.set_bfloat16(supported)
    torch.accelerator.get_device_capability.cache_clear()


def reset() -> None:
    """Run all at once again, take back every fault, delay and setting, and count from zero; memory and limits stay."""
    _backend.set_schedule(_SCHEDULES["synchronous"])
    _backend.clear_workspaces()
    _backend.set_workspace_bytes(0)
    _backend.limit_pinned(-1)
    caching(False)
    _backend.clear_streams()
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
        clear_workspaces=clear_workspaces,
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
