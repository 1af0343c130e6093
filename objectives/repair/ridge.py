"""Ridge regression in closed form, from rows that are added chunk by chunk.

Of rows x, each with what the old weights W leave to explain e, the change of the weights D and of the bias b minimise

    sum |e - D x - b|^2 + penalty |W + D - S W|^2,
    penalty = strength * mean of the diagonal of the centred Gram matrix

so that the penalty pulls towards the old weights, scaled by output. An S of 1 leaves them as they are; else

    S^2 = (v + k v) / (u + k v),        v = variance of W x + e,        u = variance of W x,        k = shrinkage

so that an output which has lost inputs varies as what is wanted does, which few rows tell better than what each weight
should be. The bias isn't penalised. Where there are more rows than columns the normal equations are added up; where
there are fewer, as before a dense layer that reads a whole image, the rows are kept and the equations have their number
(the kernel form of the same solution).
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
        is_singular: whether the equations have many solutions, of which that nearest to S W was taken.
    """

    weight: Tensor
    bias: Tensor
    is_singular: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Centred:
    """All rows about their means, of inputs that vary.

    Attributes:
        matrix: (groups, N, N), of x x' by columns, or of x' x by rows.
        right: (groups, N, outputs), likewise of x (e - (S - 1) W x)', or of e - (S - 1) W x.
        rows: (groups, N, columns), where a solution is of their shares in the change.
        mean: (groups, columns), of x.
        residual: (groups, outputs), the mean of e.
        growth: (groups, outputs, columns), (S - 1) W.
    """

    matrix: Tensor
    right: Tensor
    rows: Tensor | None
    mean: Tensor
    residual: Tensor
    growth: Tensor


class Equations(ABC):
    """What rows say about a change, for several regressions (groups) at once; float64.

    All rows are added before anything is asked of them.

    Args:
        old: weights (groups, outputs, columns).
        shrinkage: k, not negative, of the scale that the penalty pulls towards; None for the old weights as they are.
    """

    def __init__(self, old: Tensor, shrinkage: float | None = None) -> None:
        self.old = old
        self.shrinkage = shrinkage

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
    def error(self, change: Change) -> float:
        """Sum over these rows of |e - D x - b|^2."""

    def solve(self, strength: float) -> Change:
        """The change that minimises the penalised error; `strength` is at least 0."""
        about = self._centred
        penalty = strength * about.matrix.diagonal(dim1=1, dim2=2).sum(dim=1) / self.old.shape[2]
        solution, is_singular = _solved(about.matrix, penalty, strength, about.right)
        change = about.growth.mT + (solution if about.rows is None else about.rows.mT @ solution)
        bias = about.residual - (about.mean[:, None, :] @ change).squeeze(1)
        return Change(change.mT, bias, is_singular)

    @functools.cached_property
    @abstractmethod
    def _centred(self) -> _Centred: ...

    def _growth(self, before: Tensor, wanted: Tensor) -> Tensor:
        """(S - 1) W, from n u and n v of (groups, outputs)."""
        if self.shrinkage is None:
            return torch.zeros_like(self.old)
        prior = self.shrinkage * wanted
        square = torch.where(before + prior > 0, (wanted + prior) / (before + prior), 1.0)
        return self.old * (square.sqrt() - 1)[:, :, None]


