"""One-shot pruning (Hatefi et al. 2024): rank once, on the unpruned network, and prune in that order to the end."""

from __future__ import annotations

from collections.abc import Iterator

from objectives.procedures.steps import Pruning, Step
from search_spaces.procedures import OneShot

__all__ = ["one_shot"]


def one_shot(pruning: Pruning, options: OneShot) -> Iterator[Step]:
    """Yields a single step."""
    ranking = pruning.rank()
    yield Step(ranking, len(ranking))
