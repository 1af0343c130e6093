"""Stacks of relevances: rows that belong to the same N samples lie one behind the other in the batch dimension."""

from __future__ import annotations

from torch import Tensor

__all__ = ["product", "times"]


def times(stacked: Tensor, factor: Tensor, *, in_place: bool = False) -> Tensor:
    """Every row (N, ...) of `stacked` (rows * N, ...) times `factor` (N, ...)."""
    rows: Tensor = stacked.unflatten(0, (-1, len(factor)))
    return (rows.mul_(factor) if in_place else rows * factor).flatten(0, 1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of two stacks (rows * N, heads, ...) and (N, heads, ...), whichever is which."""
    n_samples = min(len(left), len(right))
    rows: Tensor = left.unflatten(0, (-1, n_samples)) @ right.unflatten(0, (-1, n_samples))
    return rows.flatten(0, 1)
