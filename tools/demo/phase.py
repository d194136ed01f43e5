"""One phase of training: a time budget, a log of losses, and a state on disk to go on from."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SAVE_EVERY = 60.0


@dataclass
class Phase:
    """Calls a step until `budget` seconds of training are spent, over as many processes as it takes.

    `step(fraction)` gets the share of the budget that is spent, 0 to 1, and returns the loss.
    """

    name: str
    budget: float
    folder: Path
    log: Path
    modules: dict[str, torch.nn.Module]
    optimizers: list[torch.optim.Optimizer]
    spent: float = 0.0
    steps: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def state(self) -> Path:
        """Where the phase's weights, optimizers and clock lie between processes."""
        return self.folder / f"{self.name}.pt"

    def load(self) -> None:
        """Go on from the saved state, if there is one."""
        if not self.state.exists():
            return
        saved: dict[str, Any] = torch.load(self.state, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(saved["modules"][name])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.spent, self.steps = saved["spent"], saved["steps"]

    def save(self) -> None:
        """Write the state whole: to a file beside it, then in its place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.state.with_suffix(".draft")
        saved = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "spent": self.spent,
            "steps": self.steps,
        }
        torch.save(saved, draft)
        draft.replace(self.state)

    def run(self, step: Callable[[float], float], every: Callable[[], None] | None = None) -> None:
        """Train until the budget is spent; `every` is called each time that the state is saved."""
        saved_at = self.spent
        while self.spent < self.budget:
            began = time.monotonic()
            self.losses.append(step(self.spent / self.budget))
            self.spent += time.monotonic() - began
            self.steps += 1
            if self.steps % 100 == 0:
                self._note()
            if self.spent - saved_at >= SAVE_EVERY:
                self.save()
                saved_at = self.spent
                if every:
                    every()
        if saved_at != self.spent:
            self.save()

    def _note(self) -> None:
        line = {
            "phase": self.name,
            "step": self.steps,
            "seconds": round(self.spent),
            "loss": round(sum(self.losses) / len(self.losses), 5),
        }
        self.losses.clear()
        print(json.dumps(line), flush=True)
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")


def learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to its `peak` times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
