"""One phase of training: a time budget, a log of losses, and a state on disk to go on from."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SAVE_EVERY = 60.0
"""Seconds of training between two saves of the state."""
LOG_EVERY = 100
"""Steps between two lines of the log."""
LEAST_RATE = 1e-3
"""What the learning rate falls to, as a share of its peak."""


@dataclass
class Phase:
    """Training until a budget is spent, over as many processes as it takes."""

    name: str
    """Its name in the log, and that of its state."""
    budget: float
    """Seconds of training."""
    folder: Path
    """Where its state is kept between processes."""
    log: Path
    """A line of JSON is added to this file every hundred steps."""
    modules: dict[str, torch.nn.Module]
    """Whose weights the state has, by name."""
    optimizers: list[torch.optim.Optimizer]
    """What `update` changes the weights with; each group of theirs has its highest learning rate as `peak`."""
    spent: float = 0.0
    """Seconds of the budget that are spent."""
    steps: int = 0
    """Steps that were made."""
    losses: list[float] = field(default_factory=list)
    """The losses since the last line of the log."""

    @property
    def state(self) -> Path:
        """The file with the weights, the optimizers' states and the time that is spent."""
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
        """Write the state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "spent": self.spent,
            "steps": self.steps,
        }
        save_atomically(saved, self.state)

    def run(
        self, step: Callable[[float], float], *, warmup: int, decay: float, on_save: Callable[[], None] | None = None
    ) -> None:
        """Call `step` with the share of the budget that is spent, 0 to 1, for its loss, until all of it is spent.

        The learning rate rises for `warmup` steps. It falls to almost nothing at the end of the budget, in its last
        1 / `decay`. `on_save` is called each time that the state was saved on the way.
        """
        saved_at = self.spent
        while self.spent < self.budget:
            began = time.monotonic()
            fraction = self.spent / self.budget
            self._set_learning_rate(fraction, warmup, decay)
            self.losses.append(step(fraction))
            self.spent += time.monotonic() - began
            self.steps += 1
            if self.steps % LOG_EVERY == 0:
                self._log_loss()
            if self.spent - saved_at >= SAVE_EVERY:
                self.save()
                saved_at = self.spent
                if on_save:
                    on_save()
        if saved_at != self.spent:
            self.save()

    def update(self, loss: torch.Tensor, weights: Iterable[torch.nn.Parameter]) -> None:
        """One step of every optimizer down the gradients of the loss, those of `weights` clipped to a norm of 1."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def _set_learning_rate(self, fraction: float, warmup: int, decay: float) -> None:
        rate = min(1.0, (self.steps + 1) / warmup) * min(1.0, decay * (1 - fraction)) + LEAST_RATE
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate

    def _log_loss(self) -> None:
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


def save_atomically(saved: dict[str, Any], path: Path) -> None:
    """Write what `torch.load(path, weights_only=True)` reads: to a file beside it, then in its place."""
    draft = path.with_suffix(".draft")
    torch.save(saved, draft)
    draft.replace(path)
