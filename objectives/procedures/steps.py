"""Steps: what a procedure is given, and what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from objectives.pruning.ranking import Masks, Ranking
from objectives.pruning.trained import TrainedWeights
from objectives.training import TrainingOptions

__all__ = ["Pruning", "Step", "when_asked"]


class Pruning(Protocol):
    """What a procedure works with: one network, one composite or criterion, and the reference images."""

    def rank(self, masks: Masks | None = None, weights: TrainedWeights | None = None) -> Ranking:
        """All components in the order in which they are to be pruned.

        Args:
            masks: of a pruned network; what it has lost comes first, the rest in the order that the composite gives it
                on this network. By default nothing is pruned.
            weights: of the pruned network; by default the unpruned one's.

        Raises:
            RelevanceError: the composite's relevance can't be used.
            OutOfMemoryError: the device has no room for a single image.
        """
        ...

    def class_accuracies(self, masks: Masks, ahead: Iterable[Masks] = ()) -> tuple[float, ...]:
        """Accuracy under masks on the reference images, of each class that has any; each mask is measured once.

        Args:
            masks: of the pruned network.
            ahead: masks that are likely to be asked for next, and may be measured with these.

        Raises:
            OutOfMemoryError: the device has no room for a single image.
        """
        ...

    def fine_tuned(
        self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions
    ) -> TrainedWeights | None:
        """Weights of a pruned network after repair, if there is any, and training.

        It is trained on the reference images, or of a split on all of P.

        Args:
            masks: of the pruned network.
            weights: that it begins with; None are the unpruned network's. Where there is nothing left to train, these
                are returned.
            options: of the training.

        Raises:
            RepairError: it can't be repaired.
            TrainingError: the training diverged.
            OutOfMemoryError: the device has no room for a batch.
        """
        ...

    def adapted(self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions) -> TrainedWeights | None:
        """As `fine_tuned`, on the images that the networks of a split are adapted to; the task must have one."""
        ...

    def grown(self, masks: Masks, core: TrainedWeights, options: TrainingOptions) -> TrainedWeights:
        """Weights of a pruned network around a core that stays as it is, after training on the reference images.

        Args:
            masks: of the pruned network.
            core: weights of one that is without some more; all others begin with those of the unpruned network.
            options: of the training.

        Raises:
            TrainingError: the training diverged.
            OutOfMemoryError: the device has no room for a batch.
        """
        ...


def _unchanged(n_pruned: int) -> None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a procedure prunes next.

    Attributes:
        ranking: of all components; those that earlier steps have pruned come first.
        n_pruned: how many of that order are pruned when the step ends, more than at its beginning; 0 only of a first
            step that is the unpruned network with weights of its own.
        weights: number of components that are pruned in this step or before -> weights of the network without them;
            None are the unpruned network's, as they are where a procedure trains nothing. May take as long as a
            training does when it is first asked for a number.
        unadapted: likewise of the network before it is adapted to new data, where the procedure adapts networks.
    """

    ranking: Ranking
    n_pruned: int
    weights: Callable[[int], TrainedWeights | None] = _unchanged
    unadapted: Callable[[int], TrainedWeights | None] = _unchanged


def when_asked(
    ranking: Ranking, train: Callable[[Masks], TrainedWeights | None]
) -> Callable[[int], TrainedWeights | None]:
    """`Step.weights` of the networks that a ranking comes to, each trained once, when it is first asked for."""

    @cache
    def weights(n_pruned: int) -> TrainedWeights | None:
        return train(ranking.masks(n_pruned))

    return weights
