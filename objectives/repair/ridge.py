"""Ridge regression in closed form, from rows that are added chunk by chunk.

Of rows x, each with what is left to explain e, the change of the weights D and of the bias b minimise

    sum |e - D x - b|^2 + penalty |D|^2,        penalty = strength * mean of the diagonal of the centred Gram matrix

so that the penalty pulls towards the old weights, of which e is the residual. The bias isn't penalised. Where there are
more rows than columns the normal equations are added up; where there are fewer, as before a dense layer that reads a
whole image, the rows are kept and the equations have their number (the kernel form of the same solution).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["Change", "Equations", "KernelEquations", "NormalEquations", "equations", "left_out_errors", "total"]

# Of an input's sum of squares: what less than this remains of when its mean is taken off is rounding.
_ROUNDING = 1e-12
# Of a Gram matrix, which is symmetric, blocks of so many rows are computed right of the diagonal, at most so many.
_BLOCK = 64
_N_BLOCKS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is added to a layer.

    Attributes:
        weight: (groups, outputs, columns).
        bias: (groups, outputs).
        is_least_norm: whether the equations were singular, so that of many solutions the smallest was taken.
    """

    weight: Tensor
    bias: Tensor
    is_least_norm: bool


class Equations(ABC):
    """What rows say about a change, for several regressions (groups) at once; float64."""

    @abstractmethod
    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """Takes rows in: (groups, P, columns) and (groups, P, outputs)."""

    @abstractmethod
    def plus(self, other: Self) -> Self:
        """Of both's rows."""

    @property
    @abstractmethod
    def square(self) -> float:
        """Sum of all e^2."""

    @abstractmethod
    def solve(self, strength: float) -> Change:
        """The change that minimises the penalised error; `strength` is at least 0."""

    @abstractmethod
    def error(self, change: Change) -> float:
        """Sum over these rows of |e - D x - b|^2."""


