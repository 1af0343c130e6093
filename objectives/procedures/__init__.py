"""Procedures: how pruning proceeds from relevance to a curve, one module each.

A procedure takes a way to rank components and yields masks, one set a rate; the objective measures them, or as many of
them as it needs. It is registered under its name, the value of `--procedure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from objectives.procedures.one_shot import one_shot
from objectives.pruning.ranking import Masks, Ranking

__all__ = ["PROCEDURES", "Procedure"]


class Procedure(Protocol):
    """How pruning proceeds."""

    def __call__(self, ranking: Callable[[], Ranking], rates: Sequence[float]) -> Iterator[Masks]:
        """Yields the masks of each rate, in the order of `rates`."""
        ...


PROCEDURES: dict[str, Procedure] = {"one_shot": one_shot}
