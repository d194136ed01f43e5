"""Muon in float32: torch.optim.Muon works in bfloat16, which CPUs without it do a hundred times slower."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

MOMENTUM = 0.95
ROUNDS = 5


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near one, by Newton-Schulz iterations (batched)."""
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for hidden matrices; the rate is that of an AdamW step of the same size."""

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__([{"params": list(matrices), "peak": lr}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape go through the iterations together."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for matrices in shapes.values():
                self._update(matrices, group["lr"])

    def _update(self, matrices: list[torch.Tensor], rate: float) -> None:
        directions = []
        for matrix in matrices:
            state: dict[str, Any] = self.state[matrix]
            momentum = state.setdefault("momentum", torch.zeros_like(matrix))
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            directions.append(matrix.grad.lerp(momentum, MOMENTUM))
        scale = 0.2 * max(matrices[0].shape) ** 0.5
        for matrix, direction in zip(matrices, orthogonal(torch.stack(directions)), strict=True):
            matrix.add_(direction, alpha=-rate * scale)
