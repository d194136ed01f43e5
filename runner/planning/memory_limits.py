"""Memory limits held against a machine, and machines that are not here."""

from collections.abc import Sequence
from dataclasses import replace

from runner.machine_option import MachineOption
from runner.placement_options import MemoryLimit, MemoryLimits
from runner.text import shown
from stages.errors import DoesNotFit, Fix, InvalidInput
from stages.machine import UNCOUNTED, Device, Machine, card_elsewhere, elsewhere


def read_machine(text: str) -> Machine:
    """The machine that a text such as `2xT4`, `16GB+8GB` or `2x16GB,ram=30GB` spells; InvalidInput for another."""
    option = MachineOption.read(text)
    cards = [card_elsewhere(index, card.size, card.bfloat16, card.label) for index, card in enumerate(option.cards)]
    return elsewhere(cards, option.ram, option.disk, option.assumed)


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
    if limit.kind != "bytes" and device.total >= UNCOUNTED:
        raise InvalidInput(f"`max_memory` {limit.text} of host memory, and nobody says how much the machine has -> "
                           f"say it with ram=32GB behind its cards, or give bytes")
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
