"""What a plan rests on, and how long a picture will take: the part of it that is assumed or estimated, in words."""

from collections.abc import Iterator

import torch

from runner.planning.lighter import quicker
from runner.planning.picture_time import picture_time
from runner.planning.plan import Plan
from stages.basis import Basis

# From so many seconds on it is said what takes less.
LONG = 600.0


def outlook(plan: Plan, disk_rate: float | None = None) -> Iterator[str]:
    """The shapes that were planned from where no file was read, what is assumed of the machine, and the time.

    `disk_rate` is in bytes a second; None where it is not known.
    """
    yield from Basis(plan.machine.assumed, plan.checkpoint.shapes, plan.checkpoint.unread).lines()
    found = picture_time(plan, disk_rate)
    if found is not None:
        yield str(found)
    if plan.machine.cards or plan.family.repo == "demo":
        return
    if found is None or found.longest > LONG:
        lighter = quicker(plan.family.name)
        less = f"less to compute: {', '.join(lighter)}; " if lighter else ""
        yield f"{less}a smaller `size` and fewer `steps` take less, and the demo (`model=demo`) takes seconds"
    if any(place.dtype == torch.float32 for place in plan.places.values()):
        yield ("`dtype=bfloat16` takes half the memory of float32: fast on processors that have it (AVX512-BF16, "
               "AMX), and slower than float32 on others")
