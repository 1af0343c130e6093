"""Iterative pruning (Yeom et al. 2021, Algorithm 1), without fine-tuning (their Scenario 2) and with it (Scenario 1).

Relevance changes as components go: those that only they passed it on to lose it, others gain. So each step prunes a
share of the original components, the least relevant of those that are left, and then all that is left is ranked anew on
the pruned network.

With fine-tuning each step ends with a training of what is left, by stochastic gradient descent with a momentum of 0.9
at a constant learning rate, and the next step ranks on the trained network and goes on from its weights. The paper
trains on its whole training set; here it is the reference images, the only training images that a task has: more of
them (`--references-per-class`) are more to train on. No image that accuracy is measured on is ever trained on. The
images' order follows from a fixed seed. Batch norm is folded into the layers and isn't trained as such, so gradients
are cut (see `objectives.training.GRADIENT_NORM`).

A network that no image gets through any more isn't trained, nor is the unpruned one.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from functools import partial

from objectives.procedures.steps import Pruning, Step, when_asked
from objectives.pruning.trained import TrainedWeights
from objectives.training import GRADIENT_NORM, TrainingOptions
from search_spaces.procedures import Iterative

__all__ = ["iterative"]

_MOMENTUM = 0.9  # as the paper's


def iterative(pruning: Pruning, options: Iterative) -> Iterator[Step]:
    """Yields steps of equal shares, the last of which takes what is left.

    Pruning rates need not be the steps' ends: between two of them components go in the order of the ranking at the
    step's beginning. With fine-tuning such a rate is the end of a shorter step, which is trained as the others are,
    from the same weights, and which the next ones don't go on from. With `step_share` 1 and no fine-tuning this is
    `one_shot`.

    Args:
        pruning: ranks on the pruned network. Where kinds or layers are ranked apart, each loses its share in each step.
        options: the share, read as the decimal that it is printed as, and fine-tuning.
    """
    ranking, n_done, share = pruning.rank(), 0, Decimal(0)
    weights: TrainedWeights | None = None
    while n_done < len(ranking):
        share = min(share + Decimal(str(options.step_share)), Decimal(1))
        n_pruned = ranking.n_pruned(float(share))
        if n_pruned == n_done:  # a share of less than a component
            continue
        if n_done:
            ranking = pruning.rank(ranking.masks(n_done), weights)
        if options.finetune_epochs:
            tuned = when_asked(ranking, partial(pruning.fine_tuned, weights=weights, options=_training(options)))
            yield Step(ranking, n_pruned, tuned)
            weights = tuned(n_pruned) if n_pruned < len(ranking) else None
        else:
            yield Step(ranking, n_pruned)
        n_done = n_pruned


def _training(options: Iterative) -> TrainingOptions:
    assert options.finetune_learning_rate is not None, "the specification fills it in"
    assert options.finetune_batch_size is not None, "the specification fills it in"
    return TrainingOptions(
        n_epochs=options.finetune_epochs,
        batch_size=options.finetune_batch_size,
        learning_rate=options.finetune_learning_rate,
        momentum=_MOMENTUM,
        max_gradient_norm=GRADIENT_NORM,
    )
