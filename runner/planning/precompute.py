"""What the modulation table saves of a denoiser, and whether it is worth it."""

from dataclasses import dataclass

import torch

from runner.text import gib
from stages.errors import NotPrecomputable
from stages.models.weights import weigh
from stages.pipeline.stage import Inputs, Stage
from stages.precompute.recorder import conditioning_program
from stages.precompute.table import Layout
from stages.state import State

LEAST = 0.02


@dataclass(frozen=True)
class TableSaving:
    """What a modulation table spares a component."""

    component: str
    """Its name."""
    whole: int
    """Bytes of all its weights."""
    left: int
    """Bytes of those that are loaded beside a table."""
    layers: frozenset[str] = frozenset()
    """The linear layers that the table stands in for."""
    row: int = 0
    """Bytes of the table that one call of the component reads."""
    refused: str = ""
    """Why there is no table; empty where there is one."""

    def __str__(self) -> str:
        if self.refused:
            return f"{self.component}: {gib(self.whole)}, no modulation table: {self.refused}"
        return (f"{self.component}: {gib(self.left)} of {gib(self.whole)}; the modulation table stands in for "
                f"{len(self.layers)} layers, {100 * (1 - self.left / self.whole):.1f} %, "
                f"with {self.row / 2**20:.1f} MiB for a step")


def table_saving(stage: Stage, dtype: torch.dtype, state: State, inputs: Inputs, wanted: bool) -> TableSaving:
    """What a table would save of the stage's denoiser at `dtype`, for requests like this one; nothing is loaded."""
    component = stage.components[0]
    whole = weigh(component, dtype).total
    if not wanted:
        return TableSaving(component.name, whole, whole, refused="not wanted")
    try:
        layers = conditioning_program(stage, dtype, state, inputs).layers
    except NotPrecomputable as error:
        return TableSaving(component.name, whole, whole, refused=str(error))
    left = weigh(component, dtype, frozenset(layers)).total
    if whole - left <= LEAST * whole:
        return TableSaving(component.name, whole, whole,
                           refused=f"it would save {100 * (1 - left / whole):.1f} %, which is not more than "
                                   f"{100 * LEAST:.0f} %")
    return TableSaving(component.name, whole, left, frozenset(layers), Layout.of(layers).size)
