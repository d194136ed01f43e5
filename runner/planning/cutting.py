"""Placing a denoiser that is cut over several cards, one process each, because somebody asked for it."""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from runner.planning.ladder import NoStrategyFits, Strategy
from runner.planning.parallel import spread
from runner.text import gib
from stages.errors import DoesNotFit, Fix
from stages.estimate.dry_run import Estimate
from stages.placement.placement import Place, Resident
from stages.placement.tensor_parallel import TensorParallel, bytes_per_device

if TYPE_CHECKING:
    from runner.planning.placer import Placer, Task


def cut(placer: "Placer", task: "Task", count: int) -> tuple[dict[str, Place], Estimate, tuple[Strategy, ...]]:
    """The denoiser cut over the first `count` cards, or over all for 0, with what a rehearsal on one card took.

    A part takes no more than that. Raises NoStrategyFits where that does not fit.
    """
    if placer.lanes not in (None, 1):
        raise ValueError(f"{placer.lanes} lanes and denoise=tensor_parallel contradict each other: its processes work "
                         f"on one picture together -> leave one of them out")
    cards = spread(placer.machine, count)
    if len(task.types) != 1:
        raise DoesNotFit(f"the denoise has {' and '.join(task.types)}, and one component can be cut over cards -> "
                        f"leave denoise=tensor_parallel out")
    component = task.stage.components[0]
    name = component.name
    if component.loras:
        raise DoesNotFit("denoise=tensor_parallel reads parts of weights, and LoRA is merged into whole ones -> "
                        "leave `place=denoise` or `loras` out", (Fix("place", None, "denoise"),))
    part = bytes_per_device(component, task.types[name], task.precomputed.get(name, frozenset()), len(cards))
    found = placer.rehearsed(task, task.places({name: Resident(cards[0])}))
    taken = found.peak[cards[0]]
    found = replace(found, peak={card: taken * times for card, times in Counter(cards).items()})
    places = task.places({name: TensorParallel(cards, part)})
    for card, need in task.needs(places, found).items():
        room = placer.machine[card].room
        if need.total > room:
            raise NoStrategyFits(f"denoise does not fit: {gib(part)} of weights and {gib(taken)} of activations in "
                                 f"each of {len(cards)} processes; {card} has {gib(room)} -> cut it over more "
                                 f"cards, or choose a smaller `size`")
    return places, found, (Strategy("tensor_parallel"),)
