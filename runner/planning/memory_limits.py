"""Memory limits held against a machine, and machines that are not here."""

import re
from collections.abc import Sequence
from dataclasses import replace

from runner.placement_options import MemoryLimit, MemoryLimits, read_bytes
from runner.text import shown
from stages.errors import DoesNotFit, Fix, InvalidInput
from stages.machine import Device, Machine, hypothetical

CARDS = 64


def read_machine(text: str) -> Machine:
    """A machine with this host and the cards of `text`, such as `2x16GB` or `16GB+8GB`; InvalidInput for another."""
    sizes: list[int] = []
    for part in text.split("+"):
        count, _, size = part.rpartition("x")
        if not re.fullmatch(r"[0-9]{0,2}", count) or count in ("0", "00") or (part.startswith("x")):
            raise InvalidInput(f"{text!r} is no machine: write cards such as 2x16GB, 1x24GB, or 16GB+8GB")
        try:
            sizes += [read_bytes(size)] * int(count or 1)
        except InvalidInput:
            raise InvalidInput(f"{text!r} is no machine: write cards such as 2x16GB, 1x24GB, or 16GB+8GB, by their "
                               f"memory") from None
    if len(sizes) > CARDS:
        raise InvalidInput(f"{text!r} has {len(sizes)} cards; the limit is {CARDS}")
    return hypothetical(sizes)


def chosen(machine: Machine, names: Sequence[str]) -> Machine:
    """The machine with these of its devices, all for none; InvalidInput for one that it does not have."""
    there = {device.name: device for device in machine.devices}
    devices = []
    for name in names:
        full = next((known for known in there if name in (known, known.rpartition(":")[2])), None)
        if full is None:
            raise InvalidInput(f"the machine has no device {shown(name)} -> choose from {', '.join(there)}")
        devices.append(there[full])
    return replace(machine, devices=tuple(dict.fromkeys(devices))) if devices else machine


def limited(machine: Machine, limits: MemoryLimits) -> Machine:
    """The machine with these limits.

    Raises InvalidInput for a limit that names no device of the machine, DoesNotFit for one above it.
    """
    named: dict[str, MemoryLimit] = {}
    for name, amount in limits.by_device.items():
        full = _device(machine, name)
        if full in named:
            raise InvalidInput(f"`max_memory` names {full} twice")
        named[full] = amount
    devices = []
    for device in machine.devices:
        limit = named.get(device.name, named.get(""))
        devices.append(replace(device, limit=None if limit is None else _bytes(device, limit, limits)))
    host = Device("cpu", machine.host_total, machine.host_free, bfloat16=False)
    return replace(machine, devices=tuple(devices),
                   host_limit=_bytes(host, named["cpu"], limits) if "cpu" in named else None)


def _device(machine: Machine, name: str) -> str:
    names = [device.name for device in machine.devices]
    full = next((known for known in names if known.rpartition(":")[2] == name), name)
    if full not in (*names, "cpu", ""):
        raise InvalidInput(f"`max_memory` names the device {name!r}, which is not used here: choose from "
                           f"{', '.join(dict.fromkeys((*names, 'cpu')))}")
    return full


def _bytes(device: Device, limit: MemoryLimit, limits: MemoryLimits) -> int:
    """The bytes that a limit allows of a device."""
    fix = Fix("max_memory", str(limits.without(device.name.rpartition(":")[2]).without(device.name)) or None)
    if limit.kind == "percent":
        return int(device.total * limit.amount / 100)
    if limit.kind == "free":
        if limit.amount >= device.free:
            raise DoesNotFit(f"`max_memory` {limit.text} leaves nothing of {device.name}, which has {device.free} "
                             f"bytes ({device.free / 2**30:.1f} GiB) free: leave less free", (fix,))
        return device.free - int(limit.amount)
    if limit.amount > device.total:
        raise DoesNotFit(f"`max_memory` {limit.text} is {int(limit.amount)} bytes ({limit.amount / 2**30:.1f} GiB), "
                         f"more than the {device.total} bytes ({device.total / 2**30:.1f} GiB) of {device.name}: "
                         f"lower it", (fix,))
    return int(limit.amount)
