"""Steps: what a procedure is given, and what it yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from objectives.pruning.ranking import Masks, Ranking

__all__ = ["Pruning", "Step"]


class Pruning(Protocol):
    """What a procedure works with: one network, one composite or criterion, and the reference images."""

    def rank(self, masks: Masks | None = None) -> Ranking:
        """All components in the order in which they are to be pruned.

        Args:
            masks: of a pruned network; what it has lost comes first, the rest in the order that the composite gives it
                on this network. By default nothing is pruned.

        Raises:
            RelevanceError: the composite's relevance can't be used.
            OutOfMemoryError: the device has no room for a single image.
        """
        ...

    def class_accuracies(self, masks: Masks) -> tuple[float, ...]:
        """Accuracy under masks on the reference images, of each class that has any; each mask is measured once.

        Raises:
            OutOfMemoryError: the device has no room for a single image.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a procedure prunes next.

    Attributes:
        ranking: of all components; those that earlier steps have pruned come first.
        n_pruned: how many of that order are pruned when the step ends, more than at its beginning.
    """

    ranking: Ranking
    n_pruned: int
