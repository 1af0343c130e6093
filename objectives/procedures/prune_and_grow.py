"""Prune and grow, by which elastic networks are made ("Model Elasticity via Prune-and-Grow CNN Architectures").

The network is pruned to a core in steps of equal shares, each of which is trained before what is left is ranked anew
(with one step: one-shot). Then the network of any smaller rate is rebuilt around it: components that were pruned last
return to their places with their original weights, and are trained while the core's weights stay as they are. Beyond
the core components go in the order of the last ranking, and nothing is trained or repaired.

The paper leaves open at which sizes, how long and how fast: the core's share, the steps' and the training are options;
the learning rate falls along a cosine, which the paper found best. It trains on its whole training set, here it is the
reference images. A trial rebuilds each of its rates from the core alone, so that no rate depends on which others are
asked for; the nested levels of one network are `objectives.elastic.prune`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from functools import partial

from objectives.procedures.steps import Pruning, Step, when_asked
from objectives.pruning.ranking import Masks, Ranking, n_pruned_by
from objectives.pruning.trained import TrainedWeights
from objectives.training import GRADIENT_NORM, TrainingOptions
from search_spaces.procedures import PruneAndGrow

__all__ = ["prune_and_grow"]


def prune_and_grow(pruning: Pruning, options: PruneAndGrow) -> Iterator[Step]:
    """Yields the core's steps once they are all made, and then one that takes what is left.

    Args:
        pruning: ranks on the pruned network. Where kinds or layers are ranked apart, each loses its share in each step.
        options: shares, read as the decimals that they are printed as, and the training.
    """
    training = TrainingOptions(
        n_epochs=options.finetune_epochs,
        batch_size=options.finetune_batch_size,
        learning_rate=options.finetune_learning_rate,
        schedule="cosine",
        max_gradient_norm=GRADIENT_NORM,
    )
    ranking, n_done, share = pruning.rank(), 0, Decimal(0)
    n_core = ranking.n_pruned(options.core_share)
    core: TrainedWeights | None = None
    steps: list[tuple[Ranking, int]] = []
    while n_done < n_core:
        share = min(share + Decimal(str(options.step_share)), Decimal(str(options.core_share)))
        n_pruned = ranking.n_pruned(float(share))
        if n_pruned == n_done:  # a share of less than a component
            continue
        if n_done:
            ranking = pruning.rank(ranking.masks(n_done), core)
        core = pruning.fine_tuned(ranking.masks(n_pruned), core, training)
        steps.append((ranking, n_pruned))
        n_done = n_pruned
    for each, end in steps:
        yield Step(each, end, when_asked(each, partial(_grown, pruning, n_core, core, training)))
    yield Step(ranking, len(ranking), lambda n_pruned: core)


def _grown(
    pruning: Pruning, n_core: int, core: TrainedWeights | None, options: TrainingOptions, masks: Masks
) -> TrainedWeights | None:
    """A network rebuilt around the core; the core itself where nothing returns to it, or it can't be trained."""
    if core is None or n_pruned_by(masks) == n_core:
        return core
    return pruning.grown(masks, core, options)
