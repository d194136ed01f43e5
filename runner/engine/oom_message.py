"""What is said of a stage that ran out of memory: what was planned, what was taken, and who has the rest."""

from collections.abc import Mapping

import torch

from runner.planning.plan import Plan
from runner.text import gib
from stages import machine
from stages.machine import Device, probe


def shortage(plan: Plan, stage: str, doing: str, peak: Mapping[str, int], error: BaseException) -> str:
    """The message for a `stage` of the plan whose `error` came while `doing` something; `peak` is in bytes by device.

    To be asked for when the stage's models are gone: what is free then, and was not when planned, is others'.
    """
    needs = plan.needs.get(stage, {})
    parts = []
    for device in probe(list(peak)).devices:
        planned = f", at most {gib(needs[device.name].total)} planned" if device.name in needs else ""
        others = machine.memory_users(device.name)
        users = f", others there: {'; '.join(others)}" if others else ""
        before = plan.machine[device.name].free
        parts.append(f"{device.name} peaked at {peak[device.name] / 2**30:.2f} GiB{planned}, {gib(_free(device))} "
                     f"free now and {gib(before)} when planned{users}")
    return (f"{stage} ran out of memory ({'; '.join(parts)}) while {doing}: {str(error).splitlines()[0]} "
            f"The artifacts of earlier stages are kept.")


def _free(device: Device) -> int:
    """What nobody uses, and what this process only keeps in reserve."""
    return device.free + (0 if device.is_host else torch.accelerator.memory_reserved(device.name)
                          - torch.accelerator.memory_allocated(device.name))