class NormalEquations(Equations):
    """Sums over rows.

    Attributes:
        upper: (groups, columns, columns), of x x' on the diagonal and above; below undefined, or all of it.
        cross: (groups, columns, outputs), of x e'.
        inputs: (groups, columns), of x.
        residuals: (groups, outputs), of e.
        squares: (groups, outputs), of e^2.
        n_rows: added up.
    """

    def __init__(self, old: Tensor, shrinkage: float | None = None) -> None:
        super().__init__(old, shrinkage)
        n_groups, n_outputs, n_columns = old.shape
        self.upper = old.new_zeros(n_groups, n_columns, n_columns)
        self.cross = old.new_zeros(n_groups, n_columns, n_outputs)
        self.inputs = old.new_zeros(n_groups, n_columns)
        self.residuals = old.new_zeros(n_groups, n_outputs)
        self.squares = old.new_zeros(n_groups, n_outputs)
        self.n_rows = 0

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
        self.squares += residuals.square().sum(dim=1)
        self.n_rows += inputs.shape[1]

    def plus(self, other: NormalEquations) -> NormalEquations:
        """See `Equations.plus`."""
        both = NormalEquations(self.old, self.shrinkage)
        both.upper = self.upper + other.upper
        both.cross = self.cross + other.cross
        both.inputs = self.inputs + other.inputs
        both.residuals = self.residuals + other.residuals
        both.squares = self.squares + other.squares
        both.n_rows = self.n_rows + other.n_rows
        return both

    @property
    def square(self) -> float:
        """See `Equations.square`."""
        return float(self.squares.sum())

    @functools.cached_property
    def _gram(self) -> Tensor:
        """(groups, columns, columns), of x x'."""
        self.upper.copy_(self.upper.triu() + self.upper.triu(1).mT)
        return self.upper

    @functools.cached_property
    def _centred(self) -> _Centred:
        mean, residual = self.inputs / self.n_rows, self.residuals / self.n_rows
        gram = self._gram - self.n_rows * mean[:, :, None] * mean[:, None, :]
        cross = self.cross - self.n_rows * mean[:, :, None] * residual[:, None, :]
        varies = _varies(gram.diagonal(dim1=1, dim2=2), self._gram.diagonal(dim1=1, dim2=2))
        gram, cross = gram * varies[:, :, None] * varies[:, None, :], cross * varies[:, :, None]
        before = ((self.old @ gram) * self.old).sum(dim=2)
        unexplained = self.squares - self.n_rows * residual.square()
        wanted = (before + 2 * (self.old * cross.mT).sum(dim=2) + unexplained).clamp(min=0)
        growth = self._growth(before, wanted) * varies[:, None, :]
        return _Centred(gram, cross - gram @ growth.mT, None, mean, residual, growth)

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

    def __init__(
        self,
        old: Tensor,
        shrinkage: float | None = None,
        inputs: Sequence[Tensor] = (),
        residuals: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(old, shrinkage)
        self.inputs = list(inputs)
        self.residuals = list(residuals)

    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """See `Equations.add`."""
        self.inputs.append(inputs)
        self.residuals.append(residuals)

    def plus(self, other: KernelEquations) -> KernelEquations:
        """See `Equations.plus`."""
        inputs, residuals = [*self.inputs, *other.inputs], [*self.residuals, *other.residuals]
        return KernelEquations(self.old, self.shrinkage, inputs, residuals)

    @property
    def square(self) -> float:
        """See `Equations.square`."""
        return sum(float(chunk.square().sum()) for chunk in self.residuals)

    @functools.cached_property
    def _centred(self) -> _Centred:
        inputs, residuals = torch.cat(self.inputs, dim=1), torch.cat(self.residuals, dim=1)
        mean, residual = inputs.mean(dim=1), residuals.mean(dim=1)
        rows = inputs - mean[:, None, :]
        varies = _varies(rows.square().sum(dim=1), inputs.square().sum(dim=1))[:, None, :]
        rows = rows * varies
        before, unexplained = rows @ self.old.mT, residuals - residual[:, None, :]
        wanted = (before + unexplained).square().sum(dim=1)
        growth = self._growth(before.square().sum(dim=1), wanted) * varies
        return _Centred(rows @ rows.mT, unexplained - rows @ growth.mT, rows, mean, residual, growth)

    def error(self, change: Change) -> float:
        """See `Equations.error`."""
        return sum(
            float((wanted - rows @ change.weight.mT - change.bias[:, None, :]).square().sum())
            for rows, wanted in zip(self.inputs, self.residuals, strict=True)
        )


def equations(old: Tensor, n_rows: int, shrinkage: float | None = None) -> Equations:
    """Of no rows yet, in the form that is smaller for as many as will come in all."""
    kind = KernelEquations if n_rows < old.shape[2] else NormalEquations
    return kind(old, shrinkage)


def _solved(matrix: Tensor, penalty: Tensor, strength: float, right: Tensor) -> tuple[Tensor, bool]:
    """Solution of (matrix + penalty) x = right, and whether there are many so that the smallest is taken.

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
