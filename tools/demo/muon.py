"""Muon in float32: torch.optim.Muon works in bfloat16, which CPUs without it do a hundred times slower."""

from collections.abc import Callable, Iterable

import torch

MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
# A step in an orthogonal direction is this much of one that AdamW makes, times the root of the longer side.
ADAMW_RATIO = 0.2


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The matrices [..., rows, columns] with their singular values brought near one."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for the matrices of hidden layers; a rate moves them as far as it does under AdamW."""

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__([{"params": list(matrices), "peak": lr}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Matrices of one shape are made orthogonal together."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"])

    def _update(self, matrices: list[torch.Tensor], rate: float) -> None:
        directions = []
        for matrix in matrices:
            momentum: torch.Tensor = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            directions.append(matrix.grad.lerp(momentum, MOMENTUM))
        scale = ADAMW_RATIO * max(matrices[0].shape) ** 0.5
        for matrix, direction in zip(matrices, orthogonal(torch.stack(directions)), strict=True):
            matrix.add_(direction, alpha=-rate * scale)
