"""Iterative pruning (Yeom et al. 2021, Algorithm 1) without fine-tuning, their Scenario 2.

Relevance changes as components go: those that only they passed it on to lose it, others gain. So each step prunes a
share of the original components, the least relevant of those that are left, and then all that is left is ranked anew on
the pruned network.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from objectives.procedures.steps import Pruning, Step
from search_spaces.procedures import Iterative

__all__ = ["iterative"]


def iterative(pruning: Pruning, options: Iterative) -> Iterator[Step]:
    """Yields steps of equal shares, the last of which takes what is left.

    Pruning rates need not be the steps' ends: between two of them components go in the order of the ranking at the
    step's beginning. With `step_share` 1 this is `one_shot`.

    Args:
        pruning: ranks on the pruned network. Where kinds or layers are ranked apart, each loses its share in each step.
        options: the share, read as the decimal that it is printed as.
    """
    ranking, n_done, share = pruning.rank(), 0, Decimal(0)
    while n_done < len(ranking):
        share = min(share + Decimal(str(options.step_share)), Decimal(1))
        n_pruned = ranking.n_pruned(float(share))
        if n_pruned == n_done:  # a share of less than a component
            continue
        if n_done:
            ranking = pruning.rank(ranking.masks(n_done))
        yield Step(ranking, n_pruned)
        n_done = n_pruned
