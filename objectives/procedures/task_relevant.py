"""Task-relevant pruning (Avé et al. 2025, Algorithm 1): prune to what one task needs, and adapt each size to new data.

    M_0 <- train(T and P)                               before: the unpruned network
    repeat:
        relevance of components on P
        each layer loses the least relevant share of what it has left
        M_i+1 <- train(M_i+1, P)
        adapt a copy of M_i+1 to F, or to P and F

Each layer's components are ranked within it, and after i steps it has lost floor((1 - (1 - share)^i) n) of its n, the
share of what was left but for rounding; so a layer never loses its last component. Pruning goes on from the retrained
weights: adaptation is for measuring alone. With the criterion `weight` in relevance's place this is iterative magnitude
pruning (IMP), the paper's baseline; its other one is T empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Protocol

from objectives.errors import OptionError
from objectives.procedures.steps import Step, when_asked
from objectives.pruning.ranking import Masks, Ranking
from objectives.pruning.trained import TrainedWeights
from objectives.training import TrainingOptions

__all__ = ["AdaptedStep", "AdaptivePruning", "TaskRelevant", "task_relevant"]

_TRAINING = TrainingOptions(n_epochs=50, batch_size=32, learning_rate=5e-4, optimizer="adamw", patience=4)


@dataclass(frozen=True, slots=True)
class TaskRelevant:
    """How task-relevant pruning proceeds; by default as the paper does.

    Attributes:
        step_share: of what a layer has left, pruned in each step; in (0, 1).
        n_iterations: steps, at least 1.
        training: of every retraining and adaptation. The paper gives no bound on epochs: ours is 50.

    Raises:
        OptionError: a value is out of its range, or so many steps would leave nothing.
    """

    step_share: float = 0.2
    n_iterations: int = 10
    training: TrainingOptions = field(default=_TRAINING)

    def __post_init__(self) -> None:
        if not 0 < self.step_share < 1:
            raise OptionError(
                f"`step_share` of task-relevant pruning must lie in (0, 1), but got {self.step_share!r}; a step that "
                "takes whole layers leaves no network."
            )
        if self.n_iterations < 1:
            raise OptionError(f"`n_iterations` must be at least 1, but got {self.n_iterations!r}.")
        if self.shares[-1] >= 1 - 1e-9:
            raise OptionError(
                f"{self.n_iterations} iterations of {self.step_share} each prune all there is; use fewer or smaller "
                "ones."
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the original components, pruned after 0, 1, ... `n_iterations` steps."""
        kept = 1 - Decimal(str(self.step_share))
        return tuple(float(1 - kept**step) for step in range(self.n_iterations + 1))


class AdaptivePruning(Protocol):
    """What the procedure works with: one network, trained on T and P, one composite or criterion, and the images."""

    def rank(self, masks: Masks | None = None, weights: TrainedWeights | None = None) -> Ranking:
        """As `Pruning.rank`, on P; each layer within itself."""
        ...

    def fine_tuned(
        self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions
    ) -> TrainedWeights | None:
        """As `Pruning.fine_tuned`, on P; stops early by validation images of P."""
        ...

    def adapted(self, masks: Masks, weights: TrainedWeights | None, options: TrainingOptions) -> TrainedWeights | None:
        """As `fine_tuned`, on the images that networks are adapted to."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedStep(Step):
    """A size that pruning comes to; the first one is the unpruned network's, whose `n_pruned` is 0.

    Attributes:
        share: of the original components, pruned.
        retrained: weights after retraining on P, from which pruning goes on; None are the unpruned network's. `weights`
            of `n_pruned` are the adapted ones; adaptation starts when they are first asked for.
    """

    share: float = 0.0
    retrained: TrainedWeights | None = None


def task_relevant(pruning: AdaptivePruning, options: TaskRelevant) -> Iterator[AdaptedStep]:
    """Yields the unpruned network, then each size that is smaller than the last one.

    Args:
        pruning: ranks, retrains and adapts.
        options: shares and training.

    Raises:
        RelevanceError: the composite's relevance can't be used.
        TrainingError: a training diverged.
        OutOfMemoryError: the device has no room for a single image, or a batch of a training.
    """
    ranking, n_done = pruning.rank(), 0
    weights: TrainedWeights | None = None
    adapted = partial(pruning.adapted, options=options.training)
    yield AdaptedStep(ranking, 0, when_asked(ranking, partial(adapted, weights=None)))
    for share in options.shares[1:]:
        n_pruned = ranking.n_pruned(share)
        if n_pruned == n_done:  # a share of less than a component of any layer
            continue
        if n_done:
            ranking = pruning.rank(ranking.masks(n_done), weights)
        weights = pruning.fine_tuned(ranking.masks(n_pruned), weights, options.training)
        yield AdaptedStep(ranking, n_pruned, when_asked(ranking, partial(adapted, weights=weights)), share, weights)
        n_done = n_pruned
