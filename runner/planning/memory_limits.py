"""Amounts of memory as people write them: limits per device, and machines that are not here."""

import re
from collections.abc import Mapping
from dataclasses import replace

from stages.errors import DoesNotFit, Fix
from stages.machine import Device, Machine, hypothetical

UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}
CARDS = 64
_AMOUNT = re.compile(r"(?P<number>[0-9]{1,12}(\.[0-9]{1,9})?) ?(?P<unit>[A-Za-z]*)")
_FORMS = "write 14GiB, 16GB, 14 (GiB), 80%, -2GiB (to leave free), or 0=14GiB,1=14GiB,cpu=24GiB"


def read_bytes(text: str) -> int:
    """The bytes that `text` means: `14GiB`, `16gb` (16e9), or a plain number of GiB. ValueError for anything else."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory: {_FORMS}")
    unit = match["unit"].lower() or "gib"
    if unit not in UNITS:
        near = f"{match['unit'][:1].upper()}iB" if unit in ("k", "m", "g", "t") else "GiB"
        raise ValueError(f"{text!r} has the unit {match['unit']!r}: write {match['number']}{near} or, for powers of "
                         f"ten, {match['number']}{near.replace('i', '')}")
    size = int(float(match["number"]) * UNITS[unit])
    if size == 0:
        raise ValueError(f"{text!r} is no memory at all: {_FORMS}")
    return size


def read_machine(text: str) -> Machine:
    """A machine with this host and the cards of `text`, such as `2x16GB` or `16GB+8GB`; ValueError for other text."""
    sizes: list[int] = []
    for part in text.split("+"):
        count, _, size = part.rpartition("x")
        if not re.fullmatch(r"[0-9]{0,2}", count) or count in ("0", "00") or (part.startswith("x")):
            raise ValueError(f"{text!r} is no machine: write cards such as 2x16GB, 1x24GB, or 16GB+8GB")
        sizes += [read_bytes(size)] * int(count or 1)
    if len(sizes) > CARDS:
        raise ValueError(f"{text!r} has {len(sizes)} cards; the limit is {CARDS}")
    return hypothetical(sizes)


def limited(machine: Machine, text: str) -> Machine:
    """The machine with the limits of `--max-memory`: one for every card, or `0=14GiB,1=14GiB,cpu=24GiB`.

    Raises ValueError for what cannot be read or names no device of the machine, DoesNotFit for a limit above it.
    """
    named = {_device(machine, name): amount for name, amount in _pairs(text).items()}
    limits: dict[str, int] = {}
    for device in machine.devices:
        amount = named.get(device.name, named.get(""))
        if amount is not None:
            limits[device.name] = _limit(device, amount, _others(named, device.name))
    host = Device("cpu", machine.host_total, machine.host_free, bfloat16=False)
    host_limit = _limit(host, named["cpu"], _others(named, "cpu")) if "cpu" in named else None
    return replace(
        machine,
        devices=tuple(replace(device, limit=limits.get(device.name)) for device in machine.devices),
        host_limit=host_limit,
    )


def _pairs(text: str) -> dict[str, str]:
    """Device to amount; "" stands for every card."""
    if "=" not in text:
        return {"": text.strip()}
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, sign, amount = (piece.strip() for piece in part.partition("="))
        if not sign or not name or not amount:
            raise ValueError(f"--max-memory {text!r}: {part!r} is no device=amount: {_FORMS}")
        if name in pairs:
            raise ValueError(f"--max-memory {text!r} names {name} twice")
        if amount.startswith("-"):
            raise ValueError(f"--max-memory {part!r}: a limit cannot be negative; to leave memory free on every card "
                             f"write --max-memory {amount}")
        pairs[name] = amount
    return pairs


def _device(machine: Machine, name: str) -> str:
    names = [device.name for device in machine.devices]
    full = next((known for known in names if known.rpartition(":")[2] == name), name)
    if full not in (*names, "cpu", ""):
        raise ValueError(f"--max-memory names the device {name!r}, which is not used here: choose from "
                         f"{', '.join(dict.fromkeys((*names, 'cpu')))}")
    return full


def _others(named: Mapping[str, str], name: str) -> str:
    """The text of the limits besides that of a device."""
    return ",".join(f"{other}={amount}" for other, amount in named.items() if other not in ("", name))


def _limit(device: Device, amount: str, others: str) -> int:
    if percent := re.fullmatch(r"([0-9]{1,3}(\.[0-9]{1,3})?) ?%", amount):
        if not 0 < float(percent[1]) <= 100:
            raise ValueError(f"--max-memory {amount}: write more than 0% and no more than 100%")
        return int(device.total * float(percent[1]) / 100)
    if amount.startswith("-"):
        left = read_bytes(amount[1:])
        if left >= device.free:
            raise DoesNotFit(f"--max-memory {amount} leaves nothing of {device.name}, which has {device.free} bytes "
                            f"({device.free / 2**30:.1f} GiB) free: leave less free",
                             (Fix("max_memory", others or None),))
        return device.free - left
    limit = read_bytes(amount)
    if limit > device.total:
        raise DoesNotFit(f"--max-memory {amount} is {limit} bytes ({limit / 2**30:.1f} GiB), more than the "
                        f"{device.total} bytes ({device.total / 2**30:.1f} GiB) of {device.name}: lower it",
                        (Fix("max_memory", others or None),))
    return limit
