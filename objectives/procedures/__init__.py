"""Procedures: how pruning proceeds from relevance to a curve, one module each.

A procedure takes a way to score components and yields masks, one set a rate; the objective measures them, or as many of
them as it needs. It is registered under its name, the value of `--procedure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from objectives.procedures.one_shot import one_shot
from objectives.pruning.ranking import Masks

__all__ = ["PROCEDURES", "Procedure"]


class Procedure(Protocol):
    """How pruning proceeds."""

    def __call__(self, score: Callable[[], Mapping[str, Tensor]], rates: Sequence[float]) -> Iterator[Masks]:
        """Yields the masks of each rate, in the order of `rates`."""
        ...


PROCEDURES: dict[str, Procedure] = {"one_shot": one_shot}
