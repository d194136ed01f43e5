"""What hardware there is, and whether it computes: the only file that asks.

Everything else goes through `torch.accelerator` and device strings, so that it runs on CUDA, on XPU and on the
simulated accelerator of the tests alike.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stages.drivers import unseen_cards
from stages.errors import InvalidInput
from stages.host_memory import host_memory

# Segments that grow do not leave gaps that fit nobody (pytorch.org/docs/stable/notes/cuda.html, torch.cuda.memory).
# Read at the first allocation on a card; what somebody has set already is left alone.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

MIB = 2**20
# What a kind of device needs besides tensors: workspaces of its libraries, and what its allocator cannot use up.
_SPARE = {"cuda": 512 * MIB, "xpu": 512 * MIB, "cpu": 256 * MIB}
# A convolution may turn its operands into another layout, in as many bytes again as they have.
_SCRATCH = {"cuda": 1.0, "xpu": 1.0, "cpu": 1.0}
# Bytes of host memory where nobody said how many there are: more than anything takes.
UNCOUNTED = 2**60
# Bytes of a card, and of a host, that its system takes where the machine is not here to be asked.
CARD_TAKEN, HOST_TAKEN = 512 * MIB, 1024 * MIB
# Rows and columns of the matrix that shows whether a card computes.
SIDE = 64
# And of those that show how fast a host computes.
HOST_SIDE = 512
OTHER_TORCH = ("install a torch with kernels for it: its builds for CUDA 12.6 still have the old ones (on Kaggle "
               "choose the accelerator GPU T4 x2)")


@dataclass(frozen=True)
class Device:
    """One device: an accelerator card, or the host's processor with the host's memory."""

    name: str
    """As torch names it, such as `cuda:0` or `cpu`."""
    total: int
    """Bytes of its memory."""
    free: int
    """Bytes of it that nobody uses."""
    bfloat16: bool
    """Whether it computes in bfloat16 by itself."""
    label: str = ""
    """What its maker calls it."""
    limit: int | None = None
    """The most bytes of it that the user allows; None for all."""

    @property
    def is_host(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.name == "cpu"

    @property
    def spare(self) -> int:
        """Bytes of the free ones that are left to the runtime, for what it takes besides tensors."""
        return _SPARE.get(self.name.partition(":")[0], 0)

    @property
    def scratch(self) -> float:
        """What a convolution takes for a moment besides its operands, as a factor of their bytes."""
        return _SCRATCH.get(self.name.partition(":")[0], 0.0)

    @property
    def room(self) -> int:
        """Bytes for weights and activations."""
        most = self.free - self.spare
        return max(0, most if self.limit is None else min(self.limit, most))


@dataclass(frozen=True)
class Machine:
    """The devices of a run, and the host's memory beside them."""

    devices: tuple[Device, ...]
    """In the order of use."""
    host_total: int
    """Bytes of host memory, under the container's limit."""
    host_free: int
    """Bytes of it that nobody uses."""
    here: bool = True
    """Whether this is the machine that the process runs on; another one can be planned for, and nothing else."""
    host_limit: int | None = None
    """The most bytes that the user allows to wait in host memory; None for all."""
    disk_free: int | None = None
    """Bytes that are free on the disk of a machine that is not here; None where nobody said."""
    assumed: tuple[str, ...] = ()
    """What nobody said of a machine that is not here, and what is taken for it, as people read it."""

    def __getitem__(self, name: str) -> Device:
        return next(device for device in self.devices if device.name == name)

    @property
    def cards(self) -> tuple[Device, ...]:
        """The devices that are not the host."""
        return tuple(device for device in self.devices if not device.is_host)

    def room(self, name: str) -> int | None:
        """Bytes for weights and activations on a device, or in host memory ("cpu"); None for the disk."""
        known = next((device.room for device in self.devices if device.name == name), None)
        return self.host_room if known is None and name == "cpu" else known

    @property
    def host_room(self) -> int:
        """Bytes of host memory for weights that wait there."""
        return Device("cpu", self.host_total, self.host_free, bfloat16=False, limit=self.host_limit).room

    @property
    def counts_host(self) -> bool:
        """Whether it is known how much memory the host has."""
        return self.host_total < UNCOUNTED

    @property
    def limits(self) -> dict[str, int]:
        """The bytes that the user allows at most, by device; "cpu" is what may wait in host memory."""
        found = {device.name: device.limit for device in self.devices if device.limit is not None}
        return found if self.host_limit is None else {"cpu": self.host_limit} | found

    @property
    def unlimited(self) -> "Machine":
        """The machine without the user's limits."""
        return replace(self, devices=tuple(replace(device, limit=None) for device in self.devices), host_limit=None)

    def to_json(self) -> dict[str, Any]:
        """The machine as JSON, for a process that is to plan for it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Machine":
        """The machine that `to_json` wrote."""
        return cls(**{**document, "devices": tuple(Device(**device) for device in document["devices"]),
                      "assumed": tuple(document["assumed"])})


def probe(names: Sequence[str] = ()) -> Machine:
    """The machine, or the part of it that `names` selects, in that order; the CPU where there is no accelerator.

    On each of its cards this process has a context afterwards, which takes some hundred megabytes. Raises InvalidInput
    as `device_names` does.
    """
    total, free = host_memory()
    return Machine(tuple(_device(name, total, free) for name in device_names(names)), total, free)


def device_names(names: Sequence[str] = ()) -> list[str]:
    """The devices of the machine, or those of them that `names` selects, in that order, with none of them touched.

    Raises InvalidInput for a device that is not there, and for cards that are there and that torch does not see.
    """
    if not torch.accelerator.is_available() and set(names) != {"cpu"} and (unseen := unseen_cards()):
        raise InvalidInput(f"{unseen}, or run on the CPU (`devices=cpu`)")
    known = {f"{kind}:{index}": index for kind, index in _accelerators()}
    chosen = [_full_name(name, known) for name in names] or list(known) or ["cpu"]
    for name in chosen:
        if name != "cpu" and name not in known:
            there = ", ".join((*known, "cpu"))
            raise InvalidInput(f"there is no device {name!r} here: choose from {there}")
    if len(set(chosen)) != len(chosen):
        raise InvalidInput(f"a device is named twice: {', '.join(chosen)}")
    return chosen


def elsewhere(
    cards: Sequence[Device], ram: int | None = None, disk: int | None = None, assumed: Sequence[str] = ()
) -> Machine:
    """A machine that is not here, with these cards, or none; `ram` and `disk` in bytes, None where nobody said."""
    total = UNCOUNTED if ram is None else ram
    free = max(0, total - HOST_TAKEN)
    return Machine(tuple(cards) or (_host(total, free),), total, free, here=False, disk_free=disk,
                   assumed=tuple(assumed))


def card_elsewhere(index: int, size: int, bfloat16: bool, label: str) -> Device:
    """A card of `size` bytes in a machine that is not here, of which its system takes 512 MiB."""
    return Device(f"cuda:{index}", size, max(0, size - CARD_TAKEN), bfloat16, label)


def _accelerators() -> list[tuple[str, int]]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return []
    return [(accelerator.type, index) for index in range(torch.accelerator.device_count())]


def _full_name(name: str, known: Mapping[str, int]) -> str:
    if name.isdecimal():
        name = next((full for full, index in known.items() if index == int(name)), f"cuda:{name}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"{name!r} is no device: write cpu, cuda:0, cuda:1, ...") from None
    return name if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def _device(name: str, host_total: int, host_free: int) -> Device:
    if name == "cpu":
        return _host(host_total, host_free)
    free, total = torch.accelerator.get_memory_info(name)
    return Device(name, total, free, has_bfloat16(name), _label(name))


def _host(total: int, free: int) -> Device:
    return Device("cpu", total, free, has_bfloat16("cpu"), label="CPU")


def has_bfloat16(name: str) -> bool:
    """Whether a device computes in bfloat16 by itself; most processors only emulate it, a hundred times slower."""
    if name == "cpu":
        return False
    module = torch.get_device_module(torch.device(name).type)
    if module is torch.cuda:
        with torch.cuda.device(name):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ask = getattr(module, "is_bf16_supported", None)
    return bool(ask()) if ask else True


def _label(name: str) -> str:
    ask = getattr(torch.get_device_module(torch.device(name).type), "get_device_name", None)
    return str(ask(name)) if ask else name


def torch_build() -> dict[str, str]:
    """What torch was built for: its version, the runtime of its cards, and their architectures."""
    runtimes = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    found = {"torch": torch.__version__} | {name: text for name, text in runtimes.items() if text}
    return found | ({"architectures": " ".join(torch.cuda.get_arch_list())} if torch.version.cuda else {})


def architecture(name: str) -> str:
    """The architecture of a card, such as `sm_75`; empty where its kind has no such number."""
    if not name.startswith("cuda:") or torch.version.cuda is None:
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(name))


def covers(built: Collection[str], card: str) -> bool:
    """Whether a torch built for these architectures, such as `sm_80`, has kernels for the card's.

    Machine code runs on later minor versions of its major one, intermediate code (`compute_90`) on all later cards.
    """
    major, minor = int(card[3:-1]), int(card[-1])
    for text in built:
        kind, _, number = text.partition("_")
        digits = "".join(filter(str.isdigit, number))
        at = int(digits[:-1]), int(digits[-1])
        if (at[0] == major and at[1] <= minor) or (kind == "compute" and at <= (major, minor)):
            return True
    return False


def memory_users(name: str) -> list[str]:
    """The other processes that hold memory of a CUDA card, as `pid, name, MiB`, where the driver's tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not name.startswith("cuda:"):
        return []
    uuid = f"GPU-{torch.cuda.get_device_properties(name).uuid}"
    query = "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"
    try:
        listed = subprocess.run([tool, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer"]
    rows = [line.split(", ", 1) for line in listed.stdout.splitlines() if ", " in line]
    return [rest for card, rest in rows if card == uuid and _is_other(rest.partition(",")[0])]


def _is_other(pid: str) -> bool:
    """Whether a number is that of another process here: in a container the driver numbers all, also this one, anew."""
    return pid != str(os.getpid()) and (sys.platform != "linux" or Path("/proc", pid).exists())


def missing_kernels(card: Device) -> str:
    """Why this torch has no kernels for a card; empty where it has them, or where nothing can be compared."""
    own, built = architecture(card.name), torch_build().get("architectures", "")
    if not own or not built or covers(built.split(), own):
        return ""
    return f"{card.name} ({card.label}) is {own}, and this torch has no kernels for it: it is built for {built}"


def computes(device: str) -> bool:
    """Whether a matrix product of whole numbers, which has one right result, comes out right on a device.

    Raises what torch raises: RuntimeError for a card without kernels or off the bus, OutOfMemoryError for a full one.
    """
    numbers = torch.arange(SIDE * SIDE, dtype=torch.float32).remainder(7).reshape(SIDE, SIDE)
    return torch.equal((numbers.to(device) @ numbers.to(device)).cpu(), numbers @ numbers)


def host_rate(dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Floating point operations a second of this host's processor in a type, measured on matrices for a moment."""
    matrix = torch.ones((HOST_SIDE, HOST_SIDE), dtype=dtype)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        before = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - before)
    return 2.0 * HOST_SIDE**3 / best


def clear_workspaces() -> None:
    """Give back what libraries took of cards to work in and keep there, one piece for each thread and stream.

    It lies in the allocator and looks like a tensor that nobody holds (pytorch#95668).
    """
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
    elif torch.accelerator.is_available():
        getattr(torch.get_device_module(), "clear_workspaces", lambda: None)()


def check_cards(machine: Machine) -> Machine:
    """The machine, if every card of it can compute; InvalidInput for the first one that cannot."""
    for card in machine.cards:
        unsupported = missing_kernels(card)
        if fault := unsupported or _fault(card):
            others = ",".join(other.name.rpartition(":")[2] for other in machine.cards if other is not card)
            without = f"leave the card out (`devices={others}`)" if others else "run on the CPU (`devices=cpu`)"
            step = OTHER_TORCH if unsupported else "python -m runner doctor tells more"
            raise InvalidInput(f"{fault} -> {step}, or {without}")
    return machine


def _fault(card: Device) -> str:
    try:
        return "" if computes(card.name) else f"{card.name} ({card.label}) gets a matrix product wrong"
    except torch.OutOfMemoryError:
        # Full is not broken: the plan says how much is free.
        return ""
    except RuntimeError as error:
        return f"{card.name} ({card.label}) does not compute: {str(error).strip().splitlines()[0]}"
