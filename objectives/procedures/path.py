"""The path of a procedure: all networks that it comes to, from the unpruned one to none."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from objectives.procedures.steps import Step
from objectives.pruning.ranking import Masks
from objectives.pruning.trained import TrainedWeights

__all__ = ["PruningPath"]


class PruningPath:
    """The masks that a procedure comes to, whose steps are made as far as they are asked for.

    Within a step components go in the order of its ranking, so there are masks for every number of components. What is
    trained on the way is kept: of each step the weights of the exact slim network.

    Not thread-safe.

    Args:
        steps: of a procedure; the last of them prunes all components.

    Attributes:
        steps: that have been made.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self.steps: list[Step] = []
        self._to_come = steps

    def __len__(self) -> int:
        """Components of the whole network."""
        return len(self._reaching(0).ranking)

    def n_pruned(self, rate: float) -> int:
        """Components pruned at a rate, see `Ranking.n_pruned`."""
        return self._reaching(0).ranking.n_pruned(rate)

    def masks(self, n_pruned: int) -> Masks:
        """Masks with `n_pruned` components pruned; nested for growing numbers.

        Raises:
            RelevanceError: the composite's relevance can't be used at a step on the way.
            RepairError: the network of one can't be repaired before its fine-tuning.
            TrainingError: fine-tuning diverged at one.
            OutOfMemoryError: the device has no room for a single image, or a batch of a training.
        """
        return self._reaching(n_pruned).ranking.masks(n_pruned)

    def weights(self, n_pruned: int) -> TrainedWeights | None:
        """Weights of the network under `masks(n_pruned)`; None are the model's own.

        Raises:
            RelevanceError: as `masks`.
            RepairError: likewise.
            TrainingError: likewise.
            OutOfMemoryError: likewise.
        """
        step = self._reaching(n_pruned)
        return None if n_pruned == 0 < step.n_pruned else step.weights(n_pruned)

    def unadapted(self, n_pruned: int) -> TrainedWeights | None:
        """As `weights`, before the network is adapted to new data; of procedures that adapt networks.

        Raises:
            RelevanceError: as `masks`.
            RepairError: likewise.
            TrainingError: likewise.
            OutOfMemoryError: likewise.
        """
        return self._reaching(n_pruned).unadapted(n_pruned)

    def ends(self, n_pruned: int) -> list[int]:
        """Components pruned where steps that prune any end, among the first `n_pruned`."""
        self._reaching(n_pruned)
        return [step.n_pruned for step in self.steps if 0 < step.n_pruned <= n_pruned]

    def _reaching(self, n_pruned: int) -> Step:
        """The step in which this number is reached."""
        while not self.steps or self.steps[-1].n_pruned < n_pruned:
            self.steps.append(next(self._to_come))
        return self.steps[bisect.bisect_left(self.steps, n_pruned, key=lambda step: step.n_pruned)]
