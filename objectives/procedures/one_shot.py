"""One-shot pruning (Hatefi et al. 2024): rank once on the unpruned network, then prune at every rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from objectives.pruning.ranking import Masks, rank
from objectives.pruning.rates import n_pruned

__all__ = ["one_shot"]


def one_shot(score: Callable[[], Mapping[str, Tensor]], rates: Sequence[float]) -> Iterator[Masks]:
    """Yields the masks of each rate, from a single ranking.

    Args:
        score: scores of all components on the unpruned network, layer -> (components,).
        rates: increasing from 0.
    """
    ranking = rank(score())
    for rate in rates:
        yield ranking.masks(n_pruned(rate, len(ranking)))
