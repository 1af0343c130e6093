"""Task-relevant pruning (Avé et al. 2025, Algorithm 1): prune to what one task needs, and adapt each size to new data.

    M_0 <- train(T and P)                               `objectives.pretraining`
    repeat:
        relevance of components on P
        prune the least relevant share of what is left
        M_i+1 <- train(M_i+1, P)
        adapt a copy of M_i+1 to F, or to P and F

With layers ranked apart, as in the paper, each has lost floor((1 - (1 - share)^i) n) of its n after i steps: the share
of what was left but for rounding, and never its last component. Pruning goes on from the retrained weights: adaptation
is for measuring, and for the network that is wanted. The unpruned network is adapted, too. With the criterion
`weight-l1` in relevance's place this is iterative magnitude pruning (IMP), the paper's baseline; its other one is T
empty. The paper sums the relevance of all images before it takes a component's l1 norm, so that images of opposite
relevance cancel; next to that is our abs scope `element`, which takes magnitudes of every image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial

from objectives.errors import TrainingError
from objectives.procedures.steps import Pruning, Step, when_asked
from objectives.pruning.ranking import Masks, n_pruned_by
from objectives.pruning.trained import TrainedWeights
from objectives.training import TrainingOptions
from search_spaces.procedures import TaskRelevant

__all__ = ["task_relevant", "training_options"]


def training_options(options: TaskRelevant, *, seed: int = 0) -> TrainingOptions:
    """Of every retraining and adaptation."""
    return TrainingOptions(
        n_epochs=options.finetune_epochs,
        batch_size=options.finetune_batch_size,
        learning_rate=options.finetune_learning_rate,
        optimizer="adamw",
        patience=options.patience,
        seed=seed,
    )


def task_relevant(pruning: Pruning, options: TaskRelevant) -> Iterator[Step]:
    """Yields the unpruned network, then each size that is smaller than the last one, until nothing is left.

    Between two steps' ends components go in the order of the ranking at the step's beginning. Such a rate is the end of
    a shorter step, which is retrained and adapted as the others are, and which the next ones don't go on from.

    Args:
        pruning: ranks on P, retrains and adapts. A network that has lost a whole layer is refused by `TrainingError`.
        options: the share, read as the decimal that it is printed as, and the training.
    """
    training = training_options(options)
    ranking, n_done, kept = pruning.rank(), 0, Decimal(1)
    retrained: TrainedWeights | None = None
    yield Step(ranking, 0, when_asked(ranking, partial(pruning.adapted, weights=None, options=training)))
    while n_done < len(ranking):
        kept *= 1 - Decimal(str(options.step_share))
        n_pruned = ranking.n_pruned(float(1 - kept))
        if n_pruned == n_done:  # a share of less than a component
            continue
        if n_done:
            ranking = pruning.rank(ranking.masks(n_done), retrained)
        unadapted = when_asked(ranking, partial(_retrained, pruning, retrained, training))
        adapted = when_asked(ranking, partial(_adapted, pruning, unadapted, training))
        yield Step(ranking, n_pruned, adapted, unadapted)
        retrained = unadapted(n_pruned)
        n_done = n_pruned


def _retrained(
    pruning: Pruning, weights: TrainedWeights | None, options: TrainingOptions, masks: Masks
) -> TrainedWeights | None:
    if gone := [name for name, mask in masks.items() if not bool(mask.any())]:
        raise TrainingError(
            f"The step to {n_pruned_by(masks)} pruned components removes the whole layer {gone[0]!r}, so that there is "
            "nothing to adapt; choose lower --rates, a smaller --step-share or --ranking layer."
        )
    return pruning.fine_tuned(masks, weights, options)


def _adapted(
    pruning: Pruning, unadapted: Callable[[int], TrainedWeights | None], options: TrainingOptions, masks: Masks
) -> TrainedWeights | None:
    return pruning.adapted(masks, unadapted(n_pruned_by(masks)), options)