class NormalEquations(Equations):
    """Sums over rows.

    Attributes:
        upper: (groups, columns, columns), of x x' on the diagonal and above; below undefined, or all of it.
        cross: (groups, columns, outputs), of x e'.
        inputs: (groups, columns), of x.
        residuals: (groups, outputs), of e.
        squares: (groups,), of e^2.
        n_rows: added up.
    """

    def __init__(
        self, upper: Tensor, cross: Tensor, inputs: Tensor, residuals: Tensor, squares: Tensor, n_rows: int = 0
    ) -> None:
        self.upper = upper
        self.cross = cross
        self.inputs = inputs
        self.residuals = residuals
        self.squares = squares
        self.n_rows = n_rows

    @classmethod
    def zeros(cls, n_groups: int, n_columns: int, n_outputs: int, device: torch.device) -> NormalEquations:
        """Of no rows."""

        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(n_groups, *sizes, dtype=torch.float64, device=device)

        upper, cross = zeros(n_columns, n_columns), zeros(n_columns, n_outputs)
        return cls(upper, cross, zeros(n_columns), zeros(n_outputs), zeros())

    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """See `Equations.add`."""
        n_columns = inputs.shape[2]
        size = max(_BLOCK, -(-n_columns // _N_BLOCKS))
        for first in range(0, n_columns, size):
            rows = slice(first, first + size)
            self.upper[:, rows, first:].baddbmm_(inputs[:, :, rows].mT, inputs[:, :, first:])
        self.cross.baddbmm_(inputs.mT, residuals)
        self.inputs += inputs.sum(dim=1)
        self.residuals += residuals.sum(dim=1)
        self.squares += residuals.square().sum(dim=(1, 2))
        self.n_rows += inputs.shape[1]

    def plus(self, other: NormalEquations) -> NormalEquations:
        """See `Equations.plus`."""
        return NormalEquations(
            self.upper + other.upper,
            self.cross + other.cross,
            self.inputs + other.inputs,
            self.residuals + other.residuals,
            self.squares + other.squares,
            self.n_rows + other.n_rows,
        )

    @property
    def square(self) -> float:
        """See `Equations.square`."""
        return float(self.squares.sum())

    @functools.cached_property
    def _gram(self) -> Tensor:
        """(groups, columns, columns), of x x'; asked for when all rows are there."""
        self.upper.copy_(self.upper.triu() + self.upper.triu(1).mT)
        return self.upper

    @functools.cached_property
    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gram and cross matrices about the means, of inputs that vary, and both means; likewise."""
        mean, residual = self.inputs / self.n_rows, self.residuals / self.n_rows
        gram = self._gram - self.n_rows * mean[:, :, None] * mean[:, None, :]
        cross = self.cross - self.n_rows * mean[:, :, None] * residual[:, None, :]
        varies = _varies(gram.diagonal(dim1=1, dim2=2), self._gram.diagonal(dim1=1, dim2=2))
        return gram * varies[:, :, None] * varies[:, None, :], cross * varies[:, :, None], mean, residual

    def solve(self, strength: float) -> Change:
        """See `Equations.solve`."""
        gram, cross, mean, residual = self._centred
        penalty = strength * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        change, is_singular = _solved(gram, penalty, strength, cross)
        bias = residual - (mean[:, None, :] @ change).squeeze(1)
        return Change(change.mT, bias, is_singular)

    def error(self, change: Change) -> float:
        """See `Equations.error`."""
        weight, bias = change.weight, change.bias
        explained = (self.cross.mT * weight).sum() + (self.residuals * bias).sum()
        square = ((weight @ self._gram) * weight).sum() + self.n_rows * bias.square().sum()
        mixed = (weight @ self.inputs[:, :, None]).squeeze(2).mul(bias).sum()
        return self.square + float(square + 2 * mixed - 2 * explained)


class KernelEquations(Equations):
    """The rows themselves.

    Attributes:
        inputs: (groups, P, columns), in chunks.
        residuals: (groups, P, outputs), in chunks.
    """

    def __init__(self, inputs: Sequence[Tensor] = (), residuals: Sequence[Tensor] = ()) -> None:
        self.inputs = list(inputs)
        self.residuals = list(residuals)

    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """See `Equations.add`."""
        self.inputs.append(inputs)
        self.residuals.append(residuals)

    def plus(self, other: KernelEquations) -> KernelEquations:
        """See `Equations.plus`."""
        return KernelEquations([*self.inputs, *other.inputs], [*self.residuals, *other.residuals])

    @property
    def square(self) -> float:
        """See `Equations.square`."""
        return sum(float(chunk.square().sum()) for chunk in self.residuals)

    @functools.cached_property
    def _kernel(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Centred rows, their products, centred residuals and both means; asked for when all rows are there."""
        inputs, residuals = torch.cat(self.inputs, dim=1), torch.cat(self.residuals, dim=1)
        mean, residual = inputs.mean(dim=1, keepdim=True), residuals.mean(dim=1, keepdim=True)
        centred = inputs - mean
        centred = centred * _varies(centred.square().sum(dim=1), inputs.square().sum(dim=1))[:, None, :]
        return centred, centred @ centred.mT, residuals - residual, mean, residual

    def solve(self, strength: float) -> Change:
        """See `Equations.solve`."""
        centred, kernel, residuals, mean, residual = self._kernel
        penalty = strength * kernel.diagonal(dim1=1, dim2=2).sum(dim=1) / centred.shape[2]
        shares, is_singular = _solved(kernel, penalty, strength, residuals)
        change = centred.mT @ shares
        bias = (residual - mean @ change).squeeze(1)
        return Change(change.mT, bias, is_singular)

    def error(self, change: Change) -> float:
        """See `Equations.error`."""
        return sum(
            float((wanted - rows @ change.weight.mT - change.bias[:, None, :]).square().sum())
            for rows, wanted in zip(self.inputs, self.residuals, strict=True)
        )


def equations(n_groups: int, n_columns: int, n_outputs: int, n_rows: int, device: torch.device) -> Equations:
    """Of no rows yet, in the form that is smaller for as many as will come in all."""
    if n_rows < n_columns:
        return KernelEquations()
    return NormalEquations.zeros(n_groups, n_columns, n_outputs, device)


def _solved(matrix: Tensor, penalty: Tensor, strength: float, right: Tensor) -> tuple[Tensor, bool]:
    """Solution of (matrix + penalty) x = right, and whether that is singular so that the smallest is taken.

    A group whose inputs never vary has nothing to fit; any penalty leaves it as it is.
    """
    added = torch.where(penalty > 0, penalty, float(strength > 0))
    penalised = matrix + torch.diag_embed(added[:, None].expand(-1, matrix.shape[1]))
    factor, failure = torch.linalg.cholesky_ex(penalised)
    # Of equations that are singular but for rounding a pivot may come out positive: then it is next to nothing.
    pivots, diagonal = (each.diagonal(dim1=1, dim2=2) for each in (factor, penalised))
    is_next_to_nothing = pivots.square() <= 10 * matrix.shape[1] * torch.finfo(matrix.dtype).eps * diagonal
    is_singular = (failure != 0) | ~factor.sum(dim=(1, 2)).isfinite() | is_next_to_nothing.any(dim=1)
    solution = torch.cholesky_solve(right, factor)
    if not bool(is_singular.any()):
        return solution, False
    solution[is_singular] = torch.linalg.pinv(penalised[is_singular], hermitian=True) @ right[is_singular]
    return solution, True


def _varies(centred: Tensor, raw: Tensor) -> Tensor:
    """Which inputs vary, by their sums of squares about the mean and about zero; of others rounding is left."""
    return centred > _ROUNDING * raw


def total(parts: Sequence[Equations]) -> Equations:
    """Of the rows of all parts."""
    return functools.reduce(lambda left, right: left.plus(right), parts)


def left_out_errors(parts: Sequence[Equations], strengths: Sequence[float]) -> list[float]:
    """For each strength, the squared error on each part of the change that all other parts give, added up.

    Nothing is read again for it.
    """
    errors = [0.0] * len(strengths)
    for index, part in enumerate(parts):
        others = total([*parts[:index], *parts[index + 1 :]])
        for position, strength in enumerate(strengths):
            errors[position] += part.error(others.solve(strength))
    return errors
