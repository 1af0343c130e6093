"""Ridge regression by normal equations that are added up chunk by chunk.

Of rows x, each with what is left to explain e, the change of the weights D and of the bias b minimise

    sum |e - D x - b|^2 + penalty |D|^2,        penalty = strength * mean of the diagonal of the centred Gram matrix

so that the penalty pulls towards the old weights, of which e is the residual. The bias isn't penalised.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Change", "NormalEquations", "left_out_error", "solve", "total"]


@dataclass(slots=True, eq=False)
class NormalEquations:
    """Sums over rows, for several regressions (groups) at once; float64.

    Attributes:
        gram: (groups, columns, columns), of x x'.
        cross: (groups, columns, outputs), of x e'.
        inputs: (groups, columns), of x.
        residuals: (groups, outputs), of e.
        square: sum of all e^2.
        n_rows: added up.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    residuals: Tensor
    square: float = 0.0
    n_rows: int = 0

    @classmethod
    def zeros(cls, n_groups: int, n_columns: int, n_outputs: int, device: torch.device) -> NormalEquations:
        """Of no rows."""
        sizes = [(n_columns, n_columns), (n_columns, n_outputs), (n_columns,), (n_outputs,)]
        return cls(*(torch.zeros(n_groups, *size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """Takes rows in: (groups, P, columns) and (groups, P, outputs)."""
        transposed = inputs.mT
        self.gram.baddbmm_(transposed, inputs)
        self.cross.baddbmm_(transposed, residuals)
        self.inputs += inputs.sum(dim=1)
        self.residuals += residuals.sum(dim=1)
        self.square += float(residuals.square().sum())
        self.n_rows += inputs.shape[1]

    def plus(self, other: NormalEquations, sign: int = 1) -> NormalEquations:
        """The sums over both's rows; with sign -1, over this one's without the other's."""
        return NormalEquations(
            *(getattr(self, each.name) + sign * getattr(other, each.name) for each in fields(NormalEquations))
        )


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


def solve(equations: NormalEquations, strength: float) -> Change:
    """The change that minimises the penalised error.

    Args:
        equations: of at least one row.
        strength: of the penalty, at least 0.
    """
    n_rows = equations.n_rows
    mean, residual = equations.inputs / n_rows, equations.residuals / n_rows
    gram = equations.gram - n_rows * mean[:, :, None] * mean[:, None, :]
    cross = equations.cross - n_rows * mean[:, :, None] * residual[:, None, :]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    penalty = strength * diagonal.mean(dim=1, keepdim=True)
    # A group whose inputs never vary has nothing to fit; any penalty keeps its weights.
    penalised = gram + torch.diag_embed(torch.where(penalty > 0, penalty, float(strength > 0)).expand_as(diagonal))
    factor, failed = torch.linalg.cholesky_ex(penalised)
    is_singular = bool(failed.any()) or not bool(factor.isfinite().all())
    change = torch.linalg.pinv(penalised, hermitian=True) @ cross if is_singular else torch.cholesky_solve(cross, factor)
    bias = residual - (mean[:, None, :] @ change).squeeze(1)
    return Change(change.mT, bias, is_singular)


def left_out_error(parts: Sequence[NormalEquations], strength: float) -> float:
    """Squared error on each part of the change that all other parts give, added up.

    Leaving one part out is a subtraction of its sums, so nothing is read again.
    """
    whole = total(parts)
    return sum(_error(part, solve(whole.plus(part, -1), strength)) for part in parts)


def total(parts: Sequence[NormalEquations]) -> NormalEquations:
    """The sums over the rows of all parts."""
    return functools.reduce(NormalEquations.plus, parts)


def _error(part: NormalEquations, change: Change) -> float:
    """Sum over a part's rows of |e - D x - b|^2."""
    weight, bias = change.weight, change.bias
    explained = (part.cross.mT * weight).sum() + (part.residuals * bias).sum()
    square = ((weight @ part.gram) * weight).sum() + part.n_rows * bias.square().sum()
    mixed = (weight @ part.inputs[:, :, None]).squeeze(2).mul(bias).sum()
    return part.square + float(square + 2 * mixed - 2 * explained)
