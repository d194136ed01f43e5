"""What a LoRA adds to a weight or a bias: a product of matrices in one of three forms, or the values themselves.

A DoRA sets the length of each row besides.

Each form gives some rows at a time, so that no sum is ever as large as the weight. Where trainers have one layer for
several of the model's (a fused qkv), `part` is the share of one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch


class Update(Protocol):
    """What is added to a weight."""

    @property
    def shape(self) -> list[int]:
        """The shape of the weight that it is for."""

    def finite(self) -> bool:
        """Whether all that it is made of is finite."""

    @property
    def bytes_in_float32(self) -> int:
        """What all that it is made of takes where it is added."""

    @property
    def copies(self) -> int:
        """How many times its rows are in memory while they are made."""

    def to(self, device: torch.device) -> "Update":
        """The same in float32 on a device."""

    def part(self, rows: torch.Tensor) -> "Update":
        """What is added to these rows alone."""

    def rows(self, rows: slice) -> torch.Tensor:
        """What is added to these rows of the weight."""

    def added_to(self, total: torch.Tensor, rows: slice) -> torch.Tensor:
        """These rows of the weight, in float32, with what is added to them."""


@dataclass(frozen=True)
class _Made:
    """What all updates share: tensors, and what their sum is multiplied by."""

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: change(value) if isinstance(value, torch.Tensor) else value
                             for name, value in tensors.items()})

    def to(self, device: torch.device) -> Self:
        """The same in float32 on a device."""
        return self._each(lambda tensor: tensor.to(device, torch.float32 if tensor.is_floating_point() else None))

    @property
    def bytes_in_float32(self) -> int:
        """Four for each element of its tensors; rows that are meant have eight."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum((4 if tensor.is_floating_point() else 8) * tensor.numel() for tensor in tensors
                   if isinstance(tensor, torch.Tensor))

    def rows(self, rows: slice) -> torch.Tensor:
        """What is added to these rows of the weight."""
        raise NotImplementedError

    def added_to(self, total: torch.Tensor, rows: slice) -> torch.Tensor:
        """The sum."""
        return total + self.rows(rows)

    def finite(self) -> bool:
        """Whether all that it is made of is finite."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return all(bool(tensor.float().isfinite().all()) for tensor in tensors if isinstance(tensor, torch.Tensor))


@dataclass(frozen=True)
class LowRankUpdate(_Made):
    """LoRA for the weight [out, in] of a linear layer."""

    down: torch.Tensor
    """The first matrix, [rank, in]."""
    up: torch.Tensor
    """The second matrix, [out, rank]."""
    scale: float
    """What their product is multiplied by."""

    @property
    def copies(self) -> int:
        """The product, and the product times the scale."""
        return 2

    @property
    def shape(self) -> list[int]:
        """Rows of the second, columns of the first."""
        return [self.up.shape[0], self.down.shape[1]]

    def part(self, rows: torch.Tensor) -> "LowRankUpdate":
        """The first matrix is for all of them."""
        return LowRankUpdate(self.down, _chosen(self.up, rows), self.scale)

    def rows(self, rows: slice) -> torch.Tensor:
        """One product."""
        return self.up[rows] @ self.down * self.scale


@dataclass(frozen=True)
class DoraUpdate(LowRankUpdate):
    """DoRA: LoRA, and then each row of the weight as long as it says (Liu et al., 2024)."""

    magnitude: torch.Tensor
    """The length of each row, [out]."""

    def part(self, rows: torch.Tensor) -> "DoraUpdate":
        """The first matrix is for all of them."""
        return DoraUpdate(self.down, _chosen(self.up, rows), self.scale, _chosen(self.magnitude, rows))

    def added_to(self, total: torch.Tensor, rows: slice) -> torch.Tensor:
        """The direction of the sum, and the length that is said."""
        total = total + self.rows(rows)
        lengths: torch.Tensor = torch.linalg.vector_norm(total, dim=1)
        return total * (self.magnitude[rows] / lengths)[:, None]


@dataclass(frozen=True)
class HadamardUpdate(_Made):
    """LoHa: two such products, multiplied element by element."""

    first_up: torch.Tensor
    """Of the first product, [out, rank]."""
    first_down: torch.Tensor
    """Of the first product, [rank, in]."""
    second_up: torch.Tensor
    """Of the second product, [out, rank]."""
    second_down: torch.Tensor
    """Of the second product, [rank, in]."""
    scale: float
    """What all of it is multiplied by."""

    @property
    def copies(self) -> int:
        """Both products, and the product of them."""
        return 3

    @property
    def shape(self) -> list[int]:
        """As both products have it."""
        return [self.first_up.shape[0], self.first_down.shape[1]]

    def part(self, rows: torch.Tensor) -> "HadamardUpdate":
        """The matrices [rank, in] are for all of them."""
        return HadamardUpdate(_chosen(self.first_up, rows), self.first_down, _chosen(self.second_up, rows),
                              self.second_down, self.scale)

    def rows(self, rows: slice) -> torch.Tensor:
        """Two products."""
        return (self.first_up[rows] @ self.first_down) * (self.second_up[rows] @ self.second_down) * self.scale


@dataclass(frozen=True)
class KroneckerUpdate(_Made):
    """LoKr: every element of a small matrix times the whole of another."""

    left: torch.Tensor
    """The small one, [a, b]."""
    right: torch.Tensor
    """The other, [c, d], for a weight [a * c, b * d]."""
    scale: float
    """What all of it is multiplied by."""
    chosen: torch.Tensor | None = None
    """The rows that are meant, in their order; None for all."""

    @property
    def copies(self) -> int:
        """The rows of both matrices, their product, and that times the scale."""
        return 3

    @property
    def shape(self) -> list[int]:
        """The product of both shapes, but for rows that are not meant."""
        rows = self.left.shape[0] * self.right.shape[0] if self.chosen is None else len(self.chosen)
        return [rows, self.left.shape[1] * self.right.shape[1]]

    def part(self, rows: torch.Tensor) -> "KroneckerUpdate":
        """The matrices stay whole: a row of the product has one of each."""
        return KroneckerUpdate(self.left, self.right, self.scale, rows)

    def rows(self, rows: slice) -> torch.Tensor:
        """Row i * c + j of the product has row i of the small one and row j of the other."""
        first, last, _ = rows.indices(self.shape[0])
        meant = torch.arange(first, last, device=self.left.device) if self.chosen is None else self.chosen[rows]
        count = self.right.shape[0]
        product = self.left[meant // count, :, None] * self.right[meant % count, None, :]
        return product.reshape(len(meant), self.shape[1]) * self.scale


@dataclass(frozen=True)
class Difference(_Made):
    """The values themselves, for a weight or a bias."""

    values: torch.Tensor
    """What is added."""
    scale: float
    """What they are multiplied by."""

    @property
    def copies(self) -> int:
        """As they are, and times the scale."""
        return 2

    @property
    def shape(self) -> list[int]:
        """That of the values."""
        return list(self.values.shape)

    def part(self, rows: torch.Tensor) -> "Difference":
        """These of the values."""
        return Difference(_chosen(self.values, rows), self.scale)

    def rows(self, rows: slice) -> torch.Tensor:
        """These of the values."""
        return self.values[rows] * self.scale


def _chosen(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor: a window on it where they follow one another, as they do but for halves that change."""
    first, count = int(rows[0]), len(rows)
    follow = torch.equal(rows, torch.arange(first, first + count))
    return tensor[first : first + count] if follow else tensor[rows]
